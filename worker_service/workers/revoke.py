"""Makes Celery's `revoke`, from Flower or `celery control`, cancel the job in the database.

By itself, Celery only keeps the task's id in task_id worker's memory and discards its message. The job would stay
`queued`, and the reconciler would publish it again and again. Celery's `terminate` does not reach a job in a thread.
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
from shared.messaging.job_updates import publish_job_update

logger = logging.getLogger(__name__)


def cancel_revoked_jobs() -> None:
    """Make this process's Celery worker cancel the jobs whose tasks are revoked.

    Workers of every kind can do it: the job's row suffices, and its message is not needed.
    """
    task_revoked.connect(_cancel_discarded_task, weak=False)
    # Celery finds commands by name, so these replace its own.
    control_command(name="revoke", variadic="task_id", signature="[id1 [id2 [... [idN]]]]")(_revoke)
    control_command(
        name="terminate", variadic="task_id", args=[("signal", str)], signature="<signal> [id1 [id2 [... [idN]]]]"
    )(_terminate)


def _revoke(_state: Any, task_id: Any, terminate: bool = False, signal: str | None = None, **_: Any) -> dict[str, str]:
    """Cancel the jobs of these ids, queued or running."""
    task_ids = [str(each) for each in maybe_list(task_id) or []]
    # The workers then discard the messages, and Flower shows the tasks as revoked. A job that cannot be canceled now is
    # canceled when its message arrives.
    worker_state.revoked.update(task_ids)
    try:
        canceled = _cancel(task_ids)
    except DatabaseError as error:
        logger.warning("revoke_failed", extra={"cause": error.code})
        return {"error": f"{error.code}: try again"}
    return {"ok": f"canceled: {', '.join(canceled) or 'none'}"}


def _terminate(state: Any, signal: str, task_id: Any, **_: Any) -> dict[str, str]:
    """Cancel the jobs of these ids, queued or running. No process gets a signal."""
    return _revoke(state, task_id)


def _cancel_discarded_task(sender: Any, request: Any, expired: bool = False, **_: Any) -> None:
    """Cancel the job whose message a worker has just discarded."""
    if sender.name != queue.GENERATE or expired:
        return
    try:
        _cancel([request.id])
    except DatabaseError as error:
        # The message is gone, so the reconciler publishes the job again, and this function is called again.
        logger.warning("revoke_failed", extra={"job_id": request.id, "cause": error.code})


def _cancel(task_ids: Iterable[str]) -> list[str]:
    with session_scope() as session:
        canceled = jobs.revoke(session, [job_id for task_id in task_ids if (job_id := _job_id(task_id)) is not None])
    for job_id in canceled:
        publish_job_update(job_id)
        logger.info("job_revoked", extra={"job_id": str(job_id)})
    return [str(job_id) for job_id in canceled]


def _job_id(task_id: str) -> UUID | None:
    """A job's task has the job's id; other tasks have other ids."""
    try:
        return UUID(task_id)
    except ValueError:
        return None
