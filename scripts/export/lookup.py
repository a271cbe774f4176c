"""Find collections and owners by name, and the progress bar of the commands."""

from uuid import UUID

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from sqlalchemy import select
from sqlalchemy.orm import Session

from scripts.console import ConsoleOutput
from shared.db import collections
from shared.db.tables import Collection, Owner
from shared.errors import ResourceNotFoundError


def get_collection(session: Session, name: str, *, owner: str | None) -> Collection:
    """Return the owner's collection of that name. Without an owner, return the shared one, else the only one.

    Raises:
        ResourceNotFoundError: the owner or the collection does not exist, or several owners have such a collection.
    """
    if owner is not None:
        owner_id = get_owner_id(session, owner)
        own = session.scalar(select(Collection).where(Collection.name == name, Collection.owner_id == owner_id))
        if own is None:
            raise ResourceNotFoundError(f"There is no collection {name!r} of the owner {owner!r}.")
        return own
    if (shared := _find_shared(session, name)) is not None:
        return shared
    owned = select(Collection, Owner.name).join(Owner, Owner.id == Collection.owner_id)
    there = owned.where(Collection.name == name, Collection.deleted_at.is_(None))
    found = session.execute(there.order_by(Owner.name)).all()
    if not found:
        raise ResourceNotFoundError(f"There is no collection {name!r}.")
    if len(found) > 1:
        names = ", ".join(each for _, each in found)
        raise ResourceNotFoundError(f"These owners have a collection {name!r}: {names}. Name one with --owner.")
    (only,) = found
    return only[0]


def _find_shared(session: Session, name: str) -> Collection | None:
    return session.scalar(select(Collection).where(Collection.name == name, Collection.shared))


def get_or_create_collection(session: Session, name: str, *, owner: str | None) -> Collection:
    """Return the shared collection of that name, or that of the owner, which is created if it does not exist.

    Raises:
        ResourceNotFoundError: the owner or the shared collection does not exist.
    """
    if owner is None:
        shared = _find_shared(session, name)
        if shared is None:
            raise ResourceNotFoundError(f"There is no shared collection {name!r}: name its --owner.")
        return shared
    return collections.ensure(session, name, owner_id=get_owner_id(session, owner))


def get_owner_id(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}.")
    return owner_id


def progress_bar(output: ConsoleOutput) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=output.console, disable=not output.shows_progress)
