"""How many requests were answered in the last minutes, and how fast: in Redis, so that every replica says the same.

Each process adds up its own requests and hands them over a second later, into one hash per minute with one field per
class of status and step of the duration. While Redis is away a process tells of its own requests alone. What it could
not hand over then is missing afterwards: sending it again could count it twice, because a Redis that did not answer in
time may still have done as it was told.
"""

import bisect
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from redis import Redis, RedisError

from shared.cache import get_cache_manager
from shared.contracts.service import RequestWindow
from shared.singleton import once

logger = logging.getLogger(__name__)

NAMESPACE = "afterimage:requests:"
WINDOWS_MIN = (1, 5, 60)
KEPT_S = (max(WINDOWS_MIN) + 2) * 60
HAND_OVER_S = 1.0
STEPS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the duration steps in seconds; a last, open step follows."""

Cell = tuple[int, int]
"""Class of the status (2 for 200 to 299) and number of the duration step."""


class RequestWindows:
    """Counts by minute. Any thread may call."""

    def __init__(self, redis: Redis, *, clock: Callable[[], float] = time.time) -> None:
        self._redis = redis
        self._clock = clock
        self._lock = threading.Lock()
        self._own: dict[int, Counter[Cell]] = {}
        """Of this process, within the longest window."""
        self._pending: dict[int, Counter[Cell]] = {}
        """Those of them that Redis has not been told."""
        self._timer: threading.Timer | None = None

    def add(self, *, status: int, seconds: float) -> None:
        """Count one answered request. Waits for nothing: a side thread hands over."""
        minute, cell = int(self._clock() // 60), (status // 100, bisect.bisect_left(STEPS_S, seconds))
        with self._lock:
            if minute not in self._own:
                self._own = {m: cells for m, cells in self._own.items() if m >= minute - max(WINDOWS_MIN)}
            for counts in (self._own, self._pending):
                counts.setdefault(minute, Counter())[cell] += 1
            if self._timer is None:
                self._timer = threading.Timer(HAND_OVER_S, self.hand_over)
                self._timer.daemon = True
                self._timer.start()

    def hand_over(self) -> None:
        """Tell Redis what it was not told yet."""
        with self._lock:
            self._timer = None
            pending, self._pending = self._pending, {}
        try:
            with self._redis.pipeline(transaction=True) as pipeline:
                for minute, cells in pending.items():
                    for (status, step), count in cells.items():
                        pipeline.hincrby(_key(minute), f"{status}:{step}", count)
                    pipeline.expire(_key(minute), KEPT_S)
                pipeline.execute()
        except RedisError as error:
            logger.debug("request_counts_lost", extra={"cause": str(error)})

    def read(self) -> list[RequestWindow]:
        """One window for each of `WINDOWS_MIN`: that many whole minutes and the running one."""
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
                    by_minute[minute].update({_cell(name): int(count) for name, count in fields.items()})
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


def _cell(name: bytes) -> Cell:
    status, step = name.split(b":")
    return int(status), int(step)


def _window(minutes: Iterable[Counter[Cell]], *, seconds: float, everyones: bool) -> RequestWindow:
    total: Counter[Cell] = sum(minutes, Counter())
    by_step = [0] * (len(STEPS_S) + 1)
    for (_, step), count in total.items():
        by_step[step] += count
    requests = sum(by_step)
    return RequestWindow(
        seconds=round(seconds, 1),
        requests=requests,
        rate_per_s=round(requests / seconds, 3),
        client_errors=sum(count for (status, _), count in total.items() if status == 4),
        server_errors=sum(count for (status, _), count in total.items() if status == 5),
        p50_s=_percentile(by_step, 0.5),
        p95_s=_percentile(by_step, 0.95),
        p99_s=_percentile(by_step, 0.99),
        everyones=everyones,
    )


def _percentile(by_step: list[int], share: float) -> float | None:
    """Interpolated within its step, as Prometheus' `histogram_quantile` does; the open step counts as its lower end."""
    rank = share * sum(by_step)
    below = 0
    for step, count in enumerate(by_step):
        if count and below + count >= rank:
            if step == len(STEPS_S):
                return STEPS_S[-1]
            start = STEPS_S[step - 1] if step else 0.0
            return round(start + (STEPS_S[step] - start) * (rank - below) / count, 5)
        below += count
    return None


@once
def request_windows() -> RequestWindows:
    """The counts of this process, on the cache's Redis: they may be lost."""
    return RequestWindows(get_cache_manager().redis)
