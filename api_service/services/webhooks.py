"""What owners see of their webhooks and do with them, without HTTP."""

from uuid import UUID

from api_service.http.auth import Caller
from api_service.services import views
from shared.contracts.common import Page
from shared.contracts.webhooks import DeliveryQuery, DeliveryView, WebhookSecretView
from shared.db import webhooks
from shared.db.session import session_scope
from shared.messaging import queue
from shared.settings import get_settings


def page(query: DeliveryQuery, *, caller: Caller) -> Page[DeliveryView]:
    """
    Raises:
        InvalidCursorError
    """
    with session_scope() as session:
        rows, next_cursor = webhooks.page(session, query, owner_id=caller.owner_id)
        types = webhooks.types_of(session, rows)
        return Page(items=[views.delivery(row, types[row.id]) for row in rows], next_cursor=next_cursor)


def redeliver(delivery_id: UUID, *, caller: Caller) -> DeliveryView:
    """Make a delivery due again, whatever became of it.

    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        webhooks.redeliver(session, delivery_id, owner_id=caller.owner_id)
        row = webhooks.get(session, delivery_id, owner_id=caller.owner_id)
        view = views.delivery(row, webhooks.types_of(session, [row])[row.id])
    queue.ring_for_webhooks()
    return view


def rotate_secret(*, caller: Caller) -> WebhookSecretView:
    overlap_s = get_settings().webhooks.secret_overlap_s
    with session_scope() as session:
        secret, until = webhooks.rotate_secret(session, caller.owner_id, overlap_s=overlap_s)
        return WebhookSecretView(secret=secret, others_until=until)
