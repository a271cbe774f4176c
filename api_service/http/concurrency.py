"""What a request may hold while it waits, so that slow clients slow down nobody but themselves.

A request holds one of the server's threads from its head to the last byte of its answer. These threads are many and
cost little; what is scarce is a place among the `api.threads` requests that are worked on at a time. Nobody holds one
while waiting for somebody else: for the rest of a body, for a job, for a reader. Each such wait has a number of places
of its own, and the server has threads for all of them together, so that none can take them all. The probes need no
place at all.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any
from uuid import UUID

from werkzeug.exceptions import RequestTimeout

from api_service.services.views import API
from shared.errors import TooManyStreamsError
from shared.settings import APISettings, get_settings
from shared.singleton import once

PROBES = ("/health", f"{API}/health", "/metrics")
PROBE_THREADS = 8
QUICK_S = 0.05
"""A body that is in by then, as nearly all are, has needed no place of its own."""
MOST_READ_BYTES = 64 * 1024
MEMORY_BYTES = 2**20
"""A body larger than this is received into a temporary file."""

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


def server_threads(settings: APISettings) -> int:
    """As many as requests can be held by all that they wait for."""
    waits = settings.max_waiters + settings.max_slow_bodies + settings.max_downloads
    return settings.threads + waits + PROBE_THREADS


class Serving:
    """The application with `api.threads` places for requests that are worked on, and bodies that must keep coming."""

    def __init__(self, application: Application, settings: APISettings) -> None:
        self._application = application
        self._settings = settings

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith(PROBES):
            return self._application(environ, start_response)
        body = environ["wsgi.input"] = Body(environ["wsgi.input"], self._settings)
        try:
            with work().place():
                # What is iterated later, a stream or a download, holds no place any more.
                return self._application(environ, start_response)
        finally:
            body.close()


def unwatched_body(environ: dict[str, Any]) -> None:
    """From now on this request reads its body as it comes, and bounds the time for that itself."""
    body = environ["wsgi.input"]
    if isinstance(body, Body):
        environ["wsgi.input"] = body.stream


class Body:
    """A request's body, received whole when the application first asks for it, which is after the caller is known.

    It must come at `api.body_bytes_per_s` after a head start of `api.body_timeout_s`. The server offers no wait with a
    limit, so that a thread of its own reads. Where that is given up it ends with the next byte, or with the connection,
    which the server does not close before.
    """

    def __init__(self, stream: IO[bytes], settings: APISettings) -> None:
        self.stream = stream
        self._settings = settings
        self._received: IO[bytes] | None = None

    def read(self, size: int = -1) -> bytes:
        """
        Raises:
            RequestTimeout: it came too slowly.
            TooManyStreamsError: this process waits for as many slow bodies as it may.
        """
        if self._received is None:
            self._received = self._receive()
        return self._received.read(size)

    def close(self) -> None:
        if self._received is not None:
            self._received.close()

    def _receive(self) -> IO[bytes]:
        reading = _Reading(self.stream, most_bytes=self._settings.max_body_bytes + 1)
        if not reading.ended.wait(QUICK_S):
            if not _slow_bodies().acquire(blocking=False):
                reading.given_up = True
                raise TooManyStreamsError("This process waits for as many slow bodies as it may.")
            try:
                with work().left():
                    self._wait(reading)
            finally:
                _slow_bodies().release()
                reading.given_up = not reading.ended.is_set()
        return reading.result()

    def _wait(self, reading: "_Reading") -> None:
        while True:
            earned_s = self._settings.body_timeout_s + reading.received_bytes / self._settings.body_bytes_per_s
            left_s = reading.started + earned_s - time.monotonic()
            if left_s <= 0:
                raise RequestTimeout("The body came too slowly.")
            if reading.ended.wait(min(left_s, self._settings.body_timeout_s)):
                return


class _Reading:
    """A thread that reads a stream to its end, or until it has `most_bytes`."""

    def __init__(self, stream: IO[bytes], *, most_bytes: int) -> None:
        self.started = time.monotonic()
        self.received_bytes = 0
        self.ended = threading.Event()
        self.given_up = False
        self._stream = stream
        self._most_bytes = most_bytes
        self._file = tempfile.SpooledTemporaryFile(MEMORY_BYTES)  # noqa: SIM115 - closed by `Body`, or when given up
        self._error: Exception | None = None
        threading.Thread(target=self._read, name="request-body", daemon=True).start()

    def result(self) -> IO[bytes]:
        if self._error is not None:
            raise self._error
        self._file.seek(0)
        return self._file

    def _read(self) -> None:
        size = 1
        try:
            while self.received_bytes < self._most_bytes and not self.given_up:
                asked = time.monotonic()
                chunk = self._stream.read(size)
                if not chunk:
                    return
                self._file.write(chunk)
                self.received_bytes += len(chunk)
                # The server's `read` waits for all it was asked for: of a slow sender that is as little as can be, or
                # his progress would not be seen.
                quick = time.monotonic() - asked < QUICK_S
                size = min(2 * size, MOST_READ_BYTES) if quick else 1
        except Exception as error:  # handed to the thread that waits
            self._error = error
        finally:
            if self.given_up:
                self._file.close()
            self.ended.set()


class Work:
    """Places for requests that are worked on. A thread that waits for somebody else gives its own back meanwhile."""

    def __init__(self, places: int) -> None:
        self._free = threading.Semaphore(places)
        self._mine = threading.local()

    @contextmanager
    def place(self) -> Iterator[None]:
        with self._free:
            self._mine.held = True
            try:
                yield
            finally:
                self._mine.held = False

    @contextmanager
    def left(self) -> Iterator[None]:
        """Without a place in this block. Nothing where this thread has none."""
        if not getattr(self._mine, "held", False):
            yield
            return
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()


class Places:
    """So many for all, and so many for one owner that others can come too."""

    def __init__(self, *, most: int, most_per_owner: int) -> None:
        self._most = most
        self._most_per_owner = most_per_owner
        self._lock = threading.Lock()
        self._taken = Counter[UUID]()

    def take(self, owner_id: UUID) -> bool:
        """Whether there was a place; it is the caller's until he gives it back."""
        with self._lock:
            if self._taken.total() >= self._most or self._taken[owner_id] >= self._most_per_owner:
                return False
            self._taken[owner_id] += 1
            return True

    def give_back(self, owner_id: UUID) -> None:
        with self._lock:
            self._taken[owner_id] -= 1
            if not self._taken[owner_id]:
                del self._taken[owner_id]


@once
def work() -> Work:
    """The places of this process."""
    return Work(get_settings().api.threads)


@once
def waiters() -> Places:
    """Long-polls and event streams."""
    settings = get_settings().api
    return Places(most=settings.max_waiters, most_per_owner=settings.max_waiters_per_owner)


@once
def downloads() -> Places:
    """Files that are too large to be handed to the server in one piece."""
    settings = get_settings().api
    return Places(most=settings.max_downloads, most_per_owner=settings.max_downloads_per_owner)


@once
def _slow_bodies() -> threading.Semaphore:
    return threading.Semaphore(get_settings().api.max_slow_bodies)
