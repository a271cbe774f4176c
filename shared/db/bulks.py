"""Bulks: receiving their lines, making jobs of their items when the turn comes, and counting how far they are.

Items wait in a table of their own. Of each running bulk a few dozen are jobs that wait, so that whatever looks at
waiting jobs sees few rows however long bulks are, and pausing or canceling one touches few rows too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
from sqlalchemy import ColumnElement, Row, and_, delete, false, func, not_, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.bulks import BulkCounts, BulkOptions, BulkQuery, BulkState, ItemState
from shared.contracts.jobs import JobState
from shared.db import jobs, paging, quotas, webhooks
from shared.db.tables import Bulk, BulkItem, BulkLineError, Job
from shared.errors import BulkStateError, ResourceNotFoundError
from shared.metrics import JOBS_SUBMITTED
from shared.settings import LimitSettings

RATE_S = 60
"""The rate is that of the last minute."""
RETRIED = (JobState.FAILED, JobState.DEAD, JobState.EXPIRED)
SWEPT_ROWS = 5000
"""Items of a bulk that never ran are removed so many at a time."""


@dataclass(frozen=True)
class Progress:
    """How far a bulk is. rate_per_s: items ended per second, none while that cannot be said."""

    counts: BulkCounts
    rate_per_s: float | None


# --- receiving ----------------------------------------------------------------------------------------------------


def create(session: Session, options: BulkOptions, *, owner_id: UUID, received_lines: int, digest: bytes) -> Bulk:
    """A bulk that receives. `received_lines` of it, with that digest, were its header."""
    bulk = Bulk(
        id=uuid4(),
        owner_id=owner_id,
        name=options.name,
        state=BulkState.RECEIVING,
        lane=options.lane.rank,
        on_invalid=options.on_invalid,
        defaults=options.defaults,
        webhook=None if options.webhook is None else options.webhook.model_dump(mode="json"),
        bulk_metadata=options.metadata,
        announced=options.items or 0,
        expires_in_s=options.expires_in_s,
        received_lines=received_lines,
        digest=digest,
    )
    session.add(bulk)
    session.flush()
    session.refresh(bulk)
    return bulk


def open_of(session: Session, owner_id: UUID, *, lock: bool = False) -> tuple[int, int]:
    """An owner's unfinished bulks, and the items that they have or have announced.

    lock: until the end of the transaction nobody else counts with a lock, so that two cannot take the same room.
    """
    if lock:
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"bulks:{owner_id}", 0))))
    items = func.coalesce(func.sum(func.greatest(Bulk.announced, Bulk.total + Bulk.invalid)), 0)
    counted = session.execute(
        select(func.count(), items).where(Bulk.owner_id == owner_id, Bulk.finished_at.is_(None))
    ).one()
    return counted[0], int(counted[1])


def lines_of(session: Session, bulk_id: UUID, custom_ids: Sequence[str]) -> dict[str, int]:
    """Which of these names the bulk already has, and in which line."""
    statement = select(BulkItem.custom_id, BulkItem.line).where(
        BulkItem.bulk_id == bulk_id, BulkItem.custom_id.in_(custom_ids)
    )
    return {str(name): line for name, line in session.execute(statement)}


INSERT_ITEMS = text(
    """
    insert into bulk_items (bulk_id, line, custom_id, kind, model, images, parameters, metadata, timeout_s)
    select :bulk_id, line, custom_id, kind, model, images, parameters, metadata, timeout_s
    from jsonb_to_recordset(cast(:rows as jsonb)) as row(
        line int, custom_id text, kind text, model text, images int, parameters jsonb, metadata jsonb, timeout_s float8
    )
    """
)
INSERT_ERRORS = text(
    """
    insert into bulk_line_errors (bulk_id, line, custom_id, code, detail, errors)
    select :bulk_id, line, custom_id, code, detail, errors
    from jsonb_to_recordset(cast(:rows as jsonb)) as row(
        line int, custom_id text, code text, detail text, errors jsonb
    )
    """
)
"""Psycopg2 cannot COPY while a callback bounds its waits. One JSON value for hundreds of rows is as quick."""


def append(
    session: Session,
    bulk: Bulk,
    *,
    received_lines: int,
    digest: bytes,
    items: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
) -> None:
    """Store what a chunk of lines has come to; the bulk's row is locked by the caller.

    items, errors: columns by name, where values that are JSON already may be `orjson.Fragment`.
    """
    for statement, rows in ((INSERT_ITEMS, items), (INSERT_ERRORS, errors)):
        if rows:
            session.execute(statement, {"bulk_id": bulk.id, "rows": orjson.dumps(rows).decode()})
    bulk.models = sorted({*bulk.models, *(item["model"] for item in items)})
    bulk.received_lines, bulk.digest = received_lines, digest
    bulk.total += len(items)
    bulk.images += sum(item["images"] for item in items)
    bulk.invalid += len(errors)
    bulk.received_at = func.now()
    session.flush()


def start(session: Session, bulk: Bulk, limits: LimitSettings) -> None:
    """The lines are complete: from now on items become jobs. Their images count towards today's quota.

    Raises:
        QuotaExceededError
    """
    bulk.quota_day = quotas.reserve(session, bulk.owner_id, bulk.images, limits)
    bulk.state = BulkState.RUNNING
    bulk.started_at = func.now()
    if bulk.expires_in_s is not None:
        bulk.expires_at = func.now() + timedelta(seconds=bulk.expires_in_s)
    session.flush()
    session.refresh(bulk)


def analyze(session: Session) -> None:
    """Tell the planner of many items that have come at once.

    Until then it takes them for a few, and reads and sorts all of them for each page. The server finds out by itself,
    but looks once a minute.
    """
    session.execute(text("analyze (skip_locked) bulk_items"))


def refuse(session: Session, bulk: Bulk) -> None:
    bulk.state, bulk.finished_at = BulkState.REFUSED, func.now()
    session.flush()
    session.refresh(bulk)


# --- reading ------------------------------------------------------------------------------------------------------


def get(session: Session, bulk_id: UUID, *, owner_id: UUID, lock: bool = False) -> Bulk:
    """
    lock: nobody else changes it until the end of the transaction.

    Raises:
        ResourceNotFoundError: there is none, or it belongs to somebody else.
    """
    statement = select(Bulk).where(Bulk.id == bulk_id, Bulk.owner_id == owner_id)
    bulk = session.scalar(statement.with_for_update() if lock else statement)
    if bulk is None:
        raise ResourceNotFoundError("There is no such bulk.", bulk_id=str(bulk_id))
    return bulk


def page(session: Session, query: BulkQuery, *, owner_id: UUID) -> tuple[list[Bulk], str | None]:
    """An owner's bulks, newest first."""
    statement = select(Bulk).where(Bulk.owner_id == owner_id)
    if query.state is not None:
        statement = statement.where(Bulk.state == query.state)
    return paging.page(
        session, statement, created_at=Bulk.created_at, id=Bulk.id, cursor=query.cursor, limit=query.limit
    )


def progress(session: Session, bulks: Sequence[Bulk]) -> dict[UUID, Progress]:
    """How far each of these is. Reads the index of its jobs alone."""
    counted = session.execute(PROGRESS, {"ids": [bulk.id for bulk in bulks], "rate_s": RATE_S}).all()
    of_bulk: dict[UUID, list[Row[Any]]] = {bulk.id: [] for bulk in bulks}
    for row in counted:
        of_bulk[row.id].append(row)
    return {bulk.id: _progress(bulk, of_bulk[bulk.id]) for bulk in bulks}


PROGRESS = text(
    """
    select bulks.id, bulks.fed, extract(epoch from now() - bulks.started_at) as runs_s, by_state.*
    from bulks cross join lateral (
        select state, count(*) as jobs,
            count(*) filter (where finished_at > now() - :rate_s * interval '1 s') as lately,
            count(*) filter (where finished_at < bulks.retry_before) as before_retry
        from jobs where bulk_id = bulks.id group by state
    ) by_state
    where bulks.id = any(:ids)
    """
)
"""One statement, so that no item is seen both as a job and as waiting for one."""


def _progress(bulk: Bulk, rows: Sequence[Row[Any]]) -> Progress:
    fed = rows[0].fed if rows else bulk.fed
    counts = {row.state: row.jobs for row in rows}
    waiting = state_without_job(bulk)
    counts[waiting] = counts.get(waiting, 0) + bulk.total - fed
    for row in rows:
        if row.state in RETRIED:
            counts[row.state] -= row.before_retry
            counts[waiting] += row.before_retry
    counts[ItemState.DELETED] = fed - sum(row.jobs for row in rows)
    rate_per_s = None
    if bulk.state == BulkState.RUNNING and rows:
        rate_per_s = sum(row.lately for row in rows) / min(RATE_S, max(float(rows[0].runs_s), 1))
    return Progress(BulkCounts(**counts), rate_per_s)


def state_without_job(bulk: Bulk) -> ItemState:
    """What an item of the bulk is that has not become a job."""
    if bulk.state in (BulkState.CANCELED, BulkState.REFUSED, BulkState.ABANDONED):
        return ItemState.CANCELED
    # Items of a bulk that completed without them had come too late.
    return ItemState.EXPIRED if bulk.state == BulkState.COMPLETED else ItemState.QUEUED


def items(
    session: Session, bulk: Bulk, *, after: int, limit: int, state: ItemState | None = None
) -> tuple[list[tuple[BulkItem, Job | None, ItemState]], int | None]:
    """A page of items with their jobs and states in the order of lines, and the line behind which the next page starts.

    One that waits to be tried again is queued, and has no job.
    """
    of_bulk = select(BulkItem, Job).where(BulkItem.bulk_id == bulk.id, BulkItem.line > after)
    with_any_job = of_bulk.outerjoin(Job, Job.id == BulkItem.job_id)
    if state is None:
        parts = [with_any_job]
    elif state is ItemState.DELETED:
        parts = [with_any_job.where(BulkItem.job_id.is_not(None), Job.id.is_(None))]
    else:
        # Asked for by their jobs, the few failed ones of many are found by index.
        of_item = and_(Job.bulk_id == bulk.id, Job.bulk_line == BulkItem.line)
        parts = [of_bulk.join(Job, and_(of_item, Job.state == state.value, not_(_waits_again(bulk))))]
        if state is state_without_job(bulk):
            parts.append(with_any_job.where(BulkItem.job_id.is_(None)))
            if bulk.retry_before is not None:
                parts.append(of_bulk.join(Job, and_(of_item, _waits_again(bulk))))
    rows = [
        _with_state(bulk, item, job)
        for part in parts
        for item, job in session.execute(part.order_by(BulkItem.line).limit(limit + 1))
    ]
    rows.sort(key=lambda row: row[0].line)
    return rows[:limit], rows[limit - 1][0].line if len(rows) > limit else None


def _with_state(bulk: Bulk, item: BulkItem, job: Job | None) -> tuple[BulkItem, Job | None, ItemState]:
    if job is None:
        return item, None, state_without_job(bulk) if item.job_id is None else ItemState.DELETED
    before, ended = bulk.retry_before, job.finished_at
    if before is not None and ended is not None and job.state in RETRIED and ended < before:
        return item, None, state_without_job(bulk)
    return item, job, ItemState(job.state)


def _waits_again(bulk: Bulk) -> ColumnElement[bool]:
    """Of jobs: whether their item will get another one."""
    if bulk.retry_before is None:
        return false()
    return and_(Job.bulk_id == bulk.id, Job.state.in_(RETRIED), Job.finished_at < bulk.retry_before)


def line_errors(session: Session, bulk_id: UUID, *, after: int, limit: int) -> tuple[list[BulkLineError], int | None]:
    """A page of invalid lines, and the line behind which the next page starts."""
    statement = select(BulkLineError).where(BulkLineError.bulk_id == bulk_id, BulkLineError.line > after)
    rows = list(session.scalars(statement.order_by(BulkLineError.line).limit(limit + 1)))
    return rows[:limit], rows[limit - 1].line if len(rows) > limit else None


# --- what owners do -----------------------------------------------------------------------------------------------


def pause(session: Session, bulk: Bulk) -> None:
    """Start nothing more of it: while it does not run, neither are its items fed nor its jobs claimed.

    Raises:
        BulkStateError: it is not running.
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED):
        raise BulkStateError("Only a running bulk can be paused.", state=bulk.state)
    # The messages of those that are published will be taken for nothing.
    waiting = select(Job.id).where(Job.bulk_id == bulk.id, Job.state == JobState.QUEUED)
    jobs.unpublish(session, session.scalars(waiting).all())
    bulk.state = BulkState.PAUSED
    session.flush()


def resume(session: Session, bulk: Bulk) -> None:
    """
    Raises:
        BulkStateError: it is not paused.
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED):
        raise BulkStateError("Only a paused bulk can be resumed.", state=bulk.state)
    bulk.state = BulkState.RUNNING
    session.flush()


def cancel(session: Session, bulk: Bulk) -> list[UUID]:
    """End the bulk and every job of it that has not ended; the ids of those.

    Raises:
        BulkStateError: it has ended otherwise.
    """
    if bulk.state == BulkState.CANCELED:
        return []
    if bulk.finished_at is not None:
        raise BulkStateError("The bulk has already ended.", state=bulk.state)
    ended = jobs.cancel_bulk(session, bulk.id)
    _end(session, bulk, BulkState.CANCELED)
    return ended


def retry_failed(session: Session, bulk: Bulk, limits: LimitSettings) -> None:
    """Have items that failed, expired or died by now wait for another job each, and run the bulk again.

    They get it when their turn comes, so this takes no longer for many. Their jobs of before stay, but leave the bulk
    then; the new ones name them in `retry_of`. Their images count again.

    Raises:
        BulkStateError: it has not started, or was canceled.
        QuotaExceededError
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED, BulkState.COMPLETED):
        raise BulkStateError("Only a bulk that runs or has completed can be tried again.", state=bulk.state)
    came_too_late = _images_left(session, bulk) if bulk.state == BulkState.COMPLETED and bulk.fed < bulk.total else 0
    now = session.scalars(select(func.clock_timestamp())).one()
    failed = and_(Job.bulk_id == bulk.id, Job.state.in_(RETRIED), Job.finished_at < now, not_(_waits_again(bulk)))
    images = session.scalar(select(func.sum(Job.images)).where(failed)) or 0
    if not images and not came_too_late:
        return
    today = quotas.reserve(session, bulk.owner_id, images + came_too_late, limits)
    if images:
        bulk.retry_before = now
    bulk.expires_at = None
    if bulk.state == BulkState.COMPLETED:
        # Items of a bulk that still runs may count towards another day, to which they must be given back.
        bulk.quota_day = today
        bulk.state, bulk.finished_at = BulkState.RUNNING, None
    session.flush()


RETRY = text(
    """
    with failed as (
        select id, bulk_line from jobs
        where bulk_id = :bulk_id and state = any(:states) and finished_at < :before and model = :model
        limit :most for update
    ), left_behind as (
        update jobs set bulk_id = null, bulk_line = null from failed where jobs.id = failed.id
    ), waiting as (
        update bulk_items set job_id = null, retry_of = failed.id
        from failed where bulk_items.bulk_id = :bulk_id and bulk_items.line = failed.bulk_line
        returning line
    )
    select count(*) from waiting
    """
)


def _free_failed(session: Session, bulk: Bulk, model: str, most: int) -> None:
    """Take the jobs from up to `most` items that wait to be tried again, so that they are fed like any other."""
    parameters = {"bulk_id": bulk.id, "states": list(RETRIED), "before": bulk.retry_before, "model": model}
    freed = int(session.execute(RETRY, {**parameters, "most": most}).scalar_one())
    bulk.fed -= freed
    if freed < most and session.scalar(select(Job.id).where(_waits_again(bulk)).limit(1)) is None:
        bulk.retry_before = None
    session.flush()


def _images_left(session: Session, bulk: Bulk) -> int:
    """Of items that wait for a job."""
    first = select(func.sum(BulkItem.images)).where(BulkItem.bulk_id == bulk.id, BulkItem.job_id.is_(None))
    again = select(func.sum(Job.images)).where(_waits_again(bulk))
    return (session.scalar(first) or 0) + (session.scalar(again) or 0)


# --- feeding ------------------------------------------------------------------------------------------------------


FEED = text(
    """
    with next as (
        select line from bulk_items
        where bulk_id = :bulk_id and model = :model and job_id is null
        order by line limit :most
    ), fed as (
        update bulk_items item set job_id = gen_random_uuid()
        from next where item.bulk_id = :bulk_id and item.line = next.line
        returning item.*
    ), made as (
        insert into jobs (
            id, owner_id, bulk_id, bulk_line, kind, state, lane, model, images, parameters, metadata, timeout_s,
            expires_at, retry_of, quota_day, last_seq
        )
        select fed.job_id, bulk.owner_id, bulk.id, fed.line, fed.kind, 'queued', bulk.lane, fed.model, fed.images,
            fed.parameters, fed.metadata, fed.timeout_s, bulk.expires_at, fed.retry_of, bulk.quota_day, 1
        from fed join bulks bulk on bulk.id = fed.bulk_id
        order by fed.line
        returning id, kind
    ), told as (
        insert into job_events (job_id, seq, type, data) select id, 1, 'queued', '{}' from made
    )
    select kind, count(*) as jobs from made group by kind
    """
)
"""As `jobs.insert` does it, for many."""


HUNGRY = text(
    """
    select bulks.id, waiting.jobs
    from bulks cross join lateral (
        select count(*) as jobs from (
            select from jobs
            where bulk_id = bulks.id and state = 'queued' and model = :model limit :window
        ) hungry
    ) waiting
    where bulks.state = 'running' and bulks.finished_at is null and bulks.models @> array[:model]
        and waiting.jobs < :window
    """
)


def top_up(session: Session, model: str, *, window: int) -> None:
    """Make jobs of the next items of running bulks, so that at least `window` of each wait for the model."""
    for bulk_id, waiting in session.execute(HUNGRY, {"model": model, "window": window}).all():
        # Whoever holds the row is feeding another model of it, or stops it; what is missed now, the next end of a job
        # makes up for, or the reconciler.
        locked = select(Bulk, func.coalesce(Bulk.expires_at <= func.now(), False)).where(
            Bulk.id == bulk_id, Bulk.state == BulkState.RUNNING
        )
        locked = locked.with_for_update(skip_locked=True).execution_options(populate_existing=True)
        row = session.execute(locked).one_or_none()
        if row is not None:
            bulk, expired = row
            _feed(session, bulk, model, most=0 if expired else 2 * window - waiting)


def _feed(session: Session, bulk: Bulk, model: str, *, most: int) -> None:
    """Make jobs of up to `most` of the bulk's items; 0: the bulk has expired."""
    made = 0
    if most and bulk.retry_before is not None:
        _free_failed(session, bulk, model, most)
    if most and bulk.fed < bulk.total:
        for kind, count in session.execute(FEED, {"bulk_id": bulk.id, "model": model, "most": most}):
            JOBS_SUBMITTED.labels(kind).inc(count)
            made += count
        bulk.fed += made
        session.flush()
    if not made and bulk.retry_before is None and (bulk.fed == bulk.total or not most):
        alive = select(Job.id).where(Job.bulk_id == bulk.id, Job.state.in_((JobState.QUEUED, JobState.PROCESSING)))
        if session.scalar(alive.limit(1)) is None:
            _end(session, bulk, BulkState.COMPLETED)


def _end(session: Session, bulk: Bulk, state: BulkState) -> None:
    if bulk.quota_day is not None and (bulk.fed < bulk.total or bulk.retry_before is not None):
        quotas.give_back_images(session, bulk.owner_id, bulk.quota_day, _images_left(session, bulk))
    bulk.state, bulk.finished_at, bulk.retry_before = state, func.now(), None
    session.flush()
    session.refresh(bulk)
    if bulk.webhook is not None:
        body = told(bulk, progress(session, [bulk])[bulk.id].counts)
        webhooks.enqueue_body(session, body, owner_id=bulk.owner_id, url=bulk.webhook["url"])


def told(bulk: Bulk, counts: BulkCounts) -> dict[str, Any]:
    """A thin body: that the bulk has ended, how, and where to look."""
    return {
        "type": f"bulk.{bulk.state}",
        "timestamp": bulk.finished_at and bulk.finished_at.isoformat(),
        "data": {
            "bulk_id": str(bulk.id),
            "name": bulk.name,
            "total": bulk.total,
            "counts": counts.model_dump(),
            "metadata": bulk.bulk_metadata,
            "url": f"/api/v1/bulks/{bulk.id}",
        },
    }


# --- what the reconciler does -------------------------------------------------------------------------------------


def running_models(session: Session) -> set[str]:
    """Models that running bulks have items for: each may have one to feed, or be through."""
    statement = select(func.unnest(Bulk.models)).where(Bulk.state == BulkState.RUNNING).distinct()
    return set(session.scalars(statement))


def waiting_items(session: Session) -> int:
    """Items of running bulks whose turn to become jobs has not come."""
    statement = select(func.coalesce(func.sum(Bulk.total - Bulk.fed), 0)).where(Bulk.state == BulkState.RUNNING)
    return int(session.scalar(statement) or 0)


def held_by_model(session: Session) -> dict[str, int]:
    """Queued jobs that wait because their bulk is paused."""
    statement = (
        select(Job.model, func.count())
        .join(Bulk, Bulk.id == Job.bulk_id)
        .where(Bulk.state == BulkState.PAUSED, Job.state == JobState.QUEUED)
        .group_by(Job.model)
    )
    return {str(model): count for model, count in session.execute(statement)}


def sweep(session: Session, *, abandoned_after_s: float) -> None:
    """Give up bulks whose lines stopped coming, and remove items that will never run, some at a time."""
    stale = and_(
        Bulk.state == BulkState.RECEIVING, Bulk.received_at < func.now() - timedelta(seconds=abandoned_after_s)
    )
    session.execute(update(Bulk).where(stale).values(state=BulkState.ABANDONED, finished_at=func.now()))
    never_ran = select(Bulk.id).where(Bulk.state.in_((BulkState.REFUSED, BulkState.ABANDONED)))
    some = (
        select(BulkItem.bulk_id, BulkItem.line)
        .where(BulkItem.bulk_id.in_(never_ran), BulkItem.job_id.is_(None))
        .limit(SWEPT_ROWS)
        .subquery()
    )
    session.execute(delete(BulkItem).where(BulkItem.bulk_id == some.c.bulk_id, BulkItem.line == some.c.line))
