"""Celery's consumer, with a patience of its own for a broker that is away."""

from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

RETRY_S = 2
"""How often it looks for the broker. Celery waits two seconds longer after every try, up to half a minute: waiting jobs
began that long after the broker was back."""


class Consumer(CeleryConsumer):
    def ensure_connected(self, conn: Any) -> Any:
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=RETRY_S, interval_max=RETRY_S)
        return super().ensure_connected(conn)
