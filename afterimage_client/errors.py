"""What can go wrong for a client: one tree, made from the service's problems by their stable `code`.

AfterimageError
  UnreachableError             no answer came
  WaitTimeoutError             the job has not ended within the time asked for
  CorruptDownloadError         the bytes are not the ones that were announced
  ProblemError                 the service said no; `code` says why
    InvalidRequestError        400, 413, 415, 422: sending it again changes nothing
      IdempotencyKeyReusedError
    AuthenticationError        401
    PermissionDeniedError      403
    NotFoundError              404
    ConflictError              409
    RateLimitedError           429
    UnavailableError           503: later, perhaps
      QueueFullError
      TooManyStreamsError
    ServerError                any other 5xx
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx
import pydantic

from shared.contracts.common import FieldProblem, Problem


class AfterimageError(Exception):
    """Anything that this client raises on purpose."""


class UnreachableError(AfterimageError):
    """No answer came from the service."""


class WaitTimeoutError(AfterimageError, TimeoutError):
    """The job has not ended in time; it goes on."""


class CorruptDownloadError(AfterimageError):
    """The bytes that arrived are not the ones that were announced."""


class ProblemError(AfterimageError):
    """The service answered with an error.

    Attributes:
        code: stable; match on this.
        errors: the wrong fields of a `validation_failed`.
        retry_after_s: when the service advises to ask again, in seconds from now.
    """

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None) -> None:
        self.code = problem.code
        self.status = problem.status
        self.detail = problem.detail
        self.request_id = problem.request_id
        self.errors: list[FieldProblem] = problem.errors
        self.context: Mapping[str, Any] = problem.context
        self.retry_after_s = retry_after_s
        fields = "; ".join(f"{error.field}: {error.message}" for error in problem.errors)
        super().__init__(f"{problem.code}: {problem.detail}" + (f" ({fields})" if fields else ""))


class InvalidRequestError(ProblemError):
    """The request is wrong; sending it again changes nothing."""


class IdempotencyKeyReusedError(InvalidRequestError):
    """This key came with another request before."""


class AuthenticationError(ProblemError):
    """A valid API key is needed."""


class PermissionDeniedError(ProblemError):
    """The API key does not allow that."""


class NotFoundError(ProblemError):
    """There is nothing under that id, or it belongs to someone else."""


class ConflictError(ProblemError):
    """The state of the thing does not allow that."""


class RateLimitedError(ProblemError):
    """Too many requests, or too much of something."""


class UnavailableError(ProblemError):
    """The service cannot do that now."""


class QueueFullError(UnavailableError):
    """The service has more queued work than it accepts."""


class TooManyStreamsError(UnavailableError):
    """The process asked holds as many streams as it may."""


class ServerError(ProblemError):
    """Something went wrong inside the service."""


_BY_CODE: Mapping[str, type[ProblemError]] = {
    "idempotency_key_reused": IdempotencyKeyReusedError,
    "queue_full": QueueFullError,
    "too_many_streams": TooManyStreamsError,
}
_BY_STATUS: Mapping[int, type[ProblemError]] = {
    HTTPStatus.UNAUTHORIZED: AuthenticationError,
    HTTPStatus.FORBIDDEN: PermissionDeniedError,
    HTTPStatus.NOT_FOUND: NotFoundError,
    HTTPStatus.CONFLICT: ConflictError,
    HTTPStatus.TOO_MANY_REQUESTS: RateLimitedError,
    HTTPStatus.SERVICE_UNAVAILABLE: UnavailableError,
}


def error_of(response: httpx.Response) -> ProblemError:
    """The error that an unsuccessful answer tells of; its body must have been read.

    A proxy's answer, which is no problem document, gets its status as its code: `http_502`.
    """
    try:
        problem = Problem.model_validate_json(response.content, extra="ignore")
    except pydantic.ValidationError:
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase,
            status=max(response.status_code, HTTPStatus.BAD_REQUEST),
            code=f"http_{response.status_code}",
            detail=f"{response.status_code} {response.reason_phrase}".strip(),
            request_id=response.headers.get("X-Request-ID", ""),
        )
    kind = _BY_CODE.get(problem.code) or _BY_STATUS.get(response.status_code)
    if kind is None:
        kind = ServerError if response.is_server_error else InvalidRequestError
    return kind(problem, retry_after_s=_retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of `Retry-After`, which is a number or a date (RFC 9110, 10.2.3)."""
    given = response.headers.get("Retry-After", "").strip()
    if given.isascii() and given.isdigit():
        return float(given)
    try:
        moment = parsedate_to_datetime(given)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
