"""Leases in SQL: the conditions, times and locks that jobs and images share. All times are the database's."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, and_, func, select, tuple_

from shared.db.tables import Image, Job


def owned(table: type[Job] | type[Image], attempts: Iterable[tuple[UUID, int]], *, state: str) -> ColumnElement[bool]:
    """Rows of `table` in `state` whose (id, attempt) is one of `attempts`: no other attempt has taken them over."""
    return and_(tuple_(table.id, table.attempt).in_(list(attempts)), table.state == state)


def in_lock_order(
    table: type[Job] | type[Image], condition: ColumnElement[bool], *, wait: bool = True
) -> ColumnElement[bool]:
    """Rows of `table` that meet `condition`; the statement locks them in the order of their ids.

    Every statement that changes several rows needs it. Otherwise two statements that change the same rows can wait for
    each other, and the database ends one of them: a deadlock.

    wait: False skips rows that another transaction has locked. A transaction that changes rows in several statements
    needs that, for the same reason.
    """
    locked = select(table.id).where(condition).order_by(table.id)
    return table.id.in_(locked.with_for_update(key_share=True, skip_locked=not wait))


def from_now(seconds: float) -> ColumnElement[Any]:
    """The time in `seconds`, from the clock and not from the start of the transaction."""
    return func.clock_timestamp() + timedelta(seconds=seconds)
