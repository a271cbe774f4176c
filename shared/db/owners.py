"""Owners and their collections."""

from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db import paging
from shared.db.tables import Collection, Owner
from shared.errors import ResourceNotFoundError


def ensure(session: Session, name: str) -> UUID:
    """The id of the owner with this name, who is added if needed."""
    session.execute(upsert(Owner).values(id=uuid4(), name=name).on_conflict_do_nothing(index_elements=["name"]))
    return session.scalars(select(Owner.id).where(Owner.name == name)).one()


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


def ensure_collection(session: Session, name: str, *, owner_id: UUID) -> Collection:
    """The owner's collection with this name, which is added if needed."""
    statement = select(Collection).where(Collection.owner_id == owner_id, Collection.name == name)
    collection = session.scalar(statement)
    if collection is None:
        new = upsert(Collection).values(id=uuid4(), owner_id=owner_id, name=name)
        session.execute(new.on_conflict_do_nothing(index_elements=["owner_id", "name"]))
        collection = session.scalars(statement).one()
    return collection
