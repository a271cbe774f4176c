"""HTTP requests to one service: errors become exception types, and temporary errors are retried."""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, Protocol, TypeVar
from uuid import UUID

import httpx
from pydantic import BaseModel
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_before_delay,
    wait_random_exponential,
)

from afterimage_client.errors import (
    AfterimageError,
    CorruptDownloadError,
    InvalidInputError,
    ProblemError,
    RateLimitedError,
    TooManyStreamsError,
    UnreachableError,
    address_of,
    error_from_response,
)
from shared.contracts.common import Page

logger = logging.getLogger(__name__)

TEMPORARY_STATUS = frozenset({408, 429, 502, 503, 504})
FIRST_PAUSE_S, MAX_PAUSE_S = 0.5, 20.0
MAX_DECODE_S = 20.0
"""Time in which a service decodes one file, by its default settings."""

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


class Flag(Protocol):
    """The part of `threading.Event` that a connection uses. The asynchronous client has another implementation."""

    def set(self) -> None: ...
    def is_set(self) -> bool: ...
    def wait(self, timeout: float) -> bool: ...


class NotSentError(UnreachableError):
    """No connection was made, so the service has not received the request."""


class Connection:
    """Sends requests to one service. Several threads may share it.

    retry_for_s: how long a call is retried after its first failure, in seconds.
    connect_for_s: the same for a failed connection before the service's first answer, if that is shorter.
    closed: set by `close`.
    """

    def __init__(self, http: httpx.Client, *, retry_for_s: float, connect_for_s: float, closed: Flag) -> None:
        self.http = http
        self._retry_for_s = retry_for_s
        self._connect_for_s = min(connect_for_s, retry_for_s)
        self._closed = closed
        self._has_answered = False
        http.event_hooks = {"response": [self._note_answer]}

    def close(self) -> None:
        """Interrupt the pauses between tries at once, then close the connections."""
        self._closed.set()
        self.http.close()

    def timeout(self, *, read_s: float) -> httpx.Timeout:
        """Return the usual limits with another read timeout."""
        usual = self.http.timeout
        return httpx.Timeout(connect=usual.connect, write=usual.write, pool=usual.pool, read=read_s)

    def decode_timeout(self, *, files: int) -> httpx.Timeout:
        """Return the limits for a request whose files the service decodes, one by one, before it answers."""
        usual = self.http.timeout
        return usual if usual.read is None else self.timeout(read_s=usual.read + MAX_DECODE_S * files)

    def pause(self, seconds: float) -> None:
        """Wait; `close` interrupts it.

        Raises:
            AfterimageError: the connection was closed before or during the wait.
        """
        if self._closed.wait(seconds):
            raise AfterimageError("the client was closed")

    def retry(self, attempt: Callable[[], Result], *, idempotent: bool = True) -> Result:
        """Call `attempt` until it succeeds or fails permanently, for at most `retry_for_s`; then raise the last error.

        Pauses are random and grow; no try comes earlier than a `Retry-After`. Before the service's first answer, a
        failed connection is logged, and retried for at most `connect_for_s`.

        idempotent: a repeated call has no further effect. Otherwise only calls without any effect are retried.
        """
        return Retrying(
            retry=retry_if_exception(_is_temporary if idempotent else _is_temporary_and_not_sent),
            wait=_pause_s,
            stop=self._must_stop,
            before_sleep=self._warn_of_address,
            sleep=self.pause,
            reraise=True,
        )(attempt)

    def send(self, method: str, path: str, *, idempotent: bool = True, **options: Any) -> httpx.Response:
        """Send a request, with retries, and return the complete, successful response.

        options: those of `httpx.Client.request`.

        Raises:
            ProblemError: the service answered with an error; the subclass says which.
            UnreachableError: no answer came.
        """
        return self.retry(lambda: self.send_once(method, path, **options), idempotent=idempotent)

    def send_once(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request without retries; raises as `send` does."""
        with translate_transport_errors(method, path):
            response = self.http.request(method, path, **options)
        if not response.is_success:
            raise error_from_response(response)
        return response

    def get(self, answer: type[Model], path: str, **options: Any) -> Model:
        return parse_response(answer, self.send("GET", path, **options))

    def post(self, answer: type[Model], path: str, **options: Any) -> Model:
        return parse_response(answer, self.send("POST", path, **options))

    def delete(self, path: str) -> None:
        """Delete a resource. A 404 is an error only at the first try: an earlier try may have deleted it."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            with translate_transport_errors("DELETE", path):
                response = self.http.delete(path)
            if not response.is_success and not (response.status_code == 404 and tries > 1):
                raise error_from_response(response)

        self.retry(attempt)

    def iterate_pages(self, item: type[Model], path: str, query: Mapping[str, Any]) -> Iterator[Model]:
        """Yield all items of a list; each page is requested when it is needed."""
        given = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.get(Page[item], path, params=given)  # type: ignore[valid-type]
            yield from page.items
            if page.next_cursor is None:
                return
            given["cursor"] = page.next_cursor

    def open(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request without retries and return the successful response unread; the caller closes it.

        Raises:
            ProblemError: the service answered with an error.
            UnreachableError: no answer came.
        """
        with translate_transport_errors(method, path):
            response = self.http.send(self.http.build_request(method, path, **options), stream=True)
            if not response.is_success:
                with closing(response):
                    response.read()
                raise error_from_response(response)
            return response

    def _note_answer(self, response: httpx.Response) -> None:
        self._has_answered = True

    def _never_connected(self, state: RetryCallState) -> bool:
        failed = state.outcome is not None and isinstance(state.outcome.exception(), NotSentError)
        return failed and not self._has_answered

    def _must_stop(self, state: RetryCallState) -> bool:
        retry_for_s = self._connect_for_s if self._never_connected(state) else self._retry_for_s
        return self._closed.is_set() or stop_before_delay(retry_for_s)(state)

    def _warn_of_address(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and self._never_connected(state) and state.outcome is not None:
            logger.warning("%s Retrying for %g seconds.", state.outcome.exception(), self._connect_for_s)


Id = UUID | str
"""An id, or its text."""


def id_of(resource: object, *kinds: type) -> UUID:
    """Return the id of an object of one of these kinds, or the given id.

    Raises:
        TypeError: `resource` is neither such an object nor an id.
        InvalidInputError: `resource` is a text, but not that of an id.
    """
    if isinstance(resource, kinds):
        resource = resource.id  # type: ignore[attr-defined]
    if isinstance(resource, UUID):
        return resource
    names = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(resource, str):
        raise TypeError(f"needs an id (UUID) or a {names}, not a {type(resource).__name__}")
    try:
        return UUID(resource)
    except ValueError:
        raise InvalidInputError(f"{resource!r} is not an id: needs a UUID or a {names}") from None


def parse_response(answer: type[Model], response: httpx.Response) -> Model:
    """Parse the body; unknown fields, which a newer service may send, are ignored."""
    return answer.model_validate_json(response.content, extra="ignore")


def sent_tags(tags: list[str]) -> list[str]:
    """Return the values of a form or query for these tags. The service splits each at its commas, but no JSON array."""
    return [json.dumps(tags, ensure_ascii=False)] if any(mark in tag for tag in tags for mark in ",[") else tags


@contextmanager
def translate_transport_errors(method: str, path: str) -> Iterator[None]:
    """Raise the transport errors of httpx as the client's own errors."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise NotSentError(
            f"cannot connect to {address_of(error.request.url)}: {_reason(error)}. Does the service run there? "
            "AFTERIMAGE_URL, or the argument `url`, names another address."
        ) from error
    except httpx.TransportError as error:
        raise UnreachableError(
            f"{method} {path}: no answer from {address_of(error.request.url)}: {_reason(error)}"
        ) from error


def _reason(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _is_temporary(error: BaseException) -> bool:
    if isinstance(error, ProblemError):
        # Without a stream the client polls instead of waiting for one.
        return error.status in TEMPORARY_STATUS and not isinstance(error, TooManyStreamsError)
    return isinstance(error, UnreachableError | CorruptDownloadError)


def _is_temporary_and_not_sent(error: BaseException) -> bool:
    return isinstance(error, NotSentError | RateLimitedError)


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = error.retry_after_s if isinstance(error, ProblemError) else None
    # Never before the advised time; then a random pause, so that not all clients return at the same moment.
    pause = wait_random_exponential(multiplier=FIRST_PAUSE_S, max=MAX_PAUSE_S)(state)
    return pause if advised is None else advised + min(pause, 1.0)
