"""What an owner does with jobs and outputs that exist, without HTTP."""

from uuid import UUID

from api_service import views
from api_service.caller import Caller
from shared.contracts.common import Page
from shared.contracts.jobs import JobQuery, JobState, JobView, OutputView
from shared.contracts.outputs import OutputQuery
from shared.db import jobs, outputs
from shared.db.models import Generation
from shared.db.session import session_scope
from shared.errors import JobStateError
from shared.progress import publish_changed


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


def output_page(query: OutputQuery, *, caller: Caller) -> Page[OutputView]:
    """
    Raises:
        InvalidCursorError
    """
    with session_scope() as session:
        rows, next_cursor = outputs.page(
            session, owner_id=caller.owner_id, cursor=query.cursor, limit=query.limit, reference_id=query.reference_id
        )
        used = outputs.references_of(session, [row.id for row in rows])
        items = [views.output(row, used.get(row.id, [])) for row in rows]
    return Page(items=items, next_cursor=next_cursor)


def output(generation_id: UUID, *, caller: Caller) -> OutputView:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        row = outputs.get(session, generation_id, owner_id=caller.owner_id)
        return views.output(row, outputs.references_of(session, [row.id]).get(row.id, []))


def output_row(generation_id: UUID, *, caller: Caller) -> Generation:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        return outputs.get(session, generation_id, owner_id=caller.owner_id)


def delete_output(generation_id: UUID, *, caller: Caller) -> None:
    """Delete one output; its job stays.

    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        session.delete(outputs.get(session, generation_id, owner_id=caller.owner_id))
