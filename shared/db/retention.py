"""Rows that are older than is kept, removed a bounded batch at a time; and when housekeeping last began."""

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, delete, func, literal_column, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db.tables import Bulk, Chore, Generation, Job, JobEvent, WebhookDelivery

PENDING = "pending"


def retire_jobs(session: Session, *, days: float, limit: int) -> int:
    """Remove jobs that ended `days` ago, with their outputs and events; how many.

    One that a webhook has still to tell of stays, and one of a bulk stays as long as the bulk.
    """
    untold = select(WebhookDelivery.id).where(WebhookDelivery.job_id == Job.id, WebhookDelivery.state == PENDING)
    in_use = select(Bulk.id).where(
        Bulk.id == Job.bulk_id, or_(Bulk.finished_at.is_(None), Bulk.finished_at >= _ago(days))
    )
    # Each `or` is true of most rows, and keeps the planner from joining all jobs with all deliveries and bulks.
    old = Job.finished_at < _ago(days)
    told = or_(Job.webhook.is_(None), ~untold.exists())
    free = or_(Job.bulk_id.is_(None), ~in_use.exists())
    return delete_batch(session, Job, select(Job).where(old, told, free).order_by(Job.finished_at), limit=limit)


def retire_bulks(session: Session, *, days: float, limit: int) -> int:
    """Remove bulks that ended `days` ago and whose jobs are gone; how many."""
    empty = ~select(Job.id).where(Job.bulk_id == Bulk.id).exists()
    return delete_batch(session, Bulk, select(Bulk).where(Bulk.finished_at < _ago(days), empty), limit=limit)


def retire_outputs(session: Session, *, days: float, limit: int) -> int:
    """Remove outputs made `days` ago; how many. Their jobs stay."""
    old = select(Generation).where(Generation.created_at < _ago(days)).order_by(Generation.created_at)
    return delete_batch(session, Generation, old, limit=limit)


def retire_events(session: Session, *, days: float, limit: int) -> int:
    """Remove the events of jobs that ended `days` ago, with the log of their deliveries; how many.

    Never a part of a story only: what is told of a job that has not ended that long ago stays whole.
    """
    untold = select(WebhookDelivery.id).where(
        WebhookDelivery.job_id == JobEvent.job_id,
        WebhookDelivery.seq == JobEvent.seq,
        WebhookDelivery.state == PENDING,
    )
    old = (
        select(JobEvent)
        .join(Job, Job.id == JobEvent.job_id)
        .where(JobEvent.at < _ago(days), Job.finished_at < _ago(days), or_(Job.webhook.is_(None), ~untold.exists()))
        .order_by(JobEvent.at)
    )
    return delete_batch(session, JobEvent, old, limit=limit)


def retire_deliveries(session: Session, *, days: float, limit: int) -> int:
    """Remove settled webhook deliveries made `days` ago from the log; how many."""
    old = (
        select(WebhookDelivery)
        .where(WebhookDelivery.state != PENDING, WebhookDelivery.created_at < _ago(days))
        .order_by(WebhookDelivery.created_at)
    )
    return delete_batch(session, WebhookDelivery, old, limit=limit)


def begin_chore(session: Session, name: str, *, every_s: float) -> bool:
    """Take this turn of a chore, if nobody did in the last `every_s` seconds.

    The first turn of all comes that long after the first call: a release that throws away what the one before it did
    not know how to keep must not begin while both run.
    """
    session.execute(upsert(Chore).values(name=name).on_conflict_do_nothing(index_elements=["name"]))
    turn = (
        update(Chore)
        .where(Chore.name == name, Chore.started_at <= func.now() - timedelta(seconds=every_s))
        .values(started_at=func.now())
        .returning(Chore.name)
    )
    return session.scalar(turn) is not None


def give_up_chore(session: Session, name: str) -> None:
    """Let the turn be taken again soon: this one failed."""
    session.execute(update(Chore).where(Chore.name == name).values(started_at=func.to_timestamp(0)))


def _ago(days: float) -> ColumnElement[Any]:
    return func.now() - timedelta(days=days)


def delete_batch(session: Session, table: Any, old: Select[Any], *, limit: int) -> int:
    """Remove up to `limit` rows of `table` that `old` selects, in its order; how many."""
    # By their places in the table: joined by key, PostgreSQL read all of it for every batch.
    place: ColumnElement[Any] = literal_column(f"{table.__tablename__}.ctid")
    chosen = old.with_only_columns(place).limit(limit).with_for_update(of=table, skip_locked=True)
    removed = (
        delete(table)
        .where(place == func.any(func.array(chosen.scalar_subquery())))
        .returning(*table.__mapper__.primary_key)
        .execution_options(synchronize_session=False)
    )
    return len(session.execute(removed).all())
