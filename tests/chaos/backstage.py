"""A folder between the one who plans faults and the workers who play them: orders go in, notes come out."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import orjson

VARIABLE = "CHAOS_BACKSTAGE"


class Backstage:
    """Safe to share between processes that are killed at any moment: an order is a file that one of them removes, a
    note is one short write to the end of a file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._notes = folder / "notes.jsonl"

    @classmethod
    def of_this_process(cls) -> Self:
        return cls(Path(os.environ[VARIABLE]))

    def order(self, what: str) -> None:
        """Ask whichever worker comes to that point next, and only that one."""
        (self.folder / what).touch()

    def takes(self, order: str) -> bool:
        """Whether the order was given, and this process is the one that carries it out."""
        try:
            (self.folder / order).unlink()
        except FileNotFoundError:
            return False
        return True

    def is_open(self, order: str) -> bool:
        """Whether nobody has carried the order out yet."""
        return (self.folder / order).exists()

    def note(self, what: str, **data: Any) -> None:
        line = orjson.dumps({"what": what, "pid": os.getpid(), "at": time.time(), **data}) + b"\n"
        descriptor = os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)

    def notes(self, what: str) -> Iterator[dict[str, Any]]:
        """Every note of that kind, the oldest first."""
        if self._notes.exists():
            for line in self._notes.read_bytes().splitlines():
                note = orjson.loads(line)
                if note["what"] == what:
                    yield note
