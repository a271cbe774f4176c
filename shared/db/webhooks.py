"""The outbox of webhooks: events to deliver, when each is due, and the result of every attempt; and signing secrets."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, func, or_, select, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from shared.contracts.webhooks import DeliveryQuery
from shared.db import leasing, paging
from shared.db.tables import Job, JobEvent, WebhookDelivery, WebhookSecret
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings

RETRY_AFTER_S = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600)
"""Pauses between attempts in seconds, about 18 hours in total. It is the schedule that Standard Webhooks recommends,
without its last step:
https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md"""

OVERDUE_S = 300

MAX_SIGNATURES = 4
"""Every valid secret adds a signature to a header. The limit keeps the header short after many rotations."""


def enqueue(session: Session, job_id: UUID, seq: int, *, owner_id: UUID, url: str) -> None:
    """Add a delivery of a job's event, due at once."""
    host = urlsplit(url).hostname or ""
    session.add(WebhookDelivery(id=uuid4(), owner_id=owner_id, job_id=job_id, seq=seq, url=url, host=host))


def enqueue_body(session: Session, body: dict[str, Any], *, owner_id: UUID, url: str) -> None:
    """Add a delivery with a body of its own, for an event that belongs to no job. It is due at once."""
    host = urlsplit(url).hostname or ""
    session.add(WebhookDelivery(id=uuid4(), owner_id=owner_id, body=body, url=url, host=host))


def any_due(session: Session) -> bool:
    """Whether a delivery could be attempted now."""
    due = select(WebhookDelivery.id).where(WebhookDelivery.state == "pending", WebhookDelivery.due_at <= func.now())
    return session.scalar(due.limit(1)) is not None


def count_overdue(session: Session) -> int:
    """How many deliveries have been due for more than `OVERDUE_S`: io workers are missing, or too slow."""
    since = func.now() - timedelta(seconds=OVERDUE_S)
    overdue = select(func.count()).where(WebhookDelivery.state == "pending", WebhookDelivery.due_at < since)
    return session.scalar(overdue) or 0


def claim_due(
    session: Session, *, lease_s: float, per_host: int, per_owner: int
) -> tuple[WebhookDelivery, dict[str, Any]] | None:
    """Claim the delivery that has been due longest, and return it with its body; None when no delivery can be claimed.

    lease_s: for how long the claim lasts.
    per_host, per_owner: deliveries of a host or owner with so many in flight are skipped.
    """
    # Claims run one after the other: two at once would not count each other's delivery.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("webhook_deliveries", 0))))
    chosen = (
        select(WebhookDelivery.id)
        .where(
            WebhookDelivery.state == "pending",
            WebhookDelivery.due_at <= func.now(),
            or_(WebhookDelivery.lease_until.is_(None), WebhookDelivery.lease_until < func.now()),
            _has_fewer_in_flight(WebhookDelivery.host, per_host),
            _has_fewer_in_flight(WebhookDelivery.owner_id, per_owner),
        )
        .order_by(WebhookDelivery.due_at)
        .limit(1)
    )
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == chosen.scalar_subquery())
        .values(lease_until=leasing.from_now(lease_s), attempts=WebhookDelivery.attempts + 1)
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


def _has_fewer_in_flight(column: InstrumentedAttribute[Any], limit: int) -> ColumnElement[bool]:
    """Whether fewer than `limit` deliveries with the row's value of `column` are in flight."""
    in_flight = select(column).where(WebhookDelivery.lease_until > func.now())
    return column.not_in(in_flight.group_by(column).having(func.count() >= limit).correlate(None))


def _body(job: Job, event: JobEvent) -> dict[str, Any]:
    """The webhook's body: the event, and the URL of the job. It holds no results."""
    return {
        "type": f"job.{event.type}",
        "timestamp": event.at.isoformat(),
        "data": {
            "job_id": str(job.id),
            "seq": event.seq,
            "event": event.data,
            "metadata": job.job_metadata,
            "url": f"{get_settings().api.path_prefix}/api/v1/jobs/{job.id}",
        },
    }


def record_success(session: Session, delivery: WebhookDelivery, *, status: int) -> None:
    """Record that the receiver accepted the delivery. status: its HTTP status."""
    _record(session, delivery, state="delivered", delivered_at=func.now(), last_status=status, last_error=None)


def record_failure(
    session: Session,
    delivery: WebhookDelivery,
    *,
    error: str,
    status: int | None = None,
    retry_after_s: float = 0,
    final: bool = False,
) -> None:
    """Record a failed attempt. The delivery is due again later, unless this is `final` or its last attempt.

    retry_after_s: the shortest pause that the receiver asked for; more than a day counts as a day.
    """
    if final or delivery.attempts > len(RETRY_AFTER_S):
        _record(session, delivery, state="failed", last_status=status, last_error=error)
        return
    wait_s = max(RETRY_AFTER_S[delivery.attempts - 1], min(retry_after_s, 86_400))
    due_at = func.now() + timedelta(seconds=wait_s)
    _record(session, delivery, state="pending", due_at=due_at, last_status=status, last_error=error)


def _record(session: Session, delivery: WebhookDelivery, **values: object) -> None:
    # `lease_until` identifies the claim: only the latest claim may record its result, and end the lease.
    claimed = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery.id, WebhookDelivery.lease_until == delivery.lease_until)
        .execution_options(synchronize_session=False)
    )
    # A redelivery that was requested during the attempt stays due.
    session.execute(claimed.where(WebhookDelivery.attempts == delivery.attempts).values(**values))
    session.execute(claimed.values(lease_until=None))


# --- operations of owners -----------------------------------------------------------------------------------------


def list_page(session: Session, query: DeliveryQuery, *, owner_id: UUID) -> tuple[list[WebhookDelivery], str | None]:
    """A page of an owner's deliveries, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(WebhookDelivery).where(WebhookDelivery.owner_id == owner_id)
    if query.job_id is not None:
        statement = statement.where(WebhookDelivery.job_id == query.job_id)
    if query.state is not None:
        statement = statement.where(WebhookDelivery.state == query.state)
    return paging.fetch_page(
        session,
        statement,
        created_at=WebhookDelivery.created_at,
        id=WebhookDelivery.id,
        cursor=query.cursor,
        limit=query.limit,
    )


def get(session: Session, delivery_id: UUID, *, owner_id: UUID) -> WebhookDelivery:
    """The delivery, if it belongs to `owner_id`.

    Raises:
        ResourceNotFoundError: the delivery does not exist, or belongs to another owner.
    """
    statement = select(WebhookDelivery).where(WebhookDelivery.id == delivery_id, WebhookDelivery.owner_id == owner_id)
    delivery = session.scalar(statement)
    if delivery is None:
        raise ResourceNotFoundError("There is no such delivery.", delivery_id=str(delivery_id))
    return delivery


def get_types(session: Session, deliveries: Sequence[WebhookDelivery]) -> dict[UUID, str]:
    """The `type` in the body of each delivery, by delivery id."""
    keys = [(each.job_id, each.seq) for each in deliveries if each.job_id is not None]
    events = select(JobEvent.job_id, JobEvent.seq, JobEvent.type).where(tuple_(JobEvent.job_id, JobEvent.seq).in_(keys))
    types = {(row.job_id, row.seq): f"job.{row.type}" for row in session.execute(events)}
    return {
        each.id: types[each.job_id, each.seq] if each.body is None else str(each.body["type"]) for each in deliveries
    }


def redeliver(session: Session, delivery_id: UUID, *, owner_id: UUID) -> None:
    """Make a delivery due again at once, with all of its attempts. It keeps its id, by which receivers recognise it.

    If an attempt is in flight, the next one waits for its end, so that both count toward the limits.

    Raises:
        ResourceNotFoundError: the delivery does not exist, or belongs to another owner.
    """
    statement = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.owner_id == owner_id)
        .values(state="pending", due_at=func.now(), attempts=0)
        .returning(WebhookDelivery.id)
    )
    if session.scalar(statement) is None:
        raise ResourceNotFoundError("There is no such delivery.", delivery_id=str(delivery_id))


def signing_secrets(session: Session, owner_id: UUID) -> Sequence[str]:
    """The owner's valid secrets, newest first, at most `MAX_SIGNATURES`. An owner without one gets one here."""
    valid = (
        select(WebhookSecret.secret)
        .where(
            WebhookSecret.owner_id == owner_id,
            or_(WebhookSecret.expires_at.is_(None), WebhookSecret.expires_at > func.now()),
        )
        .order_by(WebhookSecret.created_at.desc())
        .limit(MAX_SIGNATURES)
    )
    return session.scalars(valid).all() or [_add_secret(session, owner_id)]


def rotate_secret(session: Session, owner_id: UUID, *, overlap_s: float) -> tuple[str, datetime]:
    """Add a new secret; return it, and the time until which the older secrets still sign too."""
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
