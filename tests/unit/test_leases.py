"""The time limit of a job that this process runs."""

import time
from uuid import uuid4

from shared.db.attempts import Claim
from worker_service.jobs.leases import JobLease


def test_a_delay_by_other_batches_does_not_count_as_run_time() -> None:
    lease = JobLease(Claim(uuid4(), attempt=1))
    lease.add_delay(1)
    assert lease.deadline is None, "its model work has not started"
    lease.deadline = time.monotonic() - 5
    assert lease.timed_out
    lease.add_delay(10)
    assert not lease.timed_out
