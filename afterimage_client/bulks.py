"""Bulks: create one, send its items as lines, wait for it, pause or cancel it, read its manifest."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from typing import Any
from uuid import UUID

import httpx

from afterimage_client.connection import Connection, Id, id_of, parse_response
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
MAX_TRIES_WITHOUT_PROGRESS = 5

Line = bytes
"""One line of a bulk's stream, without its line feed: JSON in UTF-8."""


class BulkMismatchError(AfterimageError):
    """The bulk on the service has other lines than the given ones."""


class Bulks:
    """`Afterimage.bulks`"""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, header: Line, *, idempotency_key: str) -> BulkView:
        """Create a bulk without items; the same key and header return the same bulk.

        header: the options of the bulk, made by `header_line`.

        Raises:
            IdempotencyKeyReusedError: the key was used with another header.
        """
        response = self._connection.send(
            "POST",
            "/bulks",
            params={"complete": "false"},
            content=header + b"\n",
            headers={"Content-Type": "application/jsonl", "Idempotency-Key": idempotency_key},
        )
        return parse_response(BulkView, response)

    def send(
        self, bulk: Id | BulkView, lines: Iterable[Line], *, on_received: Callable[[int], object] | None = None
    ) -> BulkView:
        """Send all lines, the header included, and start the bulk. Lines that the service has are not sent again.

        The call may be repeated after a lost connection, after a killed program, and when the bulk runs or has ended.

        on_received: called with the number of lines that the service has.

        Raises:
            BulkMismatchError: the bulk on the service has other lines.
            InvalidRequestError: the service refused the lines (`bulk_invalid`); `errors` lists the reasons.
        """
        view = self.get(bulk)
        bulk_id, received, received_digest = view.id, view.received_lines, view.digest
        digest, count = b"", 0
        chunk: list[Line] = []
        chunk_bytes = 0
        for line in lines:
            digest, count = hashlib.sha256(digest + line).digest(), count + 1
            if count <= received:
                if count == received and digest.hex() != received_digest:
                    raise BulkMismatchError(f"the first {received} lines of bulk {bulk_id} differ from the given lines")
                continue
            chunk.append(line)
            chunk_bytes += len(line)
            if len(chunk) == CHUNK_LINES or chunk_bytes >= CHUNK_BYTES:
                self._append(bulk_id, chunk, before=count - len(chunk))
                chunk, chunk_bytes = [], 0
                if on_received is not None:
                    on_received(count)
        if count < received:
            raise BulkMismatchError(f"bulk {bulk_id} has {received} lines, more than the {count} given ones")
        if chunk:
            self._append(bulk_id, chunk, before=count - len(chunk))
        if on_received is not None:
            on_received(count)
        if view.state is not BulkState.RECEIVING:
            return view
        body = {"lines": count, "digest": digest.hex()}
        return self._connection.post(BulkView, f"/bulks/{bulk_id}/complete", json=body)

    def get(self, bulk: Id | BulkView) -> BulkView:
        """Return the current state of a bulk."""
        return self._connection.get(BulkView, f"/bulks/{_id(bulk)}")

    def list(self, *, state: BulkState | None = None, page_size: int = 100) -> Iterator[BulkView]:
        """Yield your bulks, newest first."""
        return self._connection.iterate_pages(BulkView, "/bulks", {"state": state, "limit": page_size})

    def items(
        self, bulk: Id | BulkView, *, after_line: int = 0, state: ItemState | None = None, page_size: int = 500
    ) -> Iterator[BulkItemView]:
        """Yield the items after a line, in the order of lines, each in the state at the request of its page."""
        query = {"state": state, "limit": page_size, "cursor": after_line or None}
        return self._connection.iterate_pages(BulkItemView, f"/bulks/{_id(bulk)}/items", query)

    def errors(self, bulk: Id | BulkView) -> Iterator[BulkLineError]:
        """Yield the invalid lines with their reasons."""
        return self._connection.iterate_pages(BulkLineError, f"/bulks/{_id(bulk)}/errors", {"limit": 500})

    def wait(
        self,
        bulk: Id | BulkView,
        *,
        timeout_s: float | None = None,
        on_update: Callable[[BulkView], object] | None = None,
    ) -> BulkView:
        """Wait until the bulk has ended, and return it.

        on_update: called with the bulk about once a second.

        Raises:
            WaitTimeoutError: the bulk has not ended within `timeout_s`; it still runs.
        """
        deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while True:
            view = self.get(bulk)
            if on_update is not None:
                on_update(view)
            if view.state.is_final:
                return view
            if time.monotonic() >= deadline:
                raise WaitTimeoutError(f"bulk {view.id} is still {view.state}")
            self._connection.pause(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def pause(self, bulk: Id | BulkView) -> BulkView:
        """Pause the bulk: running items continue to their end, no others start."""
        return self._connection.post(BulkView, f"/bulks/{_id(bulk)}/pause")

    def resume(self, bulk: Id | BulkView) -> BulkView:
        return self._connection.post(BulkView, f"/bulks/{_id(bulk)}/resume")

    def cancel(self, bulk: Id | BulkView) -> BulkView:
        """Cancel every item that has not ended."""
        return self._connection.post(BulkView, f"/bulks/{_id(bulk)}/cancel")

    def retry_failed(self, bulk: Id | BulkView) -> BulkView:
        """Create new jobs for the items that failed, died or expired; without such items nothing changes."""
        return self._connection.post(BulkView, f"/bulks/{_id(bulk)}/retry-failed")

    def manifest(self, bulk: Id | BulkView) -> Iterator[dict[str, Any]]:
        """Yield one record per item in the order of lines, with the full provenance of its outputs.

        After a broken connection the request is resumed.

        Raises:
            UnreachableError: the connection broke `MAX_TRIES_WITHOUT_PROGRESS` times at the same line.
        """
        bulk_id, cursor, tries = _id(bulk), 0, 0
        while tries < MAX_TRIES_WITHOUT_PROGRESS:
            tries += 1
            response = self._connection.retry(
                lambda: self._connection.open("GET", f"/bulks/{bulk_id}/manifest", params={"cursor": cursor})  # noqa: B023
            )
            with closing(response), suppress(httpx.TransportError):
                for line in _complete_lines(response):
                    record = json.loads(line)
                    if record.get("end"):
                        return
                    cursor, tries = record["line"], 0
                    yield record
            self._connection.pause(POLL_S)
        raise UnreachableError(f"the manifest of bulk {bulk_id} breaks after line {cursor}")

    def _append(self, bulk_id: UUID, chunk: Iterable[Line], *, before: int) -> None:
        """Send lines until the bulk has all of them. It may have stored some lines of a request without an answer."""
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
                    received = parse_response(BulkView, answer).received_lines
                except ConflictError as error:
                    known = error.context.get("received_lines")
                    if error.code != "bulk_offset_mismatch" or known == received:
                        raise
                    if not (isinstance(known, int) and before <= known <= before + len(lines)):
                        raise BulkMismatchError(f"another client also sends lines to bulk {bulk_id}") from error
                    received = known

        self._connection.retry(attempt)


def header_line(options: BulkOptions) -> Line:
    """Return the first line of a bulk's stream."""
    return json.dumps({"bulk": options.model_dump(mode="json", exclude_unset=True)}, ensure_ascii=False).encode()


def _id(bulk: Id | BulkView) -> UUID:
    return id_of(bulk, BulkView)


def _complete_lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield lines up to the last line feed; `Response.iter_lines` also splits at characters that JSON may contain."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
