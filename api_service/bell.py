"""Telling the embed workers that images wait, without a message for each image."""

import logging
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import NoReturn

from shared import queue
from shared.errors import BrokerUnavailableError

logger = logging.getLogger(__name__)

INTERVAL_S = 0.2
"""A worker embeds everything that waits when it hears the bell. In a stream of uploads a message takes it as long as
an image does, and what comes one by one cannot share a batch."""


class Bell:
    """Rings at once, and then at most once per `interval_s` for everybody who pulled it meanwhile.

    Pulling neither waits nor fails: a thread of its own waits for a broker that is away, and what could not be told
    the reconciler tells.
    """

    def __init__(self, ring: Callable[[], None], *, interval_s: float = INTERVAL_S) -> None:
        self._ring = ring
        self._interval_s = interval_s
        self._pulled = threading.Event()
        threading.Thread(target=self._work, name="bell", daemon=True).start()

    def pull(self) -> None:
        """Have it rung after this moment: whoever hears it finds what is committed by now."""
        self._pulled.set()

    def _work(self) -> NoReturn:
        while True:
            self._pulled.wait()
            self._pulled.clear()  # before it rings: who pulls during the ring may have come too late for it
            try:
                self._ring()
            except BrokerUnavailableError as error:
                logger.warning("embed_not_announced", extra={"cause": error.code})
            except Exception:  # whatever it is, the next pull must find a bell
                logger.exception("bell_failed")
            time.sleep(self._interval_s)


@cache
def embed_bell() -> Bell:
    """The bell of this process, hung up at first use."""
    return Bell(queue.publish_embed_pending)
