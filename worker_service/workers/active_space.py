"""Keeps a worker whose CLIP is not that of the active embedding space away from queries, images and jobs.

An operator activates a space while workers run. The workers of the new space then begin, and those of the old one end.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable

from shared.db import spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import DatabaseError
from worker_service.workers.process import HEARTBEAT_S, WorkerProcess

logger = logging.getLogger(__name__)


def wait_until_active(process: WorkerProcess, space: Space, *, meanwhile: Callable[[], bool] = lambda: False) -> None:
    """Return when `space` is active. meanwhile: one step of other work; returns False when that work is done."""
    announced = False
    while not _is_active(space):
        if not announced:
            announced = True
            _log_inactive(process, space)
        process.write_heartbeat("loading")
        if not meanwhile():
            process.stopping.wait(HEARTBEAT_S)


def stop_when_inactive(process: WorkerProcess, space: Space) -> None:
    """End the process, from a thread, when another space becomes active. Its supervisor starts it again to wait."""

    def check_until_stopped() -> None:
        while not process.stopping.wait(HEARTBEAT_S):
            try:
                active = _is_active(space)
            except DatabaseError:
                continue
            if not active:
                _log_inactive(process, space)
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=check_until_stopped, name="active-space", daemon=True).start()


def _is_active(space: Space) -> bool:
    with session_scope() as session:
        return spaces.is_active(session, space)


def _log_inactive(process: WorkerProcess, space: Space) -> None:
    logger.warning("space_inactive", extra={"worker": process.id, "model": space.model, "space": space.digest})
