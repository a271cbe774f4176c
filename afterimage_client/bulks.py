"""Thousands of generations as one thing: sent as lines, followed, stopped, fetched."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any
from uuid import UUID

import httpx

from afterimage_client.connection import Connection, parsed
from afterimage_client.errors import AfterimageError, ConflictError, UnreachableError, WaitTimeoutError
from shared.contracts.bulks import (
    BulkItemView,
    BulkLineError,
    BulkOptions,
    BulkState,
    BulkView,
    ItemState,
)

CHUNK_LINES, CHUNK_BYTES = 2000, 4 * 2**20
POLL_S = 1.0
FRUITLESS_TRIES = 5

Line = bytes
"""One line of a bulk's stream, without its end: JSON in UTF-8."""


class BulkMismatchError(AfterimageError):
    """The bulk on the service was made from other lines than these."""


class Bulks:
    """`Afterimage.bulks`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, header: Line, *, idempotency_key: str) -> BulkView:
        """A bulk with the options that `header` tells, and no items yet; the same key again gives the same bulk.

        header: made by `header_line`.

        Raises:
            IdempotencyKeyReusedError: the key came with another header.
        """
        response = self._connection.send(
            "POST",
            "/bulks",
            params={"complete": "false"},
            content=header + b"\n",
            headers={"Content-Type": "application/jsonl", "Idempotency-Key": idempotency_key},
        )
        return parsed(BulkView, response)

    def send(
        self, bulk_id: UUID, lines: Iterable[Line], *, on_received: Callable[[int], object] | None = None
    ) -> BulkView:
        """Bring the bulk all of its lines, the header included, and start it; what it has already is not sent again.

        Safe to call again after anything: a lost connection, a killed program, a bulk that runs or has ended.

        on_received: called with the number of lines that the service has.

        Raises:
            BulkMismatchError: what the bulk has are not these lines.
            InvalidRequestError: it refused them (`bulk_invalid`); `errors` tells of each.
        """
        bulk = self.get(bulk_id)
        received, theirs = bulk.received_lines, bulk.digest
        chain, count = b"", 0
        chunk: list[Line] = []
        chunk_bytes = 0
        for line in lines:
            chain, count = hashlib.sha256(chain + line).digest(), count + 1
            if count <= received:
                if count == received and chain.hex() != theirs:
                    raise BulkMismatchError(f"the first {received} lines of bulk {bulk_id} are not these")
                continue
            chunk.append(line)
            chunk_bytes += len(line)
            if len(chunk) == CHUNK_LINES or chunk_bytes >= CHUNK_BYTES:
                self._append(bulk_id, chunk, before=count - len(chunk))
                chunk, chunk_bytes = [], 0
                if on_received is not None:
                    on_received(count)
        if count < received:
            raise BulkMismatchError(f"bulk {bulk_id} has {received} lines, more than these {count}")
        if chunk:
            self._append(bulk_id, chunk, before=count - len(chunk))
        if on_received is not None:
            on_received(count)
        if bulk.state is not BulkState.RECEIVING:
            return bulk
        body = {"lines": count, "digest": chain.hex()}
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/complete", json=body)

    def get(self, bulk_id: UUID) -> BulkView:
        """The bulk as it is now."""
        return self._connection.get(BulkView, f"/bulks/{bulk_id}")

    def list(self, *, state: BulkState | None = None, page_size: int = 100) -> Iterator[BulkView]:
        """Your bulks, newest first."""
        return self._connection.pages(BulkView, "/bulks", {"state": state, "limit": page_size})

    def items(
        self, bulk_id: UUID, *, after_line: int = 0, state: ItemState | None = None, page_size: int = 500
    ) -> Iterator[BulkItemView]:
        """The items behind a line, in the order of lines, each as it was when its page was asked for."""
        query = {"state": state, "limit": page_size, "cursor": after_line or None}
        return self._connection.pages(BulkItemView, f"/bulks/{bulk_id}/items", query)

    def errors(self, bulk_id: UUID) -> Iterator[BulkLineError]:
        """The lines that are no items, and why."""
        return self._connection.pages(BulkLineError, f"/bulks/{bulk_id}/errors", {"limit": 500})

    def wait(
        self,
        bulk_id: UUID,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[BulkView], object] | None = None,
    ) -> BulkView:
        """The bulk once it has ended.

        on_update: called with the bulk about once a second.

        Raises:
            WaitTimeoutError: it has not ended in time; it goes on.
        """
        ends = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            bulk = self.get(bulk_id)
            if on_update is not None:
                on_update(bulk)
            if bulk.state.is_final:
                return bulk
            if time.monotonic() >= ends:
                raise WaitTimeoutError(f"bulk {bulk_id} is {bulk.state} still")
            self._connection.pause(min(POLL_S, max(0.0, ends - time.monotonic())))

    def pause(self, bulk_id: UUID) -> BulkView:
        """Start no more of its items; those that run end."""
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/pause")

    def resume(self, bulk_id: UUID) -> BulkView:
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/resume")

    def cancel(self, bulk_id: UUID) -> BulkView:
        """Cancel every item that has not ended."""
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/cancel")

    def retry_failed(self, bulk_id: UUID) -> BulkView:
        """New jobs for the items that failed, died or expired; with none of them, nothing changes."""
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/retry-failed")

    def manifest(self, bulk_id: UUID) -> Iterator[dict[str, Any]]:
        """One record per item in the order of lines, with the full provenance of its outputs; resumed when it breaks.

        Raises:
            UnreachableError: it broke again and again at the same line.
        """
        cursor, tries = 0, 0
        while tries < FRUITLESS_TRIES:
            tries += 1
            response = self._connection.again_while_passing(
                lambda: self._connection.open("GET", f"/bulks/{bulk_id}/manifest", params={"cursor": cursor})  # noqa: B023
            )
            with closing(response), suppress(httpx.TransportError):
                for line in _whole_lines(response):
                    record = json.loads(line)
                    if record.get("end"):
                        return
                    cursor, tries = record["line"], 0
                    yield record
            self._connection.pause(POLL_S)
        raise UnreachableError(f"the manifest of bulk {bulk_id} breaks behind line {cursor}")

    def _append(self, bulk_id: UUID, chunk: Iterable[Line], *, before: int) -> None:
        """Send lines until the bulk has all of them; it may have kept some of a request that got no answer."""
        lines = [*chunk]
        received = before

        def attempt() -> None:
            nonlocal received
            while received < before + len(lines):
                try:
                    answer = self._connection.send_once(
                        "POST",
                        f"/bulks/{bulk_id}/lines",
                        params={"from_line": received, "complete": "false"},
                        content=b"".join(line + b"\n" for line in lines[received - before :]),
                        headers={"Content-Type": "application/jsonl"},
                    )
                    received = parsed(BulkView, answer).received_lines
                except ConflictError as error:
                    known = error.context.get("received_lines")
                    if error.code != "bulk_offset_mismatch" or known == received:
                        raise
                    if not (isinstance(known, int) and before <= known <= before + len(lines)):
                        raise BulkMismatchError(f"bulk {bulk_id} is being sent by someone else too") from error
                    received = known

        self._connection.again_while_passing(attempt)


def header_line(options: BulkOptions) -> Line:
    """The first line of a bulk's stream."""
    return json.dumps({"bulk": options.model_dump(mode="json", exclude_unset=True)}, ensure_ascii=False).encode()


def _whole_lines(response: httpx.Response) -> Iterator[bytes]:
    """Lines up to the last line feed; `Response.iter_lines` also cuts at characters that JSON may hold."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
