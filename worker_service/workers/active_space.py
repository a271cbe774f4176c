"""Keeps the work of the active embedding space away from a worker whose CLIP makes vectors of another space.

An operator activates a space while workers run. Within a second, the workers of the new space begin to read the queues
of the active space, and those of the old one stop. Each keeps its models, so that another switch is as quick.
"""

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence

from shared.db import spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import DatabaseError
from shared.messaging.queue import notify_embed_workers
from worker_service.jobs.attempt import SPACE_CHANGE_S
from worker_service.workers.process import HEARTBEAT_S, WorkerProcess

logger = logging.getLogger(__name__)

CHECK_S = SPACE_CHANGE_S / 2
"""Seconds between two looks at which space is active."""


def wait_until_active(process: WorkerProcess, space: Space) -> None:
    """Return when `space` is active."""
    process.space = space.digest
    while not _check(process, space) and not process.stopping.is_set():
        process.write_heartbeat(process.serving_state)
        process.stopping.wait(HEARTBEAT_S)


def follow_active_space(
    process: WorkerProcess, space: Space, queues: Sequence[str], *, is_available: Callable[[], bool] = lambda: True
) -> None:
    """Let the process read `queues` only while `space` is active, from a thread, until the process stops.

    It ends the process when an operator has dropped the space.

    is_available: whether the models can work now. While it is False, the process does not read the queues either.

    Raises:
        DatabaseError: the database failed.
    """
    process.space = space.digest
    _check(process, space)

    def check_until_stopped() -> None:
        while not process.stopping.is_set():
            try:
                was_active = not process.standby.is_set()
                active = _check(process, space)
                read = active and is_available()
                for name in queues:
                    process.read_queue(name, read=read)
                if active != was_active:
                    process.write_heartbeat(process.serving_state)
                    # A worker of the old space may have received the last notification, and may embed nothing now.
                    notify_embed_workers()
            except DatabaseError as error:
                logger.warning("active_space_unknown", extra={"cause": error.code})
            process.stopping.wait(CHECK_S)

    threading.Thread(target=check_until_stopped, name="active-space", daemon=True).start()


def _check(process: WorkerProcess, space: Space) -> bool:
    """Whether `space` is active. Sets or clears `process.standby`, and ends the process if the space is gone.

    Raises:
        DatabaseError: the database failed.
    """
    with session_scope() as session:
        active = spaces.find_active(session)
        known = spaces.find(session, space.digest) == space
    fields = {"worker": process.id, "model": space.model, "space": space.digest}
    if not known:
        logger.error("space_dropped", extra=fields)
        os.kill(os.getpid(), signal.SIGTERM)
        process.stopping.wait()
    elif active == space:
        if process.standby.is_set():
            logger.info("space_active", extra=fields)
        process.standby.clear()
    elif not process.standby.is_set():
        logger.warning("space_inactive", extra=fields)
        process.standby.set()
    return active == space
