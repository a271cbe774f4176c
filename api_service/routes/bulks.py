"""Routes of bulks: send thousands of generations as one stream, follow them, and download the results."""

from collections.abc import Iterator
from uuid import UUID

from flask import Response, g, request
from flask_openapi3.models.tag import Tag
from werkzeug.exceptions import UnsupportedMediaType

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.concurrency import stream_body_directly
from api_service.http.urls import API
from api_service.routes.generation import idempotency_key
from api_service.services.bulk_lines import BulkBody
from shared.contracts.bulks import (
    BulkAppend,
    BulkComplete,
    BulkItemQuery,
    BulkItemView,
    BulkLineError,
    BulkQuery,
    BulkRest,
    BulkSend,
    BulkView,
    LineQuery,
)
from shared.contracts.common import Contract, Page
from shared.settings import get_settings

JSON_LINES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines")

bulks = ApiBlueprint(
    "bulks",
    __name__,
    url_prefix=f"{API}/bulks",
    abp_tags=[Tag(name="bulks", description="Thousands of generations as one stream.")],
)


class BulkPath(Contract):
    bulk_id: UUID


@bulks.post("", operation_id="createBulk", responses={202: BulkView})
def create_bulk(query: BulkSend) -> Response:
    """Send many generations as JSON Lines

    Each line is an item with the fields of `POST /rag/generate` and a `custom_id`. With `"kind": "generate"` it has the
    fields of `POST /generate`. The first line may be a header, `{"bulk": {...}}`, with options of the whole bulk.

    Lines are stored as they arrive. No item runs before all lines are received. The end of a body with `Content-Length`
    is the end of the lines. After a chunked body, send `POST /bulks/{bulk_id}/complete`.

    After a lost connection, send everything again with the same `Idempotency-Key`, or send the rest to
    `POST /bulks/{bulk_id}/lines`.
    """
    sent = services.bulks.send(_bulk_body(), may_complete=query.complete, caller=g.caller, key=idempotency_key())
    response = _accepted(sent.view)
    if sent.already_submitted:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bulks.post("/<bulk_id>/lines", operation_id="appendBulkLines", responses={202: BulkView})
def append_lines(path: BulkPath, query: BulkAppend) -> Response:
    """Send more lines of a bulk

    `from_line` must be the bulk's `received_lines`. Otherwise the answer is 409 `bulk_offset_mismatch`, with the right
    number.
    """
    view = services.bulks.append(
        path.bulk_id, _bulk_body(), from_line=query.from_line, may_complete=query.complete, caller=g.caller
    )
    return _accepted(view)


@bulks.post("/<bulk_id>/complete", operation_id="completeBulk", responses={200: BulkView})
def complete_bulk(path: BulkPath, body: BulkComplete) -> BulkView:
    """Declare that all lines of a bulk are sent, and start it

    `lines` must be the bulk's `received_lines`. May be repeated.
    """
    return services.bulks.complete(path.bulk_id, body, caller=g.caller)


@bulks.get("", operation_id="listBulks", responses={200: Page[BulkView]})
def list_bulks(query: BulkQuery) -> Page[BulkView]:
    """List the caller's bulks, newest first"""
    return services.bulks.list_page(query, caller=g.caller)


@bulks.get("/<bulk_id>", operation_id="getBulk", responses={200: BulkView})
def get_bulk(path: BulkPath) -> BulkView:
    """Get a bulk: items by state, rate, estimated end"""
    return services.bulks.get(path.bulk_id, caller=g.caller)


@bulks.get("/<bulk_id>/items", operation_id="listBulkItems", responses={200: Page[BulkItemView]})
def list_items(path: BulkPath, query: BulkItemQuery) -> Page[BulkItemView]:
    """List the items of a bulk, in the order of their lines, with their outputs"""
    return services.bulks.list_items(path.bulk_id, query, caller=g.caller)


@bulks.get("/<bulk_id>/errors", operation_id="listBulkErrors", responses={200: Page[BulkLineError]})
def list_errors(path: BulkPath, query: LineQuery) -> Page[BulkLineError]:
    """List the invalid lines of a bulk, with the reasons"""
    return services.bulks.list_errors(path.bulk_id, query, caller=g.caller)


@bulks.post("/<bulk_id>/pause", operation_id="pauseBulk", responses={200: BulkView})
def pause_bulk(path: BulkPath) -> BulkView:
    """Pause a bulk

    Running items end normally, and no other item starts. May be repeated.
    """
    return services.bulks.pause(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/resume", operation_id="resumeBulk", responses={200: BulkView})
def resume_bulk(path: BulkPath) -> BulkView:
    """Resume a paused bulk

    May be repeated.
    """
    return services.bulks.resume(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/cancel", operation_id="cancelBulk", responses={200: BulkView})
def cancel_bulk(path: BulkPath) -> BulkView:
    """Cancel all items of a bulk that have not ended

    May be repeated.
    """
    return services.bulks.cancel(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/retry-failed", operation_id="retryFailedBulkItems", responses={200: BulkView})
def retry_failed(path: BulkPath) -> BulkView:
    """Retry the items of a bulk that failed, expired or died

    Each gets a new job that names the old one in `retry_of`. Without such items nothing changes.
    """
    return services.bulks.retry_failed(path.bulk_id, caller=g.caller)


@bulks.get("/<bulk_id>/manifest", operation_id="getBulkManifest")
def get_manifest(path: BulkPath, query: BulkRest) -> Response:
    """Download every item with its full provenance, as JSON Lines

    The stream has the items in the order of lines, in their current state. The last line is
    `{"end": true, "items": N}`. Without it the download was cut: pass the number of its last line as `cursor` to
    continue.
    """
    parts = services.bulk_results.manifest(path.bulk_id, after=query.cursor or 0, caller=g.caller)
    return _download(parts, media_type=JSON_LINES[0], filename=f"{path.bulk_id}.jsonl")


@bulks.get("/<bulk_id>/archive", operation_id="getBulkArchive")
def get_archive(path: BulkPath, query: BulkRest) -> Response:
    """Download every image made so far, as a tar archive

    `000017-0.png` is the first image of line 17. `000017.json` follows the images of the line, and is its line of the
    manifest. The last member is `end.json`. Without it the download was cut: pass the number of its last line as
    `cursor` to continue.
    """
    parts = services.bulk_results.archive(path.bulk_id, after=query.cursor or 0, caller=g.caller)
    return _download(parts, media_type="application/x-tar", filename=f"{path.bulk_id}.tar")


def _bulk_body() -> BulkBody:
    if request.mimetype not in JSON_LINES:
        raise UnsupportedMediaType(f"Send JSON Lines with Content-Type: {JSON_LINES[0]}.")
    settings = get_settings().bulks
    request.max_content_length = settings.max_body_bytes
    stream_body_directly(request.environ)
    return BulkBody(request.stream, content_length=request.content_length, settings=settings)


def _accepted(view: BulkView) -> Response:
    return responses.json(view, 202, {"Location": view.url, "Retry-After": str(responses.POLL_AFTER_S)})


def _download(parts: Iterator[bytes], *, media_type: str, filename: str) -> Response:
    slot = services.bulks.take_transfer_slot()
    response = Response(parts, content_type=media_type)
    response.headers["Cache-Control"] = "no-store"
    response.headers["Accept-Ranges"] = "none"  # a later download has other bytes; `cursor` continues one
    response.headers.set("Content-Disposition", "attachment", filename=filename)
    # Not in the generator: if it is closed before its first step, its `finally` does not run.
    response.call_on_close(slot.release)
    return response
