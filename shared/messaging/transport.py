"""Kombu's Redis transport with one fix: a lost connection does not end the whole worker."""

from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    """A channel that sends nothing after its connection is lost.

    Kombu 5.7.0 closes a broken connection twice. The second close raises an AttributeError, because the transport has
    no client any more. So does each acknowledgement of a task that ends later. Celery then ends the worker: a restart
    of the broker lost the work of every busy process.
    """

    @property
    def do_restore(self) -> bool:  # type: ignore[override]  # only ever read
        """Whether closing the channel puts its unacknowledged messages back into their lists."""
        return self._is_connected

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        # Without a connection the broker delivers the message again, and `jobs.claim` then finds a job owned or ended.
        if self._is_connected:
            super().basic_ack(delivery_tag, multiple=multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._is_connected:
            super().basic_reject(delivery_tag, requeue=requeue)

    @property
    def _is_connected(self) -> bool:
        transport: Any = self.connection
        return transport is not None and transport.client is not None


class Transport(redis.Transport):
    Channel = Channel
