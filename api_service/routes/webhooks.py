"""Routes of webhooks: list and repeat deliveries, rotate the signing secret."""

from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.common import Contract, Page
from shared.contracts.webhooks import DeliveryQuery, DeliveryView, WebhookSecretView

webhooks = ApiBlueprint(
    "webhooks",
    __name__,
    url_prefix=f"{API}/webhooks",
    abp_tags=[Tag(name="webhooks", description="Deliveries to receivers, and the signing secret.")],
)


class DeliveryPath(Contract):
    delivery_id: UUID


@webhooks.get("/deliveries", operation_id="listWebhookDeliveries", responses={200: Page[DeliveryView]})
def list_deliveries(query: DeliveryQuery) -> Page[DeliveryView]:
    """List the webhook deliveries of the caller, newest first"""
    return services.webhooks.list_page(query, caller=g.caller)


@webhooks.post("/deliveries/<delivery_id>/redeliver", operation_id="redeliverWebhook", responses={202: DeliveryView})
def redeliver(path: DeliveryPath) -> Response:
    """Send a delivery again

    The first try is at once, and the whole schedule of retries starts again. The receiver gets the same `webhook-id` as
    before.
    """
    return responses.json(services.webhooks.redeliver(path.delivery_id, caller=g.caller), 202)


@webhooks.post("/secret/rotate", operation_id="rotateWebhookSecret", responses={201: WebhookSecretView})
def rotate_secret() -> Response:
    """Create a new signing secret

    Only this response shows it. The older secrets sign beside it for a while, so receivers can change theirs in that
    time.
    """
    return responses.created_secret(services.webhooks.rotate_secret(caller=g.caller))
