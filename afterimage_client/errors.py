"""The exceptions of the client, made from the service's problem documents by their stable `code`.

AfterimageError
  InvalidInputError            The client refuses an argument; it sent no request. Also a ValueError.
  JobFailedError               `run` waited for a job that ended without success.
  UnreachableError             No answer came.
  WaitTimeoutError             The job or bulk has not ended in time.
  CorruptDownloadError         The bytes are not the announced ones.
  ProblemError                 The service answered with an error: match on `code`.
    InvalidRequestError        400, 413, 415, 422. A retry changes nothing.
      IdempotencyKeyReusedError
    AuthenticationError        401
    PermissionDeniedError      403
    NotFoundError              404
      WithdrawnError           410
    ConflictError              409
    RateLimitedError           429
    UnavailableError           503. A later retry may succeed.
      QueueFullError
      TooManyStreamsError
    ServerError                any other 5xx
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import httpx
import pydantic

from shared.contracts.common import FieldProblem, Problem
from shared.contracts.jobs import JobView


class AfterimageError(Exception):
    """Base class of the exceptions of this client."""


class InvalidInputError(AfterimageError, ValueError):
    """The client refuses an argument, and has sent no request.

    Attributes:
        errors: the invalid fields; empty for a mistake that is not in a field of a request.
    """

    def __init__(self, message: str, errors: Sequence[FieldProblem] = ()) -> None:
        self.errors = list(errors)
        super().__init__(message)


class JobFailedError(AfterimageError):
    """The job ended without success. `job` has its `state` and `error`."""

    def __init__(self, job: JobView) -> None:
        self.job = job
        reason = f": {job.error.code}: {job.error.detail}" if job.error else ""
        super().__init__(f"job {job.id} ended as {job.state}{reason}")


class UnreachableError(AfterimageError):
    """No answer came from the service."""


class WaitTimeoutError(AfterimageError, TimeoutError):
    """The job or bulk has not ended in time; it still runs."""


class CorruptDownloadError(AfterimageError):
    """The received bytes are not the announced ones."""


class ProblemError(AfterimageError):
    """The service answered with an error.

    Attributes:
        code: stable; match on this.
        errors: the invalid fields of a `validation_failed`.
        reason: the detail, with the invalid fields.
        request: method and address of the request, without its query.
        retry_after_s: seconds from now after which the service advises to retry; None without advice.
    """

    def __init__(self, problem: Problem, *, retry_after_s: float | None = None, request: str | None = None) -> None:
        self.code = problem.code
        self.status = problem.status
        self.detail = problem.detail
        self.request_id = problem.request_id
        self.errors: list[FieldProblem] = problem.errors
        self.context: Mapping[str, Any] = problem.context
        self.retry_after_s = retry_after_s
        self.request = request
        self.reason = problem.detail + (f" ({describe_fields(problem.errors)})" if problem.errors else "")
        super().__init__(f"{problem.code}: {self.reason}" + (f" [{request}]" if request else ""))


class InvalidRequestError(ProblemError):
    """The request is invalid; a retry changes nothing."""


class IdempotencyKeyReusedError(InvalidRequestError):
    """The idempotency key was used with another request before."""


class AuthenticationError(ProblemError):
    """The request has no valid API key."""


class PermissionDeniedError(ProblemError):
    """The API key does not permit the request."""


class NotFoundError(ProblemError):
    """No resource has that id, or it belongs to another owner."""


class WithdrawnError(NotFoundError):
    """The output was withdrawn, because an image from which it drew was withdrawn."""


class ConflictError(ProblemError):
    """The state of the resource does not permit the request."""


class RateLimitedError(ProblemError):
    """A rate limit or a quota is exceeded."""


class UnavailableError(ProblemError):
    """The service cannot serve the request now."""


class QueueFullError(UnavailableError):
    """The service has more queued work than it accepts."""


class TooManyStreamsError(UnavailableError):
    """The API process has its maximum number of open streams."""


class ServerError(ProblemError):
    """The service failed to serve the request."""


_BY_CODE: Mapping[str, type[ProblemError]] = {
    "idempotency_key_reused": IdempotencyKeyReusedError,
    "queue_full": QueueFullError,
    "too_many_streams": TooManyStreamsError,
}
_BY_STATUS: Mapping[int, type[ProblemError]] = {
    HTTPStatus.UNAUTHORIZED: AuthenticationError,
    HTTPStatus.FORBIDDEN: PermissionDeniedError,
    HTTPStatus.NOT_FOUND: NotFoundError,
    HTTPStatus.GONE: WithdrawnError,
    HTTPStatus.CONFLICT: ConflictError,
    HTTPStatus.TOO_MANY_REQUESTS: RateLimitedError,
    HTTPStatus.SERVICE_UNAVAILABLE: UnavailableError,
}


def error_from_response(response: httpx.Response) -> ProblemError:
    """Return the error of an unsuccessful response, whose body must have been read.

    The response of a proxy is not a problem document: its code is made from the status, as in `http_502`.
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
    asked = response.request
    request = f"{asked.method} {address_of(asked.url)}{asked.url.path}"
    return kind(problem, retry_after_s=_retry_after_s(response), request=request)


def address_of(url: httpx.URL) -> str:
    """Return scheme, host and port, without a password, which `netloc` of httpx leaves out."""
    return f"{url.scheme}://{url.netloc.decode()}"


def describe_fields(errors: Iterable[FieldProblem]) -> str:
    return "; ".join(f"{error.field}: {error.message}" for error in errors)


def _retry_after_s(response: httpx.Response) -> float | None:
    """Return the seconds of `Retry-After`, a number or a date (RFC 9110, 10.2.3)."""
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
