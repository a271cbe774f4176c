"""Answers: JSON with an ETag, accepted jobs, and blobs that never change."""

import hashlib
import re
from functools import partial

import orjson
from flask import Response, g, request
from pydantic import BaseModel
from werkzeug.datastructures import Headers

from api_service.http.concurrency import downloads
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobView
from shared.errors import TooManyStreamsError
from shared.storage import get_blobs

POLL_AFTER_S = 1
AT_ONCE_BYTES = 2**20
"""A file up to this size is handed to the server in one piece: however slowly it is read, no thread waits for that."""


def json(body: BaseModel, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """The contract as JSON; a GET that the client already has the answer of gets 304."""
    data = orjson.dumps(body.model_dump(mode="json"))
    response = Response(data, status=status, content_type="application/json", headers=headers)
    if request.method in ("GET", "HEAD") and status == 200:
        response.set_etag(hashlib.sha256(data).hexdigest()[:32], weak=True)
        response.headers["Cache-Control"] = "private, no-cache"
        response.make_conditional(request)
    return response


def encoded(data: bytes) -> Response:
    """A contract that is JSON already."""
    return Response(data, content_type="application/json")


def job(view: JobView, *, waited: float | None = None) -> Response:
    """A job; one that has not ended with the advice when to ask again."""
    headers = {} if view.state.is_final else {"Retry-After": str(POLL_AFTER_S)}
    return json(view, headers=headers | _preference_applied(waited))


def accepted(view: JobView, *, waited: float | None = None) -> Response:
    """200 with a job that has already ended, else 202 and where to ask for it.

    waited: seconds that the caller preferred to wait for at most, if that was honoured.
    """
    headers = {"Location": view.url} | _preference_applied(waited)
    if view.state.is_final:
        return json(view, 200, headers)
    return json(view, 202, headers | {"Retry-After": str(POLL_AFTER_S)})


def secret(body: BaseModel) -> Response:
    """Something new with a secret in it, which no cache may keep."""
    return json(body, 201, {"Cache-Control": "no-store"})


def no_content() -> Response:
    response = Response(status=204)
    del response.headers["Content-Type"]
    return response


def blob(key: str, *, etag: str, media_type: str, size_bytes: int | None, filename: str) -> Response:
    """Stored bytes, streamed. They never change under their address, so whoever has them need not ask again.

    Raises:
        ResourceNotFoundError, StorageError
        TooManyStreamsError: it is large, and this process sends as many of those as it may.
    """
    headers = Headers()
    headers["Cache-Control"] = "private, max-age=31536000, immutable"
    headers.set("Content-Disposition", "inline", filename=filename)
    if request.if_none_match.contains_weak(etag):
        response = Response(status=304, headers=headers)
    else:
        response = _content(key, size_bytes)
        response.content_type = media_type
        response.headers.extend(headers)
        if size_bytes is not None:
            response.content_length = size_bytes
    response.set_etag(etag)
    return response


def _content(key: str, size_bytes: int | None) -> Response:
    if request.method == "HEAD":
        return Response()
    if (size_bytes or 0) <= AT_ONCE_BYTES:
        return Response(get_blobs().get(key))
    owner_id = g.caller.owner_id
    if not downloads().take(owner_id):
        raise TooManyStreamsError("This process sends as many large files as it may, in all or to this owner.")
    try:
        # Opened before the headers leave, so that a missing blob is a 404 and not a broken 200.
        response = Response(get_blobs().stream(key))
    except BaseException:
        downloads().give_back(owner_id)
        raise
    response.call_on_close(partial(downloads().give_back, owner_id))
    return response


def thumbnail(key: str, *, sha256: str, name: str) -> Response:
    """The thumbnail of the image with that digest."""
    return blob(
        key,
        etag=f"{sha256}-thumbnail",
        media_type=ImageFormat.WEBP.media_type,
        size_bytes=None,
        filename=f"{name}-thumbnail.webp",
    )


def preferred_wait_s() -> float | None:
    """Seconds of `Prefer: wait=N` (RFC 7240); None when it is absent or makes no sense, which is not an error."""
    found = re.search(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,6})"?\s*(?:$|[,;])', request.headers.get("Prefer", ""), re.I)
    return float(found[1]) if found else None


def _preference_applied(waited: float | None) -> dict[str, str]:
    return {} if waited is None else {"Preference-Applied": f"wait={waited:g}"}
