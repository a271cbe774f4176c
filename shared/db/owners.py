"""Owners."""

from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db import paging
from shared.db.tables import Owner
from shared.errors import ResourceNotFoundError


def ensure(session: Session, name: str) -> UUID:
    """The id of the owner with this name, who is added if needed."""
    return add(session, name)[0]


def add(session: Session, name: str) -> tuple[UUID, bool]:
    """The id of the owner with this name, who is added if needed; True when it is new."""
    new = upsert(Owner).values(id=uuid4(), name=name).on_conflict_do_nothing(index_elements=["name"])
    added = session.scalar(new.returning(Owner.id))
    if added is not None:
        return added, True
    return session.scalars(select(Owner.id).where(Owner.name == name)).one(), False


def get(session: Session, owner_id: UUID) -> Owner:
    """The owner with this id.

    Raises:
        ResourceNotFoundError: the owner does not exist.
    """
    owner = session.get(Owner, owner_id)
    if owner is None:
        raise ResourceNotFoundError("There is no such owner.", owner_id=str(owner_id))
    return owner


def list_page(session: Session, *, cursor: str | None, limit: int) -> tuple[list[Owner], str | None]:
    """A page of all owners, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(Owner)
    return paging.fetch_page(session, statement, created_at=Owner.created_at, id=Owner.id, cursor=cursor, limit=limit)


def set_disabled(session: Session, owner: Owner, *, disabled: bool) -> None:
    """Disable or enable an owner. From this commit on, no key of a disabled owner is valid.

    Enabling makes the owner's keys valid again, except those that were revoked or have expired.
    """
    if not disabled:
        owner.disabled_at = None
    elif owner.disabled_at is None:
        owner.disabled_at = session.scalars(select(func.now())).one()


def get_by_name(session: Session, name: str) -> Owner:
    """The owner with this name.

    Raises:
        ResourceNotFoundError: the owner does not exist.
    """
    owner = session.scalar(select(Owner).where(Owner.name == name))
    if owner is None:
        raise ResourceNotFoundError("There is no such owner.", owner=name)
    return owner


def names(session: Session, owner_ids: Sequence[UUID]) -> dict[UUID, str]:
    """The names of owners by their ids."""
    statement = select(Owner.id, Owner.name).where(Owner.id.in_(owner_ids))
    return dict(session.execute(statement).all())
