"""How long a held job may run."""

import time
from uuid import uuid4

from shared.db.jobs import Claim
from worker_service.jobs.leases import Held


def test_while_others_pass_it_a_job_does_not_run() -> None:
    held = Held(Claim(uuid4(), attempt=1))
    held.held_up(1)
    assert held.deadline is None, "its model work has not begun"
    held.deadline = time.monotonic() - 5
    assert held.timed_out
    held.held_up(10)
    assert not held.timed_out
