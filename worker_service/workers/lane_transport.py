"""A Celery transport that limits how many jobs of each lane a generate worker takes.

Without it, jobs of low priority could fill a worker, and a job of high priority would wait for one of them to end. A
worker therefore stops reading a lane at that lane's limit, and limits are higher for higher-priority lanes.

It also pauses between two jobs of lane `bulk` while higher-priority lanes are in use. All jobs share the processors and
the database, which know no lanes: see docs/decisions/0020-how-is-a-bulk-slowed-for-interactive-jobs.md.
"""

import time
from collections.abc import Sequence
from typing import Any

from celery.worker import state

from shared.contracts.jobs import Lane
from shared.messaging import foreign, queue, transport

FULL_POLL_S = 0.1
"""How soon after the end of a job a worker reads the lanes again whose limit it had reached."""
LANE_IN_USE_S = 10.0
"""How long after their last job the lanes other than `bulk` count as in use: one job is often followed by another."""
SHORTEST_BRPOP_S = 0.001
"""Shortest timeout of a BRPOP: some servers round a shorter one to 0, which means no timeout."""
BULK = Lane.BULK.rank
CONTROL_SUFFIX = ".pidbox"
"""Ends the name of the queue through which a worker receives Celery's remote control commands."""


class Channel(transport.Channel):
    """Leaves the lanes at their limit out of its BRPOP, and lane `bulk` while it has to pause.

    Celery's own limit, the prefetch count, does not suffice. It is one number for all lanes, and it counts messages.
    When a job outlasts the visibility timeout, its message is delivered again and acknowledged at once, so it no longer
    counts. This class counts the tasks that Celery has received and not finished. It also works after a lost
    connection.
    """

    lane_limits: Sequence[int] = ()
    """Transport option. For each lane, highest priority first: the number of unfinished jobs at which no more are taken
    from it."""
    bulk_pause_s: float = 0.0
    """Transport option: seconds between two jobs of lane `bulk` while higher-priority lanes are in use, at least."""
    queues: Sequence[str] = ()
    """Transport option: the queues that the worker reads."""
    from_transport_options = (*transport.Channel.from_transport_options, "lane_limits", "bulk_pause_s", "queues")

    _last_high_priority_at = float("-inf")
    """When an unfinished job of a lane other than `bulk` was last seen."""
    _last_bulk_read_at = float("-inf")
    """When the last BRPOP began that read lane `bulk`. Each BRPOP takes at most one message."""

    def _brpop_start(self, timeout: float | None = None) -> None:
        now = time.monotonic()
        unfinished = len(state.reserved_requests)
        lanes = [lane for lane, limit in zip(queue.LANES, self.lane_limits, strict=True) if unfinished < limit]
        if len(lanes) < len(queue.LANES):
            timeout = FULL_POLL_S
        elif (pause_s := self._last_bulk_read_at + self._bulk_pause_now_s(now) - now) > 0:
            lanes.remove(BULK)
            timeout = max(pause_s, SHORTEST_BRPOP_S)
        if not lanes:
            return
        if BULK in lanes:
            self._last_bulk_read_at = now
        self.priority_steps = lanes
        try:
            super()._brpop_start(timeout)  # type: ignore[misc]  # the stubs lack this private method
        finally:
            self.priority_steps = list(queue.LANES)

    def _bulk_pause_now_s(self, now: float) -> float:
        """Seconds between two jobs of lane `bulk` at present."""
        unfinished = list(state.requests.values())  # a copy: other threads remove finished requests
        if any((request.delivery_info["priority"] or 0) < BULK for request in unfinished):
            self._last_high_priority_at = now
        return self.bulk_pause_s if now - self._last_high_priority_at < LANE_IN_USE_S else 0.0

    def priority(self, n: int) -> int:
        """Lane of a message with priority `n`. Other threads call this at any time, to return a message to its list.

        kombu's own method knows only the lanes that are read at present.
        """
        return min(max(n, 0), BULK)


class Transport(transport.Transport):
    """A transport that connects only to a broker that accepts writes, and that checks each message first.

    Celery's consumer waits between two attempts to connect. A broker that refuses writes is so waited for like one that
    is away.
    """

    Channel = Channel

    def establish_connection(self) -> Any:
        connection = super().establish_connection()
        channel: Any = self._avail_channels[-1]  # type: ignore[attr-defined]  # the stubs lack private attributes
        try:
            lists = [name for read in channel.queues for name in queue.broker_lists(read)]
            foreign.drop_foreign_keys(channel.client, lists)
            # A write that changes nothing, to a key that workers may write anyway.
            channel.client.zadd(channel.unacked_index_key, {"none": 0}, xx=True)
        except Exception:
            self._avail_channels.remove(channel)  # type: ignore[attr-defined]
            channel.close()
            raise
        return connection

    def _deliver(self, message: Any, queue: Any) -> None:
        check = foreign.check_command if str(queue).endswith(CONTROL_SUFFIX) else foreign.check_task_message
        check(message)
        super()._deliver(message, queue)
