"""Requests that may be sent twice: the first one's answer is kept in the transaction that did its work."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.db import retention
from shared.db.tables import IdempotencyKey
from shared.errors import IdempotencyKeyReusedError

KEPT_S = 24 * 3600
"""How long a key is remembered."""


def begin(session: Session, *, owner_id: UUID, route: str, key: str, fingerprint: str) -> dict[str, Any] | None:
    """The answer that this key already has, or None for whoever comes first and must `remember` one.

    Of several at once the first inserts the key and the others wait here for its transaction: they get its answer
    when it commits, and the next of them takes its place when it rolls back, so errors are not remembered.

    Raises:
        IdempotencyKeyReusedError: the key came with another request before.
    """
    session.execute(delete(IdempotencyKey).where(_this(owner_id, route, key), _forgotten()))
    insert = upsert(IdempotencyKey).values(owner_id=owner_id, route=route, key=key, fingerprint=fingerprint)
    first = session.scalar(insert.on_conflict_do_nothing().returning(IdempotencyKey.key))
    if first is not None:
        return None
    known = session.scalars(select(IdempotencyKey).where(_this(owner_id, route, key))).one()
    if known.fingerprint != fingerprint:
        raise IdempotencyKeyReusedError
    return known.answer


def remember(session: Session, answer: dict[str, Any], *, owner_id: UUID, route: str, key: str) -> None:
    session.execute(update(IdempotencyKey).where(_this(owner_id, route, key)).values(answer=answer))


def forget_old(session: Session, *, limit: int = 500) -> None:
    """Remove up to `limit` keys that are not remembered any more."""
    old = select(IdempotencyKey).where(_forgotten()).order_by(IdempotencyKey.created_at)
    retention.delete_batch(session, IdempotencyKey, old, limit=limit)


def _this(owner_id: UUID, route: str, key: str) -> Any:
    return (IdempotencyKey.owner_id == owner_id) & (IdempotencyKey.route == route) & (IdempotencyKey.key == key)


def _forgotten() -> Any:
    return IdempotencyKey.created_at < func.now() - timedelta(seconds=KEPT_S)
