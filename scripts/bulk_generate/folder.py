"""The folder of one bulk run: what was planned, which bulk it became, and what came of it.

OUT/images/...        the generated files
OUT/manifest.jsonl    one record per item: request, state, files, full provenance
OUT/manifest.csv      one row per image, for a table
OUT/index.html        a contact sheet
OUT/rejected.jsonl    rows and lines that were no valid requests, and why
OUT/.run/             the plan and the bulk's id: what a later run goes on from
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

from afterimage_client.download import PART
from scripts.bulk_generate.plan import PlanError, PlannedItem, Rejected

VERSION = 1
NAMED = 20


class FolderError(Exception):
    """The folder cannot be used for this run."""


@dataclass(frozen=True)
class Run:
    """What is known of a run. `key` makes its bulk one and the same, however often it is created."""

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
    def held(self) -> Iterator[None]:
        """Nobody else may work in it meanwhile; what a killed run left half-written goes.

        Raises:
            FolderError: another run works in it.
        """
        self._run.parent.mkdir(parents=True, exist_ok=True)
        with (self._run.parent / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise FolderError(f"another run works in {self.path}") from error
            for part in self.path.rglob(f".*{PART}"):
                part.unlink()
            yield

    def known(self) -> Run | None:
        """The run that this folder holds.

        Raises:
            FolderError: it was written by another version.
        """
        try:
            run = json.loads(self._run.read_text())
        except FileNotFoundError:
            return None
        if run.pop("version", None) != VERSION:
            raise FolderError(f"{self.path} was written by another version of this script")
        return Run(**run | {"bulk_id": run["bulk_id"] and UUID(run["bulk_id"])})

    def keep_plan(
        self,
        planned: Iterable[PlannedItem | Rejected],
        options: dict[str, Any],
        *,
        header: Callable[[int], str],
        skip_rejected: bool,
    ) -> Run:
        """Write the plan down as a whole; before that nothing of it is sent.

        header: the first line of the bulk's stream, for so many items.

        Raises:
            PlanError: rows were rejected and are not to be skipped; or there is no item. `rejected.jsonl` names them.
        """
        items, rejected = 0, list[Rejected]()
        with whole(self._plan) as file:
            for each in planned:
                if isinstance(each, Rejected):
                    rejected.append(each)
                else:
                    items += 1
                    write_line(file, {"row": each.row, "request": each.request, "files": each.files})
        self.keep_rejected(rejected)
        if rejected and not skip_rejected:
            raise PlanError(
                f"{some(rejected)}\nNothing was sent. Correct these rows, or leave them out with --skip-invalid."
            )
        if not items:
            raise PlanError(some(rejected) if rejected else "there is no item")
        run = Run(options, uuid4().hex, header(items), items)
        self._keep(run)
        return run

    def keep_rejected(self, rejected: Collection[Rejected]) -> None:
        if not rejected:
            self.rejected.unlink(missing_ok=True)
            return
        with whole(self.rejected) as file:
            for each in rejected:
                write_line(file, {"row": each.row, "reason": each.reason})

    def known_rejected(self) -> list[Rejected]:
        if not self.rejected.exists():
            return []
        with self.rejected.open() as file:
            return [Rejected(**json.loads(line)) for line in file]

    def forget(self) -> None:
        """The folder holds no run any more; what lies in it stays."""
        self._run.unlink()

    def keep_bulk(self, run: Run, bulk_id: UUID) -> Run:
        run = replace(run, bulk_id=bulk_id)
        self._keep(run)
        return run

    def start_again(self, run: Run) -> Run:
        """The same plan as another bulk."""
        run = replace(run, bulk_id=None, key=uuid4().hex)
        self._keep(run)
        return run

    def plan(self) -> Iterator[PlannedItem]:
        with self._plan.open() as file:
            for line in file:
                yield PlannedItem(**json.loads(line))

    def target(self, name: str) -> Path:
        return self.images / name

    def _keep(self, run: Run) -> None:
        with whole(self._run) as file:
            known = {name: value for name, value in vars(run).items() if name != "bulk_id"}
            json.dump(
                {"version": VERSION, **known, "bulk_id": run.bulk_id and str(run.bulk_id)},
                file,
                ensure_ascii=False,
                indent=2,
            )


@contextmanager
def whole(path: Path) -> Iterator[IO[str]]:
    """A file that appears, or changes, all at once, and not at all when something goes wrong."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}{PART}")
    try:
        with part.open("x", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_line(file: IO[str], record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def some(rejected: Sequence[Rejected]) -> str:
    named = [f"row {each.row}: {each.reason}" for each in rejected[:NAMED]]
    if len(rejected) > NAMED:
        named.append(f"and {len(rejected) - NAMED} more, see rejected.jsonl")
    return "\n".join(named)
