"""Counters, gauges, timers and their exposition, in one process and in several."""

import asyncio
import inspect
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from shared import metrics
from shared.errors import ConfigurationError
from shared.metrics import increment_counter, recent_operations, render, set_gauge, time_operation
from shared.settings import MetricsSettings

PROMISED_METRICS = [
    "api_requests_total",
    "api_request_duration_seconds",
    "api_requests_active",
    "database_connections_active",
    "database_query_duration_seconds",
    "cache_hits_total",
    "cache_misses_total",
    "embedding_generation_total",
    "image_generation_total",
    "job_wait_duration_seconds",
    "job_stage_duration_seconds",
    "jobs_finished_total",
    "generation_batch_size",
    "queue_depth",
    "leases_expired_total",
    "retrieval_duration_seconds",
    "retrieval_similarity",
]


@pytest.fixture(autouse=True)
def _fresh_on_the_fly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = metrics._OnTheFly()
    monkeypatch.setattr(metrics, "_on_the_fly", made)
    monkeypatch.setattr(metrics, "_recent", metrics._Recent())
    yield
    for metric in made._metrics.values():
        REGISTRY.unregister(metric)


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def exposed() -> set[str]:
    text = render()[0].decode()
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_the_promised_metrics_are_exposed() -> None:
    assert set(PROMISED_METRICS) <= exposed()
    assert len(PROMISED_METRICS) >= 15


def test_every_metric_of_the_product_is_written_by_the_product() -> None:
    """On a dashboard, a series that is always empty looks like a healthy service."""
    root = Path(metrics.__file__).parent.parent
    code = "".join(
        path.read_text()
        for folder in ("api_service", "shared", "worker_service")
        for path in (root / folder).rglob("*.py")
        if path != Path(metrics.__file__)
    ) + inspect.getsource(metrics.observe_database)
    unwritten = [
        constant
        for constant, metric in vars(metrics).items()
        if isinstance(metric, Counter | Gauge | Histogram)
        and not re.search(rf"\b{constant}\b|\"{metric._name}(_total)?\"", code)
        and f'"{metric._name.removesuffix("_duration_seconds")}"' not in code
    ]
    assert unwritten == []


def test_counters_gauges_and_timers_work_as_in_the_first_version() -> None:
    increment_counter("user_actions", labels={"action": "image_upload"})
    increment_counter("user_actions", labels={"action": "image_upload"})
    set_gauge("memory_usage_bytes", 17)
    with time_operation("database_query"):
        pass
    assert value("user_actions_total", action="image_upload") == 2
    assert value("memory_usage_bytes") == 17
    assert {"user_actions_total", "memory_usage_bytes"} <= exposed()


def test_known_metrics_can_be_written_by_name() -> None:
    before = value("embedding_generation_total", model="m")
    increment_counter("embedding_generation_total", 3, labels={"model": "m"})
    assert value("embedding_generation_total", model="m") == before + 3
    set_gauge("queue_depth", 5, labels={"queue": "q"})
    assert value("queue_depth", queue="q") == 5


def test_a_timed_block_that_raises_is_measured() -> None:
    before = value("database_query_duration_seconds_count")
    with pytest.raises(KeyError), time_operation("database_query"):
        raise KeyError
    assert value("database_query_duration_seconds_count") == before + 1


def test_every_call_of_a_timed_function_is_measured() -> None:
    @time_operation("job_stage", stage="test")
    def add(a: int, b: int) -> int:
        return a + b

    before = value("job_stage_duration_seconds_count", stage="test")
    assert [add(1, 2), add(1, b=3)] == [3, 4]
    assert add.__name__ == "add"
    assert value("job_stage_duration_seconds_count", stage="test") == before + 2


def test_an_async_function_is_measured_to_its_end() -> None:
    async def scenario() -> None:
        released = asyncio.Event()

        @time_operation("job_stage", stage="async")
        async def wait() -> str:
            await released.wait()
            return "done"

        before = value("job_stage_duration_seconds_count", stage="async")
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert value("job_stage_duration_seconds_count", stage="async") == before
        released.set()
        assert await waiting == "done"
        assert value("job_stage_duration_seconds_count", stage="async") == before + 1

    asyncio.run(scenario())


def test_a_timed_function_runs_in_many_threads_at_once() -> None:
    together = threading.Barrier(8, timeout=10)
    before = value("job_stage_duration_seconds_count", stage="threads")
    function = time_operation("job_stage", stage="threads")(together.wait)
    threads = [threading.Thread(target=function) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert value("job_stage_duration_seconds_count", stage="threads") == before + 8


@pytest.mark.parametrize("labels", [{}, {"modell": "m"}, {"model": "m", "more": "x"}])
def test_wrong_labels_are_refused(labels: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="labels"):
        increment_counter("embedding_generation_total", labels=labels)


def test_labels_of_a_metric_made_on_the_fly_stay_the_same() -> None:
    increment_counter("things", labels={"kind": "a"})
    with pytest.raises(ValueError, match="labels"):
        increment_counter("things", labels={"sort": "a"})


def test_a_gauge_cannot_be_incremented_as_a_counter() -> None:
    with pytest.raises(ValueError, match="counter"):
        increment_counter("queue_depth", labels={"queue": "q"})
    set_gauge("level", 1)
    with pytest.raises(ValueError, match="counter"):
        increment_counter("level")


def test_an_invalid_metric_name_is_refused() -> None:
    with pytest.raises(ValueError, match="metric name"):
        increment_counter("user actions")


def test_the_number_of_label_values_is_limited() -> None:
    for number in range(metrics._OnTheFly.MAX_SERIES + 50):
        increment_counter("visits", labels={"path": f"/{number}"})
    increment_counter("visits", labels={"path": "/0"})
    assert value("visits_total", path="/0") == 2
    assert value("visits_total", path="other") == 50


def test_the_number_of_metric_names_is_limited() -> None:
    for number in range(metrics._OnTheFly.MAX_METRICS + 50):
        increment_counter(f"number_{number}")
        with time_operation(f"operation_{number}"):
            pass
    assert len(metrics._on_the_fly._metrics) == metrics._OnTheFly.MAX_METRICS
    assert len(recent_operations()) <= metrics._OnTheFly.MAX_METRICS


def test_statistics_are_those_of_a_time_window() -> None:
    for seconds in range(1, 101):
        metrics.observe_duration("database_query", seconds)
    found = recent_operations(60)["database_query"]
    assert found == {"count": 100, "mean": 50.5, "p50": 51, "p95": 95, "p99": 99, "max": 100}
    assert recent_operations(0) == {}


def test_the_exposition_can_be_parsed() -> None:
    increment_counter("strange", labels={"text": 'a "quoted"\nline \\'})
    body, content_type = render()
    assert content_type.startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}
    (sample,) = [s for s in families["strange"].samples if s.name == "strange_total"]
    assert (sample.labels, sample.value) == ({"text": 'a "quoted"\nline \\'}, 1)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


SERVER = """
import sys
from shared import metrics
from shared.settings import MetricsSettings
metrics.increment_counter("leases_expired_total", 7)
ready = []
print(metrics.serve(MetricsSettings(port=int(sys.argv[1])), lambda: bool(ready)), flush=True)
sys.stdin.readline()
ready.append(True)
print("ready", flush=True)
sys.stdin.read()
"""


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def test_a_worker_exposes_its_metrics_and_whether_it_is_ready() -> None:
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        assert server.stdout.readline() == b"%d\n" % port
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert b"leases_expired_total 7.0" in answer.read()
        assert status_of(f"http://127.0.0.1:{port}/ready") == 503
        server.stdin.write(b"\n")
        server.stdin.flush()
        assert server.stdout.readline() == b"ready\n"
        assert status_of(f"http://127.0.0.1:{port}/ready") == 200
        with pytest.raises(ConfigurationError, match=r"metrics\.port"):
            metrics.serve(MetricsSettings(port=port))
        server.stdin.close()


def test_port_0_means_off() -> None:
    assert metrics.serve(MetricsSettings()) is None


API_PROCESS = """
import sys
from shared import metrics
metrics.API_REQUESTS_ACTIVE.inc(2)
metrics.increment_counter("api_requests_total", 3, labels={"method": "GET", "route": "/x", "status": "200"})
metrics.API_REQUEST_DURATION.labels("GET", "/x").observe(0.02)
metrics.set_gauge("queue_depth", int(sys.argv[1]), labels={"queue": "q"})
print("ready", flush=True)
if len(sys.argv) > 2:
    print(metrics.render()[0].decode())
sys.stdin.read()
"""


def test_api_processes_expose_their_sum_and_a_dead_one_has_no_active_requests(tmp_path: Path) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def start(*arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", API_PROCESS, *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    killed, alive = start("1"), start("2")
    for process in (killed, alive):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    killed.kill()
    killed.communicate()
    last = start("3", "and show")
    text, _ = last.communicate(timeout=30)
    alive.communicate(timeout=30)
    samples = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.removeprefix("ready\n"))
        for sample in family.samples
    }
    assert samples["api_requests_total", ("GET", "/x", "200")] == 9
    assert samples["api_request_duration_seconds_count", ("GET", "/x")] == 3
    assert samples["api_requests_active", ()] == 4
    assert samples["queue_depth", ("q",)] == 3
