"""The report of an indexing run: the result of each file, as JSON Lines, which the next run reads."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from scripts.index_images.sources import SourceFile

RETRIED_CODES = ("file_unreadable", "image_too_large", "body_too_large")
"""Codes of skipped files that every run tries again: permissions and limits may change although the file does not."""


class Outcome(StrEnum):
    CREATED = "created"
    EXISTING = "existing"  # the collection already had the image
    UPDATED = "updated"  # the collection had the image with another description
    DUPLICATE = "duplicate"  # another file of this run has the same content
    SKIPPED = "skipped"  # `code` and `detail` give the reason
    DELETED = "deleted"  # the file was deleted


@dataclass(frozen=True)
class ReportEntry:
    """The result of one file."""

    file: str
    outcome: Outcome
    sha256: str | None = None
    code: str | None = None
    detail: str | None = None
    stamp: str | None = None


class Report:
    """The entries of this run and of earlier ones. A later run does not read files that have not changed since.

    path: file of JSON Lines, read if it exists; None: the entries stay in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, ReportEntry] = {}
        self._file: IO[str] | None = None
        if path is not None and path.exists():
            *lines, _ = path.read_text(encoding="utf-8").split("\n")  # a killed run may leave half a line at the end
            for line in lines:
                self._set(_parse_entry(json.loads(line)))

    @property
    def entries(self) -> list[ReportEntry]:
        return list(self._entries.values())

    @property
    def contents(self) -> dict[str, str | None]:
        """sha256 by file name; None when the file was skipped before its digest was computed."""
        return {name: entry.sha256 for name, entry in self._entries.items()}

    def find_unchanged(self, file: SourceFile, *, known: Collection[str]) -> ReportEntry | None:
        """Return the file's entry of an earlier run if it is still valid.

        known: sha256 of the images in the collection.
        """
        entry = self._entries.get(file.name)
        if entry is None or file.stamp is None or entry.stamp != file.stamp:
            return None
        if entry.outcome == Outcome.SKIPPED:
            return None if entry.code in RETRIED_CODES else entry
        return replace(entry, outcome=Outcome.EXISTING) if entry.sha256 in known else None

    def __enter__(self) -> "Report":
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Rewritten with one line per file; new entries are appended.
            self._file = self._path.open("w", encoding="utf-8")
            for entry in self._entries.values():
                self._write(entry)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, entry: ReportEntry) -> None:
        before = self._entries.get(entry.file)
        # `existing` does not replace the entry of the run that created the image.
        is_known = before is not None and entry.outcome is Outcome.EXISTING and before.sha256 == entry.sha256
        if before != entry and not is_known:
            self._set(entry)
            self._write(entry)

    def add_deleted(self, file: str) -> None:
        """Record that the file was deleted, if the report lists it."""
        if file in self._entries:
            self.add(ReportEntry(file, Outcome.DELETED))

    def _set(self, entry: ReportEntry) -> None:
        if entry.outcome is Outcome.DELETED:
            self._entries.pop(entry.file, None)
        else:
            self._entries[entry.file] = entry

    def _write(self, entry: ReportEntry) -> None:
        if self._file is not None:
            self._file.write(json.dumps(asdict(entry)) + "\n")
            self._file.flush()


def _parse_entry(line: dict[str, Any]) -> ReportEntry:
    return ReportEntry(**line | {"outcome": Outcome(line["outcome"])})
