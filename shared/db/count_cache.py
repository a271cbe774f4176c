"""Numbers of images that this process has counted, for later searches: counting takes as long as searching.

A count only chooses the way of a search, so one that is half a minute old does not make an answer wrong.
"""

from collections.abc import Hashable
from threading import Lock

from cachetools import TTLCache

from shared.singleton import process_singleton

COUNT_TTL_S = 30.0
MAX_COUNTS = 4096


class CountCache:
    """Counts by key, each for `COUNT_TTL_S` seconds. Safe to share between threads."""

    def __init__(self) -> None:
        self._counts: TTLCache[Hashable, int] = TTLCache(MAX_COUNTS, COUNT_TTL_S)
        self._lock = Lock()

    def find(self, key: Hashable) -> int | None:
        with self._lock:
            return self._counts.get(key)

    def store(self, key: Hashable, count: int) -> None:
        with self._lock:
            self._counts[key] = count


@process_singleton
def get_count_cache() -> CountCache:
    """The counts of this process."""
    return CountCache()
