"""The retry policy of jobs: which errors are temporary, how often the job runs again, and how long it waits before.

Other retries are elsewhere:
- A user's retry makes a new job: `api_service.services.generation`.
- The reconciler takes back the jobs of a dead worker: `shared.db.attempts.take_back_expired`.
- Webhooks have their own schedule: `shared.db.webhooks`.
"""

from shared.errors import (
    BrokerUnavailableError,
    DatabaseConnectionError,
    EmbeddingUnavailableError,
    EngineUnavailableError,
    JobUnreadableError,
    StorageError,
)
from shared.settings import JobSettings

TEMPORARY_ERRORS = (
    DatabaseConnectionError,
    StorageError,
    BrokerUnavailableError,
    EmbeddingUnavailableError,
    EngineUnavailableError,
    # During an upgrade two releases run at the same time: a worker of the newer one claims the job later.
    JobUnreadableError,
)
"""After one of these errors, a job returns to the queue instead of failing."""


MAX_TOLD_DELAY_S = 3600.0
"""Longest delay that another service may ask for."""


def retry_delay_s(retries: int, settings: JobSettings, *, told_s: float = 0.0) -> float | None:
    """Seconds until the next attempt, doubled with each retry; None when no retry is left.

    retries: how often the job was retried already. told_s: seconds that the service which failed asks to wait.
    """
    if retries >= settings.max_transient_retries:
        return None
    return max(settings.transient_retry_delay_s * 2.0**retries, min(told_s, MAX_TOLD_DELAY_S))
