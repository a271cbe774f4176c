"""Use cases of outputs, the generated images: list, read and delete."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.common import Page
from shared.contracts.jobs import OutputView
from shared.contracts.outputs import OutputQuery
from shared.db import outputs
from shared.db.session import session_scope
from shared.db.tables import Output


def list_page(query: OutputQuery, *, caller: Caller) -> Page[OutputView]:
    """Return a page of the caller's outputs, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = outputs.list_page(
            session, owner_id=caller.owner_id, cursor=query.cursor, limit=query.limit, reference_id=query.reference_id
        )
        references_by_output = outputs.list_references(session, [row.id for row in rows])
        items = [views.output(row, references_by_output.get(row.id, [])) for row in rows]
    return Page(items=items, next_cursor=next_cursor)


def get(generation_id: UUID, *, caller: Caller) -> OutputView:
    """Return an output with its references.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
    """
    with session_scope() as session:
        row = outputs.get(session, generation_id, owner_id=caller.owner_id)
        return views.output(row, outputs.list_references(session, [row.id]).get(row.id, []))


def get_row(generation_id: UUID, *, caller: Caller) -> Output:
    """Return the database row of an output.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
    """
    with session_scope() as session:
        return outputs.get(session, generation_id, owner_id=caller.owner_id)


def delete(generation_id: UUID, *, caller: Caller) -> None:
    """Delete an output; its job stays.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
    """
    with session_scope() as session:
        session.delete(outputs.get(session, generation_id, owner_id=caller.owner_id, lock=True))
