"""Reads the lines of a bulk from a request's body while they arrive."""

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
"""Size of one read. The server's `read` waits for all of it, so this much of a slow client's data may be unstored."""
CHUNK_BYTES = 2**20
"""Lines are stored in chunks of about this size, or of `bulks.chunk_lines` lines if that is less."""


@dataclass(frozen=True)
class Line:
    """One line of a bulk."""

    number: int
    """Counted from 1."""
    text: bytes | None
    """Without the line feed; `None`: the line is longer than `bulks.max_line_bytes`."""
    digest: bytes
    """Digest of all lines up to this one: d(n) = SHA-256(d(n-1) + line n)."""


class BulkBody:
    """The body of a request that sends lines. A separate thread reads it, so that a silent client gets a timeout.

    When a connection breaks, the server ends the body without an error. Only a `Content-Length` proves that the body is
    complete.
    """

    def __init__(self, stream: IO[bytes], *, content_length: int | None, settings: BulkSettings) -> None:
        self._stream = stream
        self._settings = settings
        self._content_length = content_length
        self._read_bytes = 0
        self.last_line = 0
        """Number of the last line that `lines` has yielded, or of the last line received before."""
        self.digest = b""
        """Digest of all lines up to `last_line`."""

    @property
    def is_complete(self) -> bool:
        """True if all bytes of the `Content-Length` were read; always False for a chunked body."""
        return self._read_bytes == self._content_length

    def lines(self, *, received: int = 0, digest: bytes = b"") -> Iterator[Line]:
        """Yield the lines of the body. Their numbers and digests continue those of the lines received before.

        received: number of lines received before. digest: digest of these lines.

        Raises:
            RequestTimeout: no data arrived for `bulks.receive_timeout_s`.
            RequestEntityTooLarge: the body is larger than `bulks.max_body_bytes`.
        """
        self.last_line, self.digest = received, digest
        for line in self._lines(received, digest):
            self.last_line, self.digest = line.number, line.digest
            yield line

    def _lines(self, number: int, digest: bytes) -> Iterator[Line]:
        hasher, pending, too_long = hashlib.sha256(digest), b"", False
        for chunk in self._read_chunks():
            *line_ends, rest = chunk.split(b"\n")
            for line_end in line_ends:
                hasher.update(line_end)
                number, digest = number + 1, hasher.digest()
                text = pending + line_end
                yield Line(number, None if too_long or len(text) > self._settings.max_line_bytes else text, digest)
                hasher, pending, too_long = hashlib.sha256(digest), b"", False
            hasher.update(rest)
            pending += rest
            if len(pending) > self._settings.max_line_bytes:
                pending, too_long = b"", True
        # The last line may lack its line feed, but only in a complete body: otherwise it may have been cut.
        if (pending or too_long) and self.is_complete:
            yield Line(number + 1, None if too_long else pending, hasher.digest())

    def _read_chunks(self) -> Iterator[bytes]:
        requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        results: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()

        def read() -> None:
            while requests.get():
                try:
                    results.put(self._stream.read(READ_BYTES))
                except Exception as error:  # raised in the thread that waits for the result
                    results.put(error)

        threading.Thread(target=read, name="bulk-body", daemon=True).start()
        try:
            while True:
                requests.put(True)
                try:
                    chunk = results.get(timeout=self._settings.receive_timeout_s)
                except queue.Empty:
                    raise RequestTimeout("The lines stopped arriving. The service keeps the lines before.") from None
                if isinstance(chunk, Exception):
                    raise chunk
                if not chunk:
                    return
                self._read_bytes += len(chunk)
                yield chunk
        finally:
            requests.put(False)


def in_chunks(lines: Iterator[Line], *, max_lines: int) -> Iterator[list[Line]]:
    """Group the lines into chunks of up to `max_lines`, or fewer once they have `CHUNK_BYTES`."""
    while chunk := list(_next_chunk(lines, max_lines)):
        yield chunk


def _next_chunk(lines: Iterator[Line], max_lines: int) -> Iterator[Line]:
    size_bytes = 0
    for line in islice(lines, max_lines):
        yield line
        size_bytes += len(line.text or b"")
        if size_bytes >= CHUNK_BYTES:
            return
