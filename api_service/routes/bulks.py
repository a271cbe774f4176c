"""Bulks: thousands of generations sent, followed and fetched as one."""

from collections.abc import Iterator
from uuid import UUID

from flask import Response, g, request
from flask_openapi3.models.tag import Tag
from werkzeug.exceptions import UnsupportedMediaType

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import Resource
from api_service.http.concurrency import unwatched_body
from api_service.routes.generation import idempotency_key
from api_service.services.bulk_lines import Body
from api_service.services.views import API
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

bulks = Resource(
    "bulks",
    __name__,
    url_prefix=f"{API}/bulks",
    abp_tags=[Tag(name="bulks", description="Thousands of generations at once.")],
)


class BulkPath(Contract):
    bulk_id: UUID


@bulks.post("", operation_id="createBulk", responses={202: BulkView})
def create_bulk(query: BulkSend) -> Response:
    """Send many generations as JSON Lines

    Each line is an item: the fields of `POST /rag/generate`, or with `"kind": "generate"` of `POST /generate`, and a
    `custom_id`. The first line may be a header, `{"bulk": {...}}`, with what holds for all of them. Lines are kept as
    they arrive; nothing runs before the bulk is complete: a body with `Content-Length` completes it, a chunked one
    needs `POST /bulks/{bulk_id}/complete`. After a lost connection the whole may be sent again with the same
    `Idempotency-Key`, or the rest to `POST /bulks/{bulk_id}/lines`.
    """
    sent = services.bulks.send(_body(), may_complete=query.complete, caller=g.caller, key=idempotency_key())
    response = _accepted(sent.view)
    if sent.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


@bulks.post("/<bulk_id>/lines", operation_id="appendBulkLines", responses={202: BulkView})
def append_lines(path: BulkPath, query: BulkAppend) -> Response:
    """Send more lines

    `from_line` must be the bulk's `received_lines`; 409 `bulk_offset_mismatch` tells what it is.
    """
    view = services.bulks.append(
        path.bulk_id, _body(), from_line=query.from_line, may_complete=query.complete, caller=g.caller
    )
    return _accepted(view)


@bulks.post("/<bulk_id>/complete", operation_id="completeBulk", responses={200: BulkView})
def complete_bulk(path: BulkPath, body: BulkComplete) -> BulkView:
    """Everything was sent: run it

    `lines` must be what the bulk has received. May be repeated.
    """
    return services.bulks.complete(path.bulk_id, body, caller=g.caller)


@bulks.get("", operation_id="listBulks", responses={200: Page[BulkView]})
def list_bulks(query: BulkQuery) -> Page[BulkView]:
    """The caller's bulks, newest first"""
    return services.bulks.page(query, caller=g.caller)


@bulks.get("/<bulk_id>", operation_id="getBulk", responses={200: BulkView})
def get_bulk(path: BulkPath) -> BulkView:
    """How far a bulk is: items by state, rate, estimated end"""
    return services.bulks.get(path.bulk_id, caller=g.caller)


@bulks.get("/<bulk_id>/items", operation_id="listBulkItems", responses={200: Page[BulkItemView]})
def list_items(path: BulkPath, query: BulkItemQuery) -> Page[BulkItemView]:
    """Its items in the order of their lines, with their outputs"""
    return services.bulks.items(path.bulk_id, query, caller=g.caller)


@bulks.get("/<bulk_id>/errors", operation_id="listBulkErrors", responses={200: Page[BulkLineError]})
def list_errors(path: BulkPath, query: LineQuery) -> Page[BulkLineError]:
    """Its invalid lines, each with the reason"""
    return services.bulks.errors(path.bulk_id, query, caller=g.caller)


@bulks.post("/<bulk_id>/pause", operation_id="pauseBulk", responses={200: BulkView})
def pause_bulk(path: BulkPath) -> BulkView:
    """Start nothing more of it

    What runs ends. May be repeated.
    """
    return services.bulks.pause(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/resume", operation_id="resumeBulk", responses={200: BulkView})
def resume_bulk(path: BulkPath) -> BulkView:
    """Go on after a pause

    May be repeated.
    """
    return services.bulks.resume(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/cancel", operation_id="cancelBulk", responses={200: BulkView})
def cancel_bulk(path: BulkPath) -> BulkView:
    """Cancel whatever of it has not ended

    May be repeated.
    """
    return services.bulks.cancel(path.bulk_id, caller=g.caller)


@bulks.post("/<bulk_id>/retry-failed", operation_id="retryFailedBulkItems", responses={200: BulkView})
def retry_failed(path: BulkPath) -> BulkView:
    """Try the items again that failed, expired or died

    Each gets a new job that names the one before in `retry_of`; without such an item nothing changes.
    """
    return services.bulks.retry_failed(path.bulk_id, caller=g.caller)


@bulks.get("/<bulk_id>/manifest", operation_id="getBulkManifest")
def get_manifest(path: BulkPath, query: BulkRest) -> Response:
    """Every item with its full provenance, as JSON Lines

    Streamed, in the order of lines, as things are. The last line is `{"end": true, "items": N}`; without it the
    download was cut and goes on behind its last line with `cursor`.
    """
    parts = services.bulk_results.manifest(path.bulk_id, after=query.cursor or 0, caller=g.caller)
    return _download(parts, media_type=JSON_LINES[0], filename=f"{path.bulk_id}.jsonl")


@bulks.get("/<bulk_id>/archive", operation_id="getBulkArchive")
def get_archive(path: BulkPath, query: BulkRest) -> Response:
    """Every image made so far, as a tar

    Streamed. `000017-0.png` is the first image of line 17, and `000017.json`, behind it, that line of the manifest.
    The last member is `end.json`; without it the download was cut and goes on behind its last line with `cursor`.
    """
    parts = services.bulk_results.archive(path.bulk_id, after=query.cursor or 0, caller=g.caller)
    return _download(parts, media_type="application/x-tar", filename=f"{path.bulk_id}.tar")


def _body() -> Body:
    if request.mimetype not in JSON_LINES:
        raise UnsupportedMediaType(f"Send JSON Lines with Content-Type: {JSON_LINES[0]}.")
    settings = get_settings().bulks
    request.max_content_length = settings.max_body_bytes
    unwatched_body(request.environ)
    return Body(request.stream, content_length=request.content_length, settings=settings)


def _accepted(view: BulkView) -> Response:
    return responses.json(view, 202, {"Location": view.url, "Retry-After": str(responses.POLL_AFTER_S)})


def _download(parts: Iterator[bytes], *, media_type: str, filename: str) -> Response:
    place = services.bulks.place()
    response = Response(parts, content_type=media_type)
    response.headers["Cache-Control"] = "no-store"
    response.headers.set("Content-Disposition", "attachment", filename=filename)
    # Not in the generator: one that is closed before its first step runs no `finally`.
    response.call_on_close(place.release)
    return response
