"""Coalesced notifications: any number of requests within an interval become one call."""

import logging
import threading
from collections.abc import Callable
from functools import partial

from shared.messaging import queue
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

EMBED_INTERVAL_S = 0.2
"""One message makes a worker embed everything that waits. During a stream of uploads, more messages would only split
the images into smaller batches."""
DISPATCH_INTERVAL_S = 0.05
"""One dispatch publishes every job that has room, under a lock. One dispatch per finished job made sixteen finishing
jobs wait for each other, and every submit wait for them."""
CLOSE_TIMEOUT_S = 5.0


class CoalescedNotifier:
    """Calls `send` in a thread: at once after the first `notify`, then at most once per `interval_s`.

    `notify` neither waits nor raises. While the broker is away, the thread waits for it; the reconciler repeats what
    could not be sent.
    """

    def __init__(self, send: Callable[[], None], *, interval_s: float) -> None:
        self._send = send
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._requested = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """Request a call that starts after this moment, so that it sees everything committed before."""
        with self._changed:
            self._requested = True
            self._changed.notify()

    def close(self) -> None:
        """Send what was requested, then stop. Waits at most `CLOSE_TIMEOUT_S`."""
        with self._changed:
            self._closed.set()
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while self._wait_for_request():
            try:
                self._send()
            except Exception:  # the thread must survive any error, or no later request would be sent
                logger.exception("notification_failed")
            self._closed.wait(self._interval_s)

    def _wait_for_request(self) -> bool:
        """Wait for a request; False when the notifier is closed and nothing is requested."""
        with self._changed:
            self._changed.wait_for(lambda: self._requested or self._closed.is_set())
            # Cleared before the call: a request during the call may have come too late for it.
            requested, self._requested = self._requested, False
            return requested


_notifiers: list[CoalescedNotifier] = []


def dispatch_soon(model: str) -> None:
    """Publish the next waiting jobs of `model`. Call it after the commit that made a job wait, or made room for one."""
    _dispatcher(model).notify()


def notify_embed_workers_soon() -> None:
    """Notify the embed workers. Call it after the commit that made an image wait for its vector."""
    _embed_notifier().notify()


def close_notifiers() -> None:
    """Close this process's notifiers; the next use starts new ones."""
    _embed_notifier.cache_clear()
    _dispatcher.cache_clear()
    while _notifiers:
        _notifiers.pop().close()


@process_singleton
def _embed_notifier() -> CoalescedNotifier:
    return _registered(CoalescedNotifier(queue.notify_embed_workers, interval_s=EMBED_INTERVAL_S))


@process_singleton
def _dispatcher(model: str) -> CoalescedNotifier:
    return _registered(CoalescedNotifier(partial(queue.dispatch_jobs, model), interval_s=DISPATCH_INTERVAL_S))


def _registered(notifier: CoalescedNotifier) -> CoalescedNotifier:
    _notifiers.append(notifier)
    return notifier
