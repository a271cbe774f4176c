"""A folder shared by the process that plans faults and the workers: it places orders, and they write notes."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import orjson

VARIABLE = "CHAOS_MAILBOX"


class Mailbox:
    """Orders and notes in a folder, safe to share between processes that are killed at any moment.

    An order is a file that one process removes. A note is one short write to the end of a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes = folder / "notes.jsonl"

    @classmethod
    def of_this_process(cls) -> Self:
        return cls(Path(os.environ[VARIABLE]))

    def order(self, what: str) -> None:
        """Place an order that the next worker at that point carries out, and only that worker."""
        (self.folder / what).touch()

    def takes(self, order: str) -> bool:
        """Take the order if there is one. Return whether this process has to carry it out."""
        try:
            (self.folder / order).unlink()
        except FileNotFoundError:
            return False
        return True

    def is_open(self, order: str) -> bool:
        """Whether no worker has taken the order yet."""
        return (self.folder / order).exists()

    def note(self, what: str, **data: Any) -> None:
        line = orjson.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **data}) + b"\n"
        descriptor = os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def notes(self, what: str) -> Iterator[dict[str, Any]]:
        """All notes of that kind, the oldest first."""
        if self._notes.exists():
            for line in self._notes.read_bytes().splitlines():
                note = orjson.loads(line)
                if note["what"] == what:
                    yield note
