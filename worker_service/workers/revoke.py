"""Celery's `revoke`, from Flower or `celery control`, does what whoever says it means: it cancels the job.

Left to itself, Celery only has the workers remember the id in memory and discard its message: the job would stay
`queued`, be published again and discarded again, and `terminate` does not reach the threads that jobs run in.
"""

import logging
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from celery.signals import task_revoked
from celery.utils.functional import maybe_list
from celery.worker import state as worker_state
from celery.worker.control import control_command

from shared.db import jobs
from shared.db.session import session_scope
from shared.errors import DatabaseError
from shared.messaging import queue
from shared.messaging.job_updates import publish_changed

logger = logging.getLogger(__name__)


def treat_as_cancel() -> None:
    """Make this process's Celery worker cancel the jobs whose tasks are revoked. Any kind of worker may: it needs no
    message of the job, only its row."""
    task_revoked.connect(_discarded, weak=False)
    # Commands are known by their names, so these take the places of Celery's own.
    control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(_revoke)
    control_command(
        name="terminate", variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]"
    )(_terminate)


def _revoke(_state: Any, task_id: Any, terminate: bool = False, signal: str | None = None, **_: Any) -> dict[str, str]:
    """Cancel the jobs of these ids, queued or running."""
    task_ids = [str(each) for each in maybe_list(task_id) or []]
    # Their messages are discarded: Flower then shows them as revoked, and what could not be canceled now is canceled
    # when its message comes.
    worker_state.revoked.update(task_ids)
    try:
        canceled = _cancel(task_ids)
    except DatabaseError as error:
        logger.warning("revoke_failed", extra={"cause": error.code})
        return {"error": f"{error.code}: say it again"}
    return {"ok": f"canceled: {', '.join(canceled) or 'none'}"}


def _terminate(state: Any, signal: str, task_id: Any, **_: Any) -> dict[str, str]:
    """Cancel the jobs of these ids, queued or running; no process is signalled."""
    return _revoke(state, task_id)


def _discarded(sender: Any, request: Any, expired: bool = False, **_: Any) -> None:
    if sender.name != queue.GENERATE or expired:
        return
    try:
        _cancel([request.id])
    except DatabaseError as error:
        # Its message is gone, so the reconciler publishes it again, and this comes again.
        logger.warning("revoke_failed", extra={"job_id": request.id, "cause": error.code})


def _cancel(task_ids: Iterable[str]) -> list[str]:
    with session_scope() as session:
        canceled = jobs.revoke(session, [job_id for each in task_ids if (job_id := _job_id(each)) is not None])
    for job_id in canceled:
        publish_changed(job_id)
        logger.info("job_revoked", extra={"job_id": str(job_id)})
    return [str(job_id) for job_id in canceled]


def _job_id(task_id: str) -> UUID | None:
    """The id of a job's task is the job's; other tasks may have any."""
    try:
        return UUID(task_id)
    except ValueError:
        return None
