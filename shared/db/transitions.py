"""Changes of the state of jobs: each is one UPDATE, which also appends an event to every job that it changes."""

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, exists, func, literal, or_, select, update
from sqlalchemy import insert as insert_into
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.event import listen
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.contracts.bulks import BulkState
from shared.contracts.jobs import EventType, JobState
from shared.db import quotas, webhooks
from shared.db.tables import Bulk, Job, JobEvent
from shared.metrics import JOBS_FINISHED


def apply(
    session: Session, condition: ColumnElement[bool], *, event: EventType, data: dict[str, Any], **values: Any
) -> list[UUID]:
    """Update the jobs that meet the condition and append an event to each; return their ids."""
    statement = build(condition, event=event, data=literal(data, JSONB), **values)
    return ids_of(run(session, statement, {}, event=event))


def build(
    condition: ColumnElement[bool],
    *,
    event: EventType,
    data: ColumnElement[Any],
    returning: Sequence[InstrumentedAttribute[Any]] = (),
    **values: Any,
) -> Select[Any]:
    """A statement that updates the jobs that meet the condition, and appends an event with `data` to each.

    The UPDATE counts `last_seq` up, so the events of a job are numbered without gaps. `run` executes it.
    """
    read = dict.fromkeys([Job.id, Job.attempt, Job.owner_id, Job.last_seq, Job.webhook, *returning])
    moved = (
        update(Job)
        .where(condition)
        .values(**values, last_seq=Job.last_seq + 1)
        .returning(*read, data.label("event_data"))
        .cte("moved")
    )
    appended = insert_into(JobEvent).from_select(
        ["job_id", "seq", "type", "data"],
        select(moved.c.id, moved.c.last_seq, literal(event.value), moved.c.event_data),
    )
    return select(*(moved.c[each.key] for each in read)).add_cte(appended.cte("appended"))


def run(session: Session, statement: Select[Any], values: dict[str, Any], *, event: EventType) -> Sequence[Row[Any]]:
    """Run a `build`. Add a webhook delivery for each job whose webhook asks for the event.

    Returns a row for each job that it updated, with `id`, `attempt` and the columns of `returning`.
    """
    rows = session.execute(statement, values).all()
    for row in rows:
        if row.webhook is not None and event in row.webhook["events"]:
            webhooks.enqueue(session, row.id, row.last_seq, owner_id=row.owner_id, url=row.webhook["url"])
    return rows


def end(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> bool:
    return bool(end_all(session, condition, state, data=data, **values))


def end_all(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> list[UUID]:
    ended = apply(session, condition, event=EventType(state.value), data=data, **end_values(state), **values)
    count_ended(session, state, len(ended))
    if ended:
        quotas.give_back(session, ended)
    return ended


def end_values(state: JobState) -> dict[str, Any]:
    return {
        "state": state,
        "lease_until": None,
        "published_at": None,
        "published_lane": None,
        "finished_at": func.now(),
    }


def count_ended(session: Session, state: JobState, ended: int) -> None:
    """Count jobs that have ended, after the commit: a group of changes that cannot be committed is applied again."""
    if ended:
        listen(session, "after_commit", lambda _: JOBS_FINISHED.labels(state.value).inc(ended), once=True)


def requeue(session: Session, condition: ColumnElement[bool], *, data: dict[str, Any], **values: Any) -> list[UUID]:
    return apply(
        session,
        condition,
        event=EventType.REQUEUED,
        data=data,
        state=JobState.QUEUED,
        lease_until=None,
        published_at=None,
        published_lane=None,
        worker=None,
        **values,
    )


def bulk_runs() -> ColumnElement[bool]:
    """The job belongs to no bulk, or its bulk is running. `shared.db.dispatch` has the same condition in SQL."""
    return or_(Job.bulk_id.is_(None), exists().where(Bulk.id == Job.bulk_id, Bulk.state == BulkState.RUNNING))


def ids_of(rows: Iterable[Any]) -> list[UUID]:
    return [row.id for row in rows]
