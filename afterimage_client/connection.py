"""HTTP to one service: errors become types, and what passes by itself is tried again."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_before_delay,
    stop_when_event_set,
    wait_random_exponential,
)

from afterimage_client.errors import (
    AfterimageError,
    CorruptDownloadError,
    ProblemError,
    RateLimitedError,
    TooManyStreamsError,
    UnreachableError,
    error_of,
)
from shared.contracts.common import Page

PASSING_STATUS = frozenset({408, 429, 502, 503, 504})
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 20.0

Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")


class NotSentError(UnreachableError):
    """No connection could be made, so nothing has happened on the other side."""


class Connection:
    """Sends requests to one service; safe to use from several threads.

    retry_for_s: how long to go on trying after the first failure of a call, in seconds.
    """

    def __init__(self, http: httpx.Client, *, retry_for_s: float) -> None:
        self.http = http
        self._retry_for_s = retry_for_s
        self._closed = threading.Event()

    def close(self) -> None:
        """End the pauses between tries at once, then the connections."""
        self._closed.set()
        self.http.close()

    def timeout(self, *, read_s: float) -> httpx.Timeout:
        """The usual limits, but for the time until something can be read."""
        usual = self.http.timeout
        return httpx.Timeout(connect=usual.connect, write=usual.write, pool=usual.pool, read=read_s)

    def pause(self, seconds: float) -> None:
        """Wait, unless the connection is closed meanwhile.

        Raises:
            AfterimageError: it was.
        """
        if self._closed.wait(seconds):
            raise AfterimageError("the client was closed")

    def again_while_passing(self, attempt: Callable[[], Result], *, repeatable: bool = True) -> Result:
        """Call until it succeeds, fails for good, or has failed for `retry_for_s`; then the last failure is raised.

        The pauses grow and are random; a service that says `Retry-After` is not asked before.

        repeatable: doing it twice is as good as once. If not, it is only tried again when nothing can have happened.
        """
        return Retrying(
            retry=retry_if_exception(_passes if repeatable else _passes_and_did_nothing),
            wait=_pause_s,
            stop=stop_when_event_set(self._closed) | stop_before_delay(self._retry_for_s),
            sleep=sleep_using_event(self._closed),
            reraise=True,
        )(attempt)

    def send(self, method: str, path: str, *, repeatable: bool = True, **options: Any) -> httpx.Response:
        """One request and its whole, successful answer. `options` are those of `httpx.Client.request`.

        Raises:
            ProblemError: the service said no; and its kinds.
            UnreachableError: no answer came.
        """

        return self.again_while_passing(lambda: self.send_once(method, path, **options), repeatable=repeatable)

    def send_once(self, method: str, path: str, **options: Any) -> httpx.Response:
        """As `send`, in one try."""
        with transport_errors_named(method, path):
            response = self.http.request(method, path, **options)
        if not response.is_success:
            raise error_of(response)
        return response

    def get(self, answer: type[Model], path: str, **options: Any) -> Model:
        return parsed(answer, self.send("GET", path, **options))

    def post(self, answer: type[Model], path: str, **options: Any) -> Model:
        return parsed(answer, self.send("POST", path, **options))

    def delete(self, path: str) -> None:
        """Delete; what is gone already is fine only when an earlier try of this very call may have done it."""
        tries = 0

        def attempt() -> None:
            nonlocal tries
            tries += 1
            with transport_errors_named("DELETE", path):
                response = self.http.delete(path)
            if not response.is_success and not (response.status_code == 404 and tries > 1):
                raise error_of(response)

        self.again_while_passing(attempt)

    def pages(self, item: type[Model], path: str, query: Mapping[str, Any]) -> Iterator[Model]:
        """Everything in a list, page by page, as it is asked for."""
        given = {name: value for name, value in query.items() if value is not None}
        while True:
            page = self.get(Page[item], path, params=given)  # type: ignore[valid-type]
            yield from page.items
            if page.next_cursor is None:
                return
            given["cursor"] = page.next_cursor

    def open(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One try of a request; the successful answer is still unread, and its reader closes it.

        Raises:
            ProblemError, UnreachableError
        """
        with transport_errors_named(method, path):
            response = self.http.send(self.http.build_request(method, path, **options), stream=True)
            if not response.is_success:
                with closing(response):
                    response.read()
                raise error_of(response)
            return response


def parsed(answer: type[Model], response: httpx.Response) -> Model:
    """The body; fields that a newer service has added are passed over."""
    return answer.model_validate_json(response.content, extra="ignore")


@contextmanager
def transport_errors_named(method: str, path: str) -> Iterator[None]:
    """What httpx raises without an answer, as the client's own errors."""
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
        raise NotSentError(f"{method} {path}: {type(error).__name__}: {error}") from error
    except httpx.TransportError as error:
        raise UnreachableError(f"{method} {path}: {type(error).__name__}: {error}") from error


def _passes(error: BaseException) -> bool:
    if isinstance(error, ProblemError):
        # Whoever gets no stream polls instead of waiting for one.
        return error.status in PASSING_STATUS and not isinstance(error, TooManyStreamsError)
    return isinstance(error, UnreachableError | CorruptDownloadError)


def _passes_and_did_nothing(error: BaseException) -> bool:
    return isinstance(error, NotSentError | RateLimitedError)


def _pause_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    advised = error.retry_after_s if isinstance(error, ProblemError) else None
    # Never before the time advised, and not everybody at the same moment after it.
    pause = wait_random_exponential(multiplier=FIRST_PAUSE_S, max=LONGEST_PAUSE_S)(state)
    return pause if advised is None else advised + min(pause, 1.0)
