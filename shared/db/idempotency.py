"""Idempotency keys: a request that is sent twice runs once, and the second one gets the first one's answer.

The answer is stored in the transaction that does the work of the request.
"""

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import func, null, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db import retention
from shared.db.tables import IdempotencyKey
from shared.errors import IdempotencyKeyReusedError

KEY_TTL_S = 24 * 3600
"""How long a key and its answer are kept."""


def begin(session: Session, *, owner_id: UUID, route: str, key: str, fingerprint: str) -> dict[str, Any] | None:
    """The stored answer of this key; None for the first request, which must call `store_answer`.

    The first of several concurrent requests inserts the key, and the others wait here for its transaction. If it
    commits, they get its answer. If it rolls back, the next one becomes the first. So errors are not stored.

    Raises:
        IdempotencyKeyReusedError: the key came with another request before.
    """
    new = {"fingerprint": fingerprint, "answer": null(), "created_at": func.now()}
    insert = upsert(IdempotencyKey).values(owner_id=owner_id, route=route, key=key, **new)
    first = session.scalar(
        insert.on_conflict_do_update(
            index_elements=["owner_id", "route", "key"], set_=new, where=_has_expired()
        ).returning(IdempotencyKey.key)
    )
    if first is not None:
        return None
    return find_answer(session, owner_id=owner_id, route=route, key=key, fingerprint=fingerprint)


def find_answer(session: Session, *, owner_id: UUID, route: str, key: str, fingerprint: str) -> dict[str, Any] | None:
    """The stored answer of this key; None if no request with it has finished.

    For requests with long work before their transaction. They call `begin` in the transaction nevertheless.

    Raises:
        IdempotencyKeyReusedError: the key came with another request before.
    """
    stored = session.scalar(select(IdempotencyKey).where(_matches(owner_id, route, key), ~_has_expired()))
    if stored is None:
        return None
    if stored.fingerprint != fingerprint:
        raise IdempotencyKeyReusedError
    return stored.answer


def store_answer(session: Session, answer: dict[str, Any], *, owner_id: UUID, route: str, key: str) -> None:
    session.execute(update(IdempotencyKey).where(_matches(owner_id, route, key)).values(answer=answer))


def delete_old(session: Session, *, limit: int = 500) -> None:
    """Delete up to `limit` expired keys."""
    old = select(IdempotencyKey).where(_has_expired()).order_by(IdempotencyKey.created_at)
    retention.delete_batch(session, IdempotencyKey, old, limit=limit)


def _matches(owner_id: UUID, route: str, key: str) -> Any:
    return (IdempotencyKey.owner_id == owner_id) & (IdempotencyKey.route == route) & (IdempotencyKey.key == key)


def _has_expired() -> Any:
    return IdempotencyKey.created_at < func.now() - timedelta(seconds=KEY_TTL_S)
