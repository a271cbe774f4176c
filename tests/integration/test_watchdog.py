"""The watchdog on real processes: the processes that it ends, and the state of their jobs afterwards."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import delete, text
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY, LocalStack
from shared.contracts.generation import Mode
from shared.contracts.jobs import JobState
from shared.db import attempts
from shared.db.tables import Job
from tests.factories import make_job
from tests.failing_worker import FAULTY
from tests.small_pipelines import save_clip
from tests.stack import wait_until
from worker_service.execution.watchdog import EXIT_CODE

SETTINGS = {
    "AFTERIMAGE_LOGGING__FORMAT": "json",
    # A batch takes long enough that other batches wait for it.
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake", "cost_ms": 480, "max_batch_size": 4}}',
}
LIMIT_S = 1.5
"""Limit of the stage that hangs: longer than one of the four steps of a batch, shorter than several batches."""
END_WAIT_S = 180


class Workers:
    """Starts one worker process after another; see `tests.failing_worker`."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process = process
        self._log = log
        self._read = 0

    def start(self, fault: str, *job_ids: UUID, stage: str = "step") -> None:
        environment = {name: value for name, value in os.environ.items() if name.startswith("AFTERIMAGE_")} | SETTINGS
        environment[f"AFTERIMAGE_WATCHDOG__{stage.upper()}_S"] = str(LIMIT_S)
        order = {"fault": fault, "jobs": list(map(str, job_ids)), "environment": environment}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def end(self) -> int:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], END_WAIT_S)
        assert ready, "the process still runs"
        return int(self._process.stdout.readline())

    def log(self) -> str:
        """The log since the last call."""
        text = self._log.read_text()
        new, self._read = text[self._read :], len(text)
        return new


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    folder = tmp_path_factory.mktemp("workers")
    save_clip(folder / "clip")
    with (folder / "log").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.failing_worker", str(folder / "clip")],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        yield Workers(process, folder / "log")
        process.kill()
        process.communicate()


def submit(session: Session, prompt: str) -> Job:
    job = make_job(session, prompt=prompt, mode=Mode.NONE)
    session.commit()
    return job


def take_back(session: Session) -> None:
    """Take back the jobs of an ended process, as the reconciler does after their leases."""
    session.execute(text("update jobs set lease_until = clock_timestamp() where state = 'processing'"))
    attempts.take_back_expired(session, max_crashes=3)
    session.commit()
    session.expire_all()


def test_a_job_that_hangs_three_times_ends_dead_and_other_jobs_crash_at_most_once(
    workers: Workers, session: Session
) -> None:
    first = submit(session, "first")
    faulty = submit(session, FAULTY)
    others = [submit(session, f"beside {number}") for number in range(6)]
    all_jobs = [first, faulty, *others]

    crashes_of_others = []
    for _ in range(3):
        waiting = [job.id for job in all_jobs if job.state == JobState.QUEUED]
        workers.start("hang", *waiting)
        assert workers.end() == EXIT_CODE
        line = next(line for line in workers.log().splitlines() if "model_stuck" in line)
        assert '"stage": "step"' in line
        assert str(faulty.id) in line
        assert "Event().wait()" in line, "the line contains the stack"
        take_back(session)
        crashes_of_others.append(sum(job.crashes for job in others))
    assert faulty.state == JobState.DEAD
    assert crashes_of_others[0] <= 3, "the jobs of its batch, not those that waited"
    assert crashes_of_others == [crashes_of_others[0]] * 3, "after its first crash it ran in isolation"

    left = [job.id for job in all_jobs if job.state == JobState.QUEUED]
    assert left, "the jobs that waited"
    workers.start("hang", *left)
    assert workers.end() == 0, "neither waiting batches nor an idle process are a hang"
    session.expire_all()
    assert {job.state for job in [first, *others]} == {JobState.SUCCEEDED}


def test_a_job_that_kills_its_worker_while_its_prompt_is_embedded_ends_dead(workers: Workers, session: Session) -> None:
    faulty, beside = make_job(session, prompt=FAULTY), make_job(session, prompt="beside")
    session.commit()
    for crashes in (1, 2, 3):
        workers.start("die-embedding", faulty.id, beside.id)
        assert workers.end() == -signal.SIGKILL
        take_back(session)
        assert (faulty.crashes, beside.crashes) == (crashes, 0), "the other one was not started"
    assert faulty.state == JobState.DEAD
    workers.start("die-embedding", beside.id)
    assert workers.end() == 0
    session.expire_all()
    assert beside.state == JobState.SUCCEEDED


def test_a_stuck_model_call_ends_its_process(workers: Workers, session: Session, servers: LocalStack) -> None:
    def log_of(fault: str, *, stage: str = "step", exit_code: int = EXIT_CODE) -> str:
        workers.start(fault, submit(session, FAULTY).id, stage=stage)
        assert workers.end() == exit_code, fault
        return workers.log()

    for stage, fault in (("load", "hang-loading"), ("embed", "hang-embedding"), ("decode", "hang-decoding")):
        assert f'"stage": "{stage}"' in log_of(fault, stage=stage)
    assert "illegal memory access" in log_of("lose")
    # No Python code can run any more, not even the thread of the watchdog.
    assert "Timeout" in log_of("hold", exit_code=1)

    session.execute(delete(Job))
    workers.start("hang", submit(session, FAULTY).id)
    wait_until(lambda: jobs_started(session), timeout_s=END_WAIT_S, what="the model to start")
    servers.control.freeze("postgres")
    try:
        assert workers.end() == EXIT_CODE
    finally:
        servers.control.thaw("postgres")
    assert "model_stuck" in workers.log()


def jobs_started(session: Session) -> bool:
    session.rollback()
    return bool(session.scalar(text("select count(*) from jobs where model_started and resolution is not null")))
