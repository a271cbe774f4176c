"""Leases of the jobs that this process runs. The same thread that renews them finds out which jobs were canceled."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.db import attempts
from shared.db.attempts import Claim
from shared.db.session import session_scope
from shared.messaging.job_updates import publish_progress
from shared.settings import JobSettings
from worker_service.execution.lease_keeper import LeaseKeeper

OWNERSHIP_POLL_S = 0.1
"""How often the held jobs are looked up in the database: a cancel takes effect within this time plus one step."""


@dataclass(eq=False)
class JobLease:
    """One job that this process runs. Any thread may call its methods: they touch memory only.

    The thread of `JobLeases` sets `lost`; the model's thread calls `check_in` and so stops a job that should not go on.
    """

    claim: Claim
    deadline: float | None = None
    """`time.monotonic()` at which the attempt times out; set when its model work starts, None before."""
    lost: bool = False
    """The job was canceled, finished elsewhere, taken over or handed back: the attempt can write nothing more."""
    images: int = 1
    """Number of images of the job."""
    steps: dict[int, int] = field(default_factory=dict)
    """Steps done by image index: the images of a job may run in different batches."""

    def add_delay(self, seconds: float) -> None:
        """Extend the deadline by the time that higher-priority batches delayed the job."""
        if self.deadline is not None:
            self.deadline += seconds

    @property
    def timed_out(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline

    def check_in(self, index: int, step: int, total_steps: int) -> bool:
        """Record a step of one image, and publish the progress if there is any; False when the job should stop.

        index: of the image in the job. step, total_steps: steps done, and steps in total, of this image.
        """
        if self.steps.get(index, 0) != step:
            self.steps[index] = step
            publish_progress(self.claim.job_id, sum(self.steps.values()), total_steps * self.images)
        return not self.lost and not self.timed_out


class JobLeases(LeaseKeeper[JobLease]):
    """The leases of a generate worker's jobs, from `hold` to `release`."""

    def __init__(self, settings: JobSettings) -> None:
        super().__init__(poll_s=OWNERSHIP_POLL_S)
        self._settings = settings
        self._renew_at = 0.0

    def hold(self, claim: Claim) -> JobLease:
        """Start to renew the lease of a claim. An older lease of the same job is lost from now on."""
        lease = JobLease(claim)
        for other in self._snapshot():
            if other.claim.job_id == claim.job_id:
                other.lost = True
        self._add([lease])
        return lease

    def release(self, lease: JobLease) -> None:
        """Stop renewing a lease."""
        self._remove([lease])

    def hand_back(self) -> int:
        """Return every held job to the queue and stop its work; how many jobs were returned."""
        held = self._snapshot()
        with session_scope() as session:
            returned = attempts.hand_back(session, [lease.claim for lease in held])
        for lease in held:
            lease.lost = True
        return returned

    def _renew_due(self, held: Sequence[JobLease]) -> None:
        active = [lease for lease in held if not lease.lost]
        if not active:
            return
        claims = [lease.claim for lease in active]
        due = time.monotonic() >= self._renew_at
        # The look for cancels is the most frequent statement of a large service, and needs no transaction.
        with session_scope(single_read=not due) as session:
            if due:
                owned = attempts.renew(session, claims, lease_s=self._settings.lease_s)
            else:
                owned = attempts.still_owned(session, claims)
        for lease in active:
            lease.lost = lease.claim.job_id not in owned
        if due:
            self._renew_at = time.monotonic() + self._settings.heartbeat_s
