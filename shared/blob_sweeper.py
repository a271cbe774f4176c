"""The blob sweeper: deletes blobs that no row names any more. Requests never delete a blob themselves.

Such blobs remain of deleted images, jobs and outputs, and of attempts and uploads that ended before their rows were
written. See docs/decisions/0008-how-are-unneeded-blobs-deleted.md.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from shared.contracts.jobs import Lane
from shared.db import blobs as blob_rows
from shared.db.session import session_scope
from shared.errors import ForeignStorageError, ResourceNotFoundError
from shared.metrics import BLOB_BYTES_SWEPT, BLOBS_SWEPT, increment_counter
from shared.settings import Settings
from shared.storage import IMAGES, OUTPUTS, REFERENCES, THUMBNAILS, BlobInfo, Blobs

logger = logging.getLogger(__name__)

OWNER_KEY = "swept-for"
"""The blob under this key names the one database that may sweep the store. Any other would delete all of its blobs."""
KEYS_PER_QUERY = 1000
BLOBS_PER_DELETE = 100
"""Blobs deleted under one set of locks. An upload of one of these blobs waits until they are deleted."""
BLOBS_PER_CHECK = 10
DELETE_LIMIT_S = blob_rows.LOCK_LIMIT_S / 3
"""Blobs of a batch that are not deleted by then wait for the next sweep."""


@dataclass
class SweepResult:
    """The number of deleted blobs, their size, and the number of deleted temporary files."""

    blobs: int = 0
    size_bytes: int = 0
    leftovers: int = 0
    """Temporary files of killed writes, in a folder."""
    stopped_by_backup: bool = False
    """A backup runs, so the rest waits for a later sweep."""


def grace_s(settings: Settings) -> float:
    """The age in seconds below which a blob is kept: at least as long as a job or an upload may take to name it."""
    # After `starvation_timeout_s`, one batch of each lane may still interrupt the job, each for up to `timeout_s`.
    longest_delay_s = settings.queue.starvation_timeout_s + len(Lane) * settings.jobs.timeout_s
    longest_work_s = settings.jobs.timeout_s + longest_delay_s + 2 * settings.jobs.lease_s
    return max(settings.retention.blob_grace_s, longest_work_s)


def sweep(blobs: Blobs, *, older_than_s: float, stopping: Callable[[], bool] = lambda: False) -> SweepResult:
    """Delete blobs that are older than `older_than_s` and that no row, running attempt or upload needs.

    Several sweeps may run at the same time. Claims of uploads older than `older_than_s` end, and such an upload then
    fails. A backup keeps all blobs: a sweep ends when one runs.
    stopping: checked between batches; True ends the sweep.

    Raises:
        ForeignStorageError: another database sweeps this store; see `adopt`.
        StorageError, DatabaseError: the store or the database failed. Blobs deleted until then stay deleted.
    """
    with session_scope() as session:
        identity = blob_rows.database_identity(session)
    _check_owner(blobs, identity)
    with session_scope() as session:
        blob_rows.delete_old_claims(session, older_than_s=older_than_s)
    swept = SweepResult()
    candidates = list_unneeded(blobs, older_than_s=older_than_s)
    while not stopping() and not swept.stopped_by_backup and (batch := list(islice(candidates, BLOBS_PER_DELETE))):
        _delete(blobs, batch, swept)
    if swept.stopped_by_backup:
        logger.info("sweep_stopped_by_backup")
    swept.leftovers = blobs.delete_leftovers(older_than=_time_ago(older_than_s))
    logger.info("blobs_swept", extra={"blobs": swept.blobs, "size_bytes": swept.size_bytes})
    return swept


def list_unneeded(blobs: Blobs, *, older_than_s: float) -> Iterator[BlobInfo]:
    """Yield the blobs that are older than `older_than_s` and not needed now. They are checked in pages."""
    stored_before = _time_ago(older_than_s)
    for prefix in (IMAGES, THUMBNAILS, REFERENCES, OUTPUTS):
        old = (info for info in blobs.list(prefix) if info.last_modified <= stored_before)
        while page := list(islice(old, KEYS_PER_QUERY)):
            with session_scope() as session:
                keys = set(blob_rows.list_unneeded(session, [info.key for info in page]))
            yield from (info for info in page if info.key in keys)


def adopt(blobs: Blobs) -> None:
    """Make this database the one that may sweep the store, for instance after it was restored or moved."""
    with session_scope() as session:
        identity = blob_rows.database_identity(session)
    blobs.put(OWNER_KEY, identity.encode(), media_type="text/plain")


def _check_owner(blobs: Blobs, identity: str) -> None:
    try:
        owner = blobs.get(OWNER_KEY).decode()
    except ResourceNotFoundError:
        blobs.put(OWNER_KEY, identity.encode(), media_type="text/plain")
        return
    if owner != identity:
        raise ForeignStorageError


def _delete(blobs: Blobs, batch: list[BlobInfo], swept: SweepResult) -> None:
    sizes = {info.key: info.size_bytes for info in batch}
    locked_at = time.monotonic()
    with session_scope() as session:
        if not blob_rows.may_delete(session):
            swept.stopped_by_backup = True
            return
        blob_rows.lock_keys(session, sizes)
        unneeded = iter(blob_rows.list_unneeded(session, list(sizes)))
        # This process may be frozen until the server has released the locks. It must then delete nothing more, so few
        # blobs are deleted between two looks at the clock.
        while time.monotonic() - locked_at < DELETE_LIMIT_S and (keys := list(islice(unneeded, BLOBS_PER_CHECK))):
            blobs.delete_all(keys)
            if time.monotonic() - locked_at >= blob_rows.LOCK_LIMIT_S:
                _log_needed(blobs, keys)
            swept.blobs += len(keys)
            size_bytes = sum(sizes[key] for key in keys)
            swept.size_bytes += size_bytes
            increment_counter(BLOBS_SWEPT, len(keys))
            increment_counter(BLOB_BYTES_SWEPT, size_bytes)


def _log_needed(blobs: Blobs, deleted: list[str]) -> None:
    """Log which of these blobs an upload stored again, after the locks were gone and before they were deleted."""
    with session_scope() as session:
        needed = set(deleted).difference(blob_rows.list_unneeded(session, deleted))
    if lost := sorted(key for key in needed if not blobs.exists(key)):
        logger.error("needed_blobs_deleted", extra={"keys": lost})


def _time_ago(seconds: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds)
