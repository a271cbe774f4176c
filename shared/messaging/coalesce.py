"""Telling the workers that something waits, without a message or a look for each thing."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from shared.messaging import queue
from shared.singleton import once

logger = logging.getLogger(__name__)

EMBED_INTERVAL_S = 0.2
"""A worker embeds everything that waits when it hears the bell. In a stream of uploads a message takes it as long as
an image does, and what comes one by one cannot share a batch."""
FEED_INTERVAL_S = 0.05
"""Feeding publishes everything that there is room for, one process after the other: fed for every job, sixteen that
ended at once held up each other, and whoever submitted one meanwhile."""
PATIENCE_S = 5.0


class Bell:
    """Rings at once, and then at most once per `interval_s` for everybody who pulled it meanwhile.

    Pulling neither waits nor fails: a thread of its own waits for a broker that is away, and what could not be told
    the reconciler tells.
    """

    def __init__(self, ring: Callable[[], None], *, interval_s: float) -> None:
        self._ring = ring
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._pulled = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="bell", daemon=True)
        self._thread.start()

    def pull(self) -> None:
        """Have it rung after this moment: whoever hears it finds what is committed by now."""
        with self._changed:
            self._pulled = True
            self._changed.notify()

    def close(self) -> None:
        """Ring for those who still wait for it, and no more."""
        with self._changed:
            self._closed.set()
            self._changed.notify()
        self._thread.join(PATIENCE_S)

    def _work(self) -> None:
        while self._wait():
            try:
                self._ring()
            except Exception:  # whatever it is, the next pull must find a bell
                logger.exception("bell_failed")
            self._closed.wait(self._interval_s)

    def _wait(self) -> bool:
        """Wait for a pull; False when none will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._pulled or self._closed.is_set())
            # Before it rings: who pulls during the ring may have come too late for it.
            pulled, self._pulled = self._pulled, False
            return pulled


_bells: list[Bell] = []


@once
def embed_bell() -> Bell:
    """For images that wait for their vectors."""
    return _hung_up(Bell(queue.ring_for_images, interval_s=EMBED_INTERVAL_S))


@once
def feed_bell(model: str) -> Bell:
    """For jobs that were queued, and for room that others have left."""
    return _hung_up(Bell(partial(queue.feed, model), interval_s=FEED_INTERVAL_S))


def close_bells() -> None:
    """Close those of this process; the next use hangs up new ones."""
    embed_bell.cache_clear()
    feed_bell.cache_clear()
    while _bells:
        _bells.pop().close()


def _hung_up(bell: Bell) -> Bell:
    _bells.append(bell)
    return bell
