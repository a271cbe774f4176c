"""What is kept for how long, on real Postgres."""

import os
import threading
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared import blob_sweeper
from shared.contracts.generation import Webhook
from shared.contracts.jobs import EventType, JobState
from shared.db import idempotency, jobs, outputs, owners, retention
from shared.db.session import session_scope
from shared.db.tables import (
    Bulk,
    Chore,
    Generation,
    GenerationReference,
    IdempotencyKey,
    Job,
    JobEvent,
    WebhookDelivery,
)
from shared.settings import Settings, load_settings
from shared.storage import get_blobs, thumbnail_key
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client
from tests.integration.test_jobs import an_output, claim
from tests.stack import wait_until
from worker_service.maintenance import housekeeping
from worker_service.maintenance.housekeeping import Housekeeping

TELL_ALL = Webhook(url="https://example.com/hook", events=[EventType.SUCCEEDED])


def finished_job(session: Session, *, days_ago: float, **details: Any) -> Job:
    """A job with an output and a reference, that ended so long ago."""
    job = make_job(session, **details)
    assert jobs.finish(session, claim(session, job), [an_output(job)], timings={})
    then = func.now() - timedelta(days=days_ago)
    session.execute(update(Job).where(Job.id == job.id).values(finished_at=then))
    session.execute(update(JobEvent).where(JobEvent.job_id == job.id).values(at=then))
    session.execute(update(Generation).where(Generation.job_id == job.id).values(created_at=then))
    session.execute(update(WebhookDelivery).where(WebhookDelivery.job_id == job.id).values(created_at=then))
    session.commit()
    return job


def settle_deliveries(session: Session) -> None:
    session.execute(update(WebhookDelivery).values(state="delivered"))
    session.commit()


def retire(**kept: float) -> None:
    Housekeeping(load_settings(retention=kept), threading.Event()).retire()


def count(session: Session, table: Any) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(table)) or 0


def test_by_default_jobs_and_outputs_stay_and_events_go_after_thirty_days(session: Session) -> None:
    old, young = finished_job(session, days_ago=31), finished_job(session, days_ago=29)
    retire()
    assert {count(session, table) for table in (Job, Generation, GenerationReference)} == {2}
    assert jobs.events(session, old.id, after=0) == []
    assert len(jobs.events(session, young.id, after=0)) == 3


def test_a_story_that_has_not_ended_long_ago_stays_whole_however_old_its_beginning(session: Session) -> None:
    waiting, young = make_job(session), finished_job(session, days_ago=1)
    session.execute(update(JobEvent).where(JobEvent.seq == 1).values(at=func.now() - timedelta(days=90)))
    session.commit()
    retire()
    assert [len(jobs.events(session, job.id, after=0)) for job in (waiting, young)] == [1, 3]


def test_old_jobs_go_with_all_that_is_theirs_and_nothing_else(session: Session) -> None:
    finished_job(session, days_ago=11, webhook=TELL_ALL)
    young = finished_job(session, days_ago=9, webhook=TELL_ALL)
    queued, running = make_job(session), make_job(session, state=JobState.PROCESSING)
    session.execute(update(Job).values(created_at=func.now() - timedelta(days=90)))
    settle_deliveries(session)
    retire(jobs_days=10)
    assert set(session.scalars(select(Job.id))) == {young.id, queued.id, running.id}
    for table in (Generation, GenerationReference, WebhookDelivery):
        assert count(session, table) == 1, table
    assert set(session.scalars(select(JobEvent.job_id))) == {young.id, queued.id, running.id}


def test_what_a_webhook_has_still_to_tell_stays(session: Session) -> None:
    job = finished_job(session, days_ago=100, webhook=TELL_ALL)
    retire(jobs_days=10)
    assert count(session, Job) == 1
    assert [event.type for event in jobs.events(session, job.id, after=0)] == ["succeeded"]
    assert count(session, WebhookDelivery) == 1
    settle_deliveries(session)
    retire(jobs_days=10)
    assert count(session, Job) == 0


def test_the_log_of_deliveries_goes_by_its_own_age(session: Session) -> None:
    finished_job(session, days_ago=3, webhook=TELL_ALL)
    retire(deliveries_days=2)
    assert count(session, WebhookDelivery) == 1, "not made yet"
    settle_deliveries(session)
    retire(deliveries_days=4)
    assert count(session, WebhookDelivery) == 1
    retire(deliveries_days=2)
    assert count(session, WebhookDelivery) == 0
    assert count(session, JobEvent) == 3


def test_outputs_can_go_before_their_jobs(session: Session) -> None:
    job = finished_job(session, days_ago=3)
    retire(outputs_days=2)
    assert (count(session, Job), count(session, Generation), count(session, GenerationReference)) == (1, 0, 0)
    assert len(jobs.events(session, job.id, after=0)) == 3


def test_the_jobs_of_a_bulk_stay_as_long_as_it_may_be_asked_for_and_then_all_of_it_goes(session: Session) -> None:
    bulk = Bulk(id=uuid4(), owner_id=owners.ensure(session, "local"), lane=3, on_invalid="refuse", state="running")
    session.add(bulk)
    session.flush()
    job = finished_job(session, days_ago=20)
    session.execute(update(Job).where(Job.id == job.id).values(bulk_id=bulk.id))
    session.commit()
    retire(jobs_days=10)
    assert (count(session, Job), count(session, Bulk)) == (1, 1)
    session.execute(update(Bulk).values(state="completed", finished_at=func.now() - timedelta(days=11)))
    session.commit()
    retire(jobs_days=10)
    assert (count(session, Job), count(session, Bulk)) == (0, 0)


def test_a_large_backlog_goes_in_batches_until_nothing_is_left(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "BATCH", 4)
    for _ in range(10):
        finished_job(session, days_ago=40)
    with session_scope() as scope:
        assert retention.retire_events(scope, days=30, limit=4) == 4
    retire()
    assert count(session, JobEvent) == 0


def test_of_several_processes_one_does_a_chore_and_only_when_it_is_due(session: Session) -> None:
    def begin(name: str = "sweep") -> bool:
        with session_scope() as scope:
            return retention.begin_chore(scope, name, every_s=60)

    assert [begin(), begin("retention")] == [False, False], "not as soon as a new release starts"
    session.execute(update(Chore).values(started_at=func.now() - timedelta(seconds=61)))
    session.commit()
    assert [begin(), begin(), begin("retention")] == [True, False, True]
    with session_scope() as scope:
        retention.give_up_chore(scope, "sweep")
    assert begin(), "one that failed is tried again soon"


def test_the_loop_does_what_is_due_and_tries_again_what_failed(session: Session, settings: Settings) -> None:
    finished_job(session, days_ago=40)
    get_blobs().put(blob_sweeper.OWNER_KEY, b"another database", media_type="text/plain")
    garbage = thumbnail_key("ab" * 32)
    get_blobs().put(garbage, b"1", media_type="image/webp")
    os.utime(os.path.join(settings.storage.url.removeprefix("file://"), garbage), (0, 0))
    stopping = threading.Event()
    often = load_settings(retention={"every_s": 0.05, "sweep_every_s": 0.05})
    thread = threading.Thread(target=Housekeeping(often, stopping).run)
    thread.start()
    try:
        wait_until(lambda: count(session, JobEvent) == 0, timeout_s=20, what="old events to go")
        assert get_blobs().exists(garbage), "the store is not ours to sweep"
        blob_sweeper.adopt(get_blobs())
        wait_until(lambda: not get_blobs().exists(garbage), timeout_s=20, what="the sweep to be tried again")
    finally:
        stopping.set()
        thread.join(20)
    assert not thread.is_alive()


def test_old_idempotency_keys_are_forgotten_a_batch_at_a_time(session: Session) -> None:
    owner_id = owners.ensure(session, "local")
    for number in range(5):
        assert idempotency.begin(session, owner_id=owner_id, route="r", key=f"{number}", fingerprint="f") is None
    session.execute(
        update(IdempotencyKey).where(IdempotencyKey.key != "4").values(created_at=func.now() - timedelta(hours=25))
    )
    idempotency.forget_old(session, limit=3)
    assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 2
    idempotency.forget_old(session, limit=3)
    assert session.scalars(select(IdempotencyKey.key)).all() == ["4"]


def test_an_output_remembers_a_reference_that_was_deleted_after_it(
    client: Client, session: Session, settings: Settings
) -> None:
    image = make_image(session, caption="a red apple")
    job = make_job(session)
    output = an_output(job)
    (reference,) = output.references
    reference.image_id, reference.sha256, reference.similarity = image.id, image.sha256, 0.75
    jobs.finish(session, claim(session, job), [output], timings={})
    session.commit()
    assert client.delete(f"{API}/images/{image.id}").status_code == 204
    (told,) = client.get(f"{API}/generations/{output.generation.id}").json["references"]
    assert (told["image_id"], told["sha256"], told["similarity"]) == (str(image.id), image.sha256, 0.75)
    using = client.get(f"{API}/images/{image.id}/generations").json["items"]
    assert [each["id"] for each in using] == [str(output.generation.id)]
    assert outputs.references_of(session, [output.generation.id])[output.generation.id][0].image_id == image.id


def test_a_deleted_job_leaves_nothing_to_ask_for(client: Client, session: Session) -> None:
    job = finished_job(session, days_ago=0, webhook=TELL_ALL)
    (output_id,) = (output.id for output in outputs.of_jobs(session, [job.id])[job.id])
    assert client.delete(f"{API}/jobs/{job.id}").status_code == 204
    for gone in (f"/jobs/{job.id}", f"/jobs/{job.id}/events", f"/generations/{output_id}"):
        assert client.get(API + gone).status_code == 404
    for table in (Job, JobEvent, Generation, GenerationReference, WebhookDelivery):
        assert count(session, table) == 0
