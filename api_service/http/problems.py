"""Turns exceptions into `application/problem+json` (RFC 9457). All error responses of the API come from here."""

import logging
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

import orjson
import pydantic
from flask import Flask, Response, g
from werkzeug.exceptions import HTTPException

from shared.contracts.common import FieldProblem, Problem
from shared.errors import BaseAppException, ConfigurationError, MalformedBodyError, ValidationError

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

HTTP_CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "request_timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.REQUEST_URI_TOO_LONG: "uri_too_long",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_media_type",
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE: "range_not_satisfiable",
}
"""Error codes of requests that the framework itself refuses."""
FRAMEWORK_HEADERS = {"Allow", "Accept-Encoding", "Content-Range"}
"""Headers of the framework's errors that clients need."""
PLAIN_WORDS = {
    "extra_forbidden": ("Extra inputs are not permitted", "There is no such field."),
    "missing": ("Field required", "Must be given."),
    "string_too_long": ("String should", "Must"),
    "string_too_short": ("String should", "Must"),
    # A text whose length is checked after another validator is a `Value` of "items".
    "too_long": (r"Value should have at most (\d+) items? after validation, .*", r"Must have at most \1 characters"),
    "too_short": ("Value should have at least 1 item after validation, .*", "Must have at least 1 character"),
}
"""By type of Pydantic's errors: pattern in its message, and plain words that replace it."""


def register(app: Flask) -> None:
    app.register_error_handler(BaseAppException, handle_app_error)
    app.register_error_handler(HTTPException, handle_http_error)
    app.register_error_handler(Exception, handle_unexpected)


def handle_app_error(error: BaseAppException) -> Response:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request_failed", exc_info=error, extra={"code": error.code})
    # A configuration error is for the operator, and only in the log. The client sees an internal error.
    shown = error if not isinstance(error, ConfigurationError) else BaseAppException()
    response = problem(
        shown.status,
        code=shown.code,
        detail=shown.message,
        errors=getattr(shown, "errors", ()),
        context=shown.context,
    )
    if shown.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if shown.retry_after_s is not None:
        response.headers["Retry-After"] = str(shown.retry_after_s)
    return response


def handle_http_error(error: HTTPException) -> Response:
    framework_response = error.get_response()
    if error.code is None or error.code < HTTPStatus.BAD_REQUEST:
        headers = framework_response.headers.to_wsgi_list()
        return Response(framework_response.get_data(), status=error.code, headers=headers)  # a redirect
    status = HTTPStatus(error.code)
    response = problem(
        status,
        code=HTTP_CODES.get(status, "bad_request" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error"),
        detail=error.description or status.description,
        errors=getattr(error, "errors", ()),
    )
    response.headers.extend((name, value) for name, value in framework_response.headers if name in FRAMEWORK_HEADERS)
    return response


def handle_unexpected(error: Exception) -> Response:
    logger.error("request_crashed", exc_info=error)
    unexpected = BaseAppException()
    return problem(unexpected.status, code=unexpected.code, detail=unexpected.message)


def problem(
    status: int,
    *,
    code: str,
    detail: str,
    errors: Iterable[Mapping[str, Any]] = (),
    context: Mapping[str, Any] | None = None,
) -> Response:
    """Create an error response with this request's id. The log line of the request then has the code."""
    g.problem_code = code
    body = Problem(
        type=f"urn:afterimage:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        request_id=g.get("request_id", ""),
        errors=[FieldProblem.model_validate(error) for error in errors],
        context=dict(context or {}),
    )
    return Response(
        orjson.dumps(body.model_dump(mode="json", exclude_defaults=True)),
        status=status,
        headers={"Cache-Control": "no-store"},
        content_type=MEDIA_TYPE,
    )


def validation_error(error: pydantic.ValidationError, *, where: str) -> ValidationError:
    """Convert Pydantic's error about a part of a request, without the values that the client sent.

    where: name of the part, such as `body`; the first part of each field's path.
    """
    details = error.errors(include_url=False, include_input=False, include_context=False)
    if details[0]["type"] == "json_invalid":
        return MalformedBodyError(f"The body is not valid JSON: {details[0]['msg'].removeprefix('Invalid JSON: ')}.")
    return ValidationError(
        errors=[
            {
                "field": _printable(".".join([where, *map(str, detail["loc"])])),
                "code": detail["type"],
                "message": _printable(_plain_message(detail)),
            }
            for detail in details
        ]
    )


def _plain_message(detail: Mapping[str, Any]) -> str:
    words, plain_words = PLAIN_WORDS.get(detail["type"], ("^Value error, ", ""))
    return re.sub(words, plain_words, detail["msg"], count=1)


def _printable(text: str) -> str:
    """Replace control characters, which a client's key or value may contain, by escapes. Postgres refuses NUL."""
    return re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", lambda match: repr(match[0])[1:-1], text)


def field_error(field: str, code: str, message: str) -> ValidationError:
    """A validation error for one field, for rules that a schema cannot express."""
    return ValidationError(errors=[{"field": field, "code": code, "message": message}])
