"""Rows that are older than is kept, removed a bounded batch at a time; and when housekeeping last began."""

from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, delete, func, or_, select, tuple_
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db.models import Bulk, Chore, Generation, Job, JobEvent, WebhookDelivery

PENDING = "pending"


def retire_jobs(session: Session, *, days: float, limit: int) -> int:
    """Remove jobs that ended `days` ago, with their outputs and events; how many.

    One that a webhook has still to tell of stays, and one of a bulk stays as long as the bulk.
    """
    untold = select(WebhookDelivery.id).where(WebhookDelivery.job_id == Job.id, WebhookDelivery.state == PENDING)
    in_use = select(Bulk.id).where(
        Bulk.id == Job.bulk_id, or_(Bulk.finished_at.is_(None), Bulk.finished_at >= _ago(days))
    )
    old = select(Job.id).where(Job.finished_at < _ago(days), ~untold.exists(), ~in_use.exists())
    return _delete(session, Job, old.order_by(Job.finished_at), limit)


def retire_bulks(session: Session, *, days: float, limit: int) -> int:
    """Remove bulks that ended `days` ago and whose jobs are gone; how many."""
    old = select(Bulk.id).where(Bulk.finished_at < _ago(days), ~select(Job.id).where(Job.bulk_id == Bulk.id).exists())
    return _delete(session, Bulk, old, limit)


def retire_outputs(session: Session, *, days: float, limit: int) -> int:
    """Remove outputs made `days` ago; how many. Their jobs stay."""
    old = select(Generation.id).where(Generation.created_at < _ago(days)).order_by(Generation.created_at)
    return _delete(session, Generation, old, limit)


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
        select(JobEvent.job_id, JobEvent.seq)
        .join(Job, Job.id == JobEvent.job_id)
        .where(JobEvent.at < _ago(days), Job.finished_at < _ago(days), ~untold.exists())
        .order_by(JobEvent.at)
    )
    return _delete(session, JobEvent, old, limit)


def retire_deliveries(session: Session, *, days: float, limit: int) -> int:
    """Remove settled webhook deliveries made `days` ago from the log; how many."""
    old = (
        select(WebhookDelivery.id)
        .where(WebhookDelivery.state != PENDING, WebhookDelivery.created_at < _ago(days))
        .order_by(WebhookDelivery.created_at)
    )
    return _delete(session, WebhookDelivery, old, limit)


def begin_chore(session: Session, name: str, *, every_s: float) -> bool:
    """Take this turn of a chore, if nobody did in the last `every_s` seconds."""
    statement = upsert(Chore).values(name=name, started_at=func.now())
    turn = statement.on_conflict_do_update(
        index_elements=["name"],
        set_={"started_at": func.now()},
        where=Chore.started_at <= func.now() - timedelta(seconds=every_s),
    )
    return session.scalar(turn.returning(Chore.name)) is not None


def give_up_chore(session: Session, name: str) -> None:
    """Let the turn be taken again soon: this one failed."""
    session.execute(delete(Chore).where(Chore.name == name))


def _ago(days: float) -> ColumnElement[Any]:
    return func.now() - timedelta(days=days)


def _delete(session: Session, table: Any, old: Any, limit: int) -> int:
    key = table.__mapper__.primary_key
    chosen = old.limit(limit).with_for_update(of=table, skip_locked=True).subquery()
    statement = delete(table).where(tuple_(*key).in_(select(*chosen.c))).returning(*key)
    return len(session.execute(statement.execution_options(synchronize_session=False)).all())
