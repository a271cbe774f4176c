"""The jobs that this process holds: their leases are renewed, and each is told when it must stop.

One side thread does it for all of them, with its own connection, so that nothing a model does can starve it.
"""

import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Self
from uuid import UUID

from shared.db import jobs
from shared.db.jobs import Claim
from shared.db.session import session_scope
from shared.errors import DatabaseError
from shared.messaging.job_updates import publish_progress
from shared.settings import JobSettings

logger = logging.getLogger(__name__)

LOOK_S = 0.1
"""How often the held jobs are looked up: a cancel is noticed within this time plus one step."""


@dataclass(eq=False)
class Held:
    """One job in the hands of this process. `check_in` is what the model's thread may call: memory only."""

    claim: Claim
    deadline: float | None = None
    """`time.monotonic()` at which the attempt has run too long; set when its model work starts."""
    lost: bool = False
    """Canceled, finished elsewhere or taken over: nothing more can be written."""
    images: int = 1
    steps: dict[int, int] = field(default_factory=dict)
    """Steps done of each image, by its index: a job's images may run in different batches."""

    def held_up(self, seconds: float) -> None:
        """Better lanes have passed: that is no work on this job, and does not count as its run."""
        if self.deadline is not None:
            self.deadline += seconds

    @property
    def timed_out(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def check_in(self, index: int, step: int, total_steps: int) -> bool:
        """Note a step of one image; False when the job should stop."""
        self.steps[index] = step
        publish_progress(self.claim.job_id, sum(self.steps.values()), total_steps * self.images)
        return not self.lost and not self.timed_out


class Leases:
    """Renews what `hold` registers until `release`; a context manager around the life of the process."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._held: dict[UUID, Held] = {}
        self._released = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def hold(self, claim: Claim) -> Held:
        held = Held(claim)
        with self._released:
            self._held[claim.job_id] = held
        return held

    def release(self, held: Held) -> None:
        with self._released:
            if self._held.get(held.claim.job_id) is held:
                del self._held[held.claim.job_id]
                self._released.notify_all()

    def wait_until_empty(self, timeout_s: float) -> bool:
        """Wait until no job is held; False when some still are after `timeout_s`."""
        with self._released:
            return self._released.wait_for(lambda: not self._held, timeout_s)

    def hand_back(self) -> int:
        """Return every held job to the queue and stop its work; how many were returned."""
        held = self._snapshot()
        with session_scope() as session:
            returned = jobs.hand_back(session, [each.claim for each in held])
        for each in held:
            each.lost = True
        return returned

    def _snapshot(self) -> list[Held]:
        with self._released:
            return list(self._held.values())

    def _work(self) -> None:
        renew_at = 0.0
        while not self._stop.wait(LOOK_S):
            held = [each for each in self._snapshot() if not each.lost]
            if not held:
                continue
            try:
                renew_at = self._look(held, renew_at)
            except DatabaseError as error:
                # The work goes on: when the database is back, the fence tells whether it still counts.
                logger.warning("lease_renewal_failed", extra={"cause": error.code, "jobs": len(held)})

    def _look(self, held: list[Held], renew_at: float) -> float:
        claims = [each.claim for each in held]
        due = time.monotonic() >= renew_at
        with session_scope() as session:
            if due:
                owned = jobs.renew(session, claims, lease_s=self._settings.lease_s)
            else:
                owned = jobs.still_owned(session, claims)
        for each in held:
            each.lost = each.claim.job_id not in owned
        return time.monotonic() + self._settings.heartbeat_s if due else renew_at
