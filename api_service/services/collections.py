"""Use cases of collections: create, list, describe, share and delete them, and find them by name."""

from uuid import UUID

from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.admin import AuditAction
from shared.contracts.collections import (
    Access,
    CollectionCreate,
    CollectionPatch,
    CollectionQuery,
    CollectionView,
    GrantRequest,
    GrantView,
)
from shared.contracts.common import Page, PageQuery
from shared.db import audit, collections, images, owners
from shared.db.session import session_scope
from shared.db.tables import Collection
from shared.errors import AuthorizationError, CollectionUnavailableError, SharedCollectionError
from shared.settings import get_settings


def list_page(query: CollectionQuery, *, caller: Caller) -> Page[CollectionView]:
    """Return a page of the collections that the caller may see, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        if query.name is not None:
            named = collections.find_by_name(session, query.name, principal=caller.principal)
            return Page(items=_views(session, [named] if named else [], caller=caller), next_cursor=None)
        rows, next_cursor = collections.list_page(
            session, principal=caller.principal, cursor=query.cursor, limit=query.limit
        )
        return Page(items=_views(session, rows, caller=caller), next_cursor=next_cursor)


def get(collection_id: UUID, *, caller: Caller) -> CollectionView:
    """Return a collection.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id.
    """
    with session_scope() as session:
        return _view(session, collections.get(session, collection_id, principal=caller.principal), caller=caller)


def create(request: CollectionCreate, *, caller: Caller) -> CollectionView:
    """Create a collection of the caller.

    Raises:
        AuthorizationError: the caller's key is limited to collections.
        CollectionExistsError: the caller has a collection of this name.
        CollectionLimitError: the caller has as many collections as the service allows.
    """
    if caller.collection_ids is not None:
        raise AuthorizationError("This API key is limited to its collections and cannot create others.")
    with session_scope() as session:
        row = collections.create(
            session,
            request.name,
            owner_id=caller.owner_id,
            most=get_settings().limits.collections,
            description=request.description or None,
            defaults=request.defaults,
        )
        return _view(session, row, caller=caller)


def update(collection_id: UUID, patch: CollectionPatch, *, caller: Caller) -> CollectionView:
    """Set the fields of a collection that `patch` contains.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id.
        CollectionAccessError: the caller is not its owner.
        CollectionExistsError: the caller has a collection of the new name.
        SharedCollectionError: it is the collection `shared`.
    """
    with session_scope() as session:
        row = _get_own(session, collection_id, caller=caller)
        if patch.name is not None:
            collections.rename(session, row, patch.name)
        if "description" in patch.model_fields_set:
            row.description = patch.description or None
        if "defaults" in patch.model_fields_set:
            collections.set_defaults(row, patch.defaults)
        images.bump_collection_version(session, row.id)  # the defaults change the answers of searches
        changes = patch.model_dump(mode="json", exclude_unset=True)
        audit.record(session, caller, action=AuditAction.COLLECTION_CHANGED, subject=row.id, **changes)
        return _view(session, row, caller=caller)


def delete(collection_id: UUID, *, caller: Caller) -> None:
    """Delete a collection with its images. All of them are hidden from then on.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id.
        CollectionAccessError: the caller is not its owner.
        SharedCollectionError: it is the collection `shared`.
    """
    with session_scope() as session:
        row = _get_own(session, collection_id, caller=caller)
        audit.record(session, caller, action=AuditAction.COLLECTION_DELETED, subject=row.id, name=row.name)
        collections.mark_deleted(session, row)


def list_grants(collection_id: UUID, query: PageQuery, *, caller: Caller) -> Page[GrantView]:
    """Return a page of the owners that have access to a collection, newest first.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id.
        CollectionAccessError: the caller is not its owner.
        SharedCollectionError: it is the collection `shared`.
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        row = _get_own(session, collection_id, caller=caller, lock=False)
        grants, next_cursor = collections.list_grants(session, row, cursor=query.cursor, limit=query.limit)
        names = owners.names(session, [grant.owner_id for grant in grants])
        items = [views.grant(grant, names[grant.owner_id]) for grant in grants]
        return Page(items=items, next_cursor=next_cursor)


def share(collection_id: UUID, owner: str, request: GrantRequest, *, caller: Caller) -> GrantView:
    """Share a collection with another owner, or change the access of that owner.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id, or no owner has this name.
        ValidationError: the owner is the caller.
        CollectionAccessError: the caller is not the owner of the collection.
        SharedCollectionError: it is the collection `shared`.
    """
    with session_scope() as session:
        row = _get_own(session, collection_id, caller=caller)
        owner_id = owners.get_by_name(session, owner).id
        if owner_id == caller.owner_id:
            raise problems.field_error("path.owner", "own_name", "This owner has the collection already.")
        grant = collections.share(session, row, owner_id=owner_id, access=request.access)
        access = request.access.value
        audit.record(session, caller, action=AuditAction.COLLECTION_SHARED, subject=row.id, owner=owner, access=access)
        return views.grant(grant, owner)


def unshare(collection_id: UUID, owner: str, *, caller: Caller) -> None:
    """Take the access of another owner away. It ends at once, also for queued jobs.

    Raises:
        ResourceNotFoundError: no collection that the caller may see has this id, or this owner has no access.
        CollectionAccessError: the caller is not the owner of the collection.
        SharedCollectionError: it is the collection `shared`.
    """
    with session_scope() as session:
        row = _get_own(session, collection_id, caller=caller)
        collections.unshare(session, row, owner_id=owners.get_by_name(session, owner).id)
        audit.record(session, caller, action=AuditAction.COLLECTION_UNSHARED, subject=row.id, owner=owner)


def find_collection(
    session: Session, name: str, *, caller: Caller, field: str, needs: Access = Access.READ
) -> Collection:
    """Return the collection that a request names: of the caller, `shared`, or `owner/name` of another owner.

    field: path of the request field with the name, for the error.

    Raises:
        ValidationError: no collection that the caller may see has this name.
        CollectionAccessError: the caller may see it, but not more.
    """
    try:
        return collections.get_by_name(session, name, principal=caller.principal, needs=needs)
    except CollectionUnavailableError as error:
        raise problems.field_error(field, "unknown", error.message) from None


def ensure_collection(session: Session, name: str, *, caller: Caller, field: str) -> Collection:
    """Return a collection to which the caller may write. A missing one of the caller is created.

    It is not deleted until the transaction ends. An image that is added to a deleted one would be lost.

    Raises:
        ValidationError: it is missing and is of another owner, or the caller's key is limited to collections.
        CollectionAccessError: the caller may read it only.
        CollectionLimitError: the caller has as many collections as the service allows.
    """
    try:
        return collections.get_by_name(session, name, principal=caller.principal, needs=Access.WRITE, lock=True)
    except CollectionUnavailableError as error:
        if "/" in name or caller.collection_ids is not None:
            raise problems.field_error(field, "unknown", error.message) from None
    return collections.ensure(session, name, owner_id=caller.owner_id, most=get_settings().limits.collections)


def _get_own(session: Session, collection_id: UUID, *, caller: Caller, lock: bool = True) -> Collection:
    row = collections.get(session, collection_id, principal=caller.principal, lock=lock)
    if row.shared:
        raise SharedCollectionError
    return collections.get(session, collection_id, principal=caller.principal, needs=Access.OWNER)


def _view(session: Session, row: Collection, *, caller: Caller) -> CollectionView:
    return _views(session, [row], caller=caller)[0]


def _views(session: Session, rows: list[Collection], *, caller: Caller) -> list[CollectionView]:
    session.flush()
    details = collections.details(session, rows, principal=caller.principal)
    return [views.collection(row, details[row.id]) for row in rows if row.id in details]
