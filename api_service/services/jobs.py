"""Use cases of existing jobs: read, list, cancel and delete."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.admin import AuditAction
from shared.contracts.common import Page
from shared.contracts.jobs import EventView, JobQuery, JobState, JobView
from shared.db import audit, jobs, outputs
from shared.db.session import session_scope
from shared.errors import JobStateError
from shared.messaging.job_updates import publish_job_update, subscriber


def get(job_id: UUID, *, caller: Caller) -> JobView:
    """Return a job as it is now.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        DatabaseConnectionError: the database does not answer.
    """
    with session_scope() as session:
        row = jobs.get(session, job_id, owner_id=caller.owner_id)
        return views.job(session, row, progress=subscriber().latest_progress(job_id))


def list_page(query: JobQuery, *, caller: Caller, with_positions: bool = False) -> Page[JobView]:
    """Return a page of the caller's jobs, newest first.

    with_positions: also the queue position of each queued job, which takes a query each.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = jobs.list_page(session, query, owner_id=caller.owner_id)
        items = views.jobs(session, rows)
        if with_positions:
            items = [
                views.with_queue_position(session, row, view) if view.state is JobState.QUEUED else view
                for row, view in zip(rows, items, strict=True)
            ]
        return Page(items=items, next_cursor=next_cursor)


def list_events(job_id: UUID, *, caller: Caller) -> list[EventView]:
    """Return the events of a job, in order.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
    """
    with session_scope() as session:
        jobs.get(session, job_id, owner_id=caller.owner_id)
        return [views.event(row) for row in jobs.list_events(session, job_id, after=0)]


def cancel(job_id: UUID, *, caller: Caller) -> JobView:
    """Cancel a job. A worker that runs it stops within a denoising step.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        JobStateError: the job has ended in another state than `canceled`.
    """
    with session_scope() as session:
        canceled = jobs.cancel(session, job_id, owner_id=caller.owner_id)
        row = jobs.get(session, job_id, owner_id=caller.owner_id)
        if not canceled and row.state != JobState.CANCELED:
            raise JobStateError("The job has already ended.", state=row.state)
        view = views.job(session, row)
    if canceled:
        publish_job_update(job_id)
    return view


def delete(job_id: UUID, *, caller: Caller) -> None:
    """Delete an ended job with its outputs.

    Raises:
        ResourceNotFoundError: the caller has no job with this id.
        JobStateError: the job has not ended.
    """
    with session_scope() as session:
        row = jobs.get(session, job_id, owner_id=caller.owner_id, lock=True)
        output_ids = [str(each.id) for each in outputs.list_by_job(session, [job_id]).get(job_id, [])]
        jobs.delete(session, row)
        audit.record(session, caller, action=AuditAction.JOB_DELETED, subject=job_id, output_ids=output_ids)
