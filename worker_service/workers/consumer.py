"""Celery's consumer for a broker that may be down for long, and whose lists may hold messages of other programs."""

import inspect
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from celery.worker.consumer import Consumer as CeleryConsumer

from shared.messaging import foreign
from shared.messaging.transport import BROKER_ERRORS

logger = logging.getLogger(__name__)

RETRY_S = 2
"""Seconds between two attempts. Celery adds two seconds after every attempt, up to half a minute. Waiting jobs then
started up to that long after the broker was back."""


EVENTS_INTERVAL_S = 0.2
"""Shortest time between two messages with task events, which Flower reads. Celery sends one for almost every event.
That took a tenth of the time of a busy generate worker."""


class Consumer(CeleryConsumer):
    """Celery's consumer, which tries to reach the broker every `RETRY_S` seconds and drops unreadable messages.

    Celery itself logs the content of such a message, or ends. Task events are sent together.
    """

    hub: Any  # the stubs lack these attributes
    _flush_events: Callable[[], None]

    _events_due_at = float("-inf")
    """The next message with task events is sent soon after this time, if it is not past."""

    def on_send_event_buffered(self) -> None:  # type: ignore[override]  # the stubs are wrong
        """Send the buffered events after `EVENTS_INTERVAL_S`. Threads of tasks call this too."""
        now = time.monotonic()
        if now >= self._events_due_at:
            self._events_due_at = now + EVENTS_INTERVAL_S
            self.call_soon(self.hub.call_later, EVENTS_INTERVAL_S, self._flush_events)

    def ensure_connected(self, conn: Any) -> Any:
        conn.ensure_connection = partial(conn.ensure_connection, interval_start=RETRY_S, interval_max=RETRY_S)
        return super().ensure_connected(conn)

    def create_task_handler(self, *args: Any, **options: Any) -> Callable[[Any], None]:
        handle = super().create_task_handler(*args, **options)

        def on_task_received(message: Any) -> None:
            try:
                self._check_arguments(message)
                handle(message)
            except BROKER_ERRORS:
                raise
            except Exception as error:
                self._drop(message, error)

        return on_task_received

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        self._drop(message, exc)

    def on_unknown_message(self, body: Any, message: Any) -> None:
        self._drop(message, "no task")

    def on_unknown_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._drop(message, "an unknown task")

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:
        self._drop(message, exc)

    def _check_arguments(self, message: Any) -> None:
        task = self.app.tasks.get(message.headers["task"])
        if task is not None:
            args, kwargs, _ = message.payload
            inspect.signature(task.run).bind(*args, **kwargs)

    def _drop(self, message: Any, cause: Exception | str) -> None:
        foreign.record_dropped("queue", cause)
        if not message.acknowledged:
            message.reject_log_error(logger, BROKER_ERRORS)
