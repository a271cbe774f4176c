"""Use cases of webhooks: list and repeat deliveries, rotate the signing secret."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.admin import AuditAction
from shared.contracts.common import Page
from shared.contracts.webhooks import DeliveryQuery, DeliveryView, WebhookSecretView
from shared.db import audit, webhooks
from shared.db.session import session_scope
from shared.messaging import queue
from shared.settings import get_settings


def list_page(query: DeliveryQuery, *, caller: Caller) -> Page[DeliveryView]:
    """Return a page of the caller's webhook deliveries, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = webhooks.list_page(session, query, owner_id=caller.owner_id)
        types = webhooks.get_types(session, rows)
        return Page(items=[views.delivery(row, types[row.id]) for row in rows], next_cursor=next_cursor)


def redeliver(delivery_id: UUID, *, caller: Caller) -> DeliveryView:
    """Make a delivery due again, in any state.

    Raises:
        ResourceNotFoundError: the caller has no delivery with this id.
    """
    with session_scope() as session:
        webhooks.redeliver(session, delivery_id, owner_id=caller.owner_id)
        row = webhooks.get(session, delivery_id, owner_id=caller.owner_id)
        view = views.delivery(row, webhooks.get_types(session, [row])[row.id])
    queue.notify_webhook_workers()
    return view


def rotate_secret(*, caller: Caller) -> WebhookSecretView:
    """Create a signing secret. The older ones stay valid for `webhooks.secret_overlap_s`."""
    overlap_s = get_settings().webhooks.secret_overlap_s
    with session_scope() as session:
        secret, until = webhooks.rotate_secret(session, caller.owner_id, overlap_s=overlap_s)
        audit.record(session, caller, action=AuditAction.WEBHOOK_SECRET_ROTATED, subject=caller.owner_id)
        return WebhookSecretView(secret=secret, others_until=until)
