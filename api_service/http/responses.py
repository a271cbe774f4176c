"""Builds responses: JSON with an ETag, accepted jobs, and stored files that never change."""

import hashlib
import re
from functools import partial

import orjson
from flask import Response, g, request
from pydantic import BaseModel
from werkzeug.datastructures import Headers

from api_service.http.concurrency import download_slots
from api_service.http.ranges import requested_range
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobView
from shared.errors import TooManyStreamsError
from shared.storage import get_blobs

POLL_AFTER_S = 1
MAX_UNSTREAMED_BYTES = 2**20
"""The server gets a file up to this size in one piece, so no thread waits for a slow reader."""


def json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Send a contract as JSON. A GET with the current ETag in `If-None-Match` gets 304."""
    data = orjson.dumps(body.model_dump(mode="json"))
    response = Response(data, status=status, content_type="application/json", headers=headers)
    if request.method in ("GET", "HEAD") and status == 200:
        response.set_etag(hashlib.sha256(data).hexdigest()[:32], weak=True)
        response.headers["Cache-Control"] = "private, no-cache"
        response.make_conditional(request)
    return response


def json_bytes(data: bytes) -> Response:
    """Send a contract that is already encoded as JSON."""
    return Response(data, content_type="application/json")


def job(view: JobView, *, waited: float | None = None) -> Response:
    """Send a job; with `Retry-After` if it has not ended.

    waited: the preferred wait in seconds, if the service applied it.
    """
    headers = {} if view.state.is_final else {"Retry-After": str(POLL_AFTER_S)}
    return json(view, headers=headers | _preference_applied(waited))


def accepted(view: JobView, *, waited: float | None = None) -> Response:
    """Send 200 with a job that has ended, otherwise 202 with its `Location`.

    waited: the preferred wait in seconds, if the service applied it.
    """
    headers = {"Location": view.url} | _preference_applied(waited)
    if view.state.is_final:
        return json(view, 200, headers)
    return json(view, 202, headers | {"Retry-After": str(POLL_AFTER_S)})


def created_secret(body: BaseModel) -> Response:
    """Send 201 with a new secret, which caches must not store."""
    return json(body, 201, {"Cache-Control": "no-store"})


def no_content() -> Response:
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def stored_file(
    key: str, *, etag: str, media_type: str, size_bytes: int | None, filename: str, may_go: bool = False
) -> Response:
    """Send the file stored under `key`, or a range of it. A large one is streamed.

    size_bytes: `None` for a small file whose size the caller does not know. may_go: caches must ask each time whether
    the file still may be shown. Otherwise they may keep it forever.

    Raises:
        RequestedRangeNotSatisfiable: the file has none of the requested bytes.
        ResourceNotFoundError: the blob store has no such file.
        StorageError: the blob store failed.
        TooManyStreamsError: the file is large, and this process or the owner has reached its limit of downloads.
    """
    headers = Headers()
    headers["Cache-Control"] = "private, no-cache" if may_go else "private, max-age=31536000, immutable"
    headers["Accept-Ranges"] = "bytes"
    headers.set("Content-Disposition", "inline", filename=filename)
    if request.if_none_match.contains_weak(etag):
        response = Response(status=304, headers=headers)
    else:
        data = None
        if size_bytes is None:
            data = get_blobs().get(key)
            size_bytes = len(data)
        wanted = requested_range(request, etag=etag, size_bytes=size_bytes)
        response = _file_response(key, data, wanted or range(size_bytes))
        response.content_type = media_type
        response.headers.extend(headers)
        if wanted is not None:
            response.status_code = 206
            response.headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{size_bytes}"
    response.set_etag(etag)
    return response


def _file_response(key: str, data: bytes | None, wanted: range) -> Response:
    if request.method == "HEAD":
        response = Response()
    elif data is not None:
        response = Response(data[wanted.start : wanted.stop])
    elif len(wanted) <= MAX_UNSTREAMED_BYTES:
        response = Response(b"".join(get_blobs().stream(key, wanted)))
    else:
        response = _streamed_response(key, wanted)
    response.content_length = len(wanted)
    return response


def _streamed_response(key: str, wanted: range) -> Response:
    owner_id = g.caller.owner_id
    if not download_slots().take(owner_id):
        raise TooManyStreamsError("This process has reached its limit of large downloads, in total or for this owner.")
    try:
        # Open the file before the headers are sent: a missing file is then a 404 and not a broken 200.
        response = Response(get_blobs().stream(key, wanted))
    except BaseException:
        download_slots().release(owner_id)
        raise
    response.call_on_close(partial(download_slots().release, owner_id))
    return response


def thumbnail(key: str, *, sha256: str, name: str, may_go: bool = False) -> Response:
    """Send the thumbnail of the image with this digest. may_go: as in `stored_file`."""
    return stored_file(
        key,
        etag=f"{sha256}-thumbnail",
        media_type=ImageFormat.WEBP.media_type,
        size_bytes=None,
        filename=f"{name}-thumbnail.webp",
        may_go=may_go,
    )


def preferred_wait_s() -> float | None:
    """Return N, in seconds, of `Prefer: wait=N` (RFC 7240); `None`: it is missing or invalid, which is not an error."""
    match = re.search(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,6})"?\s*(?:$|[,;])', request.headers.get("Prefer", ""), re.I)
    return float(match[1]) if match else None


def _preference_applied(waited: float | None) -> dict[str, str]:
    return {} if waited is None else {"Preference-Applied": f"wait={waited:g}"}
