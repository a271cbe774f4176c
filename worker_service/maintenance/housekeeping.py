"""Periodic tasks that delete old data: rows past their retention time, and blobs that no row names.

They run in the reconciler's process, in their own thread, because they may take long. When several processes run, each
turn of a task is taken by one process.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from shared import blob_sweeper
from shared.db import blobs, calibrations, retention, spaces
from shared.db.session import session_scope
from shared.errors import BaseAppException
from shared.metrics import CALIBRATION_OUTDATED, ROWS_RETIRED, increment_counter, set_gauge
from shared.settings import RetentionSettings, Settings
from shared.storage import get_blobs

logger = logging.getLogger(__name__)

POLL_S = 60.0
"""Longest time between two looks for a task that is due."""
COLLECTIONS_EVERY_S = 5.0
"""How soon the images of a deleted collection start to be removed, or continue after a crash."""
CALIBRATION_EVERY_S = 3600.0
ROWS_PER_DELETE = 500
PAUSE_BETWEEN_DELETES_S = 0.1
"""Pause between two batches, so that a large clean-up does not slow other users of the database."""


class Housekeeping:
    """The periodic tasks whose interval in the settings is above 0."""

    def __init__(self, settings: Settings, stopping: threading.Event) -> None:
        self._settings = settings
        self._stopping = stopping
        self._calibration_warning: str | None = None
        retention_settings = settings.retention
        tasks: dict[str, tuple[float, Callable[[], None]]] = {
            "retention": (retention_settings.every_s, self.delete_old_rows),
            "sweep": (retention_settings.sweep_every_s, self.sweep_blobs),
            "collections": (COLLECTIONS_EVERY_S, self.delete_collections),
            "calibration": (CALIBRATION_EVERY_S, self.check_calibration),
        }
        self._tasks = {name: (every_s, task) for name, (every_s, task) in tasks.items() if every_s > 0}

    def run(self) -> None:
        """Run the due tasks until the process stops. Errors are logged, not raised."""
        poll_s = min([POLL_S, *(every_s for every_s, _ in self._tasks.values())])
        while not self._stopping.wait(poll_s):
            for name, (every_s, task) in self._tasks.items():
                self._run_if_due(name, every_s, task)

    def delete_old_rows(self) -> None:
        """Delete rows that are older than their retention time, and the blob claims of abandoned uploads.

        Raises:
            DatabaseError: the database failed. The batches deleted before stay deleted.
        """
        with session_scope() as session:
            blobs.delete_old_claims(session, older_than_s=blob_sweeper.grace_s(self._settings))
        self._delete_in_batches(_deletions(self._settings.retention))

    def delete_collections(self) -> None:
        """Delete the images of deleted collections, then the collections. The next call continues an interrupted one.

        Raises:
            DatabaseError: the database failed. The batches deleted before stay deleted.
        """
        self._delete_in_batches(
            [
                ("images", retention.delete_images_of_deleted_collections, ROWS_PER_DELETE),
                ("collections", retention.delete_emptied_collections, ROWS_PER_DELETE),
            ]
        )

    def check_calibration(self) -> None:
        """Log why the relevance gate of the active embedding space may be wrong, once while the reason stays the same.

        Raises:
            DatabaseError: the database failed.
        """
        if self._settings.retrieval.min_similarity is not None:
            return
        with session_scope() as session:
            space = spaces.find_active(session)
            warning = None if space is None else calibrations.warning_about(session, space)
        if warning is not None and warning != self._calibration_warning:
            logger.warning("calibration_outdated", extra={"detail": warning})
        self._calibration_warning = warning
        set_gauge(CALIBRATION_OUTDATED, warning is not None)

    def sweep_blobs(self) -> None:
        """Delete blobs that no row names: see `blob_sweeper.sweep`, also for the errors."""
        older_than_s = blob_sweeper.grace_s(self._settings)
        blob_sweeper.sweep(get_blobs(), older_than_s=older_than_s, stopping=self._stopping.is_set)

    def _delete_in_batches(self, deletions: Iterable[tuple[str, Callable[..., int], int]]) -> None:
        for table, delete, limit in deletions:
            deleted = limit
            while deleted == limit and not self._stopping.wait(PAUSE_BETWEEN_DELETES_S):
                with session_scope() as session:
                    deleted = delete(session, limit=limit)
                if deleted:
                    increment_counter(ROWS_RETIRED, deleted, {"table": table})
                    logger.info("rows_retired", extra={"table": table, "rows": deleted})

    def _run_if_due(self, name: str, every_s: float, task: Callable[[], None]) -> None:
        try:
            with session_scope() as session:
                begun = retention.begin_periodic_task(session, name, every_s=every_s)
            if begun:
                task()
        except BaseAppException as error:
            logger.warning("chore_failed", extra={"chore": name, "cause": error.code, "detail": error.message})
            self._retry_soon(name)
        except Exception:
            # A bug in a task must not end this thread. The task runs again at its next turn.
            logger.exception("chore_failed", extra={"chore": name})

    def _retry_soon(self, name: str) -> None:
        try:
            with session_scope() as session:
                retention.release_periodic_task(session, name)
        except BaseAppException as error:
            logger.warning("chore_waits", extra={"chore": name, "cause": error.code})


def _deletions(settings: RetentionSettings) -> Iterator[tuple[str, Callable[..., int], int]]:
    """Table, function that deletes a batch, and rows per batch, for each table with a retention time."""
    deletions: list[tuple[str, Callable[..., int], float, int]] = [
        ("jobs", retention.delete_old_jobs, settings.jobs_days, ROWS_PER_DELETE),
        ("bulks", retention.delete_old_bulks, settings.jobs_days, 1),  # a bulk has up to 100,000 items
        ("generations", retention.delete_old_outputs, settings.outputs_days, ROWS_PER_DELETE),
        ("job_events", retention.delete_old_events, settings.events_days, ROWS_PER_DELETE),
        ("webhook_deliveries", retention.delete_old_deliveries, settings.deliveries_days, ROWS_PER_DELETE),
    ]
    for table, delete, days, limit in deletions:
        if days > 0:
            yield table, partial(delete, days=days), limit
