"""Celery's consumer with a constant, short interval between attempts to reach a broker that is down."""

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

RETRY_S = 2
"""Seconds between two attempts. Celery adds two seconds after every attempt, up to half a minute. Waiting jobs then
started up to that long after the broker was back."""


class Consumer(CeleryConsumer):
    """Celery's consumer, which tries to reach the broker every `RETRY_S` seconds."""

    def ensure_connected(self, conn: Any) -> Any:
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=RETRY_S, interval_max=RETRY_S)
        return super().ensure_connected(conn)
