"""Statistics of the requests in the last minutes: their number and durations, in Redis, shared by all replicas.

Each process counts its own requests and adds its counts to Redis a second later. Redis has one hash per minute, with
one field per status class and duration bucket. While Redis is away, a process reports only its own requests.

Counts that could not be added are lost. Adding them again could count them twice, because a Redis that did not answer
in time may still have added them.
"""

import bisect
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from redis import Redis, RedisError

from shared.cache import get_cache_manager
from shared.contracts.service import RequestWindow
from shared.messaging import foreign
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

NAMESPACE = "afterimage:requests:"
WINDOWS_MIN = (1, 5, 60)
KEY_TTL_S = (max(WINDOWS_MIN) + 2) * 60
FLUSH_S = 1.0
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the duration buckets in seconds. One more bucket without an upper end follows."""

Cell = tuple[int, int]
"""Status class (2 for 200 to 299) and index of the duration bucket."""


class RequestStats:
    """Request counts by minute. Safe to share between threads."""

    def __init__(self, redis: Redis, *, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._clock = clock
        self._lock = threading.Lock()
        self._own: dict[int, Counter[Cell]] = {}
        """This process's counts by minute, as far back as the longest window."""
        self._pending: dict[int, Counter[Cell]] = {}
        """The part of them that is not yet in Redis."""
        self._timer: threading.Timer | None = None

    def add(self, *, status: int, seconds: float) -> None:
        """Count one answered request. Does not wait: a timer's thread sends the counts to Redis."""
        minute, cell = int(self._clock() // 60), (status // 100, bisect.bisect_left(BUCKETS_S, seconds))
        with self._lock:
            if minute not in self._own:
                self._own = {m: cells for m, cells in self._own.items() if m >= minute - max(WINDOWS_MIN)}
            for counts in (self._own, self._pending):
                counts.setdefault(minute, Counter())[cell] += 1
            if self._timer is None:
                self._timer = threading.Timer(FLUSH_S, self.flush)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Add the pending counts to Redis."""
        with self._lock:
            self._timer = None
            pending, self._pending = self._pending, {}
        try:
            with self._redis.pipeline(transaction=True) as pipeline:
                for minute, cells in pending.items():
                    for (status_class, bucket), count in cells.items():
                        pipeline.hincrby(_key(minute), f"{status_class}:{bucket}", count)
                    pipeline.expire(_key(minute), KEY_TTL_S)
                pipeline.execute()
        except RedisError as error:
            logger.debug("request_counts_lost", extra={"cause": str(error)})

    def read(self) -> list[RequestWindow]:
        """One window for each length in `WINDOWS_MIN`: so many whole minutes and the current one."""
        now = self._clock()
        this_minute = int(now // 60)
        minutes = range(this_minute - max(WINDOWS_MIN), this_minute + 1)
        with self._lock:
            own = {minute: Counter(self._own.get(minute)) for minute in minutes}
            by_minute = {minute: Counter(self._pending.get(minute)) for minute in minutes}
        everyones = True
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for minute in minutes:
                    pipeline.hgetall(_key(minute))
                for minute, fields in zip(minutes, pipeline.execute(), strict=True):
                    by_minute[minute].update(_counts(fields))
        except RedisError:
            by_minute, everyones = own, False
        return [
            _window(
                (by_minute[minute] for minute in minutes if minute >= this_minute - length),
                seconds=length * 60 + now % 60,
                everyones=everyones,
            )
            for length in WINDOWS_MIN
        ]


def _key(minute: int) -> str:
    return f"{NAMESPACE}{minute}"


def _counts(fields: Mapping[bytes, bytes]) -> Counter[Cell]:
    """The counts in one minute's hash, without fields that another program wrote."""
    counts = Counter[Cell]()
    for name, count in fields.items():
        try:
            status_class, bucket = map(int, name.split(b":"))
            if 0 <= bucket <= len(BUCKETS_S):
                counts[status_class, bucket] = int(count)
        except ValueError as error:
            foreign.record_dropped("request_stats", error)
    return counts


def _window(minutes: Iterable[Counter[Cell]], *, seconds: float, everyones: bool) -> RequestWindow:
    total: Counter[Cell] = sum(minutes, Counter())
    by_bucket = [0] * (len(BUCKETS_S) + 1)
    for (_, bucket), count in total.items():
        by_bucket[bucket] += count
    requests = sum(by_bucket)
    return RequestWindow(
        seconds=round(seconds, 1),
        requests=requests,
        rate_per_s=round(requests / seconds, 3),
        client_errors=sum(count for (status_class, _), count in total.items() if status_class == 4),
        server_errors=sum(count for (status_class, _), count in total.items() if status_class == 5),
        p50_s=_percentile(by_bucket, 0.5),
        p95_s=_percentile(by_bucket, 0.95),
        p99_s=_percentile(by_bucket, 0.99),
        everyones=everyones,
    )


def _percentile(by_bucket: list[int], share: float) -> float | None:
    """The duration that a `share` of the requests does not exceed, in seconds; None without requests.

    It is interpolated within its bucket, as Prometheus' `histogram_quantile` does. In the last bucket, which has no
    upper end, it is the lower end.
    """
    rank = share * sum(by_bucket)
    below = 0
    for bucket, count in enumerate(by_bucket):
        if count and below + count >= rank:
            if bucket == len(BUCKETS_S):
                return BUCKETS_S[-1]
            start = BUCKETS_S[bucket - 1] if bucket else 0.0
            return round(start + (BUCKETS_S[bucket] - start) * (rank - below) / count, 5)
        below += count
    return None


@process_singleton
def request_stats() -> RequestStats:
    """The statistics of this process, on the cache's Redis, which may lose them."""
    return RequestStats(get_cache_manager().redis)
