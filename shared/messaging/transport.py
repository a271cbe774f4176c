"""Kombu's Redis transport, mended where the loss of a connection ended the whole worker."""

from typing import Any

from kombu.transport import redis


class Channel(redis.Channel):
    """A channel that keeps still once its connection is gone.

    Kombu 5.7.0 closes a broken connection twice, and the second time, like every acknowledgement of a task that ends
    later, it asks for the address of a connection that has none any more: an AttributeError, which Celery takes as
    the worker's end. A broker that restarted so took the work of every busy process with it.
    """

    @property
    def do_restore(self) -> bool:  # type: ignore[override]  # only ever read
        """Whether closing puts messages in hand back into their lists."""
        return self._is_connected

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        # Without a connection the message will be delivered again, and its claim finds the job owned or ended.
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
