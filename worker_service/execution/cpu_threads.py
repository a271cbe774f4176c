"""Divides the CPU cores of a process among the model calls that run at the same time.

Two calls with one core each finish more work than one call with two cores. torch joins its threads after every
operation, so one thread whose core another process uses makes all threads of the call wait. With a ViT-B/32 on two
cores beside a busy API, that wait took a fifth of the time.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class CpuThreads:
    """Divides `count` cores among the calls inside `share`. A call that runs alone gets all of them.

    Every model call of the process must be made inside `share`. torch has one number of threads per process, so a call
    outside of `share` would use the number of the latest call.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._running_calls = 0
        self._reserved = 0
        self._lock = threading.Lock()

    @contextmanager
    def share(self) -> Iterator[None]:
        """Give the model call in this block its share of the cores. Call it on the thread that makes the call."""
        with self._lock:
            self._running_calls += 1
            torch.set_num_threads(max(1, (self.count - self._reserved) // self._running_calls))
        try:
            yield
        finally:
            with self._lock:
                self._running_calls -= 1

    @contextmanager
    def reserve_one(self) -> Iterator[None]:
        """Reserve one core for other work in this block: model calls that start during it get one core less."""
        with self._lock:
            self._reserved += 1
        try:
            yield
        finally:
            with self._lock:
                self._reserved -= 1
