"""The files of a backup.

`FOLDER/blobs/` has copies of blobs by key, which all backups of the folder share. `FOLDER/20260131T020000Z/` is one
backup. Its `database.dump` is that of `pg_dump`. Its `blobs.jsonl` has key, size and sha256 of each blob that a row
names, sorted by key. Its `manifest.json` is written last: without it a backup is incomplete.

Bytes under a key never change. So each blob is copied once, and later backups refer to the copy.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from shutil import rmtree
from typing import Literal

from pydantic import BaseModel, ValidationError

from shared.settings import StorageSettings
from shared.storage import Blobs

BLOBS = "blobs"
PARTIAL = ".partial"
"""Ends the name of a backup that is not complete."""
NAME = re.compile(r"\d{8}T\d{6}Z")
Problem = Literal["missing", "damaged"]


class BackupError(Exception):
    """The folder, the database or the storage is not what the command needs. The message says what to do."""


class BlobEntry(BaseModel):
    """One blob. sha256: of its bytes, in hex."""

    key: str
    size_bytes: int
    sha256: str


class FileDigest(BaseModel):
    """One file of a backup. sha256: of its bytes, in hex."""

    name: str
    size_bytes: int
    sha256: str


class Manifest(BaseModel):
    """Description of a backup.

    schema_revision: the last migration of the database. rows: the number of rows of each table.
    copied: False if the blobs stay in their storage, and the backup only has their digests.
    problems: blobs that a row names and the storage did not have, or had with other bytes.
    """

    format: Literal[1] = 1
    created_at: datetime
    version: str
    schema_revision: str
    postgres: str
    rows: dict[str, int]
    database: FileDigest
    blob_list: FileDigest
    blobs: int
    blob_bytes: int
    copied: bool
    problems: dict[str, Problem]


class Backup:
    """One backup in its folder, complete or not."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.database = self.path / "database.dump"
        self.blob_list = self.path / "blobs.jsonl"
        self._manifest = self.path / "manifest.json"

    @property
    def name(self) -> str:
        return self.path.name

    def manifest(self) -> Manifest:
        """Raises BackupError if the backup is incomplete."""
        try:
            return Manifest.model_validate_json(self._manifest.read_bytes())
        except FileNotFoundError as error:
            raise BackupError(f"{self.path} is incomplete: it has no manifest.json.") from error
        except ValidationError as error:
            raise BackupError(f"{self._manifest} cannot be read. Another release may have written it.") from error

    def entries(self) -> Iterator[BlobEntry]:
        """Yield the blobs of the backup, sorted by key."""
        with self.blob_list.open() as lines:
            yield from map(BlobEntry.model_validate_json, lines)

    def copies(self) -> Blobs:
        """The copies of blobs that this backup shares with others of its folder."""
        return copies_in(self.path.parent)

    def complete(self, manifest: Manifest) -> "Backup":
        """Write the manifest, and give the backup its final name."""
        self._manifest.write_text(manifest.model_dump_json(indent=2) + "\n")
        for path in (self.database, self.blob_list, self._manifest, self.path):
            _fsync(path)
        complete = Backup(self.path.rename(self.path.with_name(self.name.removesuffix(PARTIAL))))
        _fsync(complete.path.parent)
        return complete


@contextmanager
def new_backup(folder: Path) -> Iterator[Backup]:
    """Create the folder of a backup that begins now. It is removed if the block fails."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with only_user(folder):
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        if (folder / name).exists():
            raise BackupError("Another backup of this folder began in the same second.")
        path = folder / f"{name}{PARTIAL}"
        path.mkdir(mode=0o700)
        try:
            yield Backup(path)
        except BaseException:
            rmtree(path)
            raise


@contextmanager
def only_user(folder: Path) -> Iterator[None]:
    """Keep other commands from changing the backups of the folder.

    Raises:
        BackupError: another command changes them.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            raise BackupError(f"Another command works in {folder}.") from error
        yield


def complete_backups(folder: Path) -> list[Backup]:
    """The complete backups of a folder, oldest first.

    Raises:
        BackupError: the folder does not exist.
    """
    if not folder.is_dir():
        raise BackupError(f"There is no folder {folder}.")
    return [Backup(path) for path in sorted(folder.iterdir()) if NAME.fullmatch(path.name)]


def copies_in(folder: Path) -> Blobs:
    return Blobs(StorageSettings(url=(folder.resolve() / BLOBS).as_uri()))


def digest(path: Path) -> FileDigest:
    """The digest of a file, which is read once."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(name=path.name, size_bytes=path.stat().st_size, sha256=sha256)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
