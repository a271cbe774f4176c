"""Celery's revoke against a real worker and broker: it cancels jobs, and no job is lost or run because of it."""

import threading
from collections.abc import Iterator
from uuid import UUID

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.worker import state as worker_state
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import attempts, jobs
from shared.db.session import session_scope
from shared.db.tables import Job, JobEvent
from shared.messaging import queue
from shared.settings import Settings
from tests import one_attempt
from tests.factories import make_job
from tests.integration.conftest import messages
from tests.stack import wait_until
from worker_service.workers import revoke as revocation


class JobRunner:
    """Runs each job until the worker does not own it any more."""

    def __init__(self) -> None:
        self.started: set[str] = set()
        self.discarded: set[str] = set()
        self.stop = threading.Event()

    def run(self, job_id: str) -> None:
        with session_scope() as session:
            taken = one_attempt.claim(session, UUID(job_id), worker="test", lease_s=30)
        if taken is None:
            return
        self.started.add(job_id)
        while not self.stop.wait(0.05):
            with session_scope() as session:
                if not attempts.still_owned(session, [taken[0]]):
                    self.discarded.add(job_id)
                    return


@pytest.fixture
def runner() -> JobRunner:
    return JobRunner()


@pytest.fixture
def celery_worker(settings: Settings, runner: JobRunner) -> Iterator[Celery]:
    """A Celery worker in this process, configured as a generate worker."""
    app = queue.configure(Celery("afterimage"), settings.queue)
    app.task(name=queue.GENERATE, shared=False)(runner.run)
    revocation.cancel_revoked_jobs()
    worker_state.revoked.clear()
    with start_worker(
        app,
        pool="threads",
        concurrency=2,
        perform_ping_check=False,
        queues=[queue.generate_queue("cheap")],
        loglevel="warning",  # it stays the level of the tests that follow
    ):
        yield app
        runner.stop.set()
    worker_state.revoked.clear()
    app.close()


def state_of(job: Job) -> str | None:
    with session_scope() as session:
        return jobs.find_state(session, job.id)


def revoke(app: Celery, ids: str | list[str], *, terminate: bool = False) -> dict[str, str]:
    """Revoke as Flower does; return the worker's answer."""
    answers = app.control.revoke(ids, terminate=terminate, reply=True, timeout=5, limit=1)
    assert answers
    ((answer,),) = [list(each.values()) for each in answers]
    return dict(answer)


@pytest.mark.parametrize("terminate", [False, True])
def test_revoking_a_running_job_cancels_it(
    session: Session, celery_worker: Celery, runner: JobRunner, terminate: bool
) -> None:
    job, other = make_job(session), make_job(session)
    session.commit()
    queue.dispatch_jobs("cheap")
    wait_until(lambda: len(runner.started) == 2, timeout_s=20, what="both jobs to run")
    assert revoke(celery_worker, str(job.id), terminate=terminate) == {"ok": f"canceled: {job.id}"}
    assert (state_of(job), state_of(other)) == (JobState.CANCELED, JobState.PROCESSING)
    wait_until(lambda: runner.discarded == {str(job.id)}, timeout_s=20, what="its worker to notice")
    latest = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq.desc())).first()
    assert latest is not None
    assert (latest.type, latest.data) == ("canceled", {"reason": "revoked"})


def test_celerys_terminate_command_cancels_a_job(session: Session, celery_worker: Celery) -> None:
    job = make_job(session)
    session.commit()
    celery_worker.control.terminate(str(job.id), signal="SIGKILL", reply=True, timeout=5, limit=1)
    assert state_of(job) == JobState.CANCELED


def test_revoking_an_undelivered_job_cancels_it_and_it_never_runs(
    session: Session, celery_worker: Celery, runner: JobRunner
) -> None:
    job, other, ended = make_job(session), make_job(session), make_job(session, state=JobState.SUCCEEDED)
    session.commit()
    ids = [str(job.id), str(ended.id), "not-a-job"]
    assert revoke(celery_worker, ids) == {"ok": f"canceled: {job.id}"}
    queue.dispatch_jobs("cheap")
    wait_until(lambda: runner.started == {str(other.id)}, timeout_s=20, what="the other job to run")
    assert (state_of(job), state_of(ended)) == (JobState.CANCELED, JobState.SUCCEEDED)


def test_a_job_whose_message_is_discarded_after_an_earlier_revoke_is_canceled(
    session: Session, celery_worker: Celery, runner: JobRunner
) -> None:
    """This happens when the database was down at the time of the revoke."""
    job = make_job(session)
    session.commit()
    worker_state.revoked.add(str(job.id))
    queue.dispatch_jobs("cheap")
    wait_until(lambda: state_of(job) == JobState.CANCELED, timeout_s=20, what="the job to be canceled")
    assert runner.started == set()
    wait_until(lambda: messages(queue.generate_queue("cheap")) == [], timeout_s=20, what="the message to be gone")
