"""Exceptions into `application/problem+json` (RFC 9457): every error that leaves the API is made here."""

import logging
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
}
"""Codes of what the framework itself refuses."""


def register(app: Flask) -> None:
    app.register_error_handler(BaseAppException, of_ours)
    app.register_error_handler(HTTPException, of_the_framework)
    app.register_error_handler(Exception, of_anything_else)


def of_ours(error: BaseAppException) -> Response:
    if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("request_failed", exc_info=error, extra={"code": error.code})
    # What is wrong with the configuration concerns its operator, who finds it in the log.
    own = error if not isinstance(error, ConfigurationError) else BaseAppException()
    response = problem(
        own.status,
        code=own.code,
        detail=own.message,
        errors=getattr(own, "errors", ()),
        context=own.context,
    )
    if own.status == HTTPStatus.UNAUTHORIZED:
        response.headers["WWW-Authenticate"] = "Bearer"
    if own.retry_after_s is not None:
        response.headers["Retry-After"] = str(own.retry_after_s)
    return response


def of_the_framework(error: HTTPException) -> Response:
    made = error.get_response()
    if error.code is None or error.code < HTTPStatus.BAD_REQUEST:
        return Response(made.get_data(), status=error.code, headers=made.headers.to_wsgi_list())  # a redirect
    status = HTTPStatus(error.code)
    response = problem(
        status,
        code=HTTP_CODES.get(status, "bad_request" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "internal_error"),
        detail=error.description or status.description,
    )
    if "Allow" in made.headers:
        response.headers["Allow"] = made.headers["Allow"]
    return response


def of_anything_else(error: Exception) -> Response:
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


def invalid(error: pydantic.ValidationError, *, where: str) -> ValidationError:
    """Pydantic's complaint about the part of a request called `where`, in our words and without the values sent."""
    mistakes = error.errors(include_url=False, include_input=False, include_context=False)
    if mistakes[0]["type"] == "json_invalid":
        return MalformedBodyError(f"The body is not valid JSON: {mistakes[0]['msg'].removeprefix('Invalid JSON: ')}.")
    return ValidationError(
        errors=[
            {
                "field": ".".join([where, *map(str, mistake["loc"])]),
                "code": mistake["type"],
                "message": mistake["msg"].removeprefix("Value error, "),
            }
            for mistake in mistakes
        ]
    )


def mistake(field: str, code: str, message: str) -> ValidationError:
    """One mistake that no schema can express."""
    return ValidationError(errors=[{"field": field, "code": code, "message": message}])
