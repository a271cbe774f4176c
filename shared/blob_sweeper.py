"""Removing blobs that nothing names any more: of deleted images, jobs and outputs, of attempts and uploads that ended
before their rows were written. Request paths never delete a blob."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice

from shared.contracts.jobs import Lane
from shared.db import blobs as needs
from shared.db.session import session_scope
from shared.errors import ForeignStorageError, ResourceNotFoundError
from shared.metrics import increment_counter
from shared.settings import Settings
from shared.storage import IMAGES, OUTPUTS, THUMBNAILS, BlobInfo, Blobs

logger = logging.getLogger(__name__)

OWNER_KEY = "swept-for"
"""Names the database whose rows decide what is needed. A store that a second one sweeps would lose everything."""
PAGE = 1000
BATCH = 100
"""Blobs removed under one set of locks: an upload of one of them waits that long."""


@dataclass
class Swept:
    blobs: int = 0
    size_bytes: int = 0
    leftovers: int = 0
    """Files of writes that were killed half way, in a folder."""


def grace_s(settings: Settings) -> float:
    """How old a blob has to be, in seconds: in no case younger than work that could still come to name it."""
    held_up_s = settings.queue.starving_s + len(Lane) * settings.jobs.timeout_s  # and what passes when that is over
    longest_work_s = settings.jobs.timeout_s + held_up_s + 2 * settings.jobs.lease_s
    return max(settings.retention.blob_grace_s, longest_work_s)


def sweep(blobs: Blobs, *, older_than_s: float, stopping: Callable[[], bool] = lambda: False) -> Swept:
    """Remove what nothing needs and is older than `older_than_s`; what an attempt or an upload is about to name stays.

    Any number may run at the same time. Claims of uploads older than `older_than_s` end: such an upload is refused.

    Raises:
        ForeignStorageError: another database sweeps this store; see `adopt`.
        StorageError, DatabaseError: what was removed until then stays removed.
    """
    with session_scope() as session:
        identity = needs.database_identity(session)
    _check_owner(blobs, identity)
    with session_scope() as session:
        needs.forget_claims(session, older_than_s=older_than_s)
    swept = Swept()
    candidates = unneeded(blobs, older_than_s=older_than_s)
    while not stopping() and (batch := list(islice(candidates, BATCH))):
        _remove(blobs, batch, swept)
    swept.leftovers = blobs.delete_leftovers(older_than=_moment(older_than_s))
    logger.info("blobs_swept", extra={"blobs": swept.blobs, "size_bytes": swept.size_bytes})
    return swept


def unneeded(blobs: Blobs, *, older_than_s: float) -> Iterator[BlobInfo]:
    """Blobs that nothing needs at this moment, a page in memory at a time."""
    born_before = _moment(older_than_s)
    for prefix in (IMAGES, THUMBNAILS, OUTPUTS):
        old = (info for info in blobs.list(prefix) if info.last_modified <= born_before)
        while page := list(islice(old, PAGE)):
            with session_scope() as session:
                keys = set(needs.unneeded(session, [info.key for info in page]))
            yield from (info for info in page if info.key in keys)


def adopt(blobs: Blobs) -> None:
    """Let this database, restored or moved for instance, decide from now on what the store needs."""
    with session_scope() as session:
        identity = needs.database_identity(session)
    blobs.put(OWNER_KEY, identity.encode(), media_type="text/plain")


def _check_owner(blobs: Blobs, identity: str) -> None:
    try:
        owner = blobs.get(OWNER_KEY).decode()
    except ResourceNotFoundError:
        blobs.put(OWNER_KEY, identity.encode(), media_type="text/plain")
        return
    if owner != identity:
        raise ForeignStorageError


def _remove(blobs: Blobs, batch: list[BlobInfo], swept: Swept) -> None:
    sizes = {info.key: info.size_bytes for info in batch}
    with session_scope() as session:
        needs.lock(session, sizes)
        keys = needs.unneeded(session, list(sizes))
        if keys:
            blobs.delete_all(keys)
    swept.blobs += len(keys)
    swept.size_bytes += sum(sizes[key] for key in keys)
    increment_counter("blobs_swept_total", len(keys))
    increment_counter("blob_bytes_swept_total", sum(sizes[key] for key in keys))


def _moment(seconds_ago: float) -> datetime:
    return datetime.now(UTC) - timedelta(seconds=seconds_ago)
