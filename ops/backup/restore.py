"""Restore a backup into an empty database and an empty blob store.

The blobs come first, and the database in one transaction. So the same command continues after an interruption: the
database is still empty, and the blobs that are there are those of the backup.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from alembic.config import Config
from alembic.script import ScriptDirectory

from ops.backup import database
from ops.backup.backup_folder import Backup, BackupError, BlobEntry, Manifest, Problem
from ops.backup.create import AT_ONCE, KEYS_PER_PAGE
from ops.backup.verify import check_blobs, read_blob, verify_files
from shared.blob_sweeper import OWNER_KEY
from shared.cache import get_cache_manager
from shared.storage import PROJECT, Blobs, get_blobs


def restore(backup: Backup, *, programs: Path | None) -> Manifest:
    """Restore the backup into the database and the blob store of the settings, and check the result.

    The cache is emptied, because it may have answers about the rows that were there.

    Raises:
        BackupError: the backup is damaged, or of a newer release; the database or the store is not empty.
        StorageError: the blob store failed.
    """
    manifest = backup.manifest()
    _check_revision(manifest)
    verify_files(backup, programs=programs)
    if not database.is_empty():
        raise BackupError("The database has tables. Restore into an empty one, before any migration.")
    problems: dict[str, Problem] = {}
    if manifest.copied:
        _check_store(backup)
        problems.update(_copy_blobs(backup, get_blobs()))
    else:
        problems.update(check_blobs(backup.entries(), get_blobs()))
    if problems:
        raise BackupError(f"Blobs are missing or damaged, so nothing was restored: {_some(problems)}.")
    database.load(backup.database, programs=programs)
    _check_database(manifest)
    get_cache_manager().invalidate("*")
    return manifest


def _check_revision(manifest: Manifest) -> None:
    migrations = ScriptDirectory.from_config(Config(PROJECT / "alembic.ini"))
    if manifest.schema_revision not in {script.revision for script in migrations.walk_revisions()}:
        raise BackupError(f"The backup is of a newer release ({manifest.version}). Restore it with that release.")


def _check_store(backup: Backup) -> None:
    """Raises BackupError if the store has a blob that is not in the backup, or belongs to a database."""
    if get_blobs().exists(OWNER_KEY):
        raise BackupError("The blob store belongs to a database. Restore into an empty one.")
    known = {entry.key for entry in backup.entries()}
    for info in get_blobs().list(""):
        if info.key not in known:
            raise BackupError(f"The blob store is not empty: it has {info.key}, which is not in the backup.")


def _copy_blobs(backup: Backup, target: Blobs) -> Iterator[tuple[str, Problem]]:
    """Copy the blobs that the target lacks, and yield those that the backup lacks."""
    entries, copies = backup.entries(), backup.copies()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        while page := list(islice(entries, KEYS_PER_PAGE)):
            copied = threads.map(partial(_copy_blob, copies=copies, target=target), page)
            for entry, problem in zip(page, copied, strict=True):
                if problem is not None:
                    yield entry.key, problem


def _copy_blob(entry: BlobEntry, *, copies: Blobs, target: Blobs) -> Problem | None:
    if isinstance(read_blob(entry, store=target), bytes):
        return None
    found = read_blob(entry, store=copies)
    if not isinstance(found, bytes):
        return found
    target.put(entry.key, found, media_type=_media_type(entry.key))
    return None


def _media_type(key: str) -> str:
    return f"image/{key.rpartition('.')[2]}"


def _check_database(manifest: Manifest) -> None:
    with database.open_session() as session:
        rows = database.count_rows(session)
    differ = sorted(name for name in rows.keys() | manifest.rows if rows.get(name) != manifest.rows.get(name))
    if differ:
        raise BackupError(f"The restored database has another number of rows in {', '.join(differ)}.")


def _some(problems: dict[str, Problem], most: int = 5) -> str:
    shown = ", ".join(f"{key} ({problem})" for key, problem in list(problems.items())[:most])
    return shown if len(problems) <= most else f"{shown} and {len(problems) - most} more"
