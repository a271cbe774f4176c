"""What an owner does with outputs (generated images), without HTTP."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.common import Page
from shared.contracts.jobs import OutputView
from shared.contracts.outputs import OutputQuery
from shared.db import outputs
from shared.db.session import session_scope
from shared.db.tables import Generation


def list_page(query: OutputQuery, *, caller: Caller) -> Page[OutputView]:
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


def get(generation_id: UUID, *, caller: Caller) -> OutputView:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        row = outputs.get(session, generation_id, owner_id=caller.owner_id)
        return views.output(row, outputs.references_of(session, [row.id]).get(row.id, []))


def get_row(generation_id: UUID, *, caller: Caller) -> Generation:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        return outputs.get(session, generation_id, owner_id=caller.owner_id)


def delete(generation_id: UUID, *, caller: Caller) -> None:
    """Delete one output; its job stays.

    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        session.delete(outputs.get(session, generation_id, owner_id=caller.owner_id))
