"""Values that a process keeps for a moment, so that frequent requests do not compute them again."""

import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from cachetools import LRUCache

Value = TypeVar("Value")

MAX_ITEMS = 1024


class Recent(Generic[Value]):
    """Values by key, each at most about twice `ttl_s` seconds old. Safe to share between threads.

    When a value is older than `ttl_s`, one caller computes it again, and the others get the old value meanwhile.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._lock = threading.Lock()
        self._entries: LRUCache[Hashable, tuple[Value, float]] = LRUCache(MAX_ITEMS)

    def get(
        self, key: Hashable, compute: Callable[[], Value], *, keep: Callable[[Value], bool] = lambda value: True
    ) -> Value:
        """The value of `key`, from `compute` if the process has no recent one. keep: whether a new value is kept."""
        with self._lock:
            now, known = time.monotonic(), self._entries.get(key)
            if known is not None:
                if now < known[1]:
                    return known[0]
                self._entries[key] = known[0], now + self._ttl_s
        value = compute()
        with self._lock:
            if keep(value):
                self._entries[key] = value, time.monotonic() + self._ttl_s
            else:
                self._entries.pop(key, None)
        return value
