"""Runs the code of the blocking client inside an event loop: each of its waits becomes an `await`.

Blocking code runs in a greenlet. Where it would wait, it hands an awaitable to the coroutine that started it, and
continues with the result. SQLAlchemy's asyncio extension works in the same way. So there is one implementation of
retries, streams and downloads, and no thread.
"""

import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import anyio
import httpx
from greenlet import getcurrent, greenlet

Result = TypeVar("Result")


async def run(work: Callable[[], Result]) -> Result:
    """Call `work`, which may call `wait_for`. A cancellation is raised where it waits."""
    worker = greenlet(work)
    worker.gr_context = getcurrent().gr_context
    result: Any = worker.switch()
    while not worker.dead:
        try:
            value = await result
        except BaseException:
            result = worker.throw(*sys.exc_info())
        else:
            result = worker.switch(value)
    return result  # type: ignore[no-any-return]


def wait_for(awaitable: Awaitable[Result]) -> Result:
    """Return the result of an awaitable, inside of `run`.

    Raises:
        RuntimeError: it was called outside of `run`.
    """
    parent = getcurrent().parent
    if parent is None:
        if isinstance(awaitable, Coroutine):
            awaitable.close()
        raise RuntimeError("the methods of an asynchronous client must be awaited")
    return parent.switch(awaitable)  # type: ignore[no-any-return]


class Flag:
    """As `threading.Event`, for code inside of `run`."""

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds, and return whether the flag is set."""
        wait_for(self._wait(timeout))
        return self.is_set()

    async def _wait(self, timeout: float) -> None:
        with anyio.move_on_after(timeout):
            await self._event.wait()


class Transport(httpx.BaseTransport):
    """Sends the requests of a blocking `httpx.Client` through an `httpx.AsyncClient`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        forwarded = httpx.Request(
            request.method, request.url, headers=request.headers, stream=request.stream, extensions=request.extensions
        )
        # The blocking client has added its credentials already, and follows no redirect.
        response = wait_for(self._http.send(forwarded, stream=True, auth=httpx.Auth(), follow_redirects=False))
        return httpx.Response(
            response.status_code, headers=response.headers, stream=_Stream(response), extensions=response.extensions
        )

    def close(self) -> None:
        wait_for(self._http.aclose())


class _Stream(httpx.SyncByteStream):
    """The body of a response as it was sent: the blocking client decompresses it."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        assert isinstance(self._response.stream, httpx.AsyncByteStream)
        pieces = aiter(self._response.stream)
        while (piece := wait_for(anext(pieces, None))) is not None:
            yield piece

    def close(self) -> None:
        wait_for(self._response.aclose())
