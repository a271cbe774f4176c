"""Telling receivers of events, by Standard Webhooks: https://github.com/standard-webhooks/standard-webhooks."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime

import httpx
import orjson
from standardwebhooks import Webhook

from shared import ssrf
from shared.db import webhooks
from shared.db.session import session_scope
from shared.db.tables import WebhookDelivery
from shared.errors import ForbiddenTargetError
from shared.metrics import increment_counter
from shared.settings import WebhookSettings

logger = logging.getLogger(__name__)

GONE = 410


def deliver_due(settings: WebhookSettings, *, stopping: Callable[[], bool]) -> int:
    """Try what is due, one delivery at a time, until nothing is; how many were tried."""
    tried = 0
    while not stopping():
        with session_scope() as session:
            # The lease covers the longest try; a worker that dies in it leaves the delivery to the next.
            claimed = webhooks.claim_due(session, lease_s=settings.timeout_s * 2 + 5, per_host=settings.per_host)
            secrets = webhooks.signing_secrets(session, claimed[0].owner_id) if claimed else ()
        if claimed is None:
            break
        delivery, body = claimed
        _try(delivery, orjson.dumps(body), list(secrets), settings)
        tried += 1
    return tried


def signed_headers(delivery_id: str, body: bytes, secrets: list[str], *, now: datetime) -> dict[str, str]:
    """One signature per valid secret, so that receivers may change theirs at their own pace."""
    signatures = [Webhook(secret).sign(delivery_id, now, body.decode()) for secret in secrets]
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
        "content-type": "application/json",
        "user-agent": "afterimage-webhooks",
    }


def _try(delivery: WebhookDelivery, body: bytes, secrets: list[str], settings: WebhookSettings) -> None:
    try:
        status, retry_after_s = _post(delivery, body, secrets, settings)
    except ForbiddenTargetError as error:
        _note(delivery, "forbidden", error=error.message)
    except httpx.HTTPError as error:
        _note(delivery, "unreachable", error=type(error).__name__)
    else:
        if 200 <= status < 300:
            with session_scope() as session:
                webhooks.delivered(session, delivery, status=status)
            increment_counter("webhook_deliveries_total", labels={"outcome": "delivered"})
        else:
            error_text = f"the receiver answered {status}"
            _note(delivery, "refused", error=error_text, status=status, retry_after_s=retry_after_s)


def _post(delivery: WebhookDelivery, body: bytes, secrets: list[str], settings: WebhookSettings) -> tuple[int, float]:
    target = ssrf.resolve(delivery.url, settings)
    headers = signed_headers(str(delivery.id), body, secrets, now=datetime.now(UTC)) | {"host": target.host}
    hostname = httpx.URL(delivery.url).host
    with (
        httpx.Client(timeout=settings.timeout_s, follow_redirects=False, trust_env=False) as client,
        # Only the head is read: a receiver that streams for ever holds nobody.
        client.stream(
            "POST", target.url, content=body, headers=headers, extensions={"sni_hostname": hostname}
        ) as answer,
    ):
        return answer.status_code, _seconds(answer.headers.get("retry-after", ""))


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0


def _note(
    delivery: WebhookDelivery, outcome: str, *, error: str, status: int | None = None, retry_after_s: float = 0
) -> None:
    with session_scope() as session:
        final = status == GONE
        webhooks.failed(session, delivery, error=error, status=status, retry_after_s=retry_after_s, final=final)
    increment_counter("webhook_deliveries_total", labels={"outcome": outcome})
    logger.warning("webhook_failed", extra={"delivery_id": str(delivery.id), "outcome": outcome, "status": status})
