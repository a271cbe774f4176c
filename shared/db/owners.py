"""Owners and their collections."""

from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db.models import Collection, Owner


def ensure(session: Session, name: str) -> UUID:
    """The id of the owner of that name, made on first sight."""
    session.execute(upsert(Owner).values(id=uuid4(), name=name).on_conflict_do_nothing(index_elements=["name"]))
    return session.scalars(select(Owner.id).where(Owner.name == name)).one()


def ensure_collection(session: Session, name: str, *, owner_id: UUID) -> Collection:
    """The owner's collection of that name, made on first sight."""
    statement = upsert(Collection).values(id=uuid4(), owner_id=owner_id, name=name)
    session.execute(statement.on_conflict_do_nothing(index_elements=["owner_id", "name"]))
    return session.scalars(select(Collection).where(Collection.owner_id == owner_id, Collection.name == name)).one()
