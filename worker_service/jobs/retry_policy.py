"""The retry policy of jobs: which errors are temporary, how often the job runs again, and how long it waits before.

Other retries are elsewhere:
- A user's retry makes a new job: `api_service.services.generation`.
- The reconciler takes back the jobs of a dead worker: `shared.db.jobs.take_back_expired`.
- Webhooks have their own schedule: `shared.db.webhooks`.
"""

from shared.errors import (
    BrokerUnavailableError,
    DatabaseConnectionError,
    EmbeddingUnavailableError,
    JobUnreadableError,
    StorageError,
)
from shared.settings import JobSettings

TEMPORARY_ERRORS = (
    DatabaseConnectionError,
    StorageError,
    BrokerUnavailableError,
    EmbeddingUnavailableError,
    # During an upgrade two releases run at the same time: a worker of the newer one claims the job later.
    JobUnreadableError,
)
"""After one of these errors, a job returns to the queue instead of failing."""


def retry_delay_s(retries: int, settings: JobSettings) -> float | None:
    """Seconds until the next attempt, doubled with each retry; None when no retry is left.

    retries: how often the job was retried already.
    """
    if retries >= settings.max_transient_retries:
        return None
    return settings.transient_retry_delay_s * 2.0**retries
