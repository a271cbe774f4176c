"""The audit: rows that say who did what to which object. They are written in the transaction of the act.

Rows are never changed or deleted, which a trigger of the database ensures. They contain no secrets.
"""

from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID, uuid4

from sqlalchemy import Select, select
from sqlalchemy.orm import Session
from structlog.contextvars import get_contextvars

from shared.contracts.admin import AuditAction, AuditActor, AuditEventView, AuditQuery
from shared.db import paging
from shared.db.tables import ApiKey, AuditEvent


class Actor(Protocol):
    """A person or program that acts, such as the API's `Caller`."""

    @property
    def owner_id(self) -> UUID | None: ...

    @property
    def key_prefix(self) -> str | None: ...


@dataclass(frozen=True)
class Operator:
    """A person with access to the database, who runs `scripts.admin`."""

    owner_id: UUID | None = None
    key_prefix: str | None = None


OPERATOR = Operator()


def record(session: Session, actor: Actor, *, action: AuditAction, subject: UUID | str, **details: Any) -> None:
    """Add a row in the transaction of the act, so that both are kept or neither.

    The id of the request comes from the context of the log.

    subject: id of the object. details: JSON values that explain the act, without secrets.
    """
    session.add(
        AuditEvent(
            id=uuid4(),
            actor=AuditActor.OPERATOR if isinstance(actor, Operator) else AuditActor.CALLER,
            owner_id=actor.owner_id,
            key_prefix=actor.key_prefix,
            action=action,
            subject_kind=action.subject_kind,
            subject_id=str(subject),
            details=details,
            request_id=None if isinstance(actor, Operator) else get_contextvars().get("request_id"),
        )
    )


def record_key(session: Session, actor: Actor, key: ApiKey, *, action: AuditAction, **details: Any) -> None:
    """As `record`, for an API key, with what its owner and an operator know of it."""
    expires_at = None if key.expires_at is None else key.expires_at.isoformat()
    limit = None if key.collection_ids is None else [str(each) for each in key.collection_ids]
    known = {"of_owner_id": str(key.owner_id), "name": key.name, "begins_with": key.prefix, "scopes": key.scopes}
    record(
        session,
        actor,
        action=action,
        subject=key.id,
        **known | {"expires_at": expires_at, "collection_ids": limit} | details,
    )


def list_page(
    session: Session, query: AuditQuery, *, oldest_first: bool = False
) -> tuple[list[AuditEvent], str | None]:
    """A page of the audit, newest first if not said otherwise, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    return paging.fetch_page(
        session,
        _selected(query),
        created_at=AuditEvent.created_at,
        id=AuditEvent.id,
        cursor=query.cursor,
        limit=query.limit,
        oldest_first=oldest_first,
    )


def view(row: AuditEvent) -> AuditEventView:
    return AuditEventView(
        id=row.id,
        created_at=row.created_at,
        actor=AuditActor(row.actor),
        owner_id=row.owner_id,
        key_prefix=row.key_prefix,
        action=row.action,
        subject_kind=row.subject_kind,
        subject_id=row.subject_id,
        details=row.details,
        request_id=row.request_id,
    )


def _selected(query: AuditQuery) -> Select[AuditEvent]:
    statement = select(AuditEvent)
    if query.action is not None:
        statement = statement.where(AuditEvent.action == query.action)
    if query.subject_id is not None:
        statement = statement.where(AuditEvent.subject_id == query.subject_id)
    if query.created_after is not None:
        statement = statement.where(AuditEvent.created_at >= query.created_after)
    if query.created_before is not None:
        statement = statement.where(AuditEvent.created_at < query.created_before)
    return statement
