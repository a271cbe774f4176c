"""Changes of several attempts in one transaction: each attempt gets its own verdict, whatever happens to the group."""

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, func, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import attempts, jobs
from shared.db.attempts import Claim, Failure, Resolution, Success
from shared.db.session import get_engine
from shared.db.tables import ImageUsage, Job, JobEvent, Output, WithdrawnImage
from shared.errors import DatabaseQueryError, ImageGenerationError, ReferenceDeletedError
from shared.metrics import JOBS_FINISHED
from shared.settings import get_settings
from tests import one_attempt
from tests.factories import make_job
from tests.integration.conftest import count_waiting
from tests.integration.test_jobs import an_output, event_types, let_lease_expire
from tests.stack import wait_until
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.group_commit import Change, GroupCommit
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.worker_models import Models

NO_GROUP_S = 10.0


@pytest.fixture
def group(session: Session) -> GroupCommit:
    return GroupCommit("w", lease_s=30)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def running(session: Session, count: int = 1) -> list[Job]:
    made = [make_job(session, state=JobState.PROCESSING) for _ in range(count)]
    session.commit()
    return made


def success(job: Job) -> Success:
    return Success(Claim(job.id, job.attempt), [an_output(job)], {"generate": 1.0})


def failure(job: Job) -> Failure:
    return Failure(Claim(job.id, job.attempt), ImageGenerationError())


def resolution(job: Job, **data: str) -> Resolution:
    return Resolution(Claim(job.id, job.attempt), {"references": [], **data})


def together(group: GroupCommit, pool: ThreadPoolExecutor, changes: Sequence[Change | UUID]) -> "list[Future[Any]]":
    """Make these changes in one group, each from a thread of its own."""
    with group._turn:
        writing = [
            pool.submit(group.claim if isinstance(change, UUID) else group.write, change)  # type: ignore[arg-type]
            for change in changes
        ]
        wait_until(lambda: len(group._waiting) == len(changes), timeout_s=NO_GROUP_S, what="the changes to wait")
    return writing


def results(writing: "Sequence[Future[Any]]") -> list[Any]:
    return [each.result(30) for each in writing]


def states(session: Session, made: Sequence[Job]) -> list[str]:
    session.expire_all()
    return [session.get_one(Job, job.id).state for job in made]


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """The statements and commits of this process's engine in the block, without the polls of `JobLeases`."""
    seen = {"statements": 0, "commits": 0}

    def add(kind: str) -> None:
        if threading.current_thread().name != JobLeases.__name__:
            seen[kind] += 1

    def on_statement(*_: Any) -> None:
        add("statements")

    def on_commit(*_: Any) -> None:
        add("commits")

    event.listen(get_engine(), "before_cursor_execute", on_statement)
    event.listen(get_engine(), "commit", on_commit)
    yield seen
    event.remove(get_engine(), "before_cursor_execute", on_statement)
    event.remove(get_engine(), "commit", on_commit)


def with_quota(session: Session, job: Job) -> None:
    """Count the job's image towards a quota. Its failure gives the image back, and first locks the owner's usage."""
    job.quota_day = session.scalars(select(func.current_date())).one()
    session.add(ImageUsage(owner_id=job.owner_id, day=job.quota_day, images=1))
    session.commit()


def lock_usage(session: Session) -> None:
    session.scalars(select(ImageUsage).with_for_update()).one()


def test_changes_that_come_together_are_one_transaction(
    session: Session, group: GroupCommit, pool: ThreadPoolExecutor
) -> None:
    queued = [make_job(session) for _ in range(4)]
    first, second, third, fourth = running(session, 4)
    changes: list[Change | UUID] = [job.id for job in queued]
    changes += [resolution(first), resolution(second), failure(third), success(fourth), success(second)]
    with counted() as seen:
        verdicts = results(together(group, pool, changes))
    assert all(verdicts)
    assert seen["commits"] == 1
    assert seen["statements"] <= 8, "the number depends on the kinds of changes, not on that of jobs"
    assert states(session, queued) == [JobState.PROCESSING] * 4
    assert states(session, [first, second, third, fourth]) == ["processing", "succeeded", "failed", "succeeded"]
    assert session.get_one(Job, queued[0].id).model_started, "a crash counts from the claim on"
    assert not session.get_one(Job, first.id).model_started, "until the job waits for the model"
    assert session.get_one(Job, fourth.id).timings == {"generate": 1.0}
    assert event_types(session, second) == ["queued", "started", "resolved", "succeeded"]
    claim, claimed = verdicts[0]
    assert (claim, claimed.parameters) == (Claim(queued[0].id, 1), queued[0].parameters)


def test_a_message_delivered_twice_claims_its_job_once(
    session: Session, group: GroupCommit, pool: ThreadPoolExecutor
) -> None:
    job = make_job(session)
    session.commit()
    taken = results(together(group, pool, [job.id, job.id, job.id]))
    assert sum(each is not None for each in taken) == 1
    assert event_types(session, job) == ["queued", "started"]


def test_of_two_processes_that_finish_a_job_in_a_group_each_only_its_owner_can(
    session: Session, pool: ThreadPoolExecutor
) -> None:
    """The first process has lost its lease of one job. Both finish that job and others at the same time."""
    processes = GroupCommit("first", lease_s=30), GroupCommit("second", lease_s=30)
    for _ in range(5):
        shared, own, other = running(session, 3)
        stale = success(shared)
        let_lease_expire(session, shared)
        assert attempts.take_back_expired(session, max_crashes=3) == [shared.id]
        taken = one_attempt.claim(session, shared.id, worker="second", lease_s=30)
        assert taken is not None
        session.commit()
        fresh = Success(taken[0], [an_output(shared)], {})
        writing = [
            pool.submit(lambda changes, process: results(together(process, pool, changes)), changes, process)
            for changes, process in zip([[stale, success(own)], [fresh, success(other)]], processes, strict=True)
        ]
        assert results(writing) == [[False, True], [True, True]]
        assert states(session, [shared, own, other]) == [JobState.SUCCEEDED] * 3
        stored = session.scalars(select(Output.id).where(Output.job_id == shared.id)).all()
        assert stored == [fresh.outputs[0].output.id]


def test_an_error_of_one_change_fails_no_other(session: Session, group: GroupCommit, pool: ThreadPoolExecutor) -> None:
    bad, good, finished = running(session, 3)
    finished_before = JOBS_FINISHED.labels("succeeded")._value.get()
    unstorable = resolution(bad, reason="\0")
    refused, *others = together(group, pool, [unstorable, resolution(good), success(finished)])
    assert results(others) == [True, True]
    with pytest.raises(DatabaseQueryError):
        refused.result(30)
    assert states(session, [bad, good, finished]) == ["processing", "processing", "succeeded"]
    assert event_types(session, good) == ["queued", "started", "resolved"]
    assert event_types(session, bad) == ["queued", "started"]
    assert JOBS_FINISHED.labels("succeeded")._value.get() == finished_before + 1, "counted once per commit"


def test_a_withdrawn_reference_fails_only_the_job_that_used_it(
    session: Session, group: GroupCommit, pool: ThreadPoolExecutor
) -> None:
    withdrawn, other = running(session, 2)
    change = success(withdrawn)
    image_id = change.outputs[0].references[0].image_id
    session.add(WithdrawnImage(image_id=image_id, cause_id=image_id))
    session.commit()
    refused, finished = together(group, pool, [change, success(other)])
    assert finished.result(30)
    with pytest.raises(ReferenceDeletedError):
        refused.result(30)
    assert states(session, [withdrawn, other]) == ["processing", "succeeded"]


def test_a_job_that_another_transaction_has_locked_delays_no_other(
    session: Session, group: GroupCommit, pool: ThreadPoolExecutor
) -> None:
    locked, other = running(session, 2)
    session.scalars(select(Job).where(Job.id == locked.id).with_for_update()).one()
    delayed, finished = together(group, pool, [success(locked), success(other)])
    assert finished.result(30)
    wait_until(lambda: count_waiting() == 1, timeout_s=10, what="the other change to wait for the lock")
    assert not delayed.done()
    session.commit()
    assert delayed.result(30)
    assert states(session, [locked, other]) == [JobState.SUCCEEDED] * 2


def test_every_attempt_of_a_broken_group_learns_its_fate(
    session: Session, group: GroupCommit, pool: ThreadPoolExecutor
) -> None:
    failed, finished, lost = running(session, 3)
    with_quota(session, failed)
    too_late = success(lost)
    assert jobs.cancel(session, lost.id, owner_id=lost.owner_id)
    session.commit()
    lock_usage(session)
    writing = together(group, pool, [failure(failed), success(finished), too_late])
    wait_until(lambda: count_waiting() == 1, timeout_s=10, what="the group to wait for the owner's usage")
    session.execute(text("select pg_terminate_backend(pid) from pg_locks where not granted"))
    assert writing[1].result(30)
    assert not writing[2].result(30), "its user has canceled it"
    session.commit()
    assert writing[0].result(30)
    assert states(session, [failed, finished, lost]) == ["failed", "succeeded", "canceled"]


def write_group(changes: Sequence[Change]) -> None:
    with ThreadPoolExecutor(len(changes)) as pool:
        results(together(GroupCommit("killed", lease_s=30), pool, changes))


def test_a_process_killed_inside_a_group_has_changed_nothing_and_its_jobs_run_again(session: Session) -> None:
    failed, resolved, finished = held = running(session, 3)
    with_quota(session, failed)
    lock_usage(session)
    # The group has recorded the resolution, and waits to give the failed job's image back.
    changes = [resolution(resolved), failure(failed), success(finished)]
    process = multiprocessing.get_context("spawn").Process(target=write_group, args=[changes])
    process.start()
    wait_until(lambda: count_waiting() == 1, timeout_s=120, what="the group to wait for the owner's usage")
    assert process.pid is not None
    process.kill()
    process.join()
    session.commit()
    other_sessions = text(
        "select count(*) from pg_stat_activity where state like 'idle in%' or wait_event_type = 'Lock'"
    )
    wait_until(lambda: session.scalar(other_sessions) == 0, timeout_s=30, what="the server to end the transaction")
    session.rollback()
    assert states(session, held) == [JobState.PROCESSING] * 3
    assert {tuple(event_types(session, job)) for job in held} == {("queued", "started")}
    assert session.scalars(select(Output.id)).all() == []
    session.execute(update(Job).values(lease_until=func.now() - timedelta(seconds=1)))
    assert sorted(attempts.take_back_expired(session, max_crashes=3)) == sorted(job.id for job in held)


def test_jobs_that_run_together_cost_few_transactions(
    session: Session, models: Models, leases: JobLeases, pool: ThreadPoolExecutor
) -> None:
    made = [make_job(session, mode="none", k=0) for _ in range(32)]
    session.commit()
    with counted() as seen:
        running_jobs = [
            pool.submit(run_job, job.id, models=models, leases=leases, settings=get_settings(), worker="w")
            for job in made
        ]
        assert results(running_jobs) == [Outcome.SUCCEEDED] * len(made)
    numbers = session.execute(
        select(JobEvent.job_id, func.array_agg(JobEvent.type.op("||")("")).label("types")).group_by(JobEvent.job_id)
    )
    assert all(len(row.types) == 4 for row in numbers), "queued, started, resolved, succeeded"
    per_job = {kind: number / len(made) for kind, number in seen.items()}
    assert per_job["commits"] < 2.5, "four, if each change had its own"
    assert per_job["statements"] < 5, "ten, if each job had its own"
