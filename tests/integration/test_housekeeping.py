"""Retention of rows and sweeping of blobs, on real Postgres."""

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
    IdempotencyKey,
    Job,
    JobEvent,
    Output,
    OutputReference,
    PeriodicTask,
    WebhookDelivery,
)
from shared.settings import Settings, load_settings
from shared.storage import get_blobs, thumbnail_key
from tests import one_attempt
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client
from tests.integration.test_jobs import an_output, claim
from tests.stack import wait_until
from worker_service.maintenance import housekeeping
from worker_service.maintenance.housekeeping import Housekeeping

WEBHOOK = Webhook(url="https://example.com/hook", events=[EventType.SUCCEEDED])


def finished_job(session: Session, *, days_ago: float, **details: Any) -> Job:
    """A job with an output and a reference, that ended `days_ago` days ago."""
    job = make_job(session, **details)
    assert one_attempt.finish(session, claim(session, job), [an_output(job)], timings={})
    then = func.now() - timedelta(days=days_ago)
    session.execute(update(Job).where(Job.id == job.id).values(finished_at=then))
    session.execute(update(JobEvent).where(JobEvent.job_id == job.id).values(at=then))
    session.execute(update(Output).where(Output.job_id == job.id).values(created_at=then))
    session.execute(update(WebhookDelivery).where(WebhookDelivery.job_id == job.id).values(created_at=then))
    session.commit()
    return job


def settle_deliveries(session: Session) -> None:
    session.execute(update(WebhookDelivery).values(state="delivered"))
    session.commit()


def delete_old_rows(**kept: float) -> None:
    Housekeeping(load_settings(retention=kept), threading.Event()).delete_old_rows()


def count(session: Session, table: Any) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(table)) or 0


def test_by_default_jobs_and_outputs_stay_and_events_are_deleted_after_30_days(session: Session) -> None:
    old, young = finished_job(session, days_ago=31), finished_job(session, days_ago=29)
    delete_old_rows()
    assert {count(session, table) for table in (Job, Output, OutputReference)} == {2}
    assert jobs.list_events(session, old.id, after=0) == []
    assert len(jobs.list_events(session, young.id, after=0)) == 3


def test_all_events_of_a_job_stay_until_it_has_ended_long_ago(session: Session) -> None:
    waiting, young = make_job(session), finished_job(session, days_ago=1)
    session.execute(update(JobEvent).where(JobEvent.seq == 1).values(at=func.now() - timedelta(days=90)))
    session.commit()
    delete_old_rows()
    assert [len(jobs.list_events(session, job.id, after=0)) for job in (waiting, young)] == [1, 3]


def test_old_jobs_are_deleted_with_their_own_rows_only(session: Session) -> None:
    finished_job(session, days_ago=11, webhook=WEBHOOK)
    young = finished_job(session, days_ago=9, webhook=WEBHOOK)
    queued, running = make_job(session), make_job(session, state=JobState.PROCESSING)
    session.execute(update(Job).values(created_at=func.now() - timedelta(days=90)))
    settle_deliveries(session)
    delete_old_rows(jobs_days=10)
    assert set(session.scalars(select(Job.id))) == {young.id, queued.id, running.id}
    for table in (Output, OutputReference, WebhookDelivery):
        assert count(session, table) == 1, table
    assert set(session.scalars(select(JobEvent.job_id))) == {young.id, queued.id, running.id}


def test_a_job_with_a_pending_webhook_delivery_is_kept(session: Session) -> None:
    job = finished_job(session, days_ago=100, webhook=WEBHOOK)
    delete_old_rows(jobs_days=10)
    assert count(session, Job) == 1
    assert [event.type for event in jobs.list_events(session, job.id, after=0)] == ["succeeded"]
    assert count(session, WebhookDelivery) == 1
    settle_deliveries(session)
    delete_old_rows(jobs_days=10)
    assert count(session, Job) == 0


def test_webhook_deliveries_are_deleted_by_their_own_age(session: Session) -> None:
    finished_job(session, days_ago=3, webhook=WEBHOOK)
    delete_old_rows(deliveries_days=2)
    assert count(session, WebhookDelivery) == 1, "not delivered yet"
    settle_deliveries(session)
    delete_old_rows(deliveries_days=4)
    assert count(session, WebhookDelivery) == 1
    delete_old_rows(deliveries_days=2)
    assert count(session, WebhookDelivery) == 0
    assert count(session, JobEvent) == 3


def test_outputs_can_be_deleted_before_their_jobs(session: Session) -> None:
    job = finished_job(session, days_ago=3)
    delete_old_rows(outputs_days=2)
    assert (count(session, Job), count(session, Output), count(session, OutputReference)) == (1, 0, 0)
    assert len(jobs.list_events(session, job.id, after=0)) == 3


def test_the_jobs_of_a_bulk_are_kept_and_deleted_together_with_it(session: Session) -> None:
    bulk = Bulk(id=uuid4(), owner_id=owners.ensure(session, "local"), lane=3, on_invalid="refuse", state="running")
    session.add(bulk)
    session.flush()
    job = finished_job(session, days_ago=20)
    session.execute(update(Job).where(Job.id == job.id).values(bulk_id=bulk.id))
    session.commit()
    delete_old_rows(jobs_days=10)
    assert (count(session, Job), count(session, Bulk)) == (1, 1)
    session.execute(update(Bulk).values(state="completed", finished_at=func.now() - timedelta(days=11)))
    session.commit()
    delete_old_rows(jobs_days=10)
    assert (count(session, Job), count(session, Bulk)) == (0, 0)


def test_a_large_backlog_is_deleted_in_batches(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(housekeeping, "ROWS_PER_DELETE", 4)
    for _ in range(10):
        finished_job(session, days_ago=40)
    with session_scope() as scope:
        assert retention.delete_old_events(scope, days=30, limit=4) == 4
    delete_old_rows()
    assert count(session, JobEvent) == 0


def test_one_of_several_processes_runs_a_periodic_task_when_it_is_due(session: Session) -> None:
    def begin(name: str = "sweep") -> bool:
        with session_scope() as scope:
            return retention.begin_periodic_task(scope, name, every_s=60)

    assert [begin(), begin("retention")] == [False, False], "not as soon as a new release starts"
    session.execute(update(PeriodicTask).values(started_at=func.now() - timedelta(seconds=61)))
    session.commit()
    assert [begin(), begin(), begin("retention")] == [True, False, True]
    with session_scope() as scope:
        retention.release_periodic_task(scope, "sweep")
    assert begin(), "a failed task is due again at once"


def test_the_loop_runs_due_tasks_and_retries_failed_ones(session: Session, settings: Settings) -> None:
    finished_job(session, days_ago=40)
    get_blobs().put(blob_sweeper.OWNER_KEY, b"another database", media_type="text/plain")
    garbage = thumbnail_key("ab" * 32, b"1")
    get_blobs().put(garbage, b"1", media_type="image/webp")
    os.utime(os.path.join(settings.storage.url.removeprefix("file://"), garbage), (0, 0))
    stopping = threading.Event()
    often = load_settings(retention={"every_s": 0.05, "sweep_every_s": 0.05})
    thread = threading.Thread(target=Housekeeping(often, stopping).run)
    thread.start()
    try:
        wait_until(lambda: count(session, JobEvent) == 0, timeout_s=20, what="old events to go")
        assert get_blobs().exists(garbage), "the store belongs to another database"
        blob_sweeper.adopt(get_blobs())
        wait_until(lambda: not get_blobs().exists(garbage), timeout_s=20, what="the sweep to be retried")
    finally:
        stopping.set()
        thread.join(20)
    assert not thread.is_alive()


def test_old_idempotency_keys_are_deleted_in_batches(session: Session) -> None:
    owner_id = owners.ensure(session, "local")
    for number in range(5):
        assert idempotency.begin(session, owner_id=owner_id, route="r", key=f"{number}", fingerprint="f") is None
    session.execute(
        update(IdempotencyKey).where(IdempotencyKey.key != "4").values(created_at=func.now() - timedelta(hours=25))
    )
    idempotency.delete_old(session, limit=3)
    assert session.scalar(select(func.count()).select_from(IdempotencyKey)) == 2
    idempotency.delete_old(session, limit=3)
    assert session.scalars(select(IdempotencyKey.key)).all() == ["4"]


def test_an_output_keeps_its_reference_to_a_deleted_image(client: Client, session: Session, settings: Settings) -> None:
    image = make_image(session, caption="a red apple")
    job = make_job(session)
    output = an_output(job)
    (reference,) = output.references
    reference.image_id, reference.sha256, reference.similarity = image.id, image.sha256, 0.75
    one_attempt.finish(session, claim(session, job), [output], timings={})
    session.commit()
    assert client.delete(f"{API}/images/{image.id}").status_code == 204
    (shown,) = client.get(f"{API}/generations/{output.output.id}").json["references"]
    assert (shown["image_id"], shown["sha256"], shown["similarity"]) == (str(image.id), image.sha256, 0.75)
    using = client.get(f"{API}/images/{image.id}/generations").json["items"]
    assert [each["id"] for each in using] == [str(output.output.id)]
    assert outputs.list_references(session, [output.output.id])[output.output.id][0].image_id == image.id


def test_a_deleted_job_leaves_no_rows_behind(client: Client, session: Session) -> None:
    job = finished_job(session, days_ago=0, webhook=WEBHOOK)
    (output_id,) = (output.id for output in outputs.list_by_job(session, [job.id])[job.id])
    assert client.delete(f"{API}/jobs/{job.id}").status_code == 204
    for gone in (f"/jobs/{job.id}", f"/jobs/{job.id}/events", f"/generations/{output_id}"):
        assert client.get(API + gone).status_code == 404
    for table in (Job, JobEvent, Output, OutputReference, WebhookDelivery):
        assert count(session, table) == 0
