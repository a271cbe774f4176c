"""Leases in SQL: the conditions and times that jobs and images share. All times are the database's."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, tuple_

from shared.db.tables import Image, Job


def owned(table: type[Job] | type[Image], attempts: Iterable[tuple[UUID, int]], *, state: str) -> ColumnElement[bool]:
    """Rows of `table` in `state` whose (id, attempt) is one of `attempts`: no other attempt has taken them over."""
    return and_(tuple_(table.id, table.attempt).in_(list(attempts)), table.state == state)


def from_now(seconds: float) -> ColumnElement[Any]:
    """The time in `seconds`, from the clock and not from the start of the transaction."""
    return func.clock_timestamp() + timedelta(seconds=seconds)
