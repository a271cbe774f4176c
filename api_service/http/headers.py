"""Descriptions of the response headers for the OpenAPI document."""

from http import HTTPStatus
from typing import Any

HEADER_REF_PREFIX = "#/components/headers/"

HEADER_COMPONENTS: dict[str, dict[str, Any]] = {
    name: {"description": description, "schema": schema, "example": example}
    for name, description, schema, example in (
        (
            "X-Request-ID",
            "the id that the client sent, if it was valid, otherwise a new one",
            {"type": "string"},
            "f0c1b0d8a9b84c0f",
        ),
        ("Retry-After", "seconds until the next try makes sense", {"type": "integer", "minimum": 0}, 5),
        ("WWW-Authenticate", "how to authenticate", {"type": "string"}, "Bearer"),
        ("RateLimit-Limit", "requests of this kind per minute", {"type": "integer", "minimum": 1}, 6000),
        (
            "RateLimit-Remaining",
            "remaining requests of this kind in this minute",
            {"type": "integer", "minimum": 0},
            5999,
        ),
        ("RateLimit-Reset", "seconds until the budget is full again", {"type": "integer", "minimum": 1}, 42),
        (
            "ETag",
            "version of the response, for `If-None-Match`",
            {"type": "string"},
            'W/"5d41402abc4b2a76b9719d911017c592"',
        ),
        (
            "Location",
            "path of the job or bulk",
            {"type": "string"},
            "/api/v1/jobs/6f1c9f5e-7a4e-4a43-9b57-0d5c1d3f8a11",
        ),
        ("Preference-Applied", "the wait that the service applied", {"type": "string"}, "wait=20"),
        (
            "Idempotent-Replayed",
            "`true`: this is the answer to an earlier request with the same key",
            {"type": "string"},
            "true",
        ),
        ("Content-Disposition", "the file's name", {"type": "string"}, 'inline; filename="apple.png"'),
        ("Accept-Ranges", "`bytes`: ranges of the file can be requested", {"type": "string"}, "bytes"),
        ("Content-Range", "place of these bytes in the file, and its size", {"type": "string"}, "bytes 0-99/1234"),
        ("Accept-Encoding", "`identity`: bodies are read only without encoding", {"type": "string"}, "identity"),
    )
}
RATE_LIMITS = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
WAIT_OPERATIONS = ("generate", "ragGenerate", "getJob")
SUBMIT_OPERATIONS = ("generate", "ragGenerate", "createBulk", "replayGeneration", "rememberGeneration")


def error_headers(status: HTTPStatus) -> dict[str, Any]:
    """References to the headers of an error response."""
    names = ["X-Request-ID"]
    if status is HTTPStatus.UNAUTHORIZED:
        names.append("WWW-Authenticate")
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        names.append("Retry-After")
    if status is HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        names.append("Accept-Encoding")
    if status is HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        names.append("Content-Range")
    return _header_refs(names)


def success_headers(operation_id: str, method: str, status: str, *, is_file: bool, needs_key: bool) -> dict[str, Any]:
    """References to the headers of a response that is not an error."""
    names = ["X-Request-ID", *(RATE_LIMITS if needs_key else ())]
    if method == "get" and status in ("200", "206", "304") and operation_id != "streamJobEvents":
        names.append("ETag")
    if is_file:
        names += ["Content-Disposition", "Accept-Ranges"]
    if status == "206":
        names.append("Content-Range")
    if status == "202":
        names += ["Location", "Retry-After"]
    elif operation_id == "getJob":
        names.append("Retry-After")
    if operation_id in WAIT_OPERATIONS:
        names.append("Preference-Applied")
    if operation_id in SUBMIT_OPERATIONS:
        names.append("Idempotent-Replayed")
    return _header_refs(names)


def _header_refs(names: list[str]) -> dict[str, Any]:
    return {name: {"$ref": HEADER_REF_PREFIX + name} for name in names}
