"""The folder of one bulk run: its plan, the id of its bulk, and its results.

- OUT/images/: the generated files
- OUT/manifest.jsonl: one record per item with request, state, files and full provenance
- OUT/manifest.csv: one row per image
- OUT/index.html: a contact sheet
- OUT/rejected.jsonl: rows and lines that are not valid requests, and why
- OUT/.run/: the plan and the bulk's id, from which a later run continues
"""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any
from uuid import UUID, uuid4

from afterimage_client.download import PARTIAL_SUFFIX
from scripts.bulk_generate.plan import PlanError, PlannedItem, RejectedRow

VERSION = 1
MAX_LISTED = 20


class FolderError(Exception):
    """The folder cannot be used for this run."""


@dataclass(frozen=True)
class Run:
    """A run as the folder keeps it. `key` is the idempotency key of its bulk, so that retries create one bulk."""

    options: dict[str, Any]
    key: str
    header: str
    items: int
    bulk_id: UUID | None = None


class BulkFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.manifest = path / "manifest.jsonl"
        self.table = path / "manifest.csv"
        self.sheet = path / "index.html"
        self.rejected = path / "rejected.jsonl"
        self._run = path / ".run" / "run.json"
        self._plan = path / ".run" / "plan.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, and delete partial files of a killed run.

        Raises:
            FolderError: another process holds the lock.
        """
        self._run.parent.mkdir(parents=True, exist_ok=True)
        with (self._run.parent / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FolderError(f"another process uses {self.path}") from error
            for part in self.path.rglob(f".*{PARTIAL_SUFFIX}"):
                part.unlink()
            yield

    def find_run(self) -> Run | None:
        """Return the run in this folder, or `None`.

        Raises:
            FolderError: another version of this script wrote it.
        """
        try:
            run = json.loads(self._run.read_text())
        except FileNotFoundError:
            return None
        if run.pop("version", None) != VERSION:
            raise FolderError(f"{self.path} was written by another version of this script")
        return Run(**run | {"bulk_id": run["bulk_id"] and UUID(run["bulk_id"])})

    def save_plan(
        self,
        planned: Iterable[PlannedItem | RejectedRow],
        options: dict[str, Any],
        *,
        header: Callable[[int], str],
        skip_rejected: bool,
    ) -> Run:
        """Write the whole plan, before any of it is sent.

        header: returns the first line of the bulk's stream for a number of items.

        Raises:
            PlanError: rows were rejected and `skip_rejected` is false, or the plan has no items. `rejected.jsonl` has
                the reasons.
        """
        items, rejected = 0, list[RejectedRow]()
        with write_atomically(self._plan) as file:
            for each in planned:
                if isinstance(each, RejectedRow):
                    rejected.append(each)
                else:
                    items += 1
                    write_json_line(file, {"row": each.row, "request": each.request, "files": each.files})
        self.save_rejected(rejected)
        if rejected and not skip_rejected:
            raise PlanError(
                f"{describe_rejected(rejected)}\nNothing was sent. Correct these rows, or add --skip-invalid."
            )
        if not items:
            raise PlanError(describe_rejected(rejected) if rejected else "the plan has no items")
        run = Run(options, uuid4().hex, header(items), items)
        self._save(run)
        return run

    def save_rejected(self, rejected: Collection[RejectedRow]) -> None:
        if not rejected:
            self.rejected.unlink(missing_ok=True)
            return
        with write_atomically(self.rejected) as file:
            for each in rejected:
                write_json_line(file, {"row": each.row, "reason": each.reason})

    def load_rejected(self) -> list[RejectedRow]:
        if not self.rejected.exists():
            return []
        with self.rejected.open() as file:
            return [RejectedRow(**json.loads(line)) for line in file]

    def delete_run(self) -> None:
        """Delete the run, but no other file."""
        self._run.unlink()

    def save_bulk_id(self, run: Run, bulk_id: UUID) -> Run:
        run = replace(run, bulk_id=bulk_id)
        self._save(run)
        return run

    def restart(self, run: Run) -> Run:
        """Start the same plan again as a new bulk."""
        run = replace(run, bulk_id=None, key=uuid4().hex)
        self._save(run)
        return run

    def load_plan(self) -> Iterator[PlannedItem]:
        with self._plan.open() as file:
            for line in file:
                yield PlannedItem(**json.loads(line))

    def image_path(self, name: str) -> Path:
        return self.images / name

    def _save(self, run: Run) -> None:
        with write_atomically(self._run) as file:
            fields = {name: value for name, value in vars(run).items() if name != "bulk_id"}
            json.dump(
                {"version": VERSION, **fields, "bulk_id": run.bulk_id and str(run.bulk_id)},
                file,
                ensure_ascii=False,
                indent=2,
            )


@contextmanager
def write_atomically(path: Path) -> Iterator[IO[str]]:
    """Write a file atomically: it appears, or changes, only after the block ended without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with part.open("x", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json_line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def describe_rejected(rejected: Sequence[RejectedRow]) -> str:
    lines = [f"row {row.row}: {row.reason}" for row in rejected[:MAX_LISTED]]
    if len(rejected) > MAX_LISTED:
        lines.append(f"and {len(rejected) - MAX_LISTED} more, see rejected.jsonl")
    return "\n".join(lines)
