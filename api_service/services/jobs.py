"""What an owner does with jobs that exist, without HTTP."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.common import Page
from shared.contracts.jobs import JobQuery, JobState, JobView
from shared.db import jobs
from shared.db.session import session_scope
from shared.errors import JobStateError
from shared.messaging.job_updates import publish_changed


def page(query: JobQuery, *, caller: Caller) -> Page[JobView]:
    """
    Raises:
        InvalidCursorError
    """
    with session_scope() as session:
        rows, next_cursor = jobs.page(session, query, owner_id=caller.owner_id)
        return Page(items=views.job_list(session, rows), next_cursor=next_cursor)


def cancel(job_id: UUID, *, caller: Caller) -> JobView:
    """End a job that has not ended; whoever works on it finds out within a step.

    Raises:
        ResourceNotFoundError
        JobStateError: it has ended already, and not by a cancel.
    """
    with session_scope() as session:
        canceled = jobs.cancel(session, job_id, owner_id=caller.owner_id)
        row = jobs.get(session, job_id, owner_id=caller.owner_id)
        if not canceled and row.state != JobState.CANCELED:
            raise JobStateError("The job has already ended.", state=row.state)
        view = views.job(session, row)
    if canceled:
        publish_changed(job_id)
    return view


def delete(job_id: UUID, *, caller: Caller) -> None:
    """
    Raises:
        ResourceNotFoundError
        JobStateError: the job has not ended.
    """
    with session_scope() as session:
        jobs.delete(session, jobs.get(session, job_id, owner_id=caller.owner_id))
