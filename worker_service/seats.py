"""Seats by lane: how a generate worker keeps room for better lanes while the worst could fill it."""

from collections.abc import Sequence

from celery.worker import state

from shared import queue, transport

LOOK_S = 0.1
"""How soon after a job has ended a full worker looks again into the lanes that had no seat left."""


class Channel(transport.Channel):
    """Leaves those lanes out of its BRPOP that have no seat left.

    Celery has one prefetch count for all lanes, and counts messages: when one is delivered again, because its job runs
    for longer than the broker is patient, it is acknowledged at once and its seat counted as free. So what is in hand
    is what Celery has taken and not ended; that is known also after the connection was lost.
    """

    lane_seats: Sequence[int] = ()
    """A transport option, best lane first: with so many jobs in hand no more are taken of that lane."""
    from_transport_options = (*transport.Channel.from_transport_options, "lane_seats")

    def _brpop_start(self, timeout: float | None = None) -> None:
        in_hand = len(state.reserved_requests)
        seated = [lane for lane, seats in zip(queue.LANES, self.lane_seats, strict=True) if in_hand < seats]
        if not seated:
            return
        full = len(seated) < len(queue.LANES)
        self.priority_steps = seated
        try:
            super()._brpop_start(LOOK_S if full else timeout)  # type: ignore[misc]  # the stubs know what is public
        finally:
            self.priority_steps = list(queue.LANES)

    def priority(self, n: int) -> int:
        """Of a message. Threads that give one back ask for it at any time, also while fewer lanes are read."""
        return min(max(n, 0), max(queue.LANES))


class Transport(transport.Transport):
    Channel = Channel
