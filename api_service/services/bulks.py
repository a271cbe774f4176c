"""Use cases of bulks: send lines, complete, follow, pause, resume, cancel and retry."""

import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any
from uuid import UUID

import orjson
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from api_service.http.urls import api_address
from api_service.services import bulk_items, views
from api_service.services.bulk_lines import BulkBody, Line, in_chunks
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
from shared.db import bulks, idempotency, outputs, withdrawals
from shared.db.session import session_scope
from shared.db.tables import Bulk, BulkItem, Job, Output
from shared.db.withdrawals import Withdrawal
from shared.errors import (
    BulkInvalidError,
    BulkOffsetError,
    BulkQuotaError,
    BulkStateError,
    BulkTooLargeError,
    DatabaseError,
    IdempotencyKeyReusedError,
    MalformedBodyError,
    TooManyStreamsError,
)
from shared.messaging import queue
from shared.messaging.coalesce import dispatch_soon
from shared.messaging.job_updates import publish_job_update
from shared.settings import get_settings
from shared.singleton import process_singleton
from shared.ssrf import check_url

logger = logging.getLogger(__name__)

ANALYZE_FROM_ITEMS = 1000
"""A bulk with this many items or more gets an ANALYZE, so that the database plans its queries well at once."""
IDEMPOTENCY_ROUTE = "bulks"
"""Name under which the idempotency keys of bulks are stored."""
MAX_ERRORS_SHOWN = 20
CACHE_COUNTS_FROM_ITEMS = 10_000
"""The counts of a bulk with more started items are cached."""
COUNTS_TTL_S = 2


@dataclass(frozen=True)
class SentBulk:
    """A bulk that has received lines."""

    view: BulkView
    already_submitted: bool = False
    """The idempotency key belongs to an earlier request, which created the bulk."""


# --- sending ------------------------------------------------------------------------------------------------------


def send(body: BulkBody, *, may_complete: bool, caller: Caller, key: str | None) -> SentBulk:
    """Create a bulk from the lines, or continue the bulk of this key; lines that it has are compared and skipped.

    may_complete: start the bulk if the body has certainly arrived to its end.

    Raises:
        MalformedBodyError: the connection broke before the end of the first line. Nothing is stored.
        ValidationError: the header is not valid.
        ForbiddenTargetError: the header's webhook has a URL to which the service does not send.
        IdempotencyKeyReusedError: the key was sent with other or more lines in the last 24 hours.
        BulkInvalidError: all lines are received, and the bulk is refused: it has invalid lines or no items.
        BulkQuotaError: the owner has too many unfinished bulks, or too many items in them.
        BulkTooLargeError: the bulk has more than `bulks.max_items` items.
        BulkStateError: the bulk receives no more lines.
        BulkOffsetError: another request sent lines of this bulk at the same time.
        QuotaExceededError: all lines are received, and have more images than the owner's quota allows today.
        TooManyStreamsError: this process has reached its limit of transfers.
        DatabaseConnectionError: the database does not answer.
    """
    with transfer_slot():
        lines = body.lines()
        first = next(lines, None)
        if first is None and not body.is_complete:
            # A bulk without its header would answer the whole request, which comes next with the same key.
            raise MalformedBodyError("The body ended before the end of its first line.")
        options = bulk_items.parse_header(first)
        with session_scope() as session:
            bulk, already_submitted = _find_or_create(session, options, first, caller=caller, key=key)
        if first is not None and (options is None or already_submitted):
            lines = chain([first], lines)
        if already_submitted:
            lines = _skip_received(lines, bulk)
        if bulk.state == BulkState.RECEIVING:
            _store_lines(bulk.id, lines, defaults=bulk.defaults, caller=caller)
        elif next(lines, None) is not None:
            if bulk.state in (BulkState.ABANDONED, BulkState.CANCELED):
                raise BulkStateError("The bulk receives no more lines.", state=bulk.state)
            raise IdempotencyKeyReusedError
        if already_submitted and body.last_line < bulk.received_lines:
            _check_early_end(bulk, body, is_header=options is not None, may_complete=may_complete)
        return SentBulk(
            _complete_if_all_arrived(bulk.id, body, may_complete=may_complete, caller=caller), already_submitted
        )


def append(bulk_id: UUID, body: BulkBody, *, from_line: int, may_complete: bool, caller: Caller) -> BulkView:
    """Receive the lines after the first `from_line` lines of the bulk.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkOffsetError: the bulk has received a different number of lines than `from_line`.
        BulkStateError: the bulk receives no more lines.
        BulkInvalidError, BulkQuotaError, BulkTooLargeError, QuotaExceededError, TooManyStreamsError,
        DatabaseConnectionError: as `send`.
    """
    with transfer_slot():
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
        _check_receiving(bulk, received_lines=from_line)
        lines = body.lines(received=from_line, digest=bulk.digest)
        _store_lines(bulk_id, lines, defaults=bulk.defaults, caller=caller)
        return _complete_if_all_arrived(bulk_id, body, may_complete=may_complete, caller=caller)


def complete(bulk_id: UUID, request: BulkComplete, *, caller: Caller) -> BulkView:
    """Start the bulk if it has received all lines that the client sent. May be repeated.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkOffsetError: the bulk has received a different number of lines, or different lines.
        BulkStateError: the bulk was abandoned.
        BulkInvalidError: the bulk is refused, because it has invalid lines or no items.
        ModelNotFoundError: a model of the bulk is not configured any more.
        QuotaExceededError: the bulk has more images than the owner's quota allows today.
        DatabaseConnectionError: the database does not answer.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        digest = bulk.digest.hex()
        if request.lines != bulk.received_lines or request.digest not in (None, digest):
            raise BulkOffsetError(received_lines=bulk.received_lines, digest=digest)
        if bulk.state == BulkState.ABANDONED:
            raise BulkStateError("The bulk was abandoned, because its lines stopped arriving.", state=bulk.state)
        starts = False
        if bulk.state == BulkState.RECEIVING:
            refused = bulk.total == 0 or (bulk.invalid and bulk.on_invalid == OnInvalid.REFUSE)
            if refused:
                bulks.refuse(session, bulk)
            else:
                _check_models(bulk.models)
                bulks.start(session, bulk, get_settings().limits)
                starts = True
        refusal = _refusal_error(session, bulk) if bulk.state == BulkState.REFUSED else None
        view = _bulk_views(session, [bulk])[0]
        models = bulk.models
    if refusal is not None:
        raise refusal
    if starts and view.total >= ANALYZE_FROM_ITEMS:
        try:
            with session_scope() as session:
                bulks.analyze(session)
        except DatabaseError as error:  # lists of items are slower for a while
            logger.warning("bulk_not_analyzed", extra={"cause": error.code})
    _dispatch(models)
    return view


def _find_or_create(
    session: Session, options: BulkOptions | None, first: Line | None, *, caller: Caller, key: str | None
) -> tuple[Bulk, bool]:
    """Return the bulk that receives the lines, and whether an earlier request with this key created it."""
    settings = get_settings()
    header = options or BulkOptions()
    if header.webhook is not None:
        check_url(header.webhook.url, settings.webhooks)
    if key is not None:
        fingerprint = hashlib.sha256(orjson.dumps(header.model_dump(mode="json"), option=orjson.OPT_SORT_KEYS))
        known = idempotency.begin(
            session, owner_id=caller.owner_id, route=IDEMPOTENCY_ROUTE, key=key, fingerprint=fingerprint.hexdigest()
        )
        if known is not None:
            return bulks.get(session, UUID(known["id"]), owner_id=caller.owner_id), True
    max_items = settings.bulks.max_items
    if header.items is not None and header.items > max_items:
        raise BulkTooLargeError(f"A bulk may have at most {max_items} items.", maximum=max_items)
    count, items = bulks.count_unfinished(session, caller.owner_id, lock=True)
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
        idempotency.store_answer(
            session, {"id": str(bulk.id)}, owner_id=caller.owner_id, route=IDEMPOTENCY_ROUTE, key=key
        )
    return bulk, False


def _skip_received(lines: Iterator[Line], bulk: Bulk) -> Iterator[Line]:
    """Skip the lines that the bulk has. The digest of the last one proves that all of them are the same.

    Raises:
        IdempotencyKeyReusedError: the skipped lines differ from the received ones.
    """
    for line in lines:
        if line.number == bulk.received_lines and line.digest != bulk.digest:
            raise IdempotencyKeyReusedError
        if line.number > bulk.received_lines:
            yield line


def _check_early_end(bulk: Bulk, body: BulkBody, *, is_header: bool, may_complete: bool) -> None:
    """Check whether a body with fewer lines than the bulk has may be a part of the same lines.

    Its lines cannot be compared, because the bulk keeps only the digest of all lines. A header alone finds the bulk in
    every state, if `may_complete` is false.

    Raises:
        IdempotencyKeyReusedError: the body is complete or has items, and cannot be a part of the bulk's lines.
    """
    is_lookup = not may_complete and body.last_line <= int(is_header)
    is_whole = may_complete and body.is_complete
    if is_whole or (bulk.state != BulkState.RECEIVING and not is_lookup):
        raise IdempotencyKeyReusedError


def _store_lines(bulk_id: UUID, lines: Iterator[Line], *, defaults: dict[str, Any], caller: Caller) -> None:
    """Store the lines, each chunk in its own transaction, so that lines before a lost connection are kept.

    defaults: fields of the items that lack them, from the bulk's header.
    """
    settings = get_settings()
    for chunk in in_chunks(lines, max_lines=settings.bulks.chunk_lines):
        parsed = bulk_items.parse_lines(chunk, defaults=defaults, settings=settings.bulks)
        with session_scope() as session:
            bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
            _check_receiving(bulk, received_lines=chunk[0].number - 1)
            checked = bulk_items.check_lines(session, bulk, parsed, caller=caller, settings=settings)
            bulks.append_lines(
                session,
                bulk,
                received_lines=chunk[-1].number,
                digest=chunk[-1].digest,
                items=checked.items,
                errors=checked.errors,
            )
            max_items = settings.bulks.max_items
            if bulk.total + bulk.invalid > max_items:
                raise BulkTooLargeError(
                    f"A bulk may have at most {max_items} items.", maximum=max_items, bulk_id=str(bulk_id)
                )
            count, items = bulks.count_unfinished(session, caller.owner_id)
            if items > settings.bulks.max_open_items:
                raise BulkQuotaError(bulks=count, items=items, bulk_id=str(bulk_id))


def _check_receiving(bulk: Bulk, *, received_lines: int) -> None:
    if bulk.state != BulkState.RECEIVING:
        raise BulkStateError("The bulk receives no more lines.", state=bulk.state)
    if bulk.received_lines != received_lines:
        raise BulkOffsetError(received_lines=bulk.received_lines, digest=bulk.digest.hex())


def _complete_if_all_arrived(bulk_id: UUID, body: BulkBody, *, may_complete: bool, caller: Caller) -> BulkView:
    """Start the bulk if its lines end with those of the body, and raise the error of a refused bulk."""
    view = get(bulk_id, caller=caller)
    if view.state is BulkState.REFUSED:
        return complete(bulk_id, BulkComplete(lines=view.received_lines), caller=caller)
    if may_complete and body.is_complete and view.state is BulkState.RECEIVING:
        end = BulkComplete(lines=body.last_line, digest=body.digest.hex() or None)
        return complete(bulk_id, end, caller=caller)
    return view


def _refusal_error(session: Session, bulk: Bulk) -> BulkInvalidError:
    """The error of a refused bulk, with the first `MAX_ERRORS_SHOWN` reasons. The others are at `errors_url`."""
    errors, _ = bulks.list_line_errors(session, bulk.id, after=0, limit=MAX_ERRORS_SHOWN)
    reasons = [
        reason
        for error in errors
        for reason in error.errors or [{"field": f"line.{error.line}", "code": error.code, "message": error.detail}]
    ]
    return BulkInvalidError(
        None if bulk.total or bulk.invalid else "The bulk has no items.",
        errors=list(reasons[:MAX_ERRORS_SHOWN]),
        bulk_id=str(bulk.id),
        invalid=bulk.invalid,
        errors_url=api_address(f"/bulks/{bulk.id}/errors"),
    )


@contextmanager
def transfer_slot() -> Iterator[None]:
    """Occupy a transfer slot in this block.

    Raises:
        TooManyStreamsError: this process has reached its limit of transfers.
    """
    slot = take_transfer_slot()
    try:
        yield
    finally:
        slot.release()


def take_transfer_slot() -> threading.BoundedSemaphore:
    """Take a transfer slot. The caller must release it.

    Raises:
        TooManyStreamsError: this process has reached its limit of transfers.
    """
    if not _transfer_slots().acquire(blocking=False):
        raise TooManyStreamsError("This process has reached its limit of bulks that are sent or received at once.")
    return _transfer_slots()


@process_singleton
def _transfer_slots() -> threading.BoundedSemaphore:
    """Limit of transfers in this process, so that they cannot occupy all of its threads."""
    return threading.BoundedSemaphore(get_settings().bulks.max_transfers)


# --- following ----------------------------------------------------------------------------------------------------


def get(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Return a bulk with its progress.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
    """
    with session_scope() as session:
        return _bulk_views(session, [bulks.get(session, bulk_id, owner_id=caller.owner_id)])[0]


def list_page(query: BulkQuery, *, caller: Caller) -> Page[BulkView]:
    """Return a page of the caller's bulks, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = bulks.list_page(session, query, owner_id=caller.owner_id)
        return Page(items=_bulk_views(session, rows), next_cursor=next_cursor)


def list_items(bulk_id: UUID, query: BulkItemQuery, *, caller: Caller) -> Page[BulkItemView]:
    """Return a page of the bulk's items, in the order of lines.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id)
        rows, last_line = bulks.list_items(session, bulk, after=query.cursor or 0, limit=query.limit, state=query.state)
        by_job = outputs.list_by_job(session, [job.id for _, job, _ in rows if job is not None])
        withdrawn = withdrawals.find(session, [each.id for of_job in by_job.values() for each in of_job])
        items = [
            _item_view(item, job, state, by_job.get(job.id, []) if job else [], withdrawn) for item, job, state in rows
        ]
    return Page(items=items, next_cursor=None if last_line is None else str(last_line))


def list_errors(bulk_id: UUID, query: LineQuery, *, caller: Caller) -> Page[BulkLineError]:
    """Return a page of the bulk's invalid lines.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
    """
    with session_scope() as session:
        bulks.get(session, bulk_id, owner_id=caller.owner_id)
        rows, last_line = bulks.list_line_errors(session, bulk_id, after=query.cursor or 0, limit=query.limit)
        views = [
            BulkLineError.model_validate(
                {name: getattr(row, name) for name in ("line", "custom_id", "code", "detail", "errors")}
            )
            for row in rows
        ]
    return Page(items=views, next_cursor=None if last_line is None else str(last_line))


# --- control ------------------------------------------------------------------------------------------------------


def pause(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Pause a bulk: running items end normally, and no other item starts. May be repeated.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkStateError: the bulk is neither running nor paused.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.pause(session, bulk)
        view = _bulk_views(session, [bulk])[0]
    _dispatch(bulk.models)  # there is room for the jobs of others now
    return view


def resume(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Resume a paused bulk. May be repeated.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkStateError: the bulk is neither paused nor running.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.resume(session, bulk)
        view = _bulk_views(session, [bulk])[0]
    _dispatch(bulk.models)
    return view


def cancel(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Cancel a bulk: waiting items end at once, running ones within a denoising step. May be repeated.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkStateError: the bulk has ended in another state.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        ended = bulks.cancel(session, bulk)
        view = _bulk_views(session, [bulk])[0]
    for job_id in ended:
        publish_job_update(job_id)
    _dispatch(bulk.models)
    if bulk.webhook is not None:
        queue.notify_webhook_workers()
    return view


def retry_failed(bulk_id: UUID, *, caller: Caller) -> BulkView:
    """Retry each item that has failed, expired or died until now, with a new job.

    Raises:
        ResourceNotFoundError: the caller has no bulk with this id.
        BulkStateError: the bulk has not started, or was canceled, refused or abandoned.
        ModelNotFoundError: a model of the bulk is not configured any more.
        QuotaExceededError: the items have more images than the owner's quota allows today.
    """
    with session_scope() as session:
        bulk = bulks.get(session, bulk_id, owner_id=caller.owner_id, lock=True)
        bulks.retry_failed(session, bulk, get_settings().limits)
        if bulk.finished_at is None:
            _check_models(bulk.models)
        view = _bulk_views(session, [bulk])[0]
    _dispatch(bulk.models)
    return view


def _check_models(models: Sequence[str]) -> None:
    """Refuse to start items that no worker would run.

    Raises:
        ModelNotFoundError: a model is not configured any more.
    """
    for model in models:
        get_settings().model.generator(model)


def _dispatch(models: Sequence[str]) -> None:
    for model in models:
        dispatch_soon(model)


# --- views --------------------------------------------------------------------------------------------------------


def _bulk_views(session: Session, rows: Sequence[Bulk]) -> list[BulkView]:
    progress = _cached_progress(session, rows)
    return [_bulk_view(row, progress[row.id]) for row in rows]


def _cached_progress(session: Session, rows: Sequence[Bulk]) -> dict[UUID, bulks.Progress]:
    """Return the progress of each bulk. That of a large bulk is cached until its state changes, or `COUNTS_TTL_S`.

    To count 100,000 rows takes 10 to 100 ms.
    """
    cache = get_cache_manager()
    keys = {
        row.id: f"bulk:{row.id}:{row.state}:{row.finished_at}:{row.total}:{row.retry_before}"
        for row in rows
        if row.fed > CACHE_COUNTS_FROM_ITEMS
    }
    known: dict[UUID, bulks.Progress | None] = {
        bulk_id: cache.get(
            key, lambda value: bulks.Progress(BulkCounts.model_validate(value["counts"]), value["rate_per_s"])
        )
        for bulk_id, key in keys.items()
    }
    progress = bulks.get_progress(session, [row for row in rows if known.get(row.id) is None])
    for bulk_id, cached in known.items():
        if cached is not None:
            progress[bulk_id] = cached
        else:
            counted = progress[bulk_id]
            value = {"counts": counted.counts.model_dump(), "rate_per_s": counted.rate_per_s}
            cache.set(keys[bulk_id], value, COUNTS_TTL_S)
    return progress


def _bulk_view(row: Bulk, progress: bulks.Progress) -> BulkView:
    url = api_address(f"/bulks/{row.id}")
    remaining = progress.counts.queued + progress.counts.processing
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
        estimated_end=datetime.now(UTC) + timedelta(seconds=remaining / rate_per_s) if rate_per_s else None,
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


def item_job_id(item: BulkItem, job: Job | None, state: ItemState) -> UUID | None:
    """The id of an item's job, even if the job was deleted. `None`: the item waits for its first or next job."""
    return job.id if job is not None else item.job_id if state is ItemState.DELETED else None


def _item_view(
    item: BulkItem,
    job: Job | None,
    state: ItemState,
    item_outputs: Sequence[Output],
    withdrawn: Mapping[UUID, Withdrawal],
) -> BulkItemView:
    return BulkItemView(
        line=item.line,
        custom_id=item.custom_id,
        kind=JobKind(item.kind),
        model=item.model,
        prompt=item.parameters["prompt"],
        metadata=item.item_metadata,
        state=state,
        job_id=item_job_id(item, job, state),
        error=JobError.model_validate(job.error, extra="ignore") if job is not None and job.error else None,
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
                content_url=None if each.id in withdrawn else api_address(f"/generations/{each.id}/content"),
                withdrawn=views.withdrawn(withdrawn.get(each.id)),
            )
            for each in item_outputs
        ],
    )
