"""The guarantees of the job table, on real Postgres: claims, leases, dispatch, expiry and events."""

from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState, Lane
from shared.db import attempts, jobs, queue_position
from shared.db.attempts import Claim, StoredOutput
from shared.db.dispatch import mark_next_published
from shared.db.session import session_scope
from shared.db.tables import Job, JobEvent, Output, OutputReference
from shared.errors import DatabaseError, ImageGenerationError, JobStateError, StorageError
from shared.settings import JobSettings
from tests import one_attempt
from tests.factories import make_job, make_output_row
from worker_service.jobs.retry_policy import retry_delay_s


def claim(session: Session, job: Job, worker: str = "w1") -> Claim:
    taken = one_attempt.claim(session, job.id, worker=worker, lease_s=30)
    assert taken is not None
    return taken[0]


def event_types(session: Session, job: Job) -> list[str]:
    return [event.type for event in jobs.list_events(session, job.id, after=0)]


def state(session: Session, job: Job) -> str:
    session.refresh(job)
    return job.state


doubled_delay_s = partial(retry_delay_s, settings=JobSettings(transient_retry_delay_s=4, max_transient_retries=3))


def let_lease_expire(session: Session, job: Job) -> None:
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == job.id).values(lease_until=past))


def dispatch(
    session: Session, *, model: str = "cheap", window: int = 2, starvation_timeout_s: float = 1e6
) -> list[UUID]:
    return [
        each.job_id
        for each in mark_next_published(session, model, window=window, starvation_timeout_s=starvation_timeout_s)
    ]


def an_output(job: Job, index: int = 0) -> StoredOutput:
    generation = make_output_row(job.id, job.owner_id, index=index, blob_key=f"outputs/{job.id}/{index}")
    reference = OutputReference(
        generation_id=generation.id, position=0, image_id=uuid4(), sha256="00", similarity=0.5, weight=1.0, pinned=False
    )
    return StoredOutput(output=generation, references=[reference])


def test_a_job_is_claimed_by_one_worker_only(session: Session) -> None:
    job = make_job(session)
    assert one_attempt.claim(session, job.id, worker="w1", lease_s=30) is not None
    assert one_attempt.claim(session, job.id, worker="w2", lease_s=30) is None
    assert state(session, job) == JobState.PROCESSING
    assert job.worker == "w1"


@pytest.mark.parametrize("final", [JobState.SUCCEEDED, JobState.CANCELED])
def test_a_redelivered_message_of_an_ended_job_claims_nothing(session: Session, final: JobState) -> None:
    job = make_job(session, state=final)
    assert one_attempt.claim(session, job.id, worker="w2", lease_s=30) is None


def test_finishing_publishes_outputs_references_and_state_together(session: Session) -> None:
    job = make_job(session)
    assert one_attempt.finish(
        session, claim(session, job), [an_output(job, 0), an_output(job, 1)], timings={"generate": 1.0}
    )
    assert state(session, job) == JobState.SUCCEEDED
    assert job.finished_at is not None
    assert session.scalar(select(func.count()).select_from(Output)) == 2
    assert session.scalar(select(func.count()).select_from(OutputReference)) == 2
    assert event_types(session, job) == ["queued", "started", "succeeded"]


def test_an_attempt_that_lost_its_job_can_write_nothing(session: Session) -> None:
    job = make_job(session)
    first = claim(session, job)
    let_lease_expire(session, job)
    assert attempts.take_back_expired(session, max_crashes=3) == [job.id]
    second = claim(session, job, "w2")
    assert second.attempt == first.attempt + 1

    assert attempts.renew(session, [first], lease_s=30) == set()
    assert not attempts.mark_model_started(session, first)
    assert not one_attempt.record_resolution(session, first, {})
    assert not one_attempt.fail(session, first, ImageGenerationError())
    assert not attempts.retry_later(session, first, StorageError(), delay_s=doubled_delay_s)
    assert not one_attempt.finish(session, first, [an_output(job)], timings={})
    assert attempts.hand_back(session, [first]) == 0
    assert session.scalar(select(func.count()).select_from(Output)) == 0
    assert one_attempt.finish(session, second, [an_output(job)], timings={}), "the current attempt can"


def test_a_renewed_lease_is_not_taken_back(session: Session) -> None:
    job = make_job(session)
    first = claim(session, job)
    let_lease_expire(session, job)
    assert attempts.renew(session, [first], lease_s=30) == {job.id}
    assert attempts.take_back_expired(session, max_crashes=3) == []


def test_no_crash_counts_while_the_job_waits_for_the_model_and_the_third_makes_it_dead(session: Session) -> None:
    job = make_job(session)
    for crashed_in_model, expected in [(False, 0), (True, 1), (True, 2)]:
        held = claim(session, job)
        assert one_attempt.record_resolution(session, held, {"mode": "none"})
        if crashed_in_model:
            assert attempts.mark_model_started(session, held)
        let_lease_expire(session, job)
        attempts.take_back_expired(session, max_crashes=3)
        assert state(session, job) == JobState.QUEUED
        assert job.crashes == expected
    assert attempts.mark_model_started(session, claim(session, job))
    let_lease_expire(session, job)
    attempts.take_back_expired(session, max_crashes=3)
    assert state(session, job) == JobState.DEAD
    assert job.error is not None
    assert job.error["code"] == "job_crashed"


def test_cancel_ends_a_queued_and_a_running_job_but_not_an_ended_one(session: Session) -> None:
    queued, running, done = make_job(session), make_job(session), make_job(session, state=JobState.SUCCEEDED)
    held = claim(session, running)
    assert jobs.cancel(session, queued.id, owner_id=queued.owner_id)
    assert jobs.cancel(session, running.id, owner_id=running.owner_id)
    assert not jobs.cancel(session, done.id, owner_id=done.owner_id)
    assert [state(session, job) for job in (queued, running, done)] == ["canceled", "canceled", "succeeded"]
    assert not one_attempt.finish(session, held, [an_output(running)], timings={}), "first commit wins"
    assert attempts.still_owned(session, [held]) == set()


def test_a_job_of_another_owner_cannot_be_canceled(session: Session) -> None:
    job = make_job(session)
    assert not jobs.cancel(session, job.id, owner_id=uuid4())
    assert state(session, job) == JobState.QUEUED


def test_a_temporary_error_delays_longer_each_time_and_fails_in_the_end(session: Session) -> None:
    job = make_job(session)
    waits = []
    for _ in range(3):
        held = claim(session, job)
        assert attempts.retry_later(session, held, StorageError(), delay_s=doubled_delay_s) is JobState.QUEUED
        session.refresh(job)
        assert job.state == JobState.QUEUED
        assert one_attempt.claim(session, job.id, worker="w", lease_s=30) is None, "not due yet"
        assert dispatch(session, window=10) == [], "and not published before it is due"
        waits.append(jobs.list_events(session, job.id, after=job.last_seq - 1)[0].data["wait_s"])
        session.execute(update(Job).where(Job.id == job.id).values(run_after=func.now()))
    assert waits == [4, 8, 16]
    assert (
        attempts.retry_later(session, claim(session, job), StorageError(), delay_s=doubled_delay_s) is JobState.FAILED
    )
    assert state(session, job) == JobState.FAILED


def test_jobs_handed_back_at_shutdown_can_be_claimed_at_once(session: Session) -> None:
    some = [make_job(session) for _ in range(3)]
    assert attempts.hand_back(session, [claim(session, job) for job in some]) == 3
    for job in some:
        claim(session, job, "w2")


def test_events_are_numbered_without_gaps(session: Session) -> None:
    job = make_job(session)
    attempts.hand_back(session, [claim(session, job)])
    held = claim(session, job)
    one_attempt.record_resolution(session, held, {"mode": "none"})
    one_attempt.finish(session, held, [], timings={})
    events = jobs.list_events(session, job.id, after=0)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events] == ["queued", "started", "requeued", "started", "resolved", "succeeded"]
    assert [event.seq for event in jobs.list_events(session, job.id, after=4)] == [5, 6]


def test_jobs_are_dispatched_by_lane_then_age_and_never_beyond_the_window(session: Session) -> None:
    old, new, newest = make_job(session), make_job(session), make_job(session)
    age(session, [old, new, newest])
    assert dispatch(session) == [old.id, new.id]
    assert dispatch(session) == []
    claim(session, old)
    assert dispatch(session) == [newest.id]
    assert dispatch(session, model="other") == []


def test_a_higher_priority_lane_is_dispatched_despite_a_full_window(session: Session) -> None:
    published = [make_job(session), make_job(session)]
    assert set(dispatch(session)) == {job.id for job in published}
    low, high = make_job(session, lane=Lane.LOW), make_job(session, lane=Lane.HIGH)
    assert dispatch(session) == [high.id]
    assert dispatch(session) == []
    for job in (*published, high):
        claim(session, job)
    assert dispatch(session) == [low.id]


def test_owners_share_the_window_equally(session: Session) -> None:
    many = [make_job(session, owner="many", lane=Lane.BULK) for _ in range(20)]
    age(session, many)
    few = [make_job(session, owner="few", lane=Lane.BULK) for _ in range(3)]
    chosen = dispatch(session, window=6)
    assert [job.id in chosen for job in few] == [True, True, True]
    assert [job.id for job in many if job.id in chosen] == [job.id for job in many[:3]]


def test_an_owner_with_images_in_flight_is_dispatched_after_other_owners(session: Session) -> None:
    claim(session, make_job(session, owner="busy", seeds=[1, 2, 3, 4]))
    busy, idle = make_job(session, owner="busy"), make_job(session, owner="idle")
    age(session, [busy, idle])
    assert dispatch(session, window=1) == [idle.id]


def test_a_starving_lane_gets_one_job_dispatched_before_a_steady_stream(session: Session) -> None:
    bulk = [make_job(session, lane=Lane.BULK) for _ in range(2)]
    stream = [make_job(session, lane=Lane.HIGH) for _ in range(6)]
    age(session, [*bulk, *stream])  # they have waited for about 100 s
    assert bulk[0].id not in dispatch(session, window=2, starvation_timeout_s=1000)
    for job in stream[:2]:
        claim(session, job)
    (promoted, _) = mark_next_published(session, "cheap", window=2, starvation_timeout_s=50)
    assert (promoted.job_id, promoted.lane) == (bulk[0].id, Lane.HIGH.rank)
    claim(session, bulk[0])
    assert bulk[1].id not in dispatch(session, window=2, starvation_timeout_s=50), "one job at a time"


def test_an_expired_job_is_neither_published_nor_claimed(session: Session) -> None:
    job = make_job(session, expires_in_s=0.001)
    session.commit()
    assert dispatch(session) == []
    assert one_attempt.claim(session, job.id, worker="w", lease_s=30) is None
    assert jobs.end_expired(session) == [job.id]
    assert state(session, job) == JobState.EXPIRED
    assert event_types(session, job) == ["queued", "expired"]


def test_a_claimed_job_whose_model_call_does_not_start_in_time_expires(session: Session) -> None:
    job = make_job(session, expires_in_s=60)
    held = claim(session, job)
    assert not attempts.expire(session, held), "it has not expired yet"
    session.execute(update(Job).values(expires_at=func.now() - timedelta(seconds=1)))
    assert not attempts.mark_model_started(session, held)
    assert attempts.expire(session, held)
    assert state(session, job) == JobState.EXPIRED


def test_a_job_missing_from_the_broker_is_published_again(session: Session) -> None:
    job = make_job(session)
    assert dispatch(session) == [job.id]
    assert jobs.list_published(session, older_than_s=-1) == [(job.id, "cheap")]
    assert jobs.unpublish(session, [job.id]) == 1
    assert jobs.list_waiting_models(session) == ["cheap"]
    assert dispatch(session) == [job.id]
    claim(session, job)
    assert jobs.unpublish(session, [job.id]) == 0, "a worker has claimed it since the broker was checked"


def test_the_queue_position_counts_the_jobs_that_run_first(session: Session) -> None:
    first, second, urgent = make_job(session), make_job(session), make_job(session, lane=Lane.HIGH)
    age(session, [first, second, urgent])
    assert [queue_position.queue_position(session, job) for job in (urgent, first, second)] == [0, 1, 2]


def test_the_position_in_a_long_queue_is_counted_from_the_nearest_mark(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs with the same creation time, as a bulk creates them, are ordered by their ids."""
    monkeypatch.setattr(queue_position, "JOBS_PER_MARK", 3)
    queued = sorted((make_job(session) for _ in range(11)), key=lambda job: job.id)
    assert [queue_position.queue_position(session, job) for job in queued] == list(range(11))
    counted: list[str] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: counted.append(call[2]))
    assert queue_position.queue_position(session, queued[10]) == 10
    assert len(counted) == 1, "the marks are cached"
    jobs.cancel(session, queued[9].id, owner_id=queued[9].owner_id)
    assert queue_position.queue_position(session, queued[10]) == 9, "after the last mark the position is exact"


def test_models_with_jobs_to_publish_are_listed_once_each(session: Session) -> None:
    for model, run_after_s in (("a", None), ("b", 60), ("a", None), ("c", None)):
        job = make_job(session, model=model)
        if run_after_s:
            later = func.now() + timedelta(seconds=run_after_s)
            session.execute(update(Job).where(Job.id == job.id).values(run_after=later))
    dispatch(session, model="c")
    assert jobs.list_waiting_models(session) == ["a"]


def test_a_job_is_deleted_with_its_outputs_but_not_before_it_ended(session: Session) -> None:
    job = make_job(session)
    with pytest.raises(JobStateError):
        jobs.delete(session, job)
    one_attempt.finish(session, claim(session, job), [an_output(job)], timings={})
    session.refresh(job)
    jobs.delete(session, job)
    session.flush()
    for table in (Job, JobEvent, Output, OutputReference):
        assert session.scalar(select(func.count()).select_from(table)) == 0


def test_a_statement_that_fails_raises_a_database_error(session: Session) -> None:
    with pytest.raises(DatabaseError), session_scope() as scope:
        scope.execute(select(func.no_such_function()))


def age(session: Session, some: Sequence[Job]) -> None:
    """Give jobs of one transaction, which share its `now()`, different creation times, in this order."""
    for position, job in enumerate(some):
        moment = func.now() - timedelta(seconds=100 - position)
        session.execute(update(Job).where(Job.id == job.id).values(created_at=moment))
        session.refresh(job)
