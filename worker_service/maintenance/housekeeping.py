"""What has to be thrown away now and then: rows that are older than is kept, and blobs that nothing names.

It runs beside the reconciler's ticks, in a thread of its own, because both may take long. Of several processes one
takes each turn.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial

from shared import blob_sweeper
from shared.db import blobs, retention
from shared.db.session import session_scope
from shared.errors import BaseAppException
from shared.metrics import increment_counter
from shared.settings import RetentionSettings, Settings
from shared.storage import get_blobs

logger = logging.getLogger(__name__)

LOOK_S = 60.0
BATCH = 500
PAUSE_S = 0.1
"""Between two batches, so that a large clean-up leaves the database to others."""


class Housekeeping:
    def __init__(self, settings: Settings, stopping: threading.Event) -> None:
        self._settings = settings
        self._stopping = stopping
        kept = settings.retention
        chores: dict[str, tuple[float, Callable[[], None]]] = {
            "retention": (kept.every_s, self.retire),
            "sweep": (kept.sweep_every_s, self.sweep),
        }
        self._chores = {name: chore for name, chore in chores.items() if chore[0] > 0}

    def run(self) -> None:
        """Do what is due until the process stops."""
        look_s = min(LOOK_S, *(every_s for every_s, _ in self._chores.values()))
        while not self._stopping.wait(look_s):
            for name, (every_s, work) in self._chores.items():
                self._do(name, every_s, work)

    def retire(self) -> None:
        """Remove rows that are older than the settings keep, and claims of uploads that will not come back."""
        with session_scope() as session:
            blobs.forget_claims(session, older_than_s=blob_sweeper.grace_s(self._settings))
        for table, retire, batch in _retirements(self._settings.retention):
            removed = batch
            while removed == batch and not self._stopping.wait(PAUSE_S):
                with session_scope() as session:
                    removed = retire(session, limit=batch)
                if removed:
                    increment_counter("rows_retired_total", removed, {"table": table})
                    logger.info("rows_retired", extra={"table": table, "rows": removed})

    def sweep(self) -> None:
        """Remove blobs that nothing names."""
        older_than_s = blob_sweeper.grace_s(self._settings)
        blob_sweeper.sweep(get_blobs(), older_than_s=older_than_s, stopping=self._stopping.is_set)

    def _do(self, name: str, every_s: float, work: Callable[[], None]) -> None:
        try:
            with session_scope() as session:
                ours = retention.begin_chore(session, name, every_s=every_s)
            if ours:
                work()
        except BaseAppException as error:
            logger.warning("chore_failed", extra={"chore": name, "cause": error.code, "detail": error.message})
            self._try_again_soon(name)
        except Exception:
            # A mistake in a chore must not end the process that repairs jobs, nor this thread.
            logger.exception("chore_failed", extra={"chore": name})

    def _try_again_soon(self, name: str) -> None:
        try:
            with session_scope() as session:
                retention.give_up_chore(session, name)
        except BaseAppException as error:
            logger.warning("chore_waits", extra={"chore": name, "cause": error.code})


def _retirements(kept: RetentionSettings) -> Iterator[tuple[str, Callable[..., int], int]]:
    each: list[tuple[str, Callable[..., int], float, int]] = [
        ("jobs", retention.retire_jobs, kept.jobs_days, BATCH),
        ("bulks", retention.retire_bulks, kept.jobs_days, 1),  # with up to a hundred thousand items
        ("generations", retention.retire_outputs, kept.outputs_days, BATCH),
        ("job_events", retention.retire_events, kept.events_days, BATCH),
        ("webhook_deliveries", retention.retire_deliveries, kept.deliveries_days, BATCH),
    ]
    for table, retire, days, batch in each:
        if days > 0:
            yield table, partial(retire, days=days), batch
