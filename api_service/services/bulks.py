"""What an owner does with bulks, without HTTP: send, follow, steer."""

import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from uuid import UUID

import orjson
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from api_service.services import bulk_items
from api_service.services.bulk_lines import Body, Line, chunks
from api_service.services.views import API
from shared.cache import get_cache_manager
from shared.contracts.bulks import (
    BulkComplete,
    BulkCounts,
    BulkItemQuery,
    BulkItemView,
    BulkLineError,
    BulkOptions,
    BulkOutput,
    BulkQuery,
    BulkState,
    BulkView,
    ItemState,
    LineQuery,
)
from shared.contracts.common import OnInvalid, Page
from shared.contracts.jobs import JobError, JobKind, Lane
from shared.db import bulks, idempotency, outputs
from shared.db.session import session_scope
from shared.db.tables import Bulk, BulkItem, Generation, Job
from shared.errors import (
    BulkInvalidError,
    BulkOffsetError,
    BulkQuotaError,
    BulkStateError,
    BulkTooLargeError,
    DatabaseError,
    IdempotencyKeyReusedError,
    TooManyStreamsError,
)
from shared.messaging import queue
from shared.messaging.coalesce import feed_bell
from shared.messaging.job_updates import publish_changed
from shared.settings import get_settings
from shared.singleton import once
from shared.ssrf import check_url

logger = logging.getLogger(__name__)

MANY = 1000
"""Items from which on the database's planner is told of them."""
ROUTE = "bulks"
"""The scope of its idempotency keys."""
ERRORS_SHOWN = 20
LARGE = 10_000
COUNTS_STAND_S = 2


@dataclass(frozen=True)
class Sent:
    """A bulk that lines were sent to. `replayed`: its key was known."""

    view: BulkView
    replayed: bool = False


# --- sending ------------------------------------------------------------------------------------------------------


def send(body: Body, *, may_complete: bool, caller: Caller, key: str | None) -> Sent:
    """Make a bulk of the lines, or go on with the one that has this key: lines that it has are compared and skipped.

    Raises:
        ValidationError: the header is wrong.
        IdempotencyKeyReusedError: `key` came with other lines in the last 24 hours.
        BulkInvalidError: it is complete, and nothing of it runs because of its invalid lines.
        BulkQuotaError, BulkTooLargeError, BulkStateError, BulkOffsetError, ForbiddenTargetError
        TooManyStreamsError: this process holds as many transfers as it may.
        DatabaseConnectionError
    """
    with transfer():
        lines = body.lines()
        first = next(lines, None)
        options = bulk_items.header(first)
        with session_scope() as session:
            bulk, replayed = _begun(session, options, first, caller=caller, key=key)
        if first is not None and (options is None or replayed):
            lines = chain([first], lines)
        if replayed:
            lines = _skipped(lines, bulk)
        if bulk.state == BulkState.RECEIVING:
            _receive(bulk.id, lines, caller=caller)
        elif next(lines, None) is not None:
            if bulk.state in (BulkState.ABANDONED, BulkState.CANCELED):
                raise BulkStateError("The bulk takes no more lines.", state=bulk.state)
            raise IdempotencyKeyReusedError
        return Sent(_done(bulk.id, body, may_complete=may_complete, caller=caller), replayed)


def append(bulk_id: UUID, body: Body, *, from_line: int, may_complete: bool, caller: Caller) -> BulkView:
    """Go on with the lines behind the first `from_line`.

    Raises:
        ResourceNotFoundError
        BulkOffsetError: it has received another number of lines.
        As `send`.
    """
    with transfer():
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
        _check_receives(bulk, received_lines=from_line)
        _receive(bulk_id, body.lines(received=from_line, digest=bulk.digest), caller=caller)
        return _done(bulk_id, body, may_complete=may_complete, caller=caller)


def complete(bulk_id: UUID, request: BulkComplete, *, caller: Caller) -> BulkView:
    """Start the bulk, if it has received what was sent. May be repeated.

    Raises:
        ResourceNotFoundError
        BulkOffsetError: it has received another number of lines, or other lines.
        BulkStateError: it was given up.
        BulkInvalidError: nothing of it runs, because of its invalid lines.
        QuotaExceededError: it may be completed another day.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        digest = bulk.digest.hex()
        if request.lines != bulk.received_lines or request.digest not in (None, digest):
            raise BulkOffsetError(received_lines=bulk.received_lines, digest=digest)
        if bulk.state == BulkState.ABANDONED:
            raise BulkStateError("The bulk was given up: its lines had stopped coming.", state=bulk.state)
        begins = False
        if bulk.state == BulkState.RECEIVING:
            refused = bulk.total == 0 or (bulk.invalid and bulk.on_invalid == OnInvalid.REFUSE)
            if refused:
                bulks.refuse(session, bulk)
            else:
                bulks.start(session, bulk, get_settings().limits)
                begins = True
        refusal = _refusal(session, bulk) if bulk.state == BulkState.REFUSED else None
        view = _views(session, [bulk])[0]
        models = bulk.models
    if refusal is not None:
        raise refusal
    if begins and view.total >= MANY:
        try:
            with session_scope() as session:
                bulks.analyze(session)
        except DatabaseError as error:  # pages are slower for a while
            logger.warning("bulk_not_analyzed", extra={"cause": error.code})
    _feed(models)
    return view


def _begun(
    session: Session, options: BulkOptions | None, first: Line | None, *, caller: Caller, key: str | None
) -> tuple[Bulk, bool]:
    """The bulk to receive into, and whether it was there before."""
    settings = get_settings()
    header = options or BulkOptions()
    if header.webhook is not None:
        check_url(header.webhook.url, settings.webhooks)
    if key is not None:
        fingerprint = hashlib.sha256(orjson.dumps(header.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS))
        known = idempotency.begin(
            session, owner_id=caller.owner_id, route=ROUTE, key=key, fingerprint=fingerprint.hexdigest()
        )
        if known is not None:
            return bulks.get(session, UUID(known["id"]), owner_id=caller.owner_id), True
    most = settings.bulks.max_items
    if header.items is not None and header.items > most:
        raise BulkTooLargeError(f"A bulk may have {most} items.", maximum=most)
    count, items = bulks.open_of(session, caller.owner_id, lock=True)
    if count >= settings.bulks.max_open or items + (header.items or 0) > settings.bulks.max_open_items:
        raise BulkQuotaError(bulks=count, items=items)
    is_header = options is not None and first is not None
    bulk = bulks.create(
        session,
        header,
        owner_id=caller.owner_id,
        received_lines=int(is_header),
        digest=first.digest if is_header and first is not None else b"",
    )
    if key is not None:
        idempotency.remember(session, {"id": str(bulk.id)}, owner_id=caller.owner_id, route=ROUTE, key=key)
    return bulk, False


def _skipped(lines: Iterator[Line], bulk: Bulk) -> Iterator[Line]:
    """The lines behind those that the bulk has, once the last of these has proved that all of them are the same."""
    for line in lines:
        if line.number == bulk.received_lines and line.digest != bulk.digest:
            raise IdempotencyKeyReusedError
        if line.number > bulk.received_lines:
            yield line


def _receive(bulk_id: UUID, lines: Iterator[Line], *, caller: Caller) -> None:
    """Store the lines, each chunk in a transaction of its own: what came before a lost connection stays."""
    settings = get_settings()
    for chunk in chunks(lines, most=settings.bulks.chunk_lines):
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
            _check_receives(bulk, received_lines=chunk[0].number - 1)
            checked = bulk_items.check(session, bulk, chunk, caller=caller, settings=settings)
            bulks.append(
                session,
                bulk,
                received_lines=chunk[-1].number,
                digest=chunk[-1].digest,
                items=checked.items,
                errors=checked.errors,
            )
            if bulk.total + bulk.invalid > settings.bulks.max_items:
                most = settings.bulks.max_items
                raise BulkTooLargeError(f"A bulk may have {most} items.", maximum=most, bulk_id=str(bulk_id))
            count, items = bulks.open_of(session, caller.owner_id)
            if items > settings.bulks.max_open_items:
                raise BulkQuotaError(bulks=count, items=items, bulk_id=str(bulk_id))


def _check_receives(bulk: Bulk, *, received_lines: int) -> None:
    if bulk.state != BulkState.RECEIVING:
        raise BulkStateError("The bulk takes no more lines.", state=bulk.state)
    if bulk.received_lines != received_lines:
        raise BulkOffsetError(received_lines=bulk.received_lines, digest=bulk.digest.hex())


def _done(bulk_id: UUID, body: Body, *, may_complete: bool, caller: Caller) -> BulkView:
    view = get(bulk_id, caller=caller)
    if view.state is BulkState.REFUSED or (may_complete and body.whole and view.state is BulkState.RECEIVING):
        return complete(bulk_id, BulkComplete(lines=view.received_lines), caller=caller)
    return view


def _refusal(session: Session, bulk: Bulk) -> BulkInvalidError:
    """The first reasons; all of them are at `errors_url`."""
    errors, _ = bulks.line_errors(session, bulk.id, after=0, limit=ERRORS_SHOWN)
    reasons = [
        reason
        for error in errors
        for reason in error.errors or [{"field": f"line.{error.line}", "code": error.code, "message": error.detail}]
    ]
    return BulkInvalidError(
        None if bulk.total or bulk.invalid else "The bulk has no items.",
        errors=list(reasons[:ERRORS_SHOWN]),
        bulk_id=str(bulk.id),
        invalid=bulk.invalid,
        errors_url=f"{API}/bulks/{bulk.id}/errors",
    )


@contextmanager
def transfer() -> Iterator[None]:
    """
    Raises:
        TooManyStreamsError
    """
    held = place()
    try:
        yield
    finally:
        held.release()


def place() -> threading.BoundedSemaphore:
    """Take a place for a transfer; whoever has it releases it.

    Raises:
        TooManyStreamsError: this process holds as many transfers as it may.
    """
    if not _places().acquire(blocking=False):
        raise TooManyStreamsError("This process sends or receives as many bulks as it may.")
    return _places()


@once
def _places() -> threading.BoundedSemaphore:
    """Transfers that this process may hold at a time, so that they never take all of its threads."""
    return threading.BoundedSemaphore(get_settings().bulks.max_transfers)


# --- following ----------------------------------------------------------------------------------------------------


def get(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        return _views(session, [bulks.get(session, bulk_id, owner_id=caller.owner_id)])[0]


def page(query: BulkQuery, *, caller: Caller) -> Page[BulkView]:
    """
    Raises:
        InvalidCursorError
    """
    with session_scope() as session:
        rows, next_cursor = bulks.page(session, query, owner_id=caller.owner_id)
        return Page(items=_views(session, rows), next_cursor=next_cursor)


def items(bulk_id: UUID, query: BulkItemQuery, *, caller: Caller) -> Page[BulkItemView]:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
        rows, behind = bulks.items(session, bulk, after=query.cursor or 0, limit=query.limit, state=query.state)
        made = outputs.of_jobs(session, [job.id for _, job, _ in rows if job is not None])
        views = [_item(item, job, state, made.get(job.id, []) if job else []) for item, job, state in rows]
    return Page(items=views, next_cursor=None if behind is None else str(behind))


def errors(bulk_id: UUID, query: LineQuery, *, caller: Caller) -> Page[BulkLineError]:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
        rows, behind = bulks.line_errors(session, bulk_id, after=query.cursor or 0, limit=query.limit)
        views = [
            BulkLineError.model_validate(
                {name: getattr(row, name) for name in ("line", "custom_id", "code", "detail", "errors")}
            )
            for row in rows
        ]
    return Page(items=views, next_cursor=None if behind is None else str(behind))


# --- steering -----------------------------------------------------------------------------------------------------


def pause(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Start nothing more of it; what runs ends. May be repeated.

    Raises:
        ResourceNotFoundError, BulkStateError
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.pause(session, bulk)
        view = _views(session, [bulk])[0]
    _feed(bulk.models)  # others have more room now
    return view


def resume(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """
    Raises:
        ResourceNotFoundError, BulkStateError
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.resume(session, bulk)
        view = _views(session, [bulk])[0]
    _feed(bulk.models)
    return view


def cancel(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """End it, what waits at once and what runs within a step. May be repeated.

    Raises:
        ResourceNotFoundError
        BulkStateError: it has ended otherwise.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        ended = bulks.cancel(session, bulk)
        view = _views(session, [bulk])[0]
    for job_id in ended:
        publish_changed(job_id)
    _feed(bulk.models)
    if bulk.webhook is not None:
        queue.ring_for_webhooks()
    return view


def retry_failed(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Have each item that failed, expired or died wait for another job. Those that fail from now on are left alone.

    Raises:
        ResourceNotFoundError, BulkStateError, QuotaExceededError
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.retry_failed(session, bulk, get_settings().limits)
        view = _views(session, [bulk])[0]
    _feed(bulk.models)
    return view


def _feed(models: Sequence[str]) -> None:
    for model in models:
        feed_bell(model).pull()


# --- views --------------------------------------------------------------------------------------------------------


def _views(session: Session, rows: Sequence[Bulk]) -> list[BulkView]:
    progress = _progress(session, rows)
    return [_view(row, progress[row.id]) for row in rows]


def _progress(session: Session, rows: Sequence[Bulk]) -> dict[UUID, bulks.Progress]:
    """Counting a hundred thousand rows takes 10 to 100 ms, so what was counted of a large bulk stands for a while, as
    long as the bulk itself does not change its state."""
    cache = get_cache_manager()
    keys = {
        row.id: f"bulk:{row.id}:{row.state}:{row.finished_at}:{row.total}:{row.retry_before}"
        for row in rows
        if row.fed > LARGE
    }
    known = {bulk_id: cache.get(key) for bulk_id, key in keys.items()}
    progress = bulks.progress(session, [row for row in rows if known.get(row.id) is None])
    for bulk_id, seen in known.items():
        if seen is not None:
            progress[bulk_id] = bulks.Progress(BulkCounts.model_validate(seen["counts"]), seen["rate_per_s"])
        else:
            made = progress[bulk_id]
            value = {"counts": made.counts.model_dump(), "rate_per_s": made.rate_per_s}
            cache.set(keys[bulk_id], value, COUNTS_STAND_S)
    return progress


def _view(row: Bulk, progress: bulks.Progress) -> BulkView:
    url = f"{API}/bulks/{row.id}"
    left = progress.counts.queued + progress.counts.processing
    rate_per_s = progress.rate_per_s
    return BulkView(
        id=row.id,
        name=row.name,
        state=BulkState(row.state),
        lane=list(Lane)[row.lane],
        on_invalid=OnInvalid(row.on_invalid),
        metadata=row.bulk_metadata,
        received_lines=row.received_lines,
        digest=row.digest.hex(),
        total=row.total,
        invalid=row.invalid,
        counts=progress.counts,
        rate_per_s=rate_per_s,
        estimated_end=datetime.now(UTC) + timedelta(seconds=left / rate_per_s) if rate_per_s else None,
        created_at=row.created_at,
        started_at=row.started_at,
        expires_at=row.expires_at,
        finished_at=row.finished_at,
        url=url,
        items_url=f"{url}/items",
        errors_url=f"{url}/errors",
        manifest_url=f"{url}/manifest",
        archive_url=f"{url}/archive",
    )


def job_of(item: BulkItem, job: Job | None, state: ItemState) -> UUID | None:
    """The id of an item's job, also of a deleted one; none of one that waits for its first or its next."""
    return job.id if job is not None else item.job_id if state is ItemState.DELETED else None


def _item(item: BulkItem, job: Job | None, state: ItemState, made: Sequence[Generation]) -> BulkItemView:
    return BulkItemView(
        line=item.line,
        custom_id=item.custom_id,
        kind=JobKind(item.kind),
        model=item.model,
        prompt=item.parameters["prompt"],
        metadata=item.item_metadata,
        state=state,
        job_id=job_of(item, job, state),
        error=JobError.model_validate(job.error) if job is not None and job.error else None,
        outputs=[
            BulkOutput(
                id=each.id,
                index=each.index,
                seed=each.seed,
                width=each.width,
                height=each.height,
                format=each.format,
                size_bytes=each.size_bytes,
                sha256=each.sha256,
                content_url=f"{API}/generations/{each.id}/content",
            )
            for each in made
        ],
    )
