"""Owners and their collections."""

from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db import paging
from shared.db.tables import Collection, Owner
from shared.errors import ResourceNotFoundError


def ensure(session: Session, name: str) -> UUID:
    """The id of the owner of that name, made on first sight."""
    session.execute(upsert(Owner).values(id=uuid4(), name=name).on_conflict_do_nothing(index_elements=["name"]))
    return session.scalars(select(Owner.id).where(Owner.name == name)).one()


def get(session: Session, owner_id: UUID) -> Owner:
    """
    Raises:
        ResourceNotFoundError
    """
    owner = session.get(Owner, owner_id)
    if owner is None:
        raise ResourceNotFoundError("There is no such owner.", owner_id=str(owner_id))
    return owner


def page(session: Session, *, cursor: str | None, limit: int) -> tuple[list[Owner], str | None]:
    """Every owner, newest first.

    Raises:
        InvalidCursorError
    """
    statement = select(Owner)
    return paging.page(session, statement, created_at=Owner.created_at, id=Owner.id, cursor=cursor, limit=limit)


def disable(session: Session, owner: Owner, *, disabled: bool) -> None:
    """From this commit on none of the owner's keys is valid; or those are again that would be otherwise."""
    if not disabled:
        owner.disabled_at = None
    elif owner.disabled_at is None:
        owner.disabled_at = session.scalars(select(func.now())).one()


def ensure_collection(session: Session, name: str, *, owner_id: UUID) -> Collection:
    """The owner's collection of that name, made on first sight."""
    statement = select(Collection).where(Collection.owner_id == owner_id, Collection.name == name)
    collection = session.scalar(statement)
    if collection is None:
        new = upsert(Collection).values(id=uuid4(), owner_id=owner_id, name=name)
        session.execute(new.on_conflict_do_nothing(index_elements=["owner_id", "name"]))
        collection = session.scalars(statement).one()
    return collection
