"""Every metric of the product, and the three calls that feed them.

Several API processes share one exposition when `PROMETHEUS_MULTIPROC_DIR` names a directory before this module is
first imported (prometheus_client decides at import); whoever starts the processes empties it first. Workers and the
reconciler have one process each and show their own numbers on `settings.metrics.port`.
"""

import inspect
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from shared.errors import ConfigurationError
from shared.settings import MetricsSettings

P = ParamSpec("P")
R = TypeVar("R")
Metric = Counter | Gauge | Histogram
Labels = Mapping[str, str]

SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)

# --- API ----------------------------------------------------------------------------------------------------------

API_REQUESTS = Counter("api_requests_total", "Requests answered.", ["method", "route", "status"])
API_REQUEST_DURATION = Histogram(
    "api_request_duration_seconds", "Time to answer a request.", ["method", "route"], buckets=SHORT
)
API_REQUESTS_ACTIVE = Gauge("api_requests_active", "Requests being answered.", multiprocess_mode="livesum")
UPLOADS = Counter("uploads_total", "Uploaded files by what became of them.", ["outcome"])

# --- database -----------------------------------------------------------------------------------------------------

DATABASE_CONNECTIONS_ACTIVE = Gauge(
    "database_connections_active", "Database connections in use.", multiprocess_mode="livesum"
)
DATABASE_QUERY_DURATION = Histogram("database_query_duration_seconds", "Time of one statement.", buckets=SHORT)

# --- cache --------------------------------------------------------------------------------------------------------

CACHE_HITS = Counter("cache_hits_total", "Answers found in the cache.", ["prefix"])
CACHE_MISSES = Counter("cache_misses_total", "Answers the cache did not have.", ["prefix"])
CACHE_FALLBACKS = Counter("cache_fallbacks_total", "Calls that memory served because Redis did not answer.")

# --- jobs ---------------------------------------------------------------------------------------------------------

JOBS_SUBMITTED = Counter("jobs_submitted_total", "Jobs accepted.", ["kind"])
JOBS_FINISHED = Counter("jobs_finished_total", "Jobs that reached a final state.", ["state"])
JOB_WAIT = Histogram("job_wait_duration_seconds", "From accepted to started.", ["model"], buckets=LONG)
JOB_DURATION = Histogram("job_duration_seconds", "From started to finished.", ["model"], buckets=LONG)
JOB_STAGE = Histogram("job_stage_duration_seconds", "Time in one stage of a job.", ["stage"], buckets=LONG)
QUEUE_DEPTH = Gauge("queue_depth", "Jobs waiting.", ["queue"], multiprocess_mode="livemostrecent")
BULK_ITEMS_WAITING = Gauge(
    "bulk_items_waiting", "Items of running bulks that are no jobs yet.", multiprocess_mode="livemostrecent"
)
LEASES_EXPIRED = Counter("leases_expired_total", "Jobs taken back from a silent worker.")
BLOBS_SWEPT = Counter("blobs_swept_total", "Blobs removed because nothing names them.")
BLOB_BYTES_SWEPT = Counter("blob_bytes_swept_total", "Their size.")
ROWS_RETIRED = Counter("rows_retired_total", "Rows removed because they are older than is kept.", ["table"])
IMAGE_LEASES_EXPIRED = Counter("image_leases_expired_total", "Waiting images taken back from a silent worker.")
JOBS_REPUBLISHED = Counter("jobs_republished_total", "Queued jobs whose message was gone from the broker.")

# --- models -------------------------------------------------------------------------------------------------------

EMBEDDING_GENERATION = Counter("embedding_generation_total", "Vectors computed.", ["model"])
EMBEDDING_DURATION = Histogram("embedding_duration_seconds", "One call of an embedding model.", ["model"])
IMAGE_GENERATION = Counter("image_generation_total", "Images generated.", ["model"])
IMAGE_GENERATION_DURATION = Histogram(
    "image_generation_duration_seconds",
    "One call of a generating model, and what passed it.",
    ["model"],
    buckets=LONG,
)
GENERATION_BATCH_SIZE = Histogram(
    "generation_batch_size", "Images in one call of a model.", ["model"], buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
)
GENERATION_MEMORY_SAVED = Counter(
    "generation_memory_saved_total",
    "Model calls that did not fit in memory and were repeated in a way that needs less.",
    ["model", "by"],
)
SAFETY_DECISIONS = Counter(
    "safety_decisions_total",
    "Prompts and images in which a content policy recognised a concept.",
    ["concept", "stage", "action"],
)
MODEL_LOAD_DURATION = Histogram(
    "model_load_duration_seconds", "Loading and warming one model.", ["model"], buckets=LONG
)

# --- retrieval ----------------------------------------------------------------------------------------------------

RETRIEVAL_DURATION = Histogram("retrieval_duration_seconds", "One vector search.", buckets=SHORT)
RETRIEVAL_SIMILARITY = Histogram(
    "retrieval_similarity",
    "Cosine similarity of what was found.",
    buckets=[step / 20 for step in range(-4, 21)],
)

_KNOWN: Mapping[str, Metric] = {
    name: metric
    for metric in list(globals().values())
    if isinstance(metric, Counter | Gauge | Histogram)
    for name in {metric._name, f"{metric._name}_total" if isinstance(metric, Counter) else metric._name}
}


class _OnTheFly:
    """Metrics that a call names and this file does not: registered at first use, few, with few label values."""

    MAX_METRICS = 64
    MAX_SERIES = 200

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[str, Metric] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}

    def get(self, kind: type[Metric], name: str, labels: Labels) -> Metric | None:
        """The metric; None when there are too many already."""
        with self._lock:
            metric = self._metrics.get(name)
            if metric is None and len(self._metrics) < self.MAX_METRICS:
                if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", name):
                    raise ValueError(f"{name!r} is not a metric name")
                help_text, label_names = "Named by its caller.", sorted(labels)
                if kind is Gauge:
                    metric = Gauge(name, help_text, label_names, multiprocess_mode="livemostrecent")
                else:
                    metric = kind(name, help_text, label_names)
                self._metrics[name] = metric
            return metric

    def bounded(self, name: str, labels: Labels) -> Labels:
        """`labels`, or `other` in place of each value when `name` has as many series as it may."""
        values = tuple(labels[label] for label in sorted(labels))
        with self._lock:
            series = self._series.setdefault(name, set())
            if values in series or len(series) < self.MAX_SERIES:
                series.add(values)
                return labels
        return dict.fromkeys(labels, "other")


_on_the_fly = _OnTheFly()
"""Per process, like prometheus_client's own registry."""


def increment_counter(name: str, value: float = 1, labels: Labels | None = None) -> None:
    """Add `value` >= 0 to a counter: one of this file, or one made now.

    Raises:
        ValueError: the labels are not those of the counter, or `name` is no counter.
    """
    counter = _series(Counter, name, labels or {})
    if counter is not None:
        counter.inc(value)


def set_gauge(name: str, value: float, labels: Labels | None = None) -> None:
    """Set a gauge: one of this file, or one made now. Raises ValueError like `increment_counter`."""
    gauge = _series(Gauge, name, labels or {})
    if gauge is not None:
        gauge.set(value)


def time_operation(operation: str, **labels: str) -> "TimedOperation":
    """Measure a block or, as a decorator, every call of a plain or async function.

    The time goes to the histogram `<operation>_duration_seconds` and, in memory, to `recent_operations`. A block that
    raises is measured too.
    """
    return TimedOperation(operation, labels)


class TimedOperation:
    def __init__(self, operation: str, labels: Labels) -> None:
        self._operation = operation
        self._labels = labels
        self._started = 0.0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        observe_duration(self._operation, time.perf_counter() - self._started, self._labels)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def timed_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                with TimedOperation(self._operation, self._labels):
                    return await function(*args, **kwargs)

            return cast(Callable[P, R], timed_coroutine)

        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with TimedOperation(self._operation, self._labels):
                return function(*args, **kwargs)

        return timed


def observe_duration(operation: str, seconds: float, labels: Labels | None = None) -> None:
    """Record one duration as `time_operation` does, for what cannot be wrapped in a block."""
    histogram = _series(Histogram, f"{operation}_duration_seconds", labels or {})
    if histogram is not None:
        histogram.observe(seconds)
    _recent.add(operation, seconds)


def _series(kind: type[Any], name: str, labels: Labels) -> Any:
    metric = _KNOWN.get(name) or _on_the_fly.get(kind, name, labels)
    if metric is None:
        return None
    if not isinstance(metric, kind):
        raise ValueError(f"{name} is no {kind.__name__.lower()}")
    if set(labels) != set(metric._labelnames):
        raise ValueError(f"{name} has the labels {sorted(metric._labelnames)}, not {sorted(labels)}")
    return metric.labels(**_on_the_fly.bounded(name, labels)) if labels else metric


def observe_database(engine: Engine) -> None:
    """Feed the database metrics from an engine's own events."""

    def started(connection: Connection, *_: Any) -> None:
        connection.info.setdefault("statements_started", []).append(time.perf_counter())

    def ended(connection: Connection, *_: Any) -> None:
        observe_duration("database_query", time.perf_counter() - connection.info["statements_started"].pop())

    def failed(context: ExceptionContext) -> None:
        if context.connection is not None and context.connection.info.get("statements_started"):
            ended(context.connection)

    event.listen(engine, "before_cursor_execute", started)
    event.listen(engine, "after_cursor_execute", ended)
    event.listen(engine, "handle_error", failed)
    event.listen(engine.pool, "checkout", lambda *_: DATABASE_CONNECTIONS_ACTIVE.inc())
    event.listen(engine.pool, "checkin", lambda *_: DATABASE_CONNECTIONS_ACTIVE.dec())


# --- time windows -------------------------------------------------------------------------------------------------


class _Recent:
    """The latest durations per operation, in memory."""

    KEPT = 2048

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._durations: dict[str, deque[tuple[float, float]]] = {}

    def add(self, operation: str, seconds: float) -> None:
        with self._lock:
            if operation in self._durations or len(self._durations) < _OnTheFly.MAX_METRICS:
                self._durations.setdefault(operation, deque(maxlen=self.KEPT)).append((time.monotonic(), seconds))

    def since(self, start: float) -> dict[str, list[float]]:
        with self._lock:
            return {
                operation: [seconds for at, seconds in durations if at >= start]
                for operation, durations in self._durations.items()
            }


_recent = _Recent()


def recent_operations(window_s: float = 300) -> dict[str, dict[str, float]]:
    """What this process measured in the last `window_s` seconds, by operation.

    For each: `count`, and in seconds `mean`, `p50`, `p95`, `p99`, `max`. At most the latest 2048 of each count.
    """
    statistics = {}
    for operation, durations in _recent.since(time.monotonic() - window_s).items():
        if durations:
            durations.sort()
            last = len(durations) - 1
            statistics[operation] = {
                "count": float(len(durations)),
                "mean": sum(durations) / len(durations),
                **{f"p{percent}": durations[round(last * percent / 100)] for percent in (50, 95, 99)},
                "max": durations[-1],
            }
    return statistics


# --- exposition ---------------------------------------------------------------------------------------------------


def render() -> tuple[bytes, str]:
    """All metrics in Prometheus' text format, and its content type; of all processes when they share a directory."""
    return generate_latest(_registry()), CONTENT_TYPE_LATEST


def serve(settings: MetricsSettings) -> int | None:
    """Show the metrics on `http://<host>:<port>/metrics` from a side thread until the process ends.

    Returns the port, or None when it is 0, which means off.

    Raises:
        ConfigurationError: the port cannot be listened on.
    """
    if settings.port == 0:
        return None
    try:
        start_http_server(settings.port, settings.host, registry=_registry())
    except OSError as error:
        raise ConfigurationError(f"metrics.port: cannot listen on {settings.host}:{settings.port}: {error}") from error
    return settings.port


def _registry() -> CollectorRegistry:
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not directory:
        return REGISTRY
    _forget_ended_processes(Path(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def _forget_ended_processes(directory: Path) -> None:
    """An ended process has no active requests; its counters stay, as the service's history."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
        except PermissionError:
            pass
