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
    """Return the owner's collection of that name, or without an owner the shared one.

    Raises:
        ResourceNotFoundError: the owner or the collection does not exist.
    """
    if owner is None:
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.shared))
    else:
        owner_id = get_owner_id(session, owner)
        collection = session.scalar(select(Collection).where(Collection.name == name, Collection.owner_id == owner_id))
    if collection is None:
        raise ResourceNotFoundError(
            f"There is no collection {name!r}."
            if owner
            else f"There is no shared collection {name!r}: name its --owner."
        )
    return collection


def get_or_create_collection(session: Session, name: str, *, owner: str | None) -> Collection:
    """As `get_collection`, but create a missing collection of an owner.

    Raises:
        ResourceNotFoundError: the owner or the shared collection does not exist.
    """
    if owner is None:
        return get_collection(session, name, owner=None)
    return collections.ensure(session, name, owner_id=get_owner_id(session, owner))


def get_owner_id(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}.")
    return owner_id


def progress_bar(output: ConsoleOutput) -> Progress:
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=output.console, disable=not output.shows_progress)
