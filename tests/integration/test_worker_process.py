"""Worker processes that get a SIGTERM while they load, while they are idle, or during a batch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from ops.local.layout import free_port
from ops.local.stack import REPOSITORY
from shared.contracts.generation import Mode
from shared.contracts.jobs import JobState
from shared.db import jobs
from shared.db.tables import Job, Worker
from shared.messaging import queue
from shared.settings import Settings
from tests.factories import make_job
from tests.small_pipelines import save_clip
from tests.stack import wait_until

START_S = 120
GRACE_S = 1


@pytest.fixture
def environment(settings: Settings, tmp_path: Path) -> dict[str, str]:
    """A model of 40 steps of 0.25 s, which is far longer than a stopped worker waits for its jobs."""
    save_clip(tmp_path / "clip")
    generators = '{"cheap": {"kind": "fake", "cost_ms": 10000}}'
    return {
        **os.environ,
        "AFTERIMAGE_MODEL__CLIP__MODEL": f"local-dir:{tmp_path / 'clip'}",
        "AFTERIMAGE_MODEL__GENERATORS": generators,
        "AFTERIMAGE_JOBS__SHUTDOWN_GRACE_S": str(GRACE_S),
        "PYTHONWARNINGS": "ignore",
    }


LOADING = """
import time
from shared.settings import get_settings
from worker_service.workers.process import WorkerProcess

with WorkerProcess("embed", None, get_settings()):
    while True:
        try:
            while True:
                time.sleep(0.01)
        except BaseException as error:
            {reaction}
"""
"""A worker that loads without end, in a library that catches every exception."""


@contextmanager
def worker(kind: str, environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    with running(["-m", "worker_service", kind], environment) as process:
        yield process


@contextmanager
def running(arguments: list[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([sys.executable, *arguments], cwd=REPOSITORY, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def states(session: Session) -> list[str]:
    session.rollback()
    return list(session.scalars(select(Worker.state)))


def stop(process: "subprocess.Popen[bytes]", session: Session) -> int:
    """Stop a worker; return its exit status. It must have deleted its row in the table of workers."""
    process.send_signal(signal.SIGTERM)
    status = process.wait(30)
    assert states(session) == []
    return status


def test_a_worker_that_loads_its_models_ends_at_once(environment: dict[str, str], session: Session) -> None:
    with worker("embed", environment) as process:
        wait_until(lambda: states(session) == ["loading"], timeout_s=START_S, what="the worker to load")
        assert stop(process, session) == 0


@pytest.mark.parametrize("reaction", ["raise RuntimeError('the file is damaged') from error", "pass"])
def test_a_loading_worker_ends_with_status_0_in_a_library_that_catches_every_exception(
    environment: dict[str, str], session: Session, reaction: str
) -> None:
    with running(["-c", LOADING.format(reaction=reaction)], environment) as process:
        wait_until(lambda: states(session) == ["loading"], timeout_s=START_S, what="the worker to load")
        assert stop(process, session) == 0


def test_an_idle_worker_ends(environment: dict[str, str], session: Session) -> None:
    with worker("io", environment) as process:
        wait_until(lambda: states(session) == ["ready"], timeout_s=START_S, what="the worker to be ready")
        assert stop(process, session) == 0


def ready_status(port: int) -> int:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=5).status_code
    except httpx.TransportError:
        return 0


def test_a_worker_is_not_ready_while_it_loads_its_models(environment: dict[str, str], session: Session) -> None:
    port = free_port(excluding=set())
    loads_forever = f"""
from shared import metrics
from worker_service.readiness import get_readiness
from shared.settings import get_settings
metrics.serve(get_settings().metrics, get_readiness().is_ready)
{LOADING.format(reaction="pass")}"""
    with running(["-c", loads_forever], environment | {"AFTERIMAGE_METRICS__PORT": str(port)}):
        wait_until(lambda: states(session) == ["loading"], timeout_s=START_S, what="the worker to load")
        assert ready_status(port) == 503


@pytest.mark.parametrize("kind", ["embed", "generate", "io", "reconciler"])
def test_each_kind_of_worker_becomes_ready(environment: dict[str, str], kind: str) -> None:
    port = free_port(excluding=set())
    with worker(kind, environment | {"AFTERIMAGE_METRICS__PORT": str(port)}):
        wait_until(lambda: ready_status(port) == 200, timeout_s=START_S, what=f"{kind} to be ready")


def test_a_worker_in_the_middle_of_a_batch_hands_its_jobs_back(environment: dict[str, str], session: Session) -> None:
    running = make_job(session, mode=Mode.NONE, num_inference_steps=40)
    waiting = make_job(session, mode=Mode.NONE, num_inference_steps=50)  # another batch
    session.commit()
    queue.dispatch_jobs("cheap")
    with worker("generate", environment) as process:
        wait_until(lambda: started(session) == 1, timeout_s=START_S, what="the model to start")
        wait_until(lambda: processing(session) == 2, timeout_s=START_S, what="both jobs to be claimed")
        asked = time.monotonic()
        assert stop(process, session) == 0
        assert time.monotonic() - asked < GRACE_S + 15, "before it is killed"
    session.expire_all()
    for job in (running, waiting):
        assert (job.state, job.crashes) == (JobState.QUEUED, 0)
        assert [event.data.get("reason") for event in jobs.list_events(session, job.id, after=0)][-1] == "shutdown"


def started(session: Session) -> int:
    session.rollback()
    return len(session.scalars(select(Job.id).where(Job.model_started)).all())


def processing(session: Session) -> int:
    session.rollback()
    return len(session.scalars(select(Job.id).where(Job.state == JobState.PROCESSING)).all())
