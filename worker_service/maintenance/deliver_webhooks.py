"""Delivers webhooks as Standard Webhooks defines: https://github.com/standard-webhooks/standard-webhooks."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from time import monotonic

import httpx
import orjson
from standardwebhooks import Webhook

from shared import ssrf
from shared.db import webhooks
from shared.db.session import session_scope
from shared.db.tables import WebhookDelivery
from shared.errors import ForbiddenTargetError
from shared.metrics import WEBHOOK_DELIVERIES, increment_counter
from shared.settings import WebhookSettings

logger = logging.getLogger(__name__)

GONE = 410
"""HTTP status by which a receiver asks for no further attempts."""

SPARE_S = 5
"""Seconds of a lease in which the claim is committed and the result is recorded."""


def deliver_due(settings: WebhookSettings, *, stopping: Callable[[], bool]) -> int:
    """Attempt all due deliveries, one after the other; how many were attempted. Thread-safe.

    stopping: whether the process stops. It is called before each attempt.

    Raises:
        DatabaseError: the database failed. The lease of the current delivery then expires.
    """
    attempted = 0
    while not stopping():
        started = monotonic()
        with session_scope() as session:
            # The lease outlasts the longest attempt. If this worker dies, another worker then claims the delivery.
            claimed = webhooks.claim_due(
                session,
                lease_s=settings.timeout_s * 2 + SPARE_S,
                per_host=settings.per_host,
                per_owner=settings.per_owner,
            )
            secrets = webhooks.signing_secrets(session, claimed[0].owner_id) if claimed else ()
        if claimed is None:
            break
        if monotonic() - started > settings.timeout_s + SPARE_S:
            continue  # the lease might expire during the attempt
        delivery, body = claimed
        _attempt_delivery(delivery, orjson.dumps(body), list(secrets), settings)
        attempted += 1
    return attempted


def signed_headers(delivery_id: str, body: bytes, secrets: list[str], *, now: datetime) -> dict[str, str]:
    """Headers of a delivery, with one signature per valid secret: after a rotation, the old secret still verifies.

    now: time of the attempt, which is part of the signature.
    """
    signatures = [Webhook(secret).sign(delivery_id, now, body.decode()) for secret in secrets]
    return {
        "webhook-id": delivery_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": " ".join(signatures),
        "content-type": "application/json",
        "user-agent": "afterimage-webhooks",
    }


def _attempt_delivery(delivery: WebhookDelivery, body: bytes, secrets: list[str], settings: WebhookSettings) -> None:
    try:
        status, retry_after_s = asyncio.run(_post(delivery, body, secrets, settings))
    except ForbiddenTargetError as error:
        _record_failure(delivery, "forbidden", error=error.message)
    except (httpx.HTTPError, TimeoutError) as error:
        _record_failure(delivery, "unreachable", error=type(error).__name__)
    else:
        if 200 <= status < 300:
            with session_scope() as session:
                webhooks.record_success(session, delivery, status=status)
            increment_counter(WEBHOOK_DELIVERIES, labels={"outcome": "delivered"})
        else:
            error_text = f"the receiver answered {status}"
            _record_failure(delivery, "refused", error=error_text, status=status, retry_after_s=retry_after_s)


async def _post(
    delivery: WebhookDelivery, body: bytes, secrets: list[str], settings: WebhookSettings
) -> tuple[int, float]:
    """Send a delivery, and return the answer's status and requested pause in seconds.

    Raises:
        ForbiddenTargetError: the target is not allowed.
        httpx.HTTPError: the connection or the exchange failed.
        TimeoutError: the answer's head did not arrive within `timeout_s` of the call.
    """
    resolver = ThreadPoolExecutor(1, thread_name_prefix="resolver")
    try:
        # httpx limits each read, not their sum: a receiver that sends byte by byte would pass. This limits the total.
        async with asyncio.timeout(settings.timeout_s):
            target = await asyncio.get_running_loop().run_in_executor(resolver, ssrf.resolve, delivery.url, settings)
            headers = signed_headers(str(delivery.id), body, secrets, now=datetime.now(UTC)) | {"host": target.host}
            extensions = {"sni_hostname": httpx.URL(delivery.url).host}
            async with (
                httpx.AsyncClient(timeout=None, follow_redirects=False, trust_env=False) as client,
                # Only the response's head is read: a receiver may stream a body for ever.
                client.stream("POST", target.url, content=body, headers=headers, extensions=extensions) as response,
            ):
                return response.status_code, _retry_after_s(response.headers.get("retry-after", ""))
    finally:
        resolver.shutdown(wait=False)  # a look-up cannot be interrupted; its late result is not used


def _retry_after_s(header: str) -> float:
    return float(header) if header.isdecimal() else 0


def _record_failure(
    delivery: WebhookDelivery, outcome: str, *, error: str, status: int | None = None, retry_after_s: float = 0
) -> None:
    with session_scope() as session:
        final = status == GONE
        webhooks.record_failure(session, delivery, error=error, status=status, retry_after_s=retry_after_s, final=final)
    increment_counter(WEBHOOK_DELIVERIES, labels={"outcome": outcome})
    fields = {"delivery_id": str(delivery.id), "outcome": outcome, "error": error, "status": status}
    logger.warning("webhook_failed", extra=fields)
