"""Kombu's Redis transport, mended where the loss of a connection ended the whole worker, and with seats by lane."""

from collections.abc import Sequence
from typing import Any

from kombu.transport import redis

LOOK_S = 0.1
"""How soon after it has let one of its jobs go a worker looks again into the lanes that had no seat left."""


class Channel(redis.Channel):
    """A channel that keeps seats free for better lanes, and still once its connection is gone.

    Kombu 5.7.0 closes a broken connection twice, and the second time, like every acknowledgement of a task that ends
    later, it asks for the address of a connection that has none any more: an AttributeError, which Celery takes as
    the worker's end. A broker that restarted so took the work of every busy process with it.
    """

    lane_seats: Sequence[int] = ()
    """A transport option, best lane first: with so many messages in hand no more are taken of that lane. Celery has one
    prefetch count for all, so that long jobs of the worst lane would fill every seat."""
    from_transport_options = (*redis.Channel.from_transport_options, "lane_seats")

    def _brpop_start(self, timeout: float | None = None) -> None:
        lanes = self.priority_steps
        qos: Any = self.qos
        in_hand = len(qos._delivered) - len(qos._dirty)
        seated = [lane for lane, seats in zip(lanes, self.lane_seats, strict=False) if in_hand < seats]
        if 0 < len(seated) < len(lanes):
            self.priority_steps, timeout = seated, LOOK_S
        try:
            super()._brpop_start(timeout)  # type: ignore[misc]  # its stubs know only what is public
        finally:
            self.priority_steps = lanes

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
