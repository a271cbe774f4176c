"""The folder of one bulk run: its plan, the ids of its bulks, and its results.

- OUT/images/: the generated files
- OUT/manifest.jsonl: one record per item with request, state, files and full provenance
- OUT/manifest.csv: one row per image
- OUT/index.html: a contact sheet
- OUT/rejected.jsonl: rows and lines that are not valid requests, and why
- OUT/.run/: the plan and the ids of its bulks, from which a later run continues
"""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import IO, Any
from uuid import UUID, uuid4

from afterimage_client.download import PARTIAL_SUFFIX
from scripts.bulk_generate.plan import PlanError, PlannedItem, RejectedRow

VERSION = 2
READABLE_VERSIONS = (1, VERSION)
MAX_LISTED = 20
MAX_NAMED_ROWS = 5


class FolderError(Exception):
    """The folder cannot be used for this run."""


@dataclass(frozen=True)
class Part:
    """Consecutive items of the plan that are one bulk. `key` is its idempotency key, so that retries create one."""

    key: str
    header: str
    items: int
    bulk_id: UUID | None = None


@dataclass(frozen=True)
class Run:
    """A run as the folder keeps it: a bulk, and one more for each time that its input grew.

    Attributes:
        first_seed: seed of the plan; `None`: version 1 of the folder, which did not keep it.
    """

    options: dict[str, Any]
    parts: tuple[Part, ...]
    first_seed: int | None = None

    @property
    def items(self) -> int:
        return sum(part.items for part in self.parts)

    def slices(self, plan: Sequence[PlannedItem]) -> list[Sequence[PlannedItem]]:
        """Return the items of each part."""
        ends = list(accumulate(part.items for part in self.parts))
        return [plan[end - part.items : end] for part, end in zip(self.parts, ends, strict=True)]


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
        if run.get("version") not in READABLE_VERSIONS:
            raise FolderError(f"{self.path} was written by another version of this script")
        parts = tuple(_parse_part(part) for part in [run, *run.get("more", [])])
        return Run(run["options"], parts, run.get("first_seed"))

    def save_plan(
        self,
        planned: Iterable[PlannedItem | RejectedRow],
        options: dict[str, Any],
        *,
        header: Callable[[int], str],
        skip_rejected: bool,
        first_seed: int | None = None,
    ) -> Run:
        """Write the whole plan, before any of it is sent.

        Args:
            header: returns the first line of the bulk's stream for a number of items.
            first_seed: seed that the plan was made with.

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
                    _write_item(file, each)
        self.save_rejected(rejected)
        if rejected and not skip_rejected:
            raise PlanError(
                f"{describe_rejected(rejected)}\nNothing was sent. Correct these rows, or add --skip-invalid."
            )
        if not items:
            raise PlanError(describe_rejected(rejected) if rejected else "the plan has no items")
        run = Run(options, (Part(uuid4().hex, header(items), items),), first_seed)
        self._save(run)
        return run

    def extend(self, run: Run, items: Sequence[PlannedItem], *, header: Callable[[int], str]) -> Run:
        """Add items to the end of the plan, as one more bulk."""
        # Until the run is saved, `load_plan` leaves the new items out.
        earlier = self.load_plan(run)
        with write_atomically(self._plan) as file:
            for item in chain(earlier, items):
                _write_item(file, item)
        run = replace(run, parts=(*run.parts, Part(uuid4().hex, header(len(items)), len(items))))
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

    def delete_part(self, run: Run, number: int) -> None:
        """Delete this part and the later ones from the run; without parts, delete the run, but no other file."""
        if number:
            self._save(replace(run, parts=run.parts[:number]))
        else:
            self._run.unlink()

    def save_bulk_id(self, run: Run, number: int, bulk_id: UUID) -> Run:
        return self._save_part(run, number, replace(run.parts[number], bulk_id=bulk_id))

    def restart(self, run: Run, number: int) -> Run:
        """Start the same part again as a new bulk."""
        return self._save_part(run, number, replace(run.parts[number], bulk_id=None, key=uuid4().hex))

    def _save_part(self, run: Run, number: int, part: Part) -> Run:
        run = replace(run, parts=(*run.parts[:number], part, *run.parts[number + 1 :]))
        self._save(run)
        return run

    def load_plan(self, run: Run) -> list[PlannedItem]:
        with self._plan.open() as file:
            return [PlannedItem(**json.loads(line)) for line in islice(file, run.items)]

    def image_path(self, name: str) -> Path:
        return self.images / name

    def _save(self, run: Run) -> None:
        first, *more = (asdict(part) for part in run.parts)
        saved = {"version": VERSION, "options": run.options, "first_seed": run.first_seed, **first, "more": more}
        with write_atomically(self._run) as file:
            json.dump(saved, file, ensure_ascii=False, indent=2, default=str)


def _parse_part(saved: dict[str, Any]) -> Part:
    bulk_id = saved["bulk_id"]
    return Part(saved["key"], saved["header"], saved["items"], UUID(bulk_id) if bulk_id else None)


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


def _write_item(file: IO[str], item: PlannedItem) -> None:
    write_json_line(file, {"row": item.row, "request": item.request, "files": item.files})


def write_json_line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def describe_rejected(rejected: Sequence[RejectedRow]) -> str:
    """Return one line per reason. A mistake in a template has the same reason in every row."""
    rows: dict[str, list[int]] = {}
    for each in rejected:
        rows.setdefault(each.reason, []).append(each.row)
    lines = [f"{_rows(numbers)}: {reason}" for reason, numbers in islice(rows.items(), MAX_LISTED)]
    if len(rows) > MAX_LISTED:
        lines.append(f"and {len(rows) - MAX_LISTED} more reasons, see rejected.jsonl")
    return "\n".join(lines)


def _rows(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"row {numbers[0]}"
    named = ", ".join(map(str, numbers[:MAX_NAMED_ROWS]))
    more = len(numbers) - MAX_NAMED_ROWS
    return f"rows {named}" + (f" and {more} more" if more > 0 else "")
