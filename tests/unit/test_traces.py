"""Traces of one process: what is recorded, what is sent, and what a bad collector does to the process."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psycopg2
import pytest
from pydantic import SecretStr
from structlog.contextvars import bound_contextvars

from shared import tracing
from shared.errors import ConfigurationError
from shared.settings import Settings, TraceSettings, load_settings
from tests.stack import wait_until
from tests.trace_collector import Collector, running_collector

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry libraries are not installed")

from shared import trace_recorder  # needs the libraries

Start = Callable[..., None]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start to record with these settings; the test's end stops it."""

    def start_with(collector_url: str, **settings: object) -> None:
        tracing.start(settings_of(collector_url, **settings), "api")

    yield start_with
    tracing.stop()


def settings_of(collector_url: str, **settings: object) -> Settings:
    return load_settings(traces=TraceSettings(enabled=True, endpoint=collector_url, **settings))


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


def test_without_traces_nothing_of_opentelemetry_is_loaded_and_a_span_does_nothing() -> None:
    code = """
import sys
import api_service.app
from shared import tracing
from shared.settings import get_settings
tracing.start(get_settings(), "api")
with tracing.span("a", kind="server", root=True):
    assert tracing.current() is None
with tracing.shared_span("b", {}, iter(())):
    tracing.annotate({"c": 1})
# redis-py imports the part of the SDK for metrics, if the SDK is installed.
ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.instrumentation", "google.protobuf")
loaded = [name for name in sys.modules if name.startswith(ours)]
assert not loaded, loaded
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AFTERIMAGE_")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_missing_library_stops_the_start_with_the_name_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "LIBRARIES", ("opentelemetry_missing.sdk",))
    with pytest.raises(ConfigurationError, match=r"pip install '\.\[traces\]'"):
        tracing.start(settings_of("http://127.0.0.1:1/v1/traces"), "api")
    tracing.start(load_settings(), "api")
    assert not tracing.is_on()


def test_spans_of_a_block_are_one_trace_with_the_ids_of_the_log_lines(start: Start, collector: Collector) -> None:
    start(collector.url, headers={"Authorization": SecretStr("Bearer collector-key")})
    with bound_contextvars(request_id="r-1"), tracing.span("request", kind="server", root=True):
        context = tracing.current()
        with bound_contextvars(job_id="j-1"), tracing.span("stage", {"items": 2, "left_out": None}):
            pass
    with tracing.span("elsewhere", kind="consumer", within=context):
        tracing.annotate({"outcome": "failed", "error.type": "model_error"})
    tracing.stop()
    spans = {span.name: span for span in collector.spans}
    assert len({span.trace_id for span in spans.values()}) == 1
    assert spans["stage"].parent_id == spans["elsewhere"].parent_id == spans["request"].span_id
    assert spans["stage"].attributes == {"items": 2, "request_id": "r-1", "job_id": "j-1"}
    assert spans["elsewhere"].failed
    assert not spans["request"].failed
    assert collector.requests[0][0]["authorization"] == "Bearer collector-key"


def test_shared_work_has_a_trace_that_links_to_all_members_and_a_span_in_each_of_theirs(
    start: Start, collector: Collector
) -> None:
    start(collector.url)
    contexts = []
    for number in range(2):
        ids = {"request_id": f"r-{number}", "job_id": str(number)}
        with bound_contextvars(**ids), tracing.span("request", kind="server", root=True):
            contexts.append(tracing.current())
    members = [(context, {"items_of_job": 1 + number}) for number, context in enumerate(contexts)]
    with (
        bound_contextvars(job_id="of the thread"),
        pytest.raises(RuntimeError),
        tracing.shared_span("batch", {"items": 3}, [*members, (None, {})]),
    ):
        raise RuntimeError
    with tracing.shared_span("batch alone", {"items": 1}, members[:1]), tracing.span("part"):
        pass
    tracing.stop()
    (work,) = (span for span in collector.spans if span.name == "batch" and not span.parent_id)
    shares = [span for span in collector.spans if span.name == "batch" and span.parent_id]
    assert work.attributes == {"items": 3, "error.type": "RuntimeError"}
    requests = {span.span_id: span for span in collector.spans if span.name == "request"}
    assert {span.trace_id for span in requests.values()} == set(work.linked_traces)
    assert [(share.linked_traces, share.failed) for share in shares] == [((work.trace_id,), True)] * 2
    assert [requests[share.parent_id].attributes["request_id"] for share in shares] == ["r-0", "r-1"]
    assert [(share.attributes["job_id"], share.attributes["request_id"]) for share in shares] == [
        ("0", "r-0"),
        ("1", "r-1"),
    ]
    alone = {span.name: span for span in collector.spans if span.name in ("batch alone", "part")}
    assert alone["batch alone"].parent_id in requests
    assert alone["part"].attributes == {"job_id": "0", "request_id": "r-0"}


def test_the_ratio_chooses_whole_traces(start: Start, collector: Collector) -> None:
    start(collector.url, sample_ratio=0.5)
    for _ in range(200):
        with tracing.span("request", kind="server", root=True):
            context = tracing.current()
            with tracing.span("stage"):
                pass
        with tracing.span("job", kind="consumer", within=context):
            pass
        with tracing.shared_span("batch", {}, [(context, {}), (context, {})]):
            pass
    tracing.stop()
    names = [span.name for span in collector.spans]
    assert 50 < names.count("request") < 150
    assert names.count("stage") == names.count("job") == names.count("request")
    assert names.count("batch") == 3 * names.count("request")


def test_work_without_a_request_or_a_job_is_not_recorded(start: Start, collector: Collector) -> None:
    start(collector.url)
    with tracing.span("heartbeat"):
        pass
    with tracing.span("request", kind="server", root=True):
        pass
    tracing.stop()
    assert [span.name for span in collector.spans] == ["request"]


def test_the_message_of_an_exception_is_not_sent(start: Start, collector: Collector) -> None:
    start(collector.url)
    recorder = tracing._recorder
    assert recorder is not None
    with tracing.span("request", kind="server", root=True):
        with pytest.raises(psycopg2.Error), recorder._tracer.start_as_current_span("a library's span"):
            raise psycopg2.IntegrityError("Failing row contains (a secret prompt)")
        with pytest.raises(ValueError, match="secret"), tracing.span("our span"):
            raise ValueError("a secret prompt")
    tracing.stop()
    assert {span.name for span in collector.spans if span.failed} == {"a library's span", "our span"}
    assert b"secret" not in b"".join(body for _, body in collector.requests)


def test_a_collector_that_does_not_answer_delays_nothing_and_costs_bounded_memory(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with running_collector(answers=False) as frozen:
        start(frozen.url, timeout_s=0.5)
        recorder = tracing._recorder
        assert recorder is not None
        begun = time.monotonic()
        for _ in range(3 * trace_recorder.MAX_WAITING_SPANS):
            with tracing.span("request", kind="server", root=True):
                pass
        assert time.monotonic() - begun < 20, "about 0.1 ms each"
        (waiting,) = (
            processor._batch_processor._queue
            for processor in recorder._provider._active_span_processor._span_processors
            if hasattr(processor, "_batch_processor")
        )
        assert len(waiting) <= trace_recorder.MAX_WAITING_SPANS
        assert frozen.requests
        wait_until(lambda: events(caplog), timeout_s=30, what="the line in the log")
        begun = time.monotonic()
        tracing.stop()
        assert time.monotonic() - begun < trace_recorder.CLOSE_TIMEOUT_S + 3


def test_a_collector_that_is_away_is_logged_once_a_minute_without_its_address(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        start(f"http://127.0.0.1:{unused.getsockname()[1]}/v1/traces", timeout_s=0.5)
        for _ in range(3 * trace_recorder.MAX_EXPORTED_SPANS):
            with tracing.span("request", kind="server", root=True):
                pass
        wait_until(lambda: events(caplog), timeout_s=30, what="the line in the log")
        tracing.stop()
    assert len(events(caplog)) == 1
    assert [record.name for record in caplog.records if record.name.startswith("opentelemetry.exporter")] == []


def events(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.message == "traces_not_exported"]
