"""The lines of a bulk as they arrive in a request's body."""

import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import IO

from werkzeug.exceptions import RequestTimeout

from shared.settings import BulkSettings

READ_BYTES = 8 * 1024
"""The server's `read` waits for all it was asked for, so this much of a slow sender's lines is kept last."""
CHUNK_BYTES = 2**20
"""Lines are stored when there are this many bytes of them, or `bulks.chunk_lines`."""


@dataclass(frozen=True)
class Line:
    """One line. `text` is without its line feed, and none when it is too long; `digest` is the chain's up to here."""

    number: int
    text: bytes | None
    digest: bytes


class Body:
    """A request's body, read in a thread of its own: a sender that has gone silent must not hold a server's thread.

    The server gives no sign when a connection breaks, the body just ends. Only a `Content-Length` proves it whole.
    """

    def __init__(self, stream: IO[bytes], *, content_length: int | None, settings: BulkSettings) -> None:
        self._stream = stream
        self._settings = settings
        self._content_length = content_length
        self._read_bytes = 0

    @property
    def whole(self) -> bool:
        """All of it has been read, for certain."""
        return self._read_bytes == self._content_length

    def lines(self, *, received: int = 0, digest: bytes = b"") -> Iterator[Line]:
        """Its lines, the first one being that behind the `received` ones with this digest.

        Raises:
            RequestTimeout: nothing came for `receive_timeout_s`.
            RequestEntityTooLarge
        """
        number, hasher, pending, too_long = received, hashlib.sha256(digest), b"", False
        for chunk in self._chunks():
            *ends, rest = chunk.split(b"\n")
            for end in ends:
                hasher.update(end)
                number, digest = number + 1, hasher.digest()
                text = pending + end
                yield Line(number, None if too_long or len(text) > self._settings.max_line_bytes else text, digest)
                hasher, pending, too_long = hashlib.sha256(digest), b"", False
            hasher.update(rest)
            pending += rest
            if len(pending) > self._settings.max_line_bytes:
                pending, too_long = b"", True
        # Without a line feed it is a line only if nothing can have been cut off.
        if (pending or too_long) and self.whole:
            yield Line(number + 1, None if too_long else pending, hasher.digest())

    def _chunks(self) -> Iterator[bytes]:
        wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        got: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def read() -> None:
            while wanted.get():
                try:
                    got.put(self._stream.read(READ_BYTES))
                except Exception as error:  # handed to the thread that asked
                    got.put(error)

        threading.Thread(target=read, name="bulk-body", daemon=True).start()
        try:
            while True:
                wanted.put(True)
                try:
                    chunk = got.get(timeout=self._settings.receive_timeout_s)
                except queue.Empty:
                    raise RequestTimeout("The lines stopped coming. Those before are kept.") from None
                if isinstance(chunk, Exception):
                    raise chunk
                if not chunk:
                    return
                self._read_bytes += len(chunk)
                yield chunk
        finally:
            wanted.put(False)


def chunks(lines: Iterator[Line], *, most: int) -> Iterator[list[Line]]:
    """The lines, some at a time: up to `most`, fewer when they are long."""
    while some := list(_some(lines, most)):
        yield some


def _some(lines: Iterator[Line], most: int) -> Iterator[Line]:
    size_bytes = 0
    for line in islice(lines, most):
        yield line
        size_bytes += len(line.text or b"")
        if size_bytes >= CHUNK_BYTES:
            return
