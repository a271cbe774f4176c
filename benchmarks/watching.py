"""Looking on while something runs: what a process holds in memory, how long others wait, how busy the machine is."""

import os
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import psutil

LOOK_S = 0.5


class Watch(threading.Thread):
    """Calls `look` again and again, `pause_s` apart, as long as the block lasts; what it said, with when."""

    def __init__(self, look: Callable[[], float], *, pause_s: float = LOOK_S) -> None:
        super().__init__(daemon=True)
        self._look, self._pause_s = look, pause_s
        self._end = threading.Event()
        self._error: Exception | None = None
        self.seen: list[tuple[float, float]] = []

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.seen]

    def between(self, since: float, until: float) -> list[float]:
        """What was said of looks that began in that time of `time.monotonic()`."""
        return [value for at, value in self.seen if since <= at <= until]

    def run(self) -> None:
        while not self._end.is_set():
            at = time.monotonic()
            try:
                self.seen.append((at, self._look()))
            except Exception as error:
                self._error = error  # raised where the block ends: figures with holes are none
                return
            self._end.wait(self._pause_s)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end.set()
        self.join()
        if self._error is not None and error is None:
            raise self._error


def resident_mib(pid: int) -> float:
    """Memory of a process and all below it, in MiB; pages that they share count for each."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def cpu_s(pids: Mapping[str, int | None]) -> dict[str, float]:
    """Processor time of these processes and all below them so far, in seconds, no matter who else runs."""
    spent: dict[str, float] = defaultdict(float)
    for name, pid in pids.items():
        for each in () if pid is None else (process := psutil.Process(pid), *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                spent[name] += times.user + times.system
    return spent


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def load_average() -> float:
    return round(os.getloadavg()[0], 1)


def in_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Count, median, 95th percentile and worst, in milliseconds."""
    if not seconds:
        return {"count": 0}
    last = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    figures = {"p50_ms": statistics.median(seconds), "p95_ms": last, "worst_ms": max(seconds)}
    return {"count": len(seconds), **{name: round(value * 1000, 1) for name, value in figures.items()}}
