"""Deletes old rows in bounded batches, and records when each periodic task last started."""

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, literal_column, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db.tables import Bulk, Collection, Image, Job, JobEvent, Output, PeriodicTask, WebhookDelivery

PENDING = "pending"


def delete_old_jobs(session: Session, *, days: float, limit: int) -> int:
    """Delete jobs that ended more than `days` ago, with their outputs and events; return how many.

    A job with a pending webhook delivery is kept. A job of a bulk is kept until the bulk too ended `days` ago.
    """
    undelivered = select(WebhookDelivery.id).where(WebhookDelivery.job_id == Job.id, WebhookDelivery.state == PENDING)
    in_use = select(Bulk.id).where(
        Bulk.id == Job.bulk_id, or_(Bulk.finished_at.is_(None), Bulk.finished_at >= _ago(days))
    )
    # The first half of each `or` is true for most rows. It keeps the planner from joining all jobs with all deliveries
    # and bulks.
    old = Job.finished_at < _ago(days)
    delivered = or_(Job.webhook.is_(None), ~undelivered.exists())
    unused = or_(Job.bulk_id.is_(None), ~in_use.exists())
    return delete_batch(session, Job, select(Job).where(old, delivered, unused).order_by(Job.finished_at), limit=limit)


def delete_old_bulks(session: Session, *, days: float, limit: int) -> int:
    """Delete bulks that ended more than `days` ago and have no jobs left; return how many."""
    empty = ~select(Job.id).where(Job.bulk_id == Bulk.id).exists()
    return delete_batch(session, Bulk, select(Bulk).where(Bulk.finished_at < _ago(days), empty), limit=limit)


def delete_old_outputs(session: Session, *, days: float, limit: int) -> int:
    """Delete outputs generated more than `days` ago, without their jobs; return how many."""
    old = select(Output).where(Output.created_at < _ago(days)).order_by(Output.created_at)
    return delete_batch(session, Output, old, limit=limit)


def delete_old_events(session: Session, *, days: float, limit: int) -> int:
    """Delete the events of jobs that ended more than `days` ago, with their deliveries; return how many.

    An event with a pending webhook delivery is kept, and so are all events of jobs that ended later or still run.
    """
    undelivered = select(WebhookDelivery.id).where(
        WebhookDelivery.job_id == JobEvent.job_id,
        WebhookDelivery.seq == JobEvent.seq,
        WebhookDelivery.state == PENDING,
    )
    delivered = or_(Job.webhook.is_(None), ~undelivered.exists())
    old = (
        select(JobEvent)
        .join(Job, Job.id == JobEvent.job_id)
        .where(JobEvent.at < _ago(days), Job.finished_at < _ago(days), delivered)
        .order_by(JobEvent.at)
    )
    return delete_batch(session, JobEvent, old, limit=limit)


def delete_old_deliveries(session: Session, *, days: float, limit: int) -> int:
    """Delete finished webhook deliveries added more than `days` ago; return how many."""
    old = (
        select(WebhookDelivery)
        .where(WebhookDelivery.state != PENDING, WebhookDelivery.created_at < _ago(days))
        .order_by(WebhookDelivery.created_at)
    )
    return delete_batch(session, WebhookDelivery, old, limit=limit)


def delete_images_of_deleted_collections(session: Session, *, limit: int) -> int:
    """Delete images of collections that were deleted; return how many."""
    deleted = select(Collection.id).where(Collection.deleted_at.is_not(None))
    return delete_batch(session, Image, select(Image).where(Image.collection_id.in_(deleted)), limit=limit)


def delete_emptied_collections(session: Session, *, limit: int) -> int:
    """Delete the rows of collections that were deleted and have no images left; return how many."""
    empty = ~select(Image.id).where(Image.collection_id == Collection.id).exists()
    deleted = select(Collection).where(Collection.deleted_at.is_not(None), empty)
    return delete_batch(session, Collection, deleted, limit=limit)


def begin_periodic_task(session: Session, name: str, *, every_s: float) -> bool:
    """Whether to run the periodic task now: True for one caller at most every `every_s` seconds.

    The very first run comes `every_s` after the first call. During an upgrade the old release still runs. The new one
    must not yet delete rows or blobs that the old one does not know how to protect.
    """
    session.execute(upsert(PeriodicTask).values(name=name).on_conflict_do_nothing(index_elements=["name"]))
    start = (
        update(PeriodicTask)
        .where(PeriodicTask.name == name, PeriodicTask.started_at <= func.now() - timedelta(seconds=every_s))
        .values(started_at=func.now())
        .returning(PeriodicTask.name)
    )
    return session.scalar(start) is not None


def release_periodic_task(session: Session, name: str) -> None:
    """Let the next caller run the task again at once, because this run failed."""
    session.execute(update(PeriodicTask).where(PeriodicTask.name == name).values(started_at=func.to_timestamp(0)))


def _ago(days: float) -> ColumnElement[Any]:
    return func.now() - timedelta(days=days)


def delete_batch(session: Session, table: Any, old: Select[Any], *, limit: int) -> int:
    """Delete up to `limit` rows of `table` that `old` selects, in its order; return how many."""
    # Rows are found by ctid, their place in the table. With a join by key, PostgreSQL read the whole table every time.
    ctid: ColumnElement[Any] = literal_column(f"{table.__tablename__}.ctid")
    chosen = old.with_only_columns(ctid).limit(limit).with_for_update(of=table, skip_locked=True)
    removed = (
        delete(table)
        .where(ctid == func.any(func.array(chosen.scalar_subquery())))
        .returning(*table.__mapper__.primary_key)
        .execution_options(synchronize_session=False)
    )
    return len(session.execute(removed).all())
