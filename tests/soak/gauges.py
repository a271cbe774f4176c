"""Regular measurements of each process of a stack, and whether they grow."""

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import redis
from sqlalchemy import Engine, text

from tests.stack import RunningStack

MIB = 2**20
WARM_UP = 0.25
"""The share of the samples, at the start, that do not count: pools and caches fill, libraries are loaded."""
LEAST_SAMPLES = 12
SLACK = {"uss_mib": 12.0, "rss_mib": 24.0, "files": 6.0, "threads": 6.0, "connections": 4.0}
"""How far the median of the last quarter may exceed that of the first, beside `SHARE` of the first."""
SHARE = 0.05


@dataclass(frozen=True)
class Sample:
    """One process and its descendants at one moment."""

    at_s: float
    rss_mib: float
    uss_mib: float
    files: int
    threads: int

    @classmethod
    def of(cls, pid: int, at_s: float) -> "Sample":
        root = psutil.Process(pid)
        rss = uss = files = threads = 0
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess), process.oneshot():
                memory = process.memory_full_info()
                rss, uss = rss + memory.rss, uss + memory.uss
                files, threads = files + process.num_fds(), threads + process.num_threads()
        return cls(at_s, rss / MIB, uss / MIB, files, threads)


@dataclass(frozen=True)
class Trend:
    """How a value developed after the warm-up. `first` and `last`: medians of the first and last quarter."""

    first: float
    last: float
    slope_per_hour: float
    grew: bool

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], *, slack: float) -> "Trend":
        """Build a trend from pairs of seconds and value."""
        counted = points[int(len(points) * WARM_UP) :]
        quarter = max(1, len(counted) // 4)
        first = statistics.median(value for _, value in counted[:quarter])
        last = statistics.median(value for _, value in counted[-quarter:])
        slope = 0.0
        if len({at_s for at_s, _ in counted}) > 1:
            slope, _ = statistics.linear_regression(*zip(*counted, strict=True))
        return cls(
            first=round(first, 2),
            last=round(last, 2),
            slope_per_hour=round(slope * 3600, 2),
            grew=last - first > slack + SHARE * first,
        )


class Gauges:
    """Samples of all processes, and of the numbers of connections that the servers report."""

    def __init__(self, stack: RunningStack, engine: Engine) -> None:
        self._stack = stack
        self._engine = engine
        self._started = time.monotonic()
        self.processes: dict[str, list[Sample]] = defaultdict(list)
        self.pids: dict[str, set[int]] = defaultdict(set)
        self.connections: dict[str, list[tuple[float, float]]] = defaultdict(list)

    @contextmanager
    def watching(self, every_s: float) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(every_s):
                self.read()

        thread = threading.Thread(target=watch, name="gauges")
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def read(self) -> None:
        at_s = time.monotonic() - self._started
        for name, process in self._stack.control.states().items():
            if process.pid is not None:
                with suppress(psutil.NoSuchProcess):
                    self.processes[name].append(Sample.of(process.pid, at_s))
                    self.pids[name].add(process.pid)
        with self._engine.connect() as connection:
            count = connection.execute(
                text("select count(*) from pg_stat_activity where datname = current_database()")
            ).scalar_one()
        self.connections["database"].append((at_s, float(count)))
        environment = self._stack.environment()
        for name in ("queue", "cache"):
            with redis.Redis.from_url(environment[f"AFTERIMAGE_{name.upper()}__URL"]) as server:
                self.connections[name].append((at_s, float(server.info("clients")["connected_clients"])))

    def trends(self) -> dict[str, dict[str, Trend]]:
        """The trends by process (or server, for connections) and by measured value."""
        found: dict[str, dict[str, Trend]] = defaultdict(dict)
        for name, samples in self.processes.items():
            for what in ("uss_mib", "rss_mib", "files", "threads"):
                if (name, what) == ("postgres", "files"):
                    continue  # by design each Postgres process keeps up to a thousand files open
                points = [(sample.at_s, float(getattr(sample, what))) for sample in samples]
                found[name][what] = Trend.of(points, slack=SLACK[what])
        for name, points in self.connections.items():
            found[f"connections to {name}"]["connections"] = Trend.of(points, slack=SLACK["connections"])
        return dict(found)

    def series(self) -> dict[str, Any]:
        """All samples by process: seconds, MiB, files and threads."""
        processes = {
            name: [[round(s.at_s, 1), round(s.rss_mib, 1), round(s.uss_mib, 1), s.files, s.threads] for s in samples]
            for name, samples in self.processes.items()
        }
        connections = {
            name: [[round(at_s, 1), int(count)] for at_s, count in points] for name, points in self.connections.items()
        }
        return {"columns": ["at_s", "rss_mib", "uss_mib", "files", "threads"], **processes, "connections": connections}
