"""The job table's promises, on real Postgres: who may write what, when, and which story it leaves."""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, func, select, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState, Lane
from shared.db import jobs, queue_position
from shared.db.dispatch import next_jobs
from shared.db.jobs import Claim, Output
from shared.db.session import session_scope
from shared.db.tables import Generation, GenerationReference, Job, JobEvent
from shared.errors import DatabaseError, ImageGenerationError, JobStateError, StorageError
from tests.factories import make_job


def claim(session: Session, job: Job, worker: str = "w1") -> Claim:
    taken = jobs.claim(session, job.id, worker=worker, lease_s=30)
    assert taken is not None
    return taken[0]


def story(session: Session, job: Job) -> list[str]:
    return [event.type for event in jobs.events(session, job.id, after=0)]


def state(session: Session, job: Job) -> str:
    session.refresh(job)
    return job.state


def let_lease_expire(session: Session, job: Job) -> None:
    past = func.now() - timedelta(seconds=1)
    session.execute(update(Job).where(Job.id == job.id).values(lease_until=past))


def feed(session: Session, *, model: str = "cheap", window: int = 2, starving_s: float = 1e6) -> list[UUID]:
    return [each.job_id for each in next_jobs(session, model, window=window, starving_s=starving_s)]


def an_output(job: Job, index: int = 0) -> Output:
    generation = Generation(
        id=uuid4(),
        job_id=job.id,
        owner_id=job.owner_id,
        index=index,
        seed=1,
        format="png",
        blob_key=f"outputs/{job.id}/{index}",
        thumbnail_key="t",
        width=1,
        height=1,
        size_bytes=1,
        sha256="00",
        pixels_sha256="00",
        provenance={},
    )
    reference = GenerationReference(
        generation_id=generation.id, position=0, image_id=uuid4(), sha256="00", similarity=0.5, weight=1.0, pinned=False
    )
    return Output(generation=generation, references=[reference])


def test_a_job_is_claimed_by_one_worker_only(session: Session) -> None:
    job = make_job(session)
    assert jobs.claim(session, job.id, worker="w1", lease_s=30) is not None
    assert jobs.claim(session, job.id, worker="w2", lease_s=30) is None
    assert state(session, job) == JobState.PROCESSING
    assert job.worker == "w1"


@pytest.mark.parametrize("final", [JobState.SUCCEEDED, JobState.CANCELED])
def test_a_redelivered_message_of_an_ended_job_claims_nothing(session: Session, final: JobState) -> None:
    job = make_job(session, state=final)
    assert jobs.claim(session, job.id, worker="w2", lease_s=30) is None


def test_finishing_publishes_outputs_references_and_state_together(session: Session) -> None:
    job = make_job(session)
    assert jobs.finish(session, claim(session, job), [an_output(job, 0), an_output(job, 1)], timings={"generate": 1.0})
    assert state(session, job) == JobState.SUCCEEDED
    assert job.finished_at is not None
    assert session.scalar(select(func.count()).select_from(Generation)) == 2
    assert session.scalar(select(func.count()).select_from(GenerationReference)) == 2
    assert story(session, job) == ["queued", "started", "succeeded"]


def test_an_attempt_that_was_taken_over_can_write_nothing(session: Session) -> None:
    job = make_job(session)
    first = claim(session, job)
    let_lease_expire(session, job)
    assert jobs.take_back_expired(session, max_crashes=3) == [job.id]
    second = claim(session, job, "w2")
    assert second.attempt == first.attempt + 1

    assert jobs.renew(session, [first], lease_s=30) == set()
    assert not jobs.model_started(session, first)
    assert not jobs.resolved(session, first, {})
    assert not jobs.fail(session, first, ImageGenerationError())
    assert not jobs.retry_later(session, first, StorageError(), delay_s=1, most=3)
    assert not jobs.finish(session, first, [an_output(job)], timings={})
    assert jobs.hand_back(session, [first]) == 0
    assert session.scalar(select(func.count()).select_from(Generation)) == 0
    assert jobs.finish(session, second, [an_output(job)], timings={}), "the owner still can"


def test_a_renewed_lease_is_not_taken_back(session: Session) -> None:
    job = make_job(session)
    first = claim(session, job)
    let_lease_expire(session, job)
    assert jobs.renew(session, [first], lease_s=30) == {job.id}
    assert jobs.take_back_expired(session, max_crashes=3) == []


def test_only_crashes_during_model_work_count_and_the_third_makes_a_job_dead(session: Session) -> None:
    job = make_job(session)
    for crashed_in_model, expected in [(False, 0), (True, 1), (True, 2)]:
        held = claim(session, job)
        if crashed_in_model:
            assert jobs.model_started(session, held)
        let_lease_expire(session, job)
        jobs.take_back_expired(session, max_crashes=3)
        assert state(session, job) == JobState.QUEUED
        assert job.crashes == expected
    assert jobs.model_started(session, claim(session, job))
    let_lease_expire(session, job)
    jobs.take_back_expired(session, max_crashes=3)
    assert state(session, job) == JobState.DEAD
    assert job.error is not None
    assert job.error["code"] == "job_crashed"


def test_cancel_ends_a_queued_and_a_running_job_but_no_ended_one(session: Session) -> None:
    queued, running, done = make_job(session), make_job(session), make_job(session, state=JobState.SUCCEEDED)
    held = claim(session, running)
    assert jobs.cancel(session, queued.id, owner_id=queued.owner_id)
    assert jobs.cancel(session, running.id, owner_id=running.owner_id)
    assert not jobs.cancel(session, done.id, owner_id=done.owner_id)
    assert [state(session, job) for job in (queued, running, done)] == ["canceled", "canceled", "succeeded"]
    assert not jobs.finish(session, held, [an_output(running)], timings={}), "first commit wins"
    assert jobs.still_owned(session, [held]) == set()


def test_nobody_cancels_the_job_of_another_owner(session: Session) -> None:
    job = make_job(session)
    assert not jobs.cancel(session, job.id, owner_id=uuid4())
    assert state(session, job) == JobState.QUEUED


def test_a_passing_fault_waits_longer_each_time_and_fails_in_the_end(session: Session) -> None:
    job = make_job(session)
    waits = []
    for _ in range(3):
        held = claim(session, job)
        assert jobs.retry_later(session, held, StorageError(), delay_s=4, most=3) is JobState.QUEUED
        session.refresh(job)
        assert job.state == JobState.QUEUED
        assert jobs.claim(session, job.id, worker="w", lease_s=30) is None, "not due yet"
        assert feed(session, window=10) == [], "and not published before it is due"
        waits.append(jobs.events(session, job.id, after=job.last_seq - 1)[0].data["wait_s"])
        session.execute(update(Job).where(Job.id == job.id).values(run_after=func.now()))
    assert waits == [4, 8, 16]
    assert jobs.retry_later(session, claim(session, job), StorageError(), delay_s=4, most=3) is JobState.FAILED
    assert state(session, job) == JobState.FAILED


def test_jobs_handed_back_at_shutdown_can_be_claimed_at_once(session: Session) -> None:
    some = [make_job(session) for _ in range(3)]
    assert jobs.hand_back(session, [claim(session, job) for job in some]) == 3
    for job in some:
        claim(session, job, "w2")


def test_events_are_numbered_without_gaps(session: Session) -> None:
    job = make_job(session)
    jobs.hand_back(session, [claim(session, job)])
    held = claim(session, job)
    jobs.resolved(session, held, {"mode": "none"})
    jobs.finish(session, held, [], timings={})
    events = jobs.events(session, job.id, after=0)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events] == ["queued", "started", "requeued", "started", "resolved", "succeeded"]
    assert [event.seq for event in jobs.events(session, job.id, after=4)] == [5, 6]


def test_the_window_is_fed_by_lane_then_age_and_never_overfilled(session: Session) -> None:
    old, new, newest = make_job(session), make_job(session), make_job(session)
    age(session, [old, new, newest])
    assert feed(session) == [old.id, new.id]
    assert feed(session) == []
    claim(session, old)
    assert feed(session) == [newest.id]
    assert feed(session, model="other") == []


def test_a_better_lane_finds_room_beside_a_full_window_and_a_worse_one_does_not(session: Session) -> None:
    published = [make_job(session), make_job(session)]
    assert set(feed(session)) == {job.id for job in published}
    low, high = make_job(session, lane=Lane.LOW), make_job(session, lane=Lane.HIGH)
    assert feed(session) == [high.id]
    assert feed(session) == []
    for job in (*published, high):
        claim(session, job)
    assert feed(session) == [low.id]


def test_owners_share_the_window_however_many_jobs_they_have(session: Session) -> None:
    many = [make_job(session, owner="many", lane=Lane.BULK) for _ in range(20)]
    age(session, many)
    few = [make_job(session, owner="few", lane=Lane.BULK) for _ in range(3)]
    chosen = feed(session, window=6)
    assert [job.id in chosen for job in few] == [True, True, True]
    assert [job.id for job in many if job.id in chosen] == [job.id for job in many[:3]]


def test_an_owner_whose_images_are_in_flight_lets_others_go_first(session: Session) -> None:
    claim(session, make_job(session, owner="busy", seeds=[1, 2, 3, 4]))
    busy, idle = make_job(session, owner="busy"), make_job(session, owner="idle")
    age(session, [busy, idle])
    assert feed(session, window=1) == [idle.id]


def test_a_lane_that_starves_under_a_steady_stream_gets_one_job_ahead_of_it(session: Session) -> None:
    bulk = [make_job(session, lane=Lane.BULK) for _ in range(2)]
    stream = [make_job(session, lane=Lane.HIGH) for _ in range(6)]
    age(session, [*bulk, *stream])  # they have waited for about 100 s
    assert bulk[0].id not in feed(session, window=2, starving_s=1000)
    for job in stream[:2]:
        claim(session, job)
    (promoted, _) = next_jobs(session, "cheap", window=2, starving_s=50)
    assert (promoted.job_id, promoted.lane) == (bulk[0].id, Lane.HIGH.rank)
    claim(session, bulk[0])
    assert bulk[1].id not in feed(session, window=2, starving_s=50), "one at a time"


def test_a_job_that_waits_longer_than_it_allows_expires_and_is_neither_published_nor_claimed(session: Session) -> None:
    job = make_job(session, expires_in_s=0.001)
    session.commit()
    assert feed(session) == []
    assert jobs.claim(session, job.id, worker="w", lease_s=30) is None
    assert jobs.end_expired(session) == [job.id]
    assert state(session, job) == JobState.EXPIRED
    assert story(session, job) == ["queued", "expired"]


def test_a_claimed_job_whose_model_does_not_begin_in_time_expires_too(session: Session) -> None:
    job = make_job(session, expires_in_s=60)
    held = claim(session, job)
    assert not jobs.expire(session, held), "its time is not over"
    session.execute(update(Job).values(expires_at=func.now() - timedelta(seconds=1)))
    assert not jobs.model_started(session, held)
    assert jobs.expire(session, held)
    assert state(session, job) == JobState.EXPIRED


def test_a_job_missing_from_the_broker_is_published_again(session: Session) -> None:
    job = make_job(session)
    assert feed(session) == [job.id]
    assert jobs.published(session, older_than_s=-1) == [(job.id, "cheap")]
    assert jobs.unpublish(session, [job.id]) == 1
    assert jobs.waiting_models(session) == ["cheap"]
    assert feed(session) == [job.id]
    claim(session, job)
    assert jobs.unpublish(session, [job.id]) == 0, "a worker took it while the broker was asked"


def test_the_queue_position_counts_the_jobs_that_go_first(session: Session) -> None:
    first, second, urgent = make_job(session), make_job(session), make_job(session, lane=Lane.HIGH)
    age(session, [first, second, urgent])
    assert [queue_position.queue_position(session, job) for job in (urgent, first, second)] == [0, 1, 2]


def test_the_place_in_a_long_queue_is_counted_from_the_nearest_mark(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of one moment, as a bulk makes them, are told apart by their ids."""
    monkeypatch.setattr(queue_position, "STRIDE", 3)
    line = sorted((make_job(session) for _ in range(11)), key=lambda job: job.id)
    assert [queue_position.queue_position(session, job) for job in line] == list(range(11))
    counted: list[str] = []
    event.listen(session.connection(), "before_cursor_execute", lambda *call: counted.append(call[2]))
    assert queue_position.queue_position(session, line[10]) == 10
    assert len(counted) == 1, "the marks are remembered"
    jobs.cancel(session, line[9].id, owner_id=line[9].owner_id)
    assert queue_position.queue_position(session, line[10]) == 9, "behind the last mark it is exact"


def test_models_with_something_to_publish_are_found_each_once(session: Session) -> None:
    for model, run_after_s in (("a", None), ("b", 60), ("a", None), ("c", None)):
        job = make_job(session, model=model)
        if run_after_s:
            later = func.now() + timedelta(seconds=run_after_s)
            session.execute(update(Job).where(Job.id == job.id).values(run_after=later))
    feed(session, model="c")
    assert jobs.waiting_models(session) == ["a"]


def test_a_job_is_deleted_with_its_outputs_but_not_before_it_ended(session: Session) -> None:
    job = make_job(session)
    with pytest.raises(JobStateError):
        jobs.delete(session, job)
    jobs.finish(session, claim(session, job), [an_output(job)], timings={})
    session.refresh(job)
    jobs.delete(session, job)
    session.flush()
    for table in (Job, JobEvent, Generation, GenerationReference):
        assert session.scalar(select(func.count()).select_from(table)) == 0


def test_a_database_that_refuses_reports_its_own_error(session: Session) -> None:
    with pytest.raises(DatabaseError), session_scope() as scope:
        scope.execute(select(func.no_such_function()))


def age(session: Session, some: Sequence[Job]) -> None:
    """Give jobs of one transaction, which share its `now()`, the order in which they stand here."""
    for position, job in enumerate(some):
        moment = func.now() - timedelta(seconds=100 - position)
        session.execute(update(Job).where(Job.id == job.id).values(created_at=moment))
        session.refresh(job)
