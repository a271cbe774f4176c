"""A processor's cores, shared by the model calls that run at once.

Two calls of one core each finish more than one call of two: torch joins its threads after every operation, and while
another process has one of the cores, the threads on all others wait for it there. With a ViT-B/32 on two cores and an
API at work beside it that took a fifth of the time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Cores:
    """Divides `count` cores. A call that is alone gets all of them, as a search in a quiet service needs it.

    Only for a process whose every call of a model is made inside of `share`: how many threads torch takes is one number
    of the whole process, so that a call beside them would find that of the latest.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._calls = 0
        self._errands = 0
        self._lock = threading.Lock()

    @contextmanager
    def share(self) -> Iterator[None]:
        """Around a call of the model, on its thread."""
        with self._lock:
            self._calls += 1
            torch.set_num_threads(max(1, (self.count - self._errands) // self._calls))
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1

    @contextmanager
    def leave_one(self) -> Iterator[None]:
        """Around work beside the model that takes one core from the calls which begin meanwhile."""
        with self._lock:
            self._errands += 1
        try:
            yield
        finally:
            with self._lock:
                self._errands -= 1
