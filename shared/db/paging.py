"""Pages by cursor over (created_at, id), newest or oldest first. New and deleted rows do not shift the next page."""

import base64
import binascii
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.errors import InvalidCursorError

Row = TypeVar("Row")


def fetch_page(
    session: Session,
    statement: Select[Row],
    *,
    created_at: InstrumentedAttribute[datetime],
    id: InstrumentedAttribute[UUID],  # noqa: A002 - the column's name
    cursor: str | None,
    limit: int,
    oldest_first: bool = False,
) -> tuple[list[Row], str | None]:
    """Up to `limit` rows, and the cursor of the next page, or None on the last page.

    Raises:
        InvalidCursorError: the cursor was not made by this function.
    """
    place = tuple_(created_at, id)
    if cursor is not None:
        last = tuple_(*_decode(cursor))
        statement = statement.where(place > last if oldest_first else place < last)
    order = (created_at, id) if oldest_first else (created_at.desc(), id.desc())
    rows = list(session.scalars(statement.order_by(*order).limit(limit + 1)))
    more = len(rows) > limit
    return rows[:limit], _encode(rows[limit - 1]) if more else None


def _encode(row: Any) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at.isoformat()} {row.id}".encode()).decode()


def _decode(cursor: str) -> tuple[datetime, UUID]:
    try:
        at, row_id = base64.b64decode(cursor.encode(), altchars=b"-_", validate=True).decode().split(" ")
        moment = datetime.fromisoformat(at)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return moment.astimezone(UTC), UUID(row_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise InvalidCursorError from error
