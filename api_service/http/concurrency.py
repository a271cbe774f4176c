"""Limits on concurrent requests, set so that slow clients do not block others.

A request occupies one thread of the server from its headers to the last byte of its response. Threads are cheap. The
`api.threads` slots for active requests are scarce, because they bound the work on the database.

A request gives its slot back while it waits for its body, for a decoder, for a job, or for a slow reader.
Each kind of wait has a limit of its own, so it cannot use up the server's threads. Probes need no slot.
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

from api_service.http.urls import API
from shared.errors import DecoderBusyError, TooManyStreamsError
from shared.settings import APISettings, get_settings
from shared.singleton import process_singleton

PROBES = ("/health", f"{API}/health", "/metrics")
FAST_BODY_S = 0.05
"""A body that is complete after this time, as nearly all are, does not count as slow."""
MAX_READ_BYTES = 64 * 1024
MAX_BODY_IN_MEMORY_BYTES = 2**20
"""A larger body is received into a temporary file."""

Application = Callable[[dict[str, Any], Any], Iterable[bytes]]


class ConcurrencyMiddleware:
    """Runs the application for at most `api.threads` requests at a time, and sets a minimum rate for their bodies."""

    def __init__(self, application: Application, settings: APISettings) -> None:
        self._application = application
        self._settings = settings

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"].startswith(PROBES):
            return self._application(environ, start_response)
        body = environ["wsgi.input"] = RequestBody(environ["wsgi.input"], self._settings)
        try:
            with active_requests().slot():
                # A stream or a download is iterated after this block, without a slot.
                return self._application(environ, start_response)
        finally:
            body.close()


def stream_body_directly(environ: dict[str, Any]) -> None:
    """Make the request read its body directly from the server. The caller must bound the time of each read."""
    body = environ["wsgi.input"]
    if isinstance(body, RequestBody):
        environ["wsgi.input"] = body.stream


class RequestBody:
    """A request's body, received completely at the first `read`. The API authenticates the caller before that.

    After `api.body_timeout_s`, the body must have arrived at `api.body_bytes_per_s` or more. A read of the server's
    stream has no timeout, so a separate thread reads. An abandoned thread ends at the next byte, or when the client
    disconnects; the server does not close the connection before that.
    """

    def __init__(self, stream: IO[bytes], settings: APISettings) -> None:
        self.stream = stream
        self._settings = settings
        self._received: IO[bytes] | None = None

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; -1: all.

        Raises:
            RequestTimeout: the body arrives too slowly.
            TooManyStreamsError: the body is slow, and this process has reached `api.max_slow_bodies`.
        """
        if self._received is None:
            self._received = self._receive()
        return self._received.read(size)

    def close(self) -> None:
        if self._received is not None:
            self._received.close()

    def _receive(self) -> IO[bytes]:
        reader = _BodyReader(self.stream, max_bytes=self._settings.max_body_bytes + 1)
        if not reader.ended.wait(FAST_BODY_S):
            if not _slow_body_slots().acquire(blocking=False):
                reader.abandoned = True
                raise TooManyStreamsError("This process has reached its limit of slow request bodies.")
            try:
                with active_requests().released():
                    self._wait(reader)
            finally:
                _slow_body_slots().release()
                reader.abandoned = not reader.ended.is_set()
        return reader.result()

    def _wait(self, reader: "_BodyReader") -> None:
        while True:
            allowed_s = self._settings.body_timeout_s + reader.received_bytes / self._settings.body_bytes_per_s
            remaining_s = reader.started + allowed_s - time.monotonic()
            if remaining_s <= 0:
                raise RequestTimeout("The body arrived too slowly.")
            if reader.ended.wait(min(remaining_s, self._settings.body_timeout_s)):
                return


class _BodyReader:
    """A thread that reads a stream to its end, or until it has `max_bytes`."""

    def __init__(self, stream: IO[bytes], *, max_bytes: int) -> None:
        self.started = time.monotonic()
        self.received_bytes = 0
        self.ended = threading.Event()
        self.abandoned = False
        self._stream = stream
        self._max_bytes = max_bytes
        # Closed by `RequestBody`, or by the thread when it is abandoned.
        self._file = tempfile.SpooledTemporaryFile(MAX_BODY_IN_MEMORY_BYTES)  # noqa: SIM115
        self._error: Exception | None = None
        threading.Thread(target=self._read, name="request-body", daemon=True).start()

    def result(self) -> IO[bytes]:
        """Return the received body; raises the error of the thread, if it failed."""
        if self._error is not None:
            raise self._error
        self._file.seek(0)
        return self._file

    def _read(self) -> None:
        size = 1
        try:
            while self.received_bytes < self._max_bytes and not self.abandoned:
                started = time.monotonic()
                chunk = self._stream.read(size)
                if not chunk:
                    return
                self._file.write(chunk)
                self.received_bytes += len(chunk)
                # The server's `read` returns only when it has all requested bytes. From a slow client this asks for one
                # byte at a time, so that `received_bytes` shows its progress.
                fast = time.monotonic() - started < FAST_BODY_S
                size = min(2 * size, MAX_READ_BYTES) if fast else 1
        except Exception as error:  # `result` raises it in the waiting thread
            self._error = error
        finally:
            if self.abandoned:
                self._file.close()
            self.ended.set()


class ActiveRequests:
    """Slots for active requests. A thread gives its slot back while it waits for a client or a job."""

    def __init__(self, slots: int) -> None:
        self._free = threading.Semaphore(slots)
        self._thread = threading.local()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a slot, and occupy it in this block."""
        with self._free:
            self._thread.has_slot = True
            try:
                yield
            finally:
                self._thread.has_slot = False

    @contextmanager
    def released(self) -> Iterator[None]:
        """Release this thread's slot in this block. Does nothing if the thread has no slot."""
        if not getattr(self._thread, "has_slot", False):
            yield
            return
        self._free.release()
        try:
            yield
        finally:
            self._free.acquire()


class SlotPool:
    """Slots with a limit for all callers together and a lower limit per owner."""

    def __init__(self, *, max_slots: int, max_slots_per_owner: int) -> None:
        self._max_slots = max_slots
        self._max_slots_per_owner = max_slots_per_owner
        self._lock = threading.Lock()
        self._taken = Counter[UUID]()

    def take(self, owner_id: UUID) -> bool:
        """Take a slot without waiting; False when a limit is reached. The caller must `release` the slot."""
        with self._lock:
            if self._taken.total() >= self._max_slots or self._taken[owner_id] >= self._max_slots_per_owner:
                return False
            self._taken[owner_id] += 1
            return True

    def release(self, owner_id: UUID) -> None:
        with self._lock:
            self._taken[owner_id] -= 1
            if not self._taken[owner_id]:
                del self._taken[owner_id]


@process_singleton
def active_requests() -> ActiveRequests:
    """Slots for active requests of this process."""
    return ActiveRequests(get_settings().api.threads)


@process_singleton
def waiter_slots() -> SlotPool:
    """Slots for long-polls and event streams."""
    settings = get_settings().api
    return SlotPool(max_slots=settings.max_waiters, max_slots_per_owner=settings.max_waiters_per_owner)


@process_singleton
def download_slots() -> SlotPool:
    """Slots for downloads of files that are streamed because of their size."""
    settings = get_settings().api
    return SlotPool(max_slots=settings.max_downloads, max_slots_per_owner=settings.max_downloads_per_owner)


@contextmanager
def decoding(owner_id: UUID) -> Iterator[None]:
    """Give this thread's slot back while a file is decoded in this block. One owner may have half of such waits.

    Raises:
        DecoderBusyError: this process or the owner has reached its limit of files that wait.
    """
    if not _decoding_slots().take(owner_id):
        raise DecoderBusyError
    try:
        with active_requests().released():
            yield
    finally:
        _decoding_slots().release(owner_id)


@process_singleton
def _decoding_slots() -> SlotPool:
    threads = get_settings().api.threads
    return SlotPool(max_slots=threads, max_slots_per_owner=(threads + 1) // 2)


@process_singleton
def _slow_body_slots() -> threading.Semaphore:
    return threading.Semaphore(get_settings().api.max_slow_bodies)
