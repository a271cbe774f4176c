"""What was told to receivers, telling it again, and the secret that signs it."""

from uuid import UUID

from flask import Response, g
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.common import Contract, Page
from shared.contracts.webhooks import DeliveryQuery, DeliveryView, WebhookSecretView

webhooks = Resource(
    "webhooks",
    __name__,
    url_prefix=f"{API}/webhooks",
    abp_tags=[Tag(name="webhooks", description="What was told to receivers.")],
)


class DeliveryPath(Contract):
    delivery_id: UUID


@webhooks.get("/deliveries", operation_id="listWebhookDeliveries", responses={200: Page[DeliveryView]})
def list_deliveries(query: DeliveryQuery) -> Page[DeliveryView]:
    """The log of the caller's webhooks, newest first"""
    return services.webhooks.page(query, caller=g.caller)


@webhooks.post("/deliveries/<delivery_id>/redeliver", operation_id="redeliverWebhook", responses={202: DeliveryView})
def redeliver(path: DeliveryPath) -> Response:
    """Tell it again, at once and with the whole schedule of retries before it

    The receiver sees the same `webhook-id` as before.
    """
    return responses.json(services.webhooks.redeliver(path.delivery_id, caller=g.caller), 202)


@webhooks.post("/secret/rotate", operation_id="rotateWebhookSecret", responses={201: WebhookSecretView})
def rotate_secret() -> Response:
    """Make a signing secret; it is shown in this answer and never again

    The secrets before it sign beside it for a while, so that receivers may change theirs at their own pace.
    """
    return responses.secret(services.webhooks.rotate_secret(caller=g.caller))
