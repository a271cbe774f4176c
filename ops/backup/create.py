"""Create a backup.

The order makes it complete. First the sweeper is paused, then the database is read as of one moment. Every blob that a
row of this moment names was stored before the row, and stays until the sweeper runs again.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from sqlalchemy import text

from ops.backup import database
from ops.backup.backup_folder import (
    Backup,
    BlobEntry,
    Manifest,
    Problem,
    complete_backups,
    copies_in,
    digest,
    new_backup,
)
from shared.db import blobs as blob_rows
from shared.errors import ResourceNotFoundError
from shared.storage import Blobs, get_blobs
from shared.version import VERSION

AT_ONCE = 8
"""Blobs that are read at the same time, because a bucket answers late and reads fast."""
KEYS_PER_PAGE = 1000


@dataclass(frozen=True)
class Named:
    """A blob that a row names, with the digest that the row has, and what the previous backup says of it."""

    key: str
    sha256: str | None
    previous: BlobEntry | None


def create(folder: Path, *, copies_blobs: bool, programs: Path | None) -> Backup:
    """Back up the database and the blobs of the settings into a new folder below `folder`.

    copies_blobs: False leaves the blobs where they are. The backup then has their sizes and digests only.

    Raises:
        BackupError: another backup runs, another command works in the folder, or `pg_dump` failed.
        StorageError: the blob store failed.
    """
    with new_backup(folder) as backup:
        previous = _newest_with_blobs(folder) if copies_blobs else None
        with TemporaryFile("w+", dir=backup.path) as keys, database.deletions_paused():
            with database.snapshot() as now:
                database.dump(backup.database, snapshot_id=now.id, programs=programs)
                revision = now.session.scalar(database.SCHEMA_REVISION)
                server = now.session.scalar(text("show server_version"))
                rows = database.count_rows(now.session)
                for key, digest_of_row in blob_rows.iterate_named(now.session):
                    print(key, digest_of_row or "", file=keys)
            # The transaction has ended: copying may take hours, and Postgres cannot clean up behind an old snapshot.
            copies = copies_in(folder) if copies_blobs else None
            count, size_bytes, problems = _read_blobs(_named(keys, previous), backup, copies)
        return backup.complete(
            Manifest(
                created_at=datetime.now(UTC),
                version=VERSION,
                schema_revision=str(revision),
                postgres=str(server),
                rows=rows,
                database=digest(backup.database),
                blob_list=digest(backup.blob_list),
                blobs=count,
                blob_bytes=size_bytes,
                copied=copies_blobs,
                problems=problems,
            )
        )


def _newest_with_blobs(folder: Path) -> Backup | None:
    return next((backup for backup in reversed(complete_backups(folder)) if backup.manifest().copied), None)


def _named(keys: IO[str], previous: Backup | None) -> Iterator[Named]:
    """Join the keys with the entries of the previous backup. Both are sorted."""
    keys.seek(0)
    entries = iter(()) if previous is None else previous.entries()
    entry = next(entries, None)
    for line in keys:
        key, _, digest_of_row = line.rstrip("\n").partition(" ")
        while entry is not None and entry.key < key:
            entry = next(entries, None)
        yield Named(key, digest_of_row or None, entry if entry is not None and entry.key == key else None)


def _read_blobs(named: Iterator[Named], backup: Backup, copies: Blobs | None) -> tuple[int, int, dict[str, Problem]]:
    """Write the list of blobs. Return their number, their size in bytes, and the blobs that were not as expected."""
    count = size_bytes = 0
    problems: dict[str, Problem] = {}
    with backup.blob_list.open("w") as lines, ThreadPoolExecutor(AT_ONCE) as threads:
        while page := list(islice(named, KEYS_PER_PAGE)):
            for wanted, found in zip(page, threads.map(partial(_read_blob, copies=copies), page), strict=True):
                if isinstance(found, BlobEntry):
                    lines.write(found.model_dump_json() + "\n")
                    count, size_bytes = count + 1, size_bytes + found.size_bytes
                else:
                    problems[wanted.key] = found
    return count, size_bytes, problems


def _read_blob(wanted: Named, *, copies: Blobs | None) -> BlobEntry | Problem:
    """Read one blob, and copy it, unless the previous backup has it already."""
    known = wanted.previous
    if copies is not None and known is not None:
        copied, stored = copies.info(wanted.key), get_blobs().info(wanted.key)
        if copied and stored and copied.size_bytes == stored.size_bytes == known.size_bytes:
            return known
    try:
        data = get_blobs().get(wanted.key)
    except ResourceNotFoundError:
        return "missing"
    found = BlobEntry(key=wanted.key, size_bytes=len(data), sha256=sha256(data).hexdigest())
    if wanted.sha256 not in (None, found.sha256):
        return "damaged"
    if copies is not None:
        copies.put(wanted.key, data, media_type="application/octet-stream")
    return found
