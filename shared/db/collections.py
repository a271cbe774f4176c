"""Collections, and who may use them. Every look at the corpus goes through `visible_to` and `access_of`.

An owner sees its own collections, the collection `shared`, and those that other owners share with it. An API key may be
limited to some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, and_, case, delete, func, literal, or_, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.contracts.collections import Access, CollectionDefaults, GrantedAccess
from shared.db import paging
from shared.db.tables import Collection, CollectionGrant, Image, Owner
from shared.errors import (
    CollectionAccessError,
    CollectionExistsError,
    CollectionLimitError,
    CollectionUnavailableError,
    ResourceNotFoundError,
)

SHARED_COLLECTION = "shared"


@dataclass(frozen=True)
class Principal:
    """The owner of a request or a job. collection_ids: the collections that the API key may use; None: no limit."""

    owner_id: UUID
    collection_ids: frozenset[UUID] | None = None


@dataclass(frozen=True)
class Details:
    """A collection as a principal sees it. name: as in its requests. images: their number, in every state."""

    name: str
    owner: str
    access: Access
    images: int


# --- access -------------------------------------------------------------------------------------------------------


def access_of(principal: Principal) -> ColumnElement[str | None]:
    """The `Access` to a collection as an SQL expression; NULL: the owner may not see it.

    A limited key never gets the access `owner`: it may change images, but neither the collection nor its grants.
    """
    granted = select(CollectionGrant.access).where(
        CollectionGrant.collection_id == Collection.id, CollectionGrant.owner_id == principal.owner_id
    )
    own = Access.OWNER if principal.collection_ids is None else Access.WRITE
    return case(
        (Collection.shared, literal(Access.WRITE.value)),
        (Collection.owner_id == principal.owner_id, literal(own.value)),
        else_=granted.scalar_subquery(),
    )


def visible_to(principal: Principal) -> ColumnElement[bool]:
    """The condition on collections that the principal may see."""
    visible = and_(Collection.deleted_at.is_(None), access_of(principal).is_not(None))
    if principal.collection_ids is None:
        return visible
    return and_(visible, Collection.id.in_(principal.collection_ids))


def require(access: str | None, needs: Access) -> None:
    """Check the access to a collection that the principal sees. access: from `access_of`.

    Raises:
        CollectionAccessError: it does not include `needs`.
    """
    order = [None, *Access]
    if order.index(Access(access) if access else None) < order.index(needs):
        raise CollectionAccessError(
            f"This needs the access `{needs}` to the collection. Yours is `{access}`.", access=access, needs=needs
        )


def get_by_name(
    session: Session, name: str, *, principal: Principal, needs: Access = Access.READ, lock: bool = False
) -> Collection:
    """The collection that a request names: one's own, `shared`, or `owner/name` of another owner.

    lock: no other transaction renames or deletes it until this one ends. Images may be added meanwhile.

    Raises:
        CollectionUnavailableError: no collection that the principal may see has this name.
        CollectionAccessError: the principal may see it, but not more.
    """
    owner, _, plain = name.rpartition("/")
    if owner:
        named = Collection.owner_id == select(Owner.id).where(Owner.name == owner).scalar_subquery()
    else:
        named = or_(Collection.owner_id == principal.owner_id, Collection.shared)
    statement = (
        select(Collection, access_of(principal))
        .where(Collection.name == plain, named, visible_to(Principal(principal.owner_id)))
        .order_by((Collection.owner_id == principal.owner_id).desc())
        .limit(1)
    )
    if lock:
        statement = statement.with_for_update(of=Collection, read=True, key_share=True)
    row = session.execute(statement).one_or_none()
    # The limit is checked last: a plain name means the same collection for every key of an owner.
    limited_to = principal.collection_ids
    if row is None or (limited_to is not None and row[0].id not in limited_to):
        raise CollectionUnavailableError(f"There is no collection {name!r}.", collection=name)
    require(row[1], needs)
    return row[0]


def find_by_name(session: Session, name: str, *, principal: Principal) -> Collection | None:
    """As `get_by_name`; None: no collection that the principal may see has this name."""
    try:
        return get_by_name(session, name, principal=principal)
    except CollectionUnavailableError:
        return None


def ids_of(session: Session, names: Sequence[str], *, owner_id: UUID) -> list[UUID]:
    """The ids of the collections that requests of this owner name.

    Raises:
        CollectionUnavailableError: no collection that the owner may see has one of the names.
    """
    return [get_by_name(session, name, principal=Principal(owner_id)).id for name in names]


def get(
    session: Session, collection_id: UUID, *, principal: Principal, needs: Access = Access.READ, lock: bool = False
) -> Collection:
    """The collection with this id. lock: no other transaction changes or deletes it until this one ends.

    Raises:
        ResourceNotFoundError: no collection that the principal may see has this id.
        CollectionAccessError: the principal may see it, but not more.
    """
    statement = select(Collection, access_of(principal)).where(Collection.id == collection_id, visible_to(principal))
    if lock:
        statement = statement.with_for_update(of=Collection)
    row = session.execute(statement).one_or_none()
    if row is None:
        raise ResourceNotFoundError("There is no such collection.", collection_id=str(collection_id))
    require(row[1], needs)
    return row[0]


# --- the resource -------------------------------------------------------------------------------------------------


def defaults_of(collection: Collection) -> CollectionDefaults:
    """The values of requests that search this collection and do not set their own."""
    return CollectionDefaults.model_validate(collection.defaults, extra="ignore")


def name_for(session: Session, collection: Collection, *, principal: Principal) -> str:
    """The collection's name in the principal's requests."""
    if collection.shared or collection.owner_id == principal.owner_id:
        return collection.name
    return names_for(session, [collection.id], owner_id=principal.owner_id)[collection.id]


def names_for(session: Session, collection_ids: Sequence[UUID], *, owner_id: UUID) -> dict[UUID, str]:
    """The names of collections in the owner's requests, by id. Deleted ones are left out."""
    statement = (
        select(Collection.id, _name_for(owner_id))
        .join(Owner, Owner.id == Collection.owner_id)
        .where(Collection.id.in_(collection_ids), Collection.deleted_at.is_(None))
    )
    return dict(session.execute(statement).all())


def _name_for(owner_id: UUID) -> ColumnElement[str]:
    own = or_(Collection.shared, Collection.owner_id == owner_id)
    return case((own, Collection.name), else_=Owner.name + "/" + Collection.name)


def list_page(
    session: Session, *, principal: Principal, cursor: str | None, limit: int
) -> tuple[list[Collection], str | None]:
    """A page of the collections that the principal may see, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    return paging.fetch_page(
        session,
        select(Collection).where(visible_to(principal)),
        created_at=Collection.created_at,
        id=Collection.id,
        cursor=cursor,
        limit=limit,
    )


def details(session: Session, collections: Sequence[Collection], *, principal: Principal) -> dict[UUID, Details]:
    """The details of these collections, by id."""
    count = select(func.count()).where(Image.collection_id == Collection.id).scalar_subquery()
    statement = (
        select(Collection.id, _name_for(principal.owner_id), Owner.name, access_of(principal), count)
        .join(Owner, Owner.id == Collection.owner_id)
        .where(Collection.id.in_([each.id for each in collections]), visible_to(principal))
    )
    return {
        collection_id: Details(name, owner, Access(access), images)
        for collection_id, name, owner, access, images in session.execute(statement)
    }


def ensure(session: Session, name: str, *, owner_id: UUID, most: int | None = None) -> Collection:
    """The owner's collection with this name, which is added if needed. most: as in `create`.

    Raises:
        CollectionExistsError: the name is `shared`.
        CollectionLimitError: the owner has `most` collections.
    """
    own = select(Collection).where(Collection.owner_id == owner_id, Collection.name == name)
    collection = session.scalar(own)
    if collection is not None:
        return collection
    try:
        return create(session, name, owner_id=owner_id, most=most)
    except CollectionExistsError:
        collection = session.scalar(own)  # another transaction has just added it
        if collection is None:
            raise
        return collection


def create(
    session: Session,
    name: str,
    *,
    owner_id: UUID,
    most: int | None,
    description: str | None = None,
    defaults: CollectionDefaults | None = None,
) -> Collection:
    """Add a collection. most: how many collections the owner may have; None: no limit.

    Raises:
        CollectionExistsError: the owner has a collection of this name, or it is `shared`.
        CollectionLimitError: the owner has `most` collections.
    """
    _refuse_taken_name(session, name, owner_id=owner_id)
    own = select(func.count()).where(Collection.owner_id == owner_id, Collection.deleted_at.is_(None))
    if most is not None and (session.scalar(own) or 0) >= most:
        raise CollectionLimitError(f"An owner may have {most} collections.", maximum=most)
    collection = Collection(id=uuid4(), owner_id=owner_id, name=name, description=description)
    set_defaults(collection, defaults or CollectionDefaults())
    session.add(collection)
    session.flush()
    session.refresh(collection)
    return collection


def rename(session: Session, collection: Collection, name: str) -> None:
    """Give a collection another name. Requests and queued jobs that name the old one do not find it any more.

    Raises:
        CollectionExistsError: the owner has a collection of this name, or it is `shared`.
    """
    if name == collection.name:
        return
    _refuse_taken_name(session, name, owner_id=collection.owner_id)
    collection.name = name


def set_defaults(collection: Collection, defaults: CollectionDefaults) -> None:
    collection.defaults = defaults.model_dump(mode="json", exclude_none=True)


def _refuse_taken_name(session: Session, name: str, *, owner_id: UUID) -> None:
    """Wait for other creations and renamings of this owner until they end, then refuse a name that is taken."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"collections:{owner_id}", 0))))
    same = select(Collection.id).where(Collection.owner_id == owner_id, Collection.name == name)
    if name == SHARED_COLLECTION or session.scalar(same) is not None:
        raise CollectionExistsError(f"There is a collection {name!r}.", collection=name)


def mark_deleted(session: Session, collection: Collection) -> None:
    """Hide a collection from everybody; its name is free at once. Housekeeping deletes its images in steps."""
    session.execute(delete(CollectionGrant).where(CollectionGrant.collection_id == collection.id))
    collection.name = f"{collection.name}~{collection.id}"  # no request can name this
    collection.deleted_at = session.scalars(select(func.now())).one()


# --- grants -------------------------------------------------------------------------------------------------------


def share(session: Session, collection: Collection, *, owner_id: UUID, access: GrantedAccess) -> CollectionGrant:
    """Give another owner access to a collection, or change the access that it has."""
    new = upsert(CollectionGrant).values(collection_id=collection.id, owner_id=owner_id, access=access)
    changed = new.on_conflict_do_update(
        index_elements=["collection_id", "owner_id"], set_={"access": new.excluded.access}
    )
    statement = changed.returning(CollectionGrant).execution_options(populate_existing=True)
    return session.scalars(statement).one()


def unshare(session: Session, collection: Collection, *, owner_id: UUID) -> None:
    """Take another owner's access away, from this commit on.

    Raises:
        ResourceNotFoundError: the owner has no access.
    """
    statement = (
        delete(CollectionGrant)
        .where(CollectionGrant.collection_id == collection.id, CollectionGrant.owner_id == owner_id)
        .returning(CollectionGrant.owner_id)
    )
    if session.scalar(statement) is None:
        raise ResourceNotFoundError("This owner has no access to the collection.")


def list_grants(
    session: Session, collection: Collection, *, cursor: str | None, limit: int
) -> tuple[list[CollectionGrant], str | None]:
    """A page of the accesses of other owners, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    return paging.fetch_page(
        session,
        select(CollectionGrant).where(CollectionGrant.collection_id == collection.id),
        created_at=CollectionGrant.created_at,
        id=CollectionGrant.owner_id,
        cursor=cursor,
        limit=limit,
    )
