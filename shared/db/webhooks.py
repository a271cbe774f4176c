"""The outbox of webhooks: what is still to be told to whom, and how the telling went."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from sqlalchemy import func, or_, select, tuple_, update
from sqlalchemy.orm import Session, aliased

from shared.contracts.webhooks import DeliveryQuery
from shared.db import paging
from shared.db.tables import Job, JobEvent, WebhookDelivery, WebhookSecret
from shared.errors import ResourceNotFoundError

RETRY_AFTER_S = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600)
"""Waits between tries, about 18 hours in all: the schedule that Standard Webhooks recommends, without its last step.
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""

SIGN_AT_ONCE = 4
"""Each of these secrets adds a signature to a header: rotating again and again must not make it endless."""


def enqueue(session: Session, job_id: UUID, seq: int, *, owner_id: UUID, url: str) -> None:
    """Put an event of a job into the outbox, due at once."""
    host = urlsplit(url).hostname or ""
    session.add(WebhookDelivery(id=uuid4(), owner_id=owner_id, job_id=job_id, seq=seq, url=url, host=host))


def enqueue_body(session: Session, body: dict[str, Any], *, owner_id: UUID, url: str) -> None:
    """Put something that is not about a job into the outbox, due at once."""
    host = urlsplit(url).hostname or ""
    session.add(WebhookDelivery(id=uuid4(), owner_id=owner_id, body=body, url=url, host=host))


def any_due(session: Session) -> bool:
    """Is there a delivery that could be tried now?"""
    due = select(WebhookDelivery.id).where(WebhookDelivery.state == "pending", WebhookDelivery.due_at <= func.now())
    return session.scalar(due.limit(1)) is not None


def claim_due(session: Session, *, lease_s: float, per_host: int) -> tuple[WebhookDelivery, dict[str, Any]] | None:
    """Take the delivery that is due longest, unless its host already has `per_host` in flight; with what to tell."""
    # One claim at a time: two would each count the other's host as idle.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("webhook_deliveries", 0))))
    other = aliased(WebhookDelivery)
    in_flight = select(func.count()).where(other.host == WebhookDelivery.host, other.lease_until > func.now())
    chosen = (
        select(WebhookDelivery.id)
        .where(
            WebhookDelivery.state == "pending",
            WebhookDelivery.due_at <= func.now(),
            or_(WebhookDelivery.lease_until.is_(None), WebhookDelivery.lease_until < func.now()),
            in_flight.scalar_subquery() < per_host,
        )
        .order_by(WebhookDelivery.due_at)
        .limit(1)
    )
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == chosen.scalar_subquery())
        .values(lease_until=func.clock_timestamp() + timedelta(seconds=lease_s), attempts=WebhookDelivery.attempts + 1)
        .returning(WebhookDelivery)
        .execution_options(synchronize_session=False)
    )
    delivery = session.scalar(statement)
    if delivery is None:
        return None
    if delivery.body is not None:
        return delivery, delivery.body
    event = session.get_one(JobEvent, (delivery.job_id, delivery.seq))
    return delivery, _body(session.get_one(Job, delivery.job_id), event)


def _body(job: Job, event: JobEvent) -> dict[str, Any]:
    """A thin body: what happened and where to look, never the result itself."""
    return {
        "type": f"job.{event.type}",
        "timestamp": event.at.isoformat(),
        "data": {
            "job_id": str(job.id),
            "seq": event.seq,
            "event": event.data,
            "metadata": job.job_metadata,
            "url": f"/api/v1/jobs/{job.id}",
        },
    }


def delivered(session: Session, delivery: WebhookDelivery, *, status: int) -> None:
    _settle(session, delivery, state="delivered", delivered_at=func.now(), last_status=status, last_error=None)


def failed(
    session: Session,
    delivery: WebhookDelivery,
    *,
    error: str,
    status: int | None = None,
    retry_after_s: float = 0,
    final: bool = False,
) -> None:
    """Note a try that failed; it is tried again later, unless it is `final` or was the last one."""
    if final or delivery.attempts > len(RETRY_AFTER_S):
        _settle(session, delivery, state="failed", last_status=status, last_error=error)
        return
    wait_s = max(RETRY_AFTER_S[delivery.attempts - 1], min(retry_after_s, 86_400))
    due_at = func.now() + timedelta(seconds=wait_s)
    _settle(session, delivery, state="pending", due_at=due_at, last_status=status, last_error=error)


def _settle(session: Session, delivery: WebhookDelivery, **values: object) -> None:
    # Of two workers that tried the same delivery only the later claim may say how it went.
    mine = update(WebhookDelivery).where(
        WebhookDelivery.id == delivery.id, WebhookDelivery.attempts == delivery.attempts
    )
    session.execute(mine.values(lease_until=None, **values).execution_options(synchronize_session=False))


# --- what owners see and do ---------------------------------------------------------------------------------------


def page(session: Session, query: DeliveryQuery, *, owner_id: UUID) -> tuple[list[WebhookDelivery], str | None]:
    """An owner's deliveries, newest first.

    Raises:
        InvalidCursorError
    """
    statement = select(WebhookDelivery).where(WebhookDelivery.owner_id == owner_id)
    if query.job_id is not None:
        statement = statement.where(WebhookDelivery.job_id == query.job_id)
    if query.state is not None:
        statement = statement.where(WebhookDelivery.state == query.state)
    return paging.page(
        session,
        statement,
        created_at=WebhookDelivery.created_at,
        id=WebhookDelivery.id,
        cursor=query.cursor,
        limit=query.limit,
    )


def get(session: Session, delivery_id: UUID, *, owner_id: UUID) -> WebhookDelivery:
    """
    Raises:
        ResourceNotFoundError: there is none, or it belongs to somebody else.
    """
    statement = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.owner_id == owner_id)
    delivery = session.scalar(statement)
    if delivery is None:
        raise ResourceNotFoundError("There is no such delivery.", delivery_id=str(delivery_id))
    return delivery


def types_of(session: Session, deliveries: Sequence[WebhookDelivery]) -> dict[UUID, str]:
    """The `type` of each delivery's body."""
    told = [(each.job_id, each.seq) for each in deliveries if each.job_id is not None]
    events = select(JobEvent.job_id, JobEvent.seq, JobEvent.type).where(tuple_(JobEvent.job_id, JobEvent.seq).in_(told))
    types = {(row.job_id, row.seq): f"job.{row.type}" for row in session.execute(events)}
    return {
        each.id: types[each.job_id, each.seq] if each.body is None else str(each.body["type"]) for each in deliveries
    }


def redeliver(session: Session, delivery_id: UUID, *, owner_id: UUID) -> None:
    """Make a delivery due again, with its whole schedule before it. It keeps its id: receivers know it by that.

    Raises:
        ResourceNotFoundError
    """
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.owner_id == owner_id)
        .values(state="pending", due_at=func.now(), attempts=0, lease_until=None)
        .returning(WebhookDelivery.id)
    )
    if session.scalar(statement) is None:
        raise ResourceNotFoundError("There is no such delivery.", delivery_id=str(delivery_id))


def signing_secrets(session: Session, owner_id: UUID) -> Sequence[str]:
    """The owner's newest valid secrets, newest first, `SIGN_AT_ONCE` at most; one is made on first sight."""
    valid = (
        select(WebhookSecret.secret)
        .where(
            WebhookSecret.owner_id == owner_id,
            or_(WebhookSecret.expires_at.is_(None), WebhookSecret.expires_at > func.now()),
        )
        .order_by(WebhookSecret.created_at.desc())
        .limit(SIGN_AT_ONCE)
    )
    return session.scalars(valid).all() or [_add_secret(session, owner_id)]


def rotate_secret(session: Session, owner_id: UUID, *, overlap_s: float) -> tuple[str, datetime]:
    """A new secret for the owner, and until when the ones before it sign beside it."""
    until = session.scalars(select(func.now() + timedelta(seconds=overlap_s))).one()
    session.execute(
        update(WebhookSecret)
        .where(WebhookSecret.owner_id == owner_id, WebhookSecret.expires_at.is_(None))
        .values(expires_at=until)
    )
    return _add_secret(session, owner_id), until


def _add_secret(session: Session, owner_id: UUID) -> str:
    secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    session.add(WebhookSecret(id=uuid4(), owner_id=owner_id, secret=secret))
    session.flush()
    return secret
