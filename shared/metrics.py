"""Every metric of the product, and the functions that update them.

Product code passes the metric object, so that a misspelt metric fails at import. Other code may pass a name; an
unknown name registers a new metric.

Several API processes share one exposition if `PROMETHEUS_MULTIPROC_DIR` names a directory before the first import of
this module: prometheus_client decides at import. The parent process empties that directory before it starts them.
Workers and the reconciler have one process each and serve their own numbers on `settings.metrics.port`, beside whether
they are ready.
"""

import inspect
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Self, TypeVar, cast

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    make_wsgi_app,
    start_http_server,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext

from shared.contracts.jobs import JobState
from shared.errors import ConfigurationError
from shared.settings import MetricsSettings

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

P = ParamSpec("P")
R = TypeVar("R")
Metric = Counter | Gauge | Histogram
Labels = Mapping[str, str]

DURATION = "_duration_seconds"
"""Ends the name of every histogram of durations."""

REQUEST_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
JOB_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)

# --- API ----------------------------------------------------------------------------------------------------------

API_REQUESTS = Counter("api_requests_total", "Requests answered.", ["method", "route", "status"])
API_REQUEST_DURATION = Histogram(
    "api_request_duration_seconds", "Time to answer a request.", ["method", "route"], buckets=REQUEST_BUCKETS_S
)
API_REQUESTS_ACTIVE = Gauge("api_requests_active", "Requests being answered.", multiprocess_mode="livesum")
UPLOADS = Counter("uploads_total", "Uploaded files by outcome.", ["outcome"])

# --- database -----------------------------------------------------------------------------------------------------

DATABASE_CONNECTIONS_ACTIVE = Gauge(
    "database_connections_active", "Database connections in use.", multiprocess_mode="livesum"
)
DATABASE_QUERY_DURATION = Histogram(
    "database_query_duration_seconds", "Duration of one statement.", buckets=REQUEST_BUCKETS_S
)

# --- cache --------------------------------------------------------------------------------------------------------

CACHE_HITS = Counter("cache_hits_total", "Cache reads that found a value.", ["prefix"])
CACHE_MISSES = Counter("cache_misses_total", "Cache reads that found no value.", ["prefix"])
CACHE_FALLBACKS = Counter("cache_fallbacks_total", "Cache calls that memory served because Redis did not answer.")

# --- jobs ---------------------------------------------------------------------------------------------------------

JOBS_SUBMITTED = Counter("jobs_submitted_total", "Jobs accepted.", ["kind"])
JOBS_FINISHED = Counter("jobs_finished_total", "Jobs that reached a final state.", ["state"])
for _state in JobState:
    if _state.is_final:
        # Without this, the first job that dies creates its series with the value 1, and `increase` of it is 0.
        JOBS_FINISHED.labels(_state.value)
JOB_WAIT = Histogram(
    "job_wait_duration_seconds", "Time from submit to the first attempt.", ["model"], buckets=JOB_BUCKETS_S
)
JOB_DURATION = Histogram("job_duration_seconds", "Duration of one attempt at a job.", ["model"], buckets=JOB_BUCKETS_S)
JOB_STAGE = Histogram("job_stage_duration_seconds", "Duration of one stage of a job.", ["stage"], buckets=JOB_BUCKETS_S)
QUEUE_DEPTH = Gauge(
    "queue_depth",
    "Queued jobs of a model, without those of paused bulks.",
    ["queue"],
    multiprocess_mode="livemostrecent",
)
BULK_ITEMS_WAITING = Gauge(
    "bulk_items_waiting", "Items of running bulks that have not become jobs yet.", multiprocess_mode="livemostrecent"
)
LEASES_EXPIRED = Counter("leases_expired_total", "Jobs whose lease expired because their worker stopped renewing it.")
WEBHOOKS_OVERDUE = Gauge(
    "webhooks_overdue",
    "Webhook deliveries that have been due for more than five minutes.",
    multiprocess_mode="livemostrecent",
)
WEBHOOK_DELIVERIES = Counter("webhook_deliveries_total", "Attempts to deliver a webhook, by outcome.", ["outcome"])
BLOBS_SWEPT = Counter("blobs_swept_total", "Blobs deleted because no row refers to them.")
BLOB_BYTES_SWEPT = Counter("blob_bytes_swept_total", "Bytes of the blobs deleted by the sweeper.")
ROWS_RETIRED = Counter("rows_retired_total", "Rows deleted because their retention time is over.", ["table"])
IMAGE_LEASES_EXPIRED = Counter(
    "image_leases_expired_total", "Pending images whose lease expired because their worker stopped renewing it."
)
MESSAGES_DROPPED = Counter(
    "messages_dropped_total", "Things in Redis that another program wrote and that were dropped, by place.", ["source"]
)
JOBS_REPUBLISHED = Counter(
    "jobs_republished_total", "Queued jobs published again because the broker had lost their message."
)
JOBS_UNSERVED = Counter(
    "jobs_unserved_total", "Queued jobs that failed because no settings name their model and no worker serves it."
)

# --- servers, as the reconciler sees them -------------------------------------------------------------------------

COMPONENT_UP = Gauge(
    "component_up", "1 while this server does its work, else 0.", ["component"], multiprocess_mode="livemostrecent"
)
STORAGE_FREE_BYTES = Gauge(
    "storage_free_bytes", "Free bytes of the file system of the blob store.", multiprocess_mode="livemostrecent"
)
STORAGE_SIZE_BYTES = Gauge(
    "storage_size_bytes", "Size of the file system of the blob store.", multiprocess_mode="livemostrecent"
)

# --- models -------------------------------------------------------------------------------------------------------

EMBEDDING_GENERATION = Counter("embedding_generation_total", "Vectors computed.", ["model"])
EMBEDDING_DURATION = Histogram("embedding_duration_seconds", "Duration of one call of an embedding model.", ["model"])
IMAGE_GENERATION = Counter("image_generation_total", "Images generated.", ["model"])
IMAGE_GENERATION_DURATION = Histogram(
    "image_generation_duration_seconds",
    "Duration of one call of an image model, with the batches that interrupted it.",
    ["model"],
    buckets=JOB_BUCKETS_S,
)
GENERATION_BATCH_SIZE = Histogram(
    "generation_batch_size",
    "Images or texts in one call of a model.",
    ["model"],
    buckets=(1, 2, 3, 4, 6, 8, 12, 16, 32, 64),
)
GENERATION_MEMORY_SAVED = Counter(
    "generation_memory_saved_total",
    "Model calls that did not fit in memory and were repeated in a way that needs less memory.",
    ["model", "by"],
)
ENGINE_CALLS = Counter(
    "engine_calls_total",
    "Calls of engines that draw for a model, by outcome: drawn, busy, refused, failed or unreachable.",
    ["model", "engine", "outcome"],
)
SAFETY_DECISIONS = Counter(
    "safety_decisions_total",
    "Prompts and images in which a content policy recognised a concept.",
    ["concept", "stage", "action"],
)
CONTENT_TIMESTAMPS = Counter(
    "content_timestamps_total",
    "Signed outputs by time stamp: stamped, missing (the service gave none), or not_asked shortly after that.",
    ["outcome"],
)
MODEL_LOAD_DURATION = Histogram(
    "model_load_duration_seconds", "Time to load and warm up one model.", ["model"], buckets=JOB_BUCKETS_S
)

# --- retrieval ----------------------------------------------------------------------------------------------------

RETRIEVAL_DURATION = Histogram(
    "retrieval_duration_seconds", "Duration of one vector search.", buckets=REQUEST_BUCKETS_S
)
EMBEDDING_SPACE_VECTORS = Gauge(
    "embedding_space_vectors", "Vectors in an embedding space.", ["space"], multiprocess_mode="livemostrecent"
)
EMBEDDING_SPACE_MISSING = Gauge(
    "embedding_space_missing",
    "Searchable images that a worker still has to embed for a space.",
    ["space"],
    multiprocess_mode="livemostrecent",
)
EMBEDDING_SPACE_FAILED = Gauge(
    "embedding_space_failed",
    "Searchable images that no worker could embed for a space.",
    ["space"],
    multiprocess_mode="livemostrecent",
)
EMBEDDING_SPACE_ACTIVE = Gauge(
    "embedding_space_active",
    "1 for the space that searches use, else 0.",
    ["space"],
    multiprocess_mode="livemostrecent",
)
RETRIEVAL_SIMILARITY = Histogram(
    "retrieval_similarity",
    "Cosine similarity of the images found.",
    buckets=[step / 20 for step in range(-4, 21)],
)
CALIBRATION_OUTDATED = Gauge(
    "calibration_outdated",
    "1 while the relevance gate of the active space does not fit the collection, else 0.",
    multiprocess_mode="livemostrecent",
)
PLANNER_ANSWERS = Counter(
    "planner_answers_total",
    "Prompts for which the planner was asked, by outcome: answered, or the reason why the rules decided.",
    ["outcome"],
)

_KNOWN: Mapping[str, Metric] = {
    name: metric
    for metric in list(globals().values())
    if isinstance(metric, Counter | Gauge | Histogram)
    for name in {metric._name, f"{metric._name}_total" if isinstance(metric, Counter) else metric._name}
}


class _OnTheFly:
    """Metrics that this module does not define. They are registered at first use, and their number is bounded."""

    MAX_METRICS = 64
    MAX_SERIES = 200

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._metrics: dict[str, Metric] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}

    def get(self, kind: type[Metric], name: str, labels: Labels) -> Metric | None:
        """Return the metric, or `None` if `MAX_METRICS` others exist already."""
        with self._lock:
            metric = self._metrics.get(name)
            if metric is None and len(self._metrics) < self.MAX_METRICS:
                if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", name):
                    raise ValueError(f"{name!r} is not a metric name")
                help_text, label_names = "A metric that its caller named.", sorted(labels)
                if kind is Gauge:
                    metric = Gauge(name, help_text, label_names, multiprocess_mode="livemostrecent")
                else:
                    metric = kind(name, help_text, label_names)
                self._metrics[name] = metric
            return metric

    def bounded(self, name: str, labels: Labels) -> Labels:
        """Return `labels`, with every value replaced by `other` if `name` already has `MAX_SERIES` other series."""
        values = tuple(labels[label] for label in sorted(labels))
        with self._lock:
            series = self._series.setdefault(name, set())
            if values in series or len(series) < self.MAX_SERIES:
                series.add(values)
                return labels
        return dict.fromkeys(labels, "other")


_on_the_fly = _OnTheFly()
"""One per process, like the registry of prometheus_client."""


def expect_jobs_of(model: str, *, stages: Iterable[str]) -> None:
    """Create the series of a model's jobs. Prometheus sees no increase in a series that begins with its first job."""
    for metric in (JOB_WAIT, JOB_DURATION, IMAGE_GENERATION, IMAGE_GENERATION_DURATION, GENERATION_BATCH_SIZE):
        metric.labels(model)
    for stage in stages:
        JOB_STAGE.labels(stage)


def increment_counter(counter: Counter | str, value: float = 1, labels: Labels | None = None) -> None:
    """Add `value` >= 0 to a counter of this module, or to one that is created now.

    Raises:
        ValueError: `labels` are not the labels of the counter, or the name is not one of a counter.
    """
    series = _series(Counter, counter, labels or {})
    if series is not None:
        series.inc(value)


def set_gauge(gauge: Gauge | str, value: float, labels: Labels | None = None) -> None:
    """Set a gauge of this module, or one that is created now.

    Raises:
        ValueError: as `increment_counter`.
    """
    series = _series(Gauge, gauge, labels or {})
    if series is not None:
        series.set(value)


def time_operation(operation: Histogram | str, **labels: str) -> "TimedOperation":
    """Measure a block or, as a decorator, every call of a plain or async function.

    The seconds go to the histogram, or for a name to `<operation>_duration_seconds`, and to `recent_operations`. A
    block that raises is measured too.
    """
    return TimedOperation(operation, labels)


class TimedOperation:
    def __init__(self, operation: Histogram | str, labels: Labels) -> None:
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


def observe_duration(operation: Histogram | str, seconds: float, labels: Labels | None = None) -> None:
    """Record one duration as `time_operation` does, for code that cannot be wrapped in a block."""
    if isinstance(operation, str):
        name, series = operation, _series(Histogram, f"{operation}{DURATION}", labels or {})
    else:
        name, series = operation._name.removesuffix(DURATION), _series(Histogram, operation, labels or {})
    if series is not None:
        series.observe(seconds)
    _recent.add(name, seconds)


def _series(kind: type[Any], metric_or_name: Metric | str, labels: Labels) -> Any:
    """The series of a metric with these labels; None when too many metrics were registered by name."""
    if isinstance(metric_or_name, str):
        name, metric = metric_or_name, _KNOWN.get(metric_or_name) or _on_the_fly.get(kind, metric_or_name, labels)
    else:
        name, metric = metric_or_name._name, metric_or_name
    if metric is None:
        return None
    if not isinstance(metric, kind):
        raise ValueError(f"{name} is not a {kind.__name__.lower()}")
    if set(labels) != set(metric._labelnames):
        raise ValueError(f"{name} has the labels {sorted(metric._labelnames)}, not {sorted(labels)}")
    return metric.labels(**_on_the_fly.bounded(name, labels)) if labels else metric


def observe_database(engine: Engine) -> None:
    """Update the database metrics from the events of an engine."""

    def started(connection: Connection, *_: Any) -> None:
        connection.info.setdefault("statements_started", []).append(time.perf_counter())

    def ended(connection: Connection, *_: Any) -> None:
        observe_duration(DATABASE_QUERY_DURATION, time.perf_counter() - connection.info["statements_started"].pop())

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
    """The latest durations of each operation, in memory."""

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
    """Return statistics of the last `window_s` seconds of this process, by operation.

    Each has `count`, and in seconds `mean`, `p50`, `p95`, `p99` and `max`. Only the latest 2048 durations count.
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
    """Return all metrics in Prometheus' text format and its content type, for all processes that share a directory."""
    return generate_latest(_registry()), CONTENT_TYPE_LATEST


def serve(settings: MetricsSettings, is_ready: Callable[[], bool] = lambda: True) -> int | None:
    """Serve the metrics at `http://<host>:<port>/metrics` from a background thread until the process ends.

    `/ready` beside it answers 200 while `is_ready` returns True, else 503. Returns the port, or `None` if it is 0,
    which means off.

    Raises:
        ConfigurationError: the process cannot listen on the port.
    """
    if settings.port == 0:
        return None
    registry = _registry()
    try:
        server, _ = start_http_server(settings.port, settings.host, registry=registry)
    except OSError as error:
        raise ConfigurationError(f"metrics.port: cannot listen on {settings.host}:{settings.port}: {error}") from error
    server.set_app(_with_readiness(make_wsgi_app(registry), is_ready))
    return settings.port


def _with_readiness(metrics_app: "WSGIApplication", is_ready: Callable[[], bool]) -> "WSGIApplication":
    def app(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        if environ["PATH_INFO"] != "/ready":
            return metrics_app(environ, start_response)
        ready = is_ready()
        start_response("200 OK" if ready else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"ready\n" if ready else b"not ready\n"]

    return app


def _registry() -> CollectorRegistry:
    directory = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not directory:
        return REGISTRY
    _forget_ended_processes(Path(directory))
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def _forget_ended_processes(directory: Path) -> None:
    """Remove the live gauges of ended processes; their counters stay, as the history of the service."""
    for file in directory.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid)  # type: ignore[no-untyped-call]
        except PermissionError:
            pass
