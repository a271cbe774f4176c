"""API keys: secrets of 256 random bits. Only their SHA-256 is stored, so a stolen database reveals no key."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID, uuid4

from sqlalchemy import bindparam, func, or_, select, update
from sqlalchemy.orm import Session

from shared.contracts.admin import Scope
from shared.db import paging
from shared.db.tables import ApiKey, Owner
from shared.errors import ResourceNotFoundError

SCOPES = tuple(scope.value for scope in Scope)
TOKEN_PREFIX = "aft_"


class ValidKey(NamedTuple):
    """The rights of a key. collection_ids: the only collections that it may use; None: all that its owner may use."""

    id: UUID
    owner_id: UUID
    prefix: str
    scopes: frozenset[str]
    collection_ids: frozenset[UUID] | None


def create(
    session: Session,
    owner_id: UUID,
    *,
    name: str,
    scopes: frozenset[str],
    expires_in_s: float | None = None,
    collection_ids: Sequence[UUID] | None = None,
) -> tuple[ApiKey, str]:
    """Add a key for the owner and return it with its secret, which cannot be read again later.

    collection_ids: the only collections that the key may use; None: all that the owner may use.

    Raises:
        ValueError: `scopes` has an unknown scope.
    """
    if unknown := scopes - set(SCOPES):
        raise ValueError(f"unknown scopes: {', '.join(sorted(unknown))}")
    secret = TOKEN_PREFIX + secrets.token_urlsafe(32)
    key = ApiKey(
        id=uuid4(),
        owner_id=owner_id,
        name=name,
        prefix=secret[: len(TOKEN_PREFIX) + 6],
        secret_sha256=_digest(secret),
        scopes=sorted(scopes),
        collection_ids=None if collection_ids is None else list(collection_ids),
        expires_at=None if expires_in_s is None else func.now() + timedelta(seconds=expires_in_s),
    )
    session.add(key)
    session.flush()
    return key, secret


VALID = (
    select(ApiKey.id, ApiKey.owner_id, ApiKey.prefix, ApiKey.scopes, ApiKey.collection_ids, ApiKey.secret_sha256)
    .join(Owner, Owner.id == ApiKey.owner_id)
    .where(ApiKey.secret_sha256 == bindparam("digest"), ApiKey.revoked_at.is_(None), Owner.disabled_at.is_(None))
    .where(or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > func.now()))
)


def find_valid(session: Session, secret: str) -> ValidKey | None:
    """The valid key with this secret; None if it is unknown, revoked or expired, or if its owner is disabled.

    Every request runs this one statement, so a revoked key is refused from the next request on.
    """
    digest = _digest(secret)
    row = session.execute(VALID, {"digest": digest}).one_or_none()
    # The index compares digests, so its timing does not reveal the secret. compare_digest is used out of caution.
    if row is None or not hmac.compare_digest(row.secret_sha256, digest):
        return None
    collections = None if row.collection_ids is None else frozenset(row.collection_ids)
    return ValidKey(row.id, row.owner_id, row.prefix, frozenset(row.scopes), collections)


def get(session: Session, key_id: UUID) -> ApiKey:
    """The key with this id.

    Raises:
        ResourceNotFoundError: the key does not exist.
    """
    key = session.get(ApiKey, key_id)
    if key is None:
        raise ResourceNotFoundError("There is no such key.", key_id=str(key_id))
    return key


def list_page(
    session: Session, *, owner_id: UUID | None, cursor: str | None, limit: int
) -> tuple[list[ApiKey], str | None]:
    """A page of the keys of one owner, newest first, and the cursor of the next page.

    owner_id: None for the keys of all owners.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(ApiKey)
    if owner_id is not None:
        statement = statement.where(ApiKey.owner_id == owner_id)
    return paging.fetch_page(session, statement, created_at=ApiKey.created_at, id=ApiKey.id, cursor=cursor, limit=limit)


def rotate(session: Session, key_id: UUID, *, overlap_s: float) -> tuple[ApiKey, str]:
    """Add a key with the scopes and collections of the old one; the old key stays valid for `overlap_s` more seconds.

    Raises:
        ResourceNotFoundError: the key does not exist or was revoked.
    """
    old = get(session, key_id)
    if old.revoked_at is not None:
        raise ResourceNotFoundError("The key was revoked.", key_id=str(key_id))
    end = session.scalars(select(func.now() + timedelta(seconds=overlap_s))).one()
    old.expires_at = min(end, old.expires_at or end)
    return create(session, old.owner_id, name=old.name, scopes=frozenset(old.scopes), collection_ids=old.collection_ids)


def revoke(session: Session, key_id: UUID) -> None:
    """Make a key invalid from this commit on.

    Raises:
        ResourceNotFoundError: the key does not exist.
    """
    statement = update(ApiKey).where(ApiKey.id == key_id).values(revoked_at=func.now()).returning(ApiKey.id)
    if session.scalar(statement) is None:
        raise ResourceNotFoundError("There is no such key.", key_id=str(key_id))


def list_all(session: Session) -> list[tuple[ApiKey, Owner]]:
    """Every key with its owner, sorted by the owner's name and the key's age, oldest first."""
    statement = select(ApiKey, Owner).join(Owner, Owner.id == ApiKey.owner_id).order_by(Owner.name, ApiKey.created_at)
    return [(row[0], row[1]) for row in session.execute(statement)]


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()
