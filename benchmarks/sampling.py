"""Measurements during a run: memory and processor time of processes, latencies, load average."""

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

SAMPLE_INTERVAL_S = 0.5


class Sampler(threading.Thread):
    """Context manager that calls `measure` repeatedly, `pause_s` apart, and keeps (time, value) samples."""

    def __init__(self, measure: Callable[[], float], *, pause_s: float = SAMPLE_INTERVAL_S) -> None:
        super().__init__(daemon=True)
        self._measure, self._pause_s = measure, pause_s
        self._end = threading.Event()
        self._error: Exception | None = None
        self.samples: list[tuple[float, float]] = []

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.samples]

    def between(self, since: float, until: float) -> list[float]:
        """Return the values of measurements that started between two times of `time.monotonic()`."""
        return [value for at, value in self.samples if since <= at <= until]

    def run(self) -> None:
        while not self._end.is_set():
            at = time.monotonic()
            try:
                self.samples.append((at, self._measure()))
            except Exception as error:
                self._error = error  # raised at the end of the block, because samples are missing
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
    """Return the memory of a process and its descendants in MiB; shared pages count for each process."""
    total = 0
    process = psutil.Process(pid)
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


def cpu_s(pids: Mapping[str, int | None]) -> dict[str, float]:
    """Return the processor time so far of each process and its descendants, in seconds; None for a pid counts 0."""
    spent: dict[str, float] = defaultdict(float)
    for name, pid in pids.items():
        for each in () if pid is None else (process := psutil.Process(pid), *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                spent[name] += times.user + times.system
    return spent


def time_call_s(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def load_average() -> float:
    return round(os.getloadavg()[0], 1)


def latency_summary(seconds: Sequence[float]) -> dict[str, float]:
    """Return count, median, 95th percentile and maximum, in milliseconds."""
    if not seconds:
        return {"count": 0}
    last = statistics.quantiles(seconds, n=20, method="inclusive")[-1] if len(seconds) > 1 else seconds[0]
    figures = {"p50_ms": statistics.median(seconds), "p95_ms": last, "worst_ms": max(seconds)}
    return {"count": len(seconds), **{name: round(value * 1000, 1) for name, value in figures.items()}}
