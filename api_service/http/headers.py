"""The headers of answers, as the OpenAPI document describes them."""

from http import HTTPStatus
from typing import Any

HEADERS = "#/components/headers/"

COMPONENTS: dict[str, dict[str, Any]] = {
    name: {"description": description, "schema": schema, "example": example}
    for name, description, schema, example in (
        ("X-Request-ID", "the one sent, if it was sane, else a new one", {"type": "string"}, "f0c1b0d8a9b84c0f"),
        ("Retry-After", "seconds until it makes sense to ask again", {"type": "integer", "minimum": 0}, 5),
        ("WWW-Authenticate", "how to authenticate", {"type": "string"}, "Bearer"),
        ("RateLimit-Limit", "requests of this kind per minute", {"type": "integer", "minimum": 1}, 6000),
        ("RateLimit-Remaining", "of them, those that are left", {"type": "integer", "minimum": 0}, 5999),
        ("RateLimit-Reset", "seconds until all are there again", {"type": "integer", "minimum": 1}, 42),
        ("ETag", "for `If-None-Match`", {"type": "string"}, 'W/"5d41402abc4b2a76b9719d911017c592"'),
        ("Location", "where to ask for it", {"type": "string"}, "/api/v1/jobs/6f1c9f5e-7a4e-4a43-9b57-0d5c1d3f8a11"),
        ("Preference-Applied", "the wait that was honoured", {"type": "string"}, "wait=20"),
        ("Idempotent-Replayed", "`true`: the answer that the key had before", {"type": "string"}, "true"),
        ("Content-Disposition", "the file's name", {"type": "string"}, 'inline; filename="apple.png"'),
    )
}
RATE_LIMITS = ("RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset")
WAITING = ("generate", "ragGenerate", "getJob")
SUBMITS = ("generate", "ragGenerate", "createBulk")


def of_error(status: HTTPStatus) -> dict[str, Any]:
    names = ["X-Request-ID"]
    if status is HTTPStatus.UNAUTHORIZED:
        names.append("WWW-Authenticate")
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        names.append("Retry-After")
    return _references(names)


def of_success(operation_id: str, method: str, status: str, *, is_file: bool, needs_key: bool) -> dict[str, Any]:
    names = ["X-Request-ID", *(RATE_LIMITS if needs_key else ())]
    if method == "get" and status in ("200", "304") and operation_id != "streamJobEvents":
        names.append("ETag")
    if is_file:
        names.append("Content-Disposition")
    if status == "202":
        names += ["Location", "Retry-After"]
    elif operation_id == "getJob":
        names.append("Retry-After")
    if operation_id in WAITING:
        names.append("Preference-Applied")
    if operation_id in SUBMITS:
        names.append("Idempotent-Replayed")
    return _references(names)


def _references(names: list[str]) -> dict[str, Any]:
    return {name: {"$ref": HEADERS + name} for name in names}
