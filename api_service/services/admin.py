"""Use cases of operators: manage owners and API keys, read the audit. Every change is logged, without secrets."""

import logging
from uuid import UUID

from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from shared.contracts.admin import (
    AuditAction,
    AuditEventView,
    AuditQuery,
    KeyCreate,
    KeyPatch,
    KeyQuery,
    KeyRotate,
    KeyView,
    NewKeyView,
    OwnerCreate,
    OwnerPatch,
    OwnerView,
    Scope,
)
from shared.contracts.common import Page, PageQuery
from shared.db import audit, collections, keys, owners
from shared.db.session import session_scope
from shared.db.tables import ApiKey, Owner
from shared.errors import CollectionUnavailableError

logger = logging.getLogger(__name__)


def list_owners(query: PageQuery) -> Page[OwnerView]:
    """Return a page of owners, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = owners.list_page(session, cursor=query.cursor, limit=query.limit)
        return Page(items=[_owner_view(row) for row in rows], next_cursor=next_cursor)


def get_owner(owner_id: UUID) -> OwnerView:
    """Return an owner.

    Raises:
        ResourceNotFoundError: no owner has this id.
    """
    with session_scope() as session:
        return _owner_view(owners.get(session, owner_id))


def create_owner(request: OwnerCreate, *, caller: Caller) -> OwnerView:
    """Return the owner with this name, created if it does not exist."""
    with session_scope() as session:
        owner_id, is_new = owners.add(session, request.name)
        view = _owner_view(owners.get(session, owner_id))
        if is_new:
            audit.record(session, caller, action=AuditAction.OWNER_CREATED, subject=owner_id, name=request.name)
    _log("owner_made", caller, owner_id=view.id)
    return view


def update_owner(owner_id: UUID, patch: OwnerPatch, *, caller: Caller) -> OwnerView:
    """Change the quota of an owner, disable or enable it.

    Raises:
        ResourceNotFoundError: no owner has this id.
    """
    with session_scope() as session:
        row = owners.get(session, owner_id)
        if "daily_images" in patch.model_fields_set:
            row.daily_images = patch.daily_images
        if "disabled" in patch.model_fields_set:
            owners.set_disabled(session, row, disabled=patch.disabled)
        view = _owner_view(row)
        changes = patch.model_dump(mode="json", exclude_unset=True)
        audit.record(session, caller, action=AuditAction.OWNER_CHANGED, subject=owner_id, **changes)
    _log("owner_changed", caller, owner_id=owner_id, fields=sorted(patch.model_fields_set))
    return view


def list_keys(query: KeyQuery) -> Page[KeyView]:
    """Return a page of API keys, newest first, invalid ones included.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = keys.list_page(session, owner_id=query.owner_id, cursor=query.cursor, limit=query.limit)
        return Page(items=[_key_view(session, row) for row in rows], next_cursor=next_cursor)


def create_key(owner_id: UUID, request: KeyCreate, *, caller: Caller) -> NewKeyView:
    """Create an API key; only the returned view contains its secret.

    Raises:
        ResourceNotFoundError: no owner has this id.
        ValidationError: the owner has no access to one of `collections`, or the key would also have the scope `admin`.
    """
    with session_scope() as session:
        row, secret = keys.create(
            session,
            owners.get(session, owner_id).id,
            name=request.name,
            scopes=frozenset(request.scopes),
            expires_in_s=request.expires_in_s,
            collection_ids=_collection_ids(session, request, owner_id=owner_id),
        )
        session.refresh(row)
        view = _key_view(session, row)
        audit.record_key(session, caller, row, action=AuditAction.KEY_CREATED)
    _log("key_made", caller, owner_id=owner_id, made_key_id=view.id, scopes=view.scopes)
    return NewKeyView(key=view, secret=secret)


def update_key(key_id: UUID, patch: KeyPatch, *, caller: Caller) -> KeyView:
    """Change when a key expires.

    Raises:
        ResourceNotFoundError: no key has this id.
    """
    with session_scope() as session:
        row = keys.get(session, key_id)
        row.expires_at = patch.expires_at
        view = _key_view(session, row)
        audit.record_key(session, caller, row, action=AuditAction.KEY_CHANGED)
    _log("key_changed", caller, changed_key_id=key_id, expires_at=patch.expires_at)
    return view


def rotate_key(key_id: UUID, request: KeyRotate, *, caller: Caller) -> NewKeyView:
    """Create a key with the owner and scopes of an old one, which expires after `overlap_s` seconds at the latest.

    Raises:
        ResourceNotFoundError: no key has this id, or the key was revoked.
    """
    with session_scope() as session:
        row, secret = keys.rotate(session, key_id, overlap_s=request.overlap_s)
        session.refresh(row)
        view = _key_view(session, row)
        audit.record_key(session, caller, row, action=AuditAction.KEY_ROTATED, replaces=str(key_id))
    _log("key_rotated", caller, rotated_key_id=key_id, made_key_id=view.id)
    return NewKeyView(key=view, secret=secret)


def revoke_key(key_id: UUID, *, caller: Caller) -> KeyView:
    """Make a key invalid at once.

    Raises:
        ResourceNotFoundError: no key has this id.
    """
    with session_scope() as session:
        keys.revoke(session, key_id)
        row = keys.get(session, key_id)
        view = _key_view(session, row)
        audit.record_key(session, caller, row, action=AuditAction.KEY_REVOKED)
    _log("key_revoked", caller, revoked_key_id=key_id)
    return view


def list_audit(query: AuditQuery) -> Page[AuditEventView]:
    """Return a page of the audit, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = audit.list_page(session, query)
        return Page(items=[audit.view(row) for row in rows], next_cursor=next_cursor)


def _log(event: str, caller: Caller, **fields: object) -> None:
    logger.info(event, extra={"by_key_id": caller.key_id, **fields})


def _owner_view(row: Owner) -> OwnerView:
    return OwnerView(
        id=row.id,
        name=row.name,
        daily_images=row.daily_images,
        created_at=row.created_at,
        disabled_at=row.disabled_at,
    )


def _collection_ids(session: Session, request: KeyCreate, *, owner_id: UUID) -> list[UUID] | None:
    if request.collections is None:
        return None
    if Scope.ADMIN in request.scopes:
        detail = "A key with the scope `admin` cannot be limited: it could create keys without limits."
        raise problems.field_error("body.collections", "exclusive", detail)
    try:
        return collections.ids_of(session, request.collections, owner_id=owner_id)
    except CollectionUnavailableError as error:
        raise problems.field_error("body.collections", "unknown", error.message) from None


def _key_view(session: Session, row: ApiKey) -> KeyView:
    limited_to = row.collection_ids
    names = {} if limited_to is None else collections.names_for(session, limited_to, owner_id=row.owner_id)
    return KeyView(
        id=row.id,
        owner_id=row.owner_id,
        name=row.name,
        begins_with=row.prefix,
        scopes=[Scope(scope) for scope in row.scopes],
        collections=None if limited_to is None else [names[each] for each in limited_to if each in names],
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )
