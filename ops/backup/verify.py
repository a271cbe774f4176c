"""Compare every byte of a backup with the digests of its manifest."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path

from ops.backup import database
from ops.backup.backup_folder import Backup, BackupError, BlobEntry, Problem, digest
from ops.backup.create import AT_ONCE, KEYS_PER_PAGE
from shared.errors import ResourceNotFoundError
from shared.storage import Blobs, get_blobs


def verify(backup: Backup, *, programs: Path | None) -> dict[str, Problem]:
    """Return the blobs that are missing or damaged, those that were it when the backup was made among them.

    Blobs that were not copied are read from the storage of the settings.

    Raises:
        BackupError: the backup is not complete, or its dump or its list of blobs is damaged.
        StorageError: the blob store failed.
    """
    manifest = backup.manifest()
    verify_files(backup, programs=programs)
    found = check_blobs(backup.entries(), backup.copies() if manifest.copied else get_blobs())
    return manifest.problems | dict(found)


def verify_files(backup: Backup, *, programs: Path | None) -> None:
    """Raises BackupError if the dump or the list of blobs is damaged."""
    manifest = backup.manifest()
    for path, expected in ((backup.database, manifest.database), (backup.blob_list, manifest.blob_list)):
        if not path.exists() or digest(path) != expected:
            raise BackupError(f"{path} is damaged: it is not the file that the manifest describes.")
    database.check_dump(backup.database, programs=programs)


def check_blobs(entries: Iterator[BlobEntry], store: Blobs) -> Iterator[tuple[str, Problem]]:
    """Read each blob from the store, and yield those that it lacks, or has with other bytes."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        while page := list(islice(entries, KEYS_PER_PAGE)):
            for entry, found in zip(page, threads.map(partial(read_blob, store=store), page), strict=True):
                if not isinstance(found, bytes):
                    yield entry.key, found


def read_blob(entry: BlobEntry, *, store: Blobs) -> bytes | Problem:
    """The bytes of this blob in the store, if they are those of the entry."""
    try:
        data = store.get(entry.key)
    except ResourceNotFoundError:
        return "missing"
    return data if sha256(data).hexdigest() == entry.sha256 else "damaged"
