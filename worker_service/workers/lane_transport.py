"""Which lanes a generate worker reads: how it keeps room for better lanes while the worst could fill it."""

import time
from collections.abc import Sequence

from celery.worker import state

from shared.contracts.jobs import Lane
from shared.messaging import queue, transport

LOOK_S = 0.1
"""How soon after a job has ended a full worker looks again into the lanes that had no seat left."""
IN_USE_S = 10.0
"""For how long after their last job the better lanes count as in use: who has waited for one will want another."""
SHORTEST_S = 0.001
"""Of a BRPOP: some servers cut what is shorter to 0, which is for ever."""
BULK = Lane.BULK.rank


class Channel(transport.Channel):
    """Leaves those lanes out of its BRPOP that have no seat left, and a bulk's while it has to pause.

    Celery has one prefetch count for all lanes, and counts messages: when one is delivered again, because its job runs
    for longer than the broker is patient, it is acknowledged at once and its seat counted as free. So what is in hand
    is what Celery has taken and not ended; that is known also after the connection was lost.
    """

    lane_seats: Sequence[int] = ()
    """A transport option, best lane first: with so many jobs in hand no more are taken of that lane."""
    bulk_pause_s: float = 0.0
    """A transport option: how far apart a bulk's jobs are taken at least while better lanes are in use."""
    from_transport_options = (*transport.Channel.from_transport_options, "lane_seats", "bulk_pause_s")

    _better_at = float("-inf")
    """When something of a better lane than a bulk's was last seen in hand."""
    _bulk_read_at = float("-inf")
    """When the last BRPOP began that a bulk's job could answer: each takes one message at most."""

    def _brpop_start(self, timeout: float | None = None) -> None:
        now = time.monotonic()
        in_hand = len(state.reserved_requests)
        lanes = [lane for lane, seats in zip(queue.LANES, self.lane_seats, strict=True) if in_hand < seats]
        if len(lanes) < len(queue.LANES):
            timeout = LOOK_S
        elif (pause_s := self._bulk_read_at + self._pause_s(now) - now) > 0:
            lanes.remove(BULK)
            timeout = max(pause_s, SHORTEST_S)
        if not lanes:
            return
        if BULK in lanes:
            self._bulk_read_at = now
        self.priority_steps = lanes
        try:
            super()._brpop_start(timeout)  # type: ignore[misc]  # the stubs know what is public
        finally:
            self.priority_steps = list(queue.LANES)

    def _pause_s(self, now: float) -> float:
        """How far apart a bulk's jobs are taken now."""
        in_hand = list(state.requests.values())  # the pool's threads take out what they have ended
        if any((request.delivery_info["priority"] or 0) < BULK for request in in_hand):
            self._better_at = now
        return self.bulk_pause_s if now - self._better_at < IN_USE_S else 0.0

    def priority(self, n: int) -> int:
        """Of a message. Threads that give one back ask for it at any time, also while fewer lanes are read."""
        return min(max(n, 0), BULK)


class Transport(transport.Transport):
    Channel = Channel
