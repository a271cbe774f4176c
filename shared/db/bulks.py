"""Bulks: receives their lines, makes jobs of their items step by step, and counts their progress.

Items wait in a table of their own, `bulk_items`. At each dispatch, `top_up` makes jobs of the next items. A few dozen
jobs per running bulk wait at a time. Every query over waiting jobs therefore reads few rows, however long the bulks
are. Pausing or canceling a bulk changes few rows too. See docs/decisions/0011-when-do-bulk-items-become-jobs.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import orjson
from sqlalchemy import ColumnElement, Row, and_, delete, false, func, not_, select, text, update
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from shared import tracing
from shared.contracts.bulks import BulkCounts, BulkOptions, BulkQuery, BulkState, ItemState
from shared.contracts.jobs import JobState
from shared.db import jobs, paging, quotas, webhooks
from shared.db.tables import Bulk, BulkItem, BulkLineError, Job
from shared.errors import BulkStateError, ResourceNotFoundError
from shared.metrics import JOBS_SUBMITTED
from shared.settings import LimitSettings, get_settings

RATE_WINDOW_S = 60
"""`rate_per_s` is measured over this many seconds."""
RETRIABLE = (JobState.FAILED, JobState.DEAD, JobState.EXPIRED)
ITEMS_PER_DELETE = 5000
"""Items of bulks that never ran are deleted in batches of this size."""


@dataclass(frozen=True)
class Progress:
    """How far a bulk is. rate_per_s: items ended per second; None unless the bulk runs and has jobs."""

    counts: BulkCounts
    rate_per_s: float | None


# --- receiving ----------------------------------------------------------------------------------------------------


def create(session: Session, options: BulkOptions, *, owner_id: UUID, received_lines: int, digest: bytes) -> Bulk:
    """Add a bulk in state `receiving`, whose header has been read.

    received_lines: lines up to the end of the header. digest: the SHA-256 chain of these lines.
    """
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
        trace_context=tracing.current(),
        received_lines=received_lines,
        digest=digest,
    )
    session.add(bulk)
    session.flush()
    session.refresh(bulk)
    return bulk


def count_unfinished(session: Session, owner_id: UUID, *, lock: bool = False) -> tuple[int, int]:
    """How many unfinished bulks an owner has, and how many items they have or have announced.

    lock: until the end of the transaction, other calls with `lock` for this owner wait. So two requests cannot both use
    the last free place.
    """
    if lock:
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"bulks:{owner_id}", 0))))
    items = func.coalesce(func.sum(func.greatest(Bulk.announced, Bulk.total + Bulk.invalid)), 0)
    counted = session.execute(
        select(func.count(), items).where(Bulk.owner_id == owner_id, Bulk.finished_at.is_(None))
    ).one()
    return counted[0], int(counted[1])


def find_lines(session: Session, bulk_id: UUID, custom_ids: Sequence[str]) -> dict[str, int]:
    """The line number of each of `custom_ids` that the bulk already has."""
    statement = select(BulkItem.custom_id, BulkItem.line).where(
        BulkItem.bulk_id == bulk_id, BulkItem.custom_id.in_(custom_ids)
    )
    return {str(custom_id): line for custom_id, line in session.execute(statement)}


INSERT_ITEMS = text(
    """
    insert into bulk_items (
        bulk_id, line, custom_id, kind, model, images, parameters, new_parameters, metadata, timeout_s
    )
    select :bulk_id, line, custom_id, kind, model, images, parameters, new_parameters, metadata, timeout_s
    from jsonb_to_recordset(cast(:rows as jsonb)) as row(
        line int, custom_id text, kind text, model text, images int, parameters jsonb, new_parameters jsonb,
        metadata jsonb, timeout_s float8
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
"""Both statements take their rows as one JSON value. Psycopg2 cannot COPY while the wait callback that enforces our
timeouts is installed. For hundreds of rows one JSON value is as fast."""


def append_lines(
    session: Session,
    bulk: Bulk,
    *,
    received_lines: int,
    digest: bytes,
    items: Sequence[Mapping[str, Any]],
    errors: Sequence[Mapping[str, Any]],
) -> None:
    """Store the items and the errors of a chunk of lines. The caller has locked the bulk's row.

    items, errors: columns by name. A value that is already JSON may be an `orjson.Fragment`.
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
    """Set a bulk whose lines have all arrived to `running`, so that its items become jobs.

    All images of the bulk count towards the owner's quota of today.

    Raises:
        QuotaExceededError: the images exceed the owner's quota of today.
    """
    bulk.quota_day = quotas.reserve(session, bulk.owner_id, bulk.images, limits)
    bulk.state = BulkState.RUNNING
    bulk.started_at = func.now()
    if bulk.expires_in_s is not None:
        bulk.expires_at = func.now() + timedelta(seconds=bulk.expires_in_s)
    session.flush()
    session.refresh(bulk)


def analyze(session: Session) -> None:
    """Refresh the planner's statistics after a large bulk has arrived.

    With old statistics the planner expects a few items, and reads and sorts all of them for each page. The server
    refreshes the statistics itself, but looks only once a minute.
    """
    session.execute(text("analyze (skip_locked) bulk_items"))


def refuse(session: Session, bulk: Bulk) -> None:
    """End the bulk in state `refused`: none of its items runs."""
    bulk.state, bulk.finished_at = BulkState.REFUSED, func.now()
    session.flush()
    session.refresh(bulk)


# --- reading ------------------------------------------------------------------------------------------------------


def get(session: Session, bulk_id: UUID, *, owner_id: UUID, lock: bool = False) -> Bulk:
    """The bulk, if it belongs to `owner_id`.

    lock: no other transaction changes the bulk until this one ends.

    Raises:
        ResourceNotFoundError: the bulk does not exist, or belongs to another owner.
    """
    statement = select(Bulk).where(Bulk.id == bulk_id, Bulk.owner_id == owner_id)
    bulk = session.scalar(statement.with_for_update() if lock else statement)
    if bulk is None:
        raise ResourceNotFoundError("There is no such bulk.", bulk_id=str(bulk_id))
    return bulk


def list_page(session: Session, query: BulkQuery, *, owner_id: UUID) -> tuple[list[Bulk], str | None]:
    """A page of an owner's bulks, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(Bulk).where(Bulk.owner_id == owner_id)
    if query.state is not None:
        statement = statement.where(Bulk.state == query.state)
    return paging.fetch_page(
        session, statement, created_at=Bulk.created_at, id=Bulk.id, cursor=query.cursor, limit=query.limit
    )


def get_progress(session: Session, bulks: Sequence[Bulk]) -> dict[UUID, Progress]:
    """The progress of each bulk. It reads only the index of the bulk's jobs, not the jobs."""
    counted = session.execute(PROGRESS, {"ids": [bulk.id for bulk in bulks], "rate_s": RATE_WINDOW_S}).all()
    by_bulk: dict[UUID, list[Row[Any]]] = {bulk.id: [] for bulk in bulks}
    for row in counted:
        by_bulk[row.id].append(row)
    return {bulk.id: _progress(bulk, by_bulk[bulk.id]) for bulk in bulks}


PROGRESS = text(
    """
    select bulks.id, bulks.fed, extract(epoch from now() - bulks.started_at) as running_s, by_state.*
    from bulks cross join lateral (
        select state, count(*) as jobs,
            count(*) filter (where finished_at > now() - :rate_s * interval '1 s') as ended_recently,
            count(*) filter (where finished_at < bulks.retry_before) as ended_before_retry
        from jobs where bulk_id = bulks.id group by state
    ) by_state
    where bulks.id = any(:ids)
    """
)
"""The column `fed`, the number of items that have become jobs, is read in the same statement as the jobs. Otherwise an
item could count twice: as a job and as waiting for one."""


def _progress(bulk: Bulk, rows: Sequence[Row[Any]]) -> Progress:
    items_with_job = rows[0].fed if rows else bulk.fed
    counts = {row.state: row.jobs for row in rows}
    waiting = state_without_job(bulk)
    counts[waiting] = counts.get(waiting, 0) + bulk.total - items_with_job
    for row in rows:
        if row.state in RETRIABLE:
            counts[row.state] -= row.ended_before_retry
            counts[waiting] += row.ended_before_retry
    counts[ItemState.DELETED] = items_with_job - sum(row.jobs for row in rows)
    rate_per_s = None
    if bulk.state == BulkState.RUNNING and rows:
        rate_per_s = sum(row.ended_recently for row in rows) / min(RATE_WINDOW_S, max(float(rows[0].running_s), 1))
    return Progress(BulkCounts(**counts), rate_per_s)


def state_without_job(bulk: Bulk) -> ItemState:
    """The state of the bulk's items that have no job: canceled, expired or queued, depending on the bulk's state."""
    if bulk.state in (BulkState.CANCELED, BulkState.REFUSED, BulkState.ABANDONED):
        return ItemState.CANCELED
    # A bulk that completes before all items have become jobs has reached its deadline.
    return ItemState.EXPIRED if bulk.state == BulkState.COMPLETED else ItemState.QUEUED


def list_items(
    session: Session, bulk: Bulk, *, after: int, limit: int, state: ItemState | None = None
) -> tuple[list[tuple[BulkItem, Job | None, ItemState]], int | None]:
    """A page of items with jobs and states, by line, and the `after` of the next page; None on the last page.

    An item that waits for a retry has the state `queued` and no job.
    """
    of_bulk = select(BulkItem, Job).where(BulkItem.bulk_id == bulk.id, BulkItem.line > after)
    with_any_job = of_bulk.outerjoin(Job, Job.id == BulkItem.job_id)
    if state is None:
        parts = [with_any_job]
    elif state is ItemState.DELETED:
        parts = [with_any_job.where(BulkItem.job_id.is_not(None), Job.id.is_(None))]
    else:
        # Joined from the jobs, so that the index finds a few failed items among many.
        of_item = and_(Job.bulk_id == bulk.id, Job.bulk_line == BulkItem.line)
        parts = [of_bulk.join(Job, and_(of_item, Job.state == state.value, not_(_awaits_retry(bulk))))]
        if state is state_without_job(bulk):
            parts.append(with_any_job.where(BulkItem.job_id.is_(None)))
            if bulk.retry_before is not None:
                parts.append(of_bulk.join(Job, and_(of_item, _awaits_retry(bulk))))
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
    if before is not None and ended is not None and job.state in RETRIABLE and ended < before:
        return item, None, state_without_job(bulk)
    return item, job, ItemState(job.state)


def _awaits_retry(bulk: Bulk) -> ColumnElement[bool]:
    """The condition on jobs whose item will get a new job: they failed before the bulk's `retry_before`."""
    if bulk.retry_before is None:
        return false()
    return and_(Job.bulk_id == bulk.id, Job.state.in_(RETRIABLE), Job.finished_at < bulk.retry_before)


def list_line_errors(
    session: Session, bulk_id: UUID, *, after: int, limit: int
) -> tuple[list[BulkLineError], int | None]:
    """A page of invalid lines, and the `after` of the next page; None on the last page."""
    statement = select(BulkLineError).where(BulkLineError.bulk_id == bulk_id, BulkLineError.line > after)
    rows = list(session.scalars(statement.order_by(BulkLineError.line).limit(limit + 1)))
    return rows[:limit], rows[limit - 1].line if len(rows) > limit else None


# --- operations of owners -----------------------------------------------------------------------------------------


def pause(session: Session, bulk: Bulk) -> None:
    """Pause the bulk: none of its items becomes a job and none of its queued jobs is claimed. Running jobs go on.

    Raises:
        BulkStateError: the bulk is neither running nor paused.
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED):
        raise BulkStateError("Only a running bulk can be paused.", state=bulk.state)
    # Published jobs become unpublished. Their messages stay in the broker, and workers cannot claim the jobs.
    waiting = select(Job.id).where(Job.bulk_id == bulk.id, Job.state == JobState.QUEUED)
    jobs.unpublish(session, session.scalars(waiting).all())
    bulk.state = BulkState.PAUSED
    session.flush()


def resume(session: Session, bulk: Bulk) -> None:
    """Let a paused bulk run again.

    Raises:
        BulkStateError: the bulk is neither paused nor running.
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED):
        raise BulkStateError("Only a paused bulk can be resumed.", state=bulk.state)
    bulk.state = BulkState.RUNNING
    session.flush()


def cancel(session: Session, bulk: Bulk) -> list[UUID]:
    """Cancel the bulk and every job of it that has not ended; return the ids of these jobs.

    Raises:
        BulkStateError: the bulk has ended in another state than `canceled`.
    """
    if bulk.state == BulkState.CANCELED:
        return []
    if bulk.finished_at is not None:
        raise BulkStateError("The bulk has already ended.", state=bulk.state)
    ended = jobs.cancel_bulk(session, bulk.id)
    _end(session, bulk, BulkState.CANCELED)
    return ended


def retry_failed(session: Session, bulk: Bulk, limits: LimitSettings) -> None:
    """Retry the items whose jobs have failed, expired or died until now, and run the bulk again.

    The call only sets `retry_before` to this moment, so it takes no longer for many items. `top_up` later gives each
    item a new job, whose `retry_of` is the old one. The old job is kept, but no longer belongs to the bulk. Items of a
    completed bulk that never had a job, because it reached its deadline, run too. All these images count towards the
    quota again.

    Raises:
        BulkStateError: the bulk is not running, paused or completed.
        QuotaExceededError: the images exceed the owner's quota of today.
    """
    if bulk.state not in (BulkState.RUNNING, BulkState.PAUSED, BulkState.COMPLETED):
        raise BulkStateError("Only a running, paused or completed bulk can be retried.", state=bulk.state)
    has_expired_items = bulk.state == BulkState.COMPLETED and bulk.fed < bulk.total
    images_without_job = _images_without_job(session, bulk) if has_expired_items else 0
    now = session.scalars(select(func.clock_timestamp())).one()
    failed = and_(Job.bulk_id == bulk.id, Job.state.in_(RETRIABLE), Job.finished_at < now, not_(_awaits_retry(bulk)))
    images = session.scalar(select(func.sum(Job.images)).where(failed)) or 0
    if not images and not images_without_job:
        return
    today = quotas.reserve(session, bulk.owner_id, images + images_without_job, limits)
    if images:
        bulk.retry_before = now
    bulk.expires_at = None
    if bulk.state == BulkState.COMPLETED:
        # A bulk that still runs keeps its day: its waiting items are counted there, and given back there.
        bulk.quota_day = today
        bulk.state, bulk.finished_at = BulkState.RUNNING, None
    session.flush()


RELEASE_FAILED = text(
    """
    with failed as (
        select id, bulk_line from jobs
        where bulk_id = :bulk_id and state = any(:states) and finished_at < :before and model = :model
        limit :most for update skip locked
    ), removed_from_bulk as (
        update jobs set bulk_id = null, bulk_line = null from failed where jobs.id = failed.id
    ), waiting as (
        update bulk_items set job_id = null, retry_of = failed.id
        from failed where bulk_items.bulk_id = :bulk_id and bulk_items.line = failed.bulk_line
        returning line
    )
    select count(*) from waiting
    """
)


def _release_failed(session: Session, bulk: Bulk, model: str, most: int) -> None:
    """Detach the failed jobs of up to `most` items that wait for a retry, so that these items can get new jobs.

    A job that another transaction has locked is left for the next call.
    """
    parameters = {"bulk_id": bulk.id, "states": list(RETRIABLE), "before": bulk.retry_before, "model": model}
    released = int(session.execute(RELEASE_FAILED, {**parameters, "most": most}).scalar_one())
    bulk.fed -= released
    if released < most and session.scalar(select(Job.id).where(_awaits_retry(bulk)).limit(1)) is None:
        bulk.retry_before = None
    session.flush()


def _images_without_job(session: Session, bulk: Bulk) -> int:
    """The number of images of all items that wait for their first job or for a retry."""
    never_ran = select(func.sum(BulkItem.images)).where(BulkItem.bulk_id == bulk.id, BulkItem.job_id.is_(None))
    await_retry = select(func.sum(Job.images)).where(_awaits_retry(bulk))
    return (session.scalar(never_ran) or 0) + (session.scalar(await_retry) or 0)


# --- making jobs --------------------------------------------------------------------------------------------------


INSERT_JOBS = text(
    """
    with next_items as (
        select line from bulk_items
        where bulk_id = :bulk_id and model = :model and job_id is null
        order by line limit :most
    ), updated_items as (
        update bulk_items item set job_id = gen_random_uuid()
        from next_items where item.bulk_id = :bulk_id and item.line = next_items.line
        returning item.*
    ), new_jobs as (
        insert into jobs (
            id, owner_id, bulk_id, bulk_line, kind, state, lane, model, images, parameters, new_parameters, metadata,
            timeout_s, expires_at, retry_of, quota_day, last_seq
        )
        select item.job_id, bulk.owner_id, bulk.id, item.line, item.kind, 'queued', bulk.lane, item.model, item.images,
            item.parameters, item.new_parameters, item.metadata, item.timeout_s, bulk.expires_at, item.retry_of,
            bulk.quota_day, 1
        from updated_items item join bulks bulk on bulk.id = item.bulk_id
        order by item.line
        returning id, kind
    ), new_events as (
        insert into job_events (job_id, seq, type, data) select id, 1, 'queued', '{}' from new_jobs
    )
    select kind, array_agg(id) as job_ids from new_jobs group by kind
    """
)
"""Does for many items what `jobs.insert` does for one job. A column added there must be added here."""


BULKS_NEEDING_JOBS = text(
    """
    select bulks.id, queued.jobs
    from bulks cross join lateral (
        select count(*) as jobs from (
            select from jobs
            where bulk_id = bulks.id and state = 'queued' and model = :model limit :window
        ) first_jobs
    ) queued
    where bulks.state = 'running' and bulks.finished_at is null and bulks.models @> array[:model]
        and queued.jobs < :window
    order by bulks.owner_id, bulks.quota_day
    """
)
"""The limit inside the count bounds its cost: it reads at most `window` jobs of each bulk. The order is that of
`quotas.give_back`: every transaction locks the owners' usage in one order."""


def top_up(session: Session, model: str, *, window: int) -> None:
    """Make jobs of the next items of running bulks, so that enough jobs wait for `model`.

    A running bulk with fewer than `window` queued jobs for `model` is filled up to twice `window`, as long as it has
    items. The dispatch calls this first, with its own window, so that one bulk alone can fill it. Items that wait for a
    retry are detached from their failed jobs first, and then get new ones. A bulk past its deadline gets no new job.
    A bulk whose items have all become jobs, or that is past its deadline, ends here once its last job has ended.
    """
    for bulk_id, queued in session.execute(BULKS_NEEDING_JOBS, {"model": model, "window": window}).all():
        # A locked row is skipped: another process tops up another model of this bulk, or pauses or cancels it. The
        # next job that ends, or the reconciler, dispatches again and makes up for it.
        locked = select(Bulk, func.coalesce(Bulk.expires_at <= func.now(), False)).where(
            Bulk.id == bulk_id, Bulk.state == BulkState.RUNNING
        )
        locked = locked.with_for_update(skip_locked=True).execution_options(populate_existing=True)
        row = session.execute(locked).one_or_none()
        if row is not None:
            bulk, expired = row
            _insert_jobs(session, bulk, model, most=0 if expired else 2 * window - queued)


def _insert_jobs(session: Session, bulk: Bulk, model: str, *, most: int) -> None:
    """Make jobs of up to `most` of the bulk's items, retries included.

    The bulk ends here when no item waits and its last job has ended.

    most: 0 when the bulk is past its deadline.
    """
    made = 0
    if most and bulk.retry_before is not None:
        _release_failed(session, bulk, model, most)
    if most and bulk.fed < bulk.total:
        for kind, job_ids in session.execute(INSERT_JOBS, {"bulk_id": bulk.id, "model": model, "most": most}):
            JOBS_SUBMITTED.labels(kind).inc(len(job_ids))
            made += len(job_ids)
            if tracing.is_on():
                _begin_traces(session, bulk, job_ids)
        bulk.fed += made
        session.flush()
    if not made and bulk.retry_before is None and (bulk.fed == bulk.total or not most):
        unfinished = select(Job.id).where(Job.bulk_id == bulk.id, Job.state.in_((JobState.QUEUED, JobState.PROCESSING)))
        if session.scalar(unfinished.limit(1)) is None:
            _end(session, bulk, BulkState.COMPLETED)


SET_TRACES = text(
    """
    update jobs set trace_context = traced.context
    from jsonb_to_recordset(cast(:rows as jsonb)) as traced(id uuid, context jsonb) where jobs.id = traced.id
    """
)


def _begin_traces(session: Session, bulk: Bulk, job_ids: Sequence[UUID]) -> None:
    """Begin a trace for each new job. It links to the request that began the bulk."""
    links = [] if bulk.trace_context is None else [bulk.trace_context]
    rows = []
    for job_id in map(str, job_ids):
        with (
            bound_contextvars(**{**tracing.ids(bulk.trace_context), "job_id": job_id}),
            tracing.span("bulk item", {"bulk_id": str(bulk.id)}, kind="producer", root=True, links=links),
        ):
            rows.append({"id": job_id, "context": tracing.current()})
    session.execute(SET_TRACES, {"rows": orjson.dumps(rows).decode()})


def _end(session: Session, bulk: Bulk, state: BulkState) -> None:
    if bulk.quota_day is not None and (bulk.fed < bulk.total or bulk.retry_before is not None):
        quotas.give_back_images(session, bulk.owner_id, bulk.quota_day, _images_without_job(session, bulk))
    bulk.state, bulk.finished_at, bulk.retry_before = state, func.now(), None
    session.flush()
    session.refresh(bulk)
    if bulk.webhook is not None:
        body = webhook_body(bulk, get_progress(session, [bulk])[bulk.id].counts)
        webhooks.enqueue_body(session, body, owner_id=bulk.owner_id, url=bulk.webhook["url"])


def webhook_body(bulk: Bulk, counts: BulkCounts) -> dict[str, Any]:
    """The webhook's body: the bulk's final state and counts, and its URL. It holds no results."""
    return {
        "type": f"bulk.{bulk.state}",
        "timestamp": bulk.finished_at and bulk.finished_at.isoformat(),
        "data": {
            "bulk_id": str(bulk.id),
            "name": bulk.name,
            "total": bulk.total,
            "counts": counts.model_dump(),
            "metadata": bulk.bulk_metadata,
            "url": f"{get_settings().api.path_prefix}/api/v1/bulks/{bulk.id}",
        },
    }


# --- for the reconciler -------------------------------------------------------------------------------------------


def list_running_models(session: Session) -> set[str]:
    """Models that items of running bulks use. A dispatch of such a model may make jobs or end a bulk."""
    statement = select(func.unnest(Bulk.models)).where(Bulk.state == BulkState.RUNNING).distinct()
    return set(session.scalars(statement))


def count_waiting_items(session: Session) -> int:
    """How many items of running bulks have not become jobs."""
    statement = select(func.coalesce(func.sum(Bulk.total - Bulk.fed), 0)).where(Bulk.state == BulkState.RUNNING)
    return int(session.scalar(statement) or 0)


def count_paused_by_model(session: Session) -> dict[str, int]:
    """How many queued jobs of each model wait because their bulk is paused."""
    statement = (
        select(Job.model, func.count())
        .join(Bulk, Bulk.id == Job.bulk_id)
        .where(Bulk.state == BulkState.PAUSED, Job.state == JobState.QUEUED)
        .group_by(Job.model)
    )
    return {str(model): count for model, count in session.execute(statement)}


def delete_abandoned(session: Session, *, abandoned_after_s: float) -> None:
    """End bulks that received no line for `abandoned_after_s`, and delete up to `ITEMS_PER_DELETE` items of bulks that
    never ran."""
    stale = and_(
        Bulk.state == BulkState.RECEIVING, Bulk.received_at < func.now() - timedelta(seconds=abandoned_after_s)
    )
    stale_ids = select(Bulk.id).where(stale).with_for_update(skip_locked=True)
    abandoned = update(Bulk).where(Bulk.id.in_(stale_ids)).values(state=BulkState.ABANDONED, finished_at=func.now())
    session.execute(abandoned.execution_options(synchronize_session=False))
    never_ran = select(Bulk.id).where(Bulk.state.in_((BulkState.REFUSED, BulkState.ABANDONED)))
    batch = (
        select(BulkItem.bulk_id, BulkItem.line)
        .where(BulkItem.bulk_id.in_(never_ran), BulkItem.job_id.is_(None))
        .limit(ITEMS_PER_DELETE)
        .with_for_update(skip_locked=True)
        .subquery()
    )
    session.execute(delete(BulkItem).where(BulkItem.bulk_id == batch.c.bulk_id, BulkItem.line == batch.c.line))
