"""Traces of jobs in one process: the API, the dispatch, the attempts, a real database and CLIP."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared import tracing
from shared.db.session import session_scope
from shared.db.tables import Job
from shared.messaging import queue
from shared.settings import Settings, get_settings
from tests.integration.conftest import API, AppFactory, Client, FlushingClient, messages
from tests.trace_collector import CollectedSpan, Collector, running_collector
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.worker_models import Models

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry libraries are not installed")

PROMPT = "a crimson zeppelin over water"
STAGES = ["claim", "embed", "retrieve", "resolve", "load_references", "generate", "store"]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


class ReadingClient(FlushingClient):
    """A client that reads every answer to its end, as a server sends it: the span of a request ends there."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        return super().open(*args, buffered=True, **kwargs)


@pytest.fixture
def client(settings: Settings, new_app: AppFactory) -> Client:
    app = new_app(settings)
    app.test_client_class = ReadingClient
    return app.test_client()


@pytest.fixture
def traced_client(collector: Collector, client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The API, and everything else in this process, while traces are recorded."""
    monkeypatch.setenv("AFTERIMAGE_TRACES__ENABLED", "true")
    monkeypatch.setenv("AFTERIMAGE_TRACES__ENDPOINT", collector.url)
    get_settings.cache_clear()
    tracing.start(get_settings(), "test")
    yield client
    tracing.stop()


def run(job_id: UUID, models: Models, leases: JobLeases) -> Outcome:
    return run_job(job_id, models=models, leases=leases, settings=get_settings(), worker="test")


def connected(spans: list[CollectedSpan]) -> CollectedSpan:
    """The first span of a trace that has exactly one, and all parents of the others."""
    (first,) = (span for span in spans if not span.parent_id)
    assert {span.parent_id for span in spans} - {""} <= {span.span_id for span in spans}
    return first


def test_a_job_and_its_request_are_one_trace_with_every_stage(
    traced_client: Client, collector: Collector, models: Models, leases: JobLeases
) -> None:
    headers = {"X-Request-ID": "the-request", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    request = {"prompt": PROMPT, "num_images": 2, "min_similarity": -1}
    answer = traced_client.post(f"{API}/rag/generate", json=request, headers=headers)
    assert answer.status_code == 202, answer.text
    assert run(UUID(answer.json["id"]), models, leases) is Outcome.SUCCEEDED
    tracing.stop()
    (job,) = (span for span in collector.spans if span.name == "job")
    spans = collector.of_trace(job.trace_id)
    by_id = {span.span_id: span for span in spans}
    named = {span.name: span for span in spans}

    # 1. The request begins the trace, and its caller does not choose the id.
    assert connected(spans).name == "POST /api/v1/rag/generate"
    assert job.trace_id != "1" * 32

    # 2. Every stage is below the job, and the work of the models below its stage.
    assert [name for name in STAGES if name not in named] == []
    assert {by_id[named[name].parent_id].name for name in STAGES} == {"job"}
    assert named["publish"].attributes["model"] == "cheap"
    assert by_id[named["embed batch"].parent_id].name == "embed"
    assert by_id[named["generate batch"].parent_id].name == "generate"
    assert {by_id[span.parent_id].name for span in spans if span.name in ("encode", "put")} == {"store"}
    assert len([span for span in spans if span.name == "encode"]) == 2
    assert job.attributes["outcome"] == "succeeded"
    assert not [span for span in spans if span.failed]

    # 3. Statements and Redis commands, without their values.
    systems = {span.attributes.get("db.system") for span in spans}
    assert {"postgresql", "redis"} <= systems
    statements = [span for span in spans if span.attributes.get("db.system") == "postgresql"]
    assert {by_id[span.parent_id].name for span in statements} >= {"POST /api/v1/rag/generate", "retrieve", "commit"}
    assert b"zeppelin" not in b"".join(body for _, body in collector.requests)

    # 4. Ids on every span.
    assert {span.attributes.get("request_id") for span in spans} == {"the-request"}
    after = [span for span in spans if by_id.get(span.parent_id) is not None and span.start_ns >= job.start_ns]
    assert {span.attributes.get("job_id") for span in after} == {answer.json["id"]}
    assert connected(spans).attributes["job_id"] == answer.json["id"]
    assert connected(spans).attributes["http.response.status_code"] == 202


def test_each_job_of_a_bulk_is_a_trace_that_links_to_the_request_of_the_bulk(
    traced_client: Client, collector: Collector, models: Models, leases: JobLeases, session: Session
) -> None:
    lines = '{"bulk": {"defaults": {"kind": "generate"}}}\n' + f'{{"prompt": "{PROMPT}"}}\n' * 6
    headers = {"Content-Type": "application/jsonl", "X-Request-ID": "the-bulk"}
    answer = traced_client.post(f"{API}/bulks", data=lines, headers=headers)
    assert answer.status_code == 202, answer.text
    job_ids = list(session.scalars(select(Job.id)))
    assert len(job_ids) == 6
    with ThreadPoolExecutor(6) as threads:
        outcomes = list(threads.map(lambda job_id: run(job_id, models, leases), job_ids))
    assert set(outcomes) == {Outcome.SUCCEEDED}
    tracing.stop()
    (request,) = (span for span in collector.spans if span.name == "POST /api/v1/bulks")
    jobs = [span for span in collector.spans if span.name == "job"]
    assert {span.attributes["job_id"] for span in jobs} == set(map(str, job_ids))
    assert len({span.trace_id for span in jobs}) == 6
    for job in jobs:
        spans = collector.of_trace(job.trace_id)
        first = connected(spans)
        assert (first.name, first.linked_traces) == ("bulk item", (request.trace_id,))
        assert first.attributes["bulk_id"] == answer.json["id"]
        assert {"publish", "generate batch", "encode", "put", *STAGES} <= {span.name for span in spans}
        assert {span.attributes.get("request_id") for span in spans} == {"the-bulk"}
        assert {span.attributes.get("job_id") for span in spans} == {job.attributes["job_id"]}


def test_work_that_jobs_share_links_to_each_of_them(
    traced_client: Client, collector: Collector, models: Models, leases: JobLeases
) -> None:
    ids = [UUID(traced_client.post(f"{API}/generate", json={"prompt": f"{PROMPT} {n}"}).json["id"]) for n in range(4)]
    with ThreadPoolExecutor(4) as threads:
        assert {Outcome.SUCCEEDED} == set(threads.map(lambda job_id: run(job_id, models, leases), ids))
    tracing.stop()
    shared = [span for span in collector.spans if span.name.endswith(("batch", "commit")) and not span.parent_id]
    assert shared, "four jobs at once share something"
    for work in shared:
        assert len(work.linked_traces) > 1
        for trace_id in work.linked_traces:
            shares = [span for span in collector.of_trace(trace_id) if work.trace_id in span.linked_traces]
            assert [span.name for span in shares] == [work.name] * work.linked_traces.count(trace_id)


def test_a_lost_message_and_a_new_attempt_continue_the_trace(
    traced_client: Client, collector: Collector, models: Models, leases: JobLeases
) -> None:
    job_id = UUID(traced_client.post(f"{API}/generate", json={"prompt": PROMPT}).json["id"])
    queue.broker().flushall()
    with session_scope() as session:
        session.execute(text("update jobs set published_at = null, published_lane = null"))
    queue.dispatch_jobs("cheap")
    assert len(messages(queue.generate_queue("cheap"))) == 1
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    tracing.stop()
    (job,) = (span for span in collector.spans if span.name == "job")
    spans = collector.of_trace(job.trace_id)
    connected(spans)
    assert [span.name for span in spans].count("publish") == 2


def test_a_job_from_before_traces_were_on_gets_a_trace_of_its_own(
    client: Client,
    collector: Collector,
    models: Models,
    leases: JobLeases,
    session: Session,
    request: pytest.FixtureRequest,
) -> None:
    job_id = UUID(client.post(f"{API}/generate", json={"prompt": PROMPT}).json["id"])
    assert session.get_one(Job, job_id).trace_context is None
    assert collector.requests == []
    request.getfixturevalue("traced_client")
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    tracing.stop()
    (job,) = (span for span in collector.spans if span.name == "job")
    assert connected(collector.of_trace(job.trace_id)).name == "job"


def test_a_failed_job_is_a_failed_span_without_its_message(
    traced_client: Client, collector: Collector, models: Models, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot draw {PROMPT}")

    monkeypatch.setattr(models.image_model, "generate", fail)
    job_id = UUID(traced_client.post(f"{API}/generate", json={"prompt": PROMPT}).json["id"])
    assert run(job_id, models, leases) is Outcome.FAILED
    tracing.stop()
    failed = {span.name: span.attributes["error.type"] for span in collector.spans if span.failed}
    assert failed == {"generate batch": "RuntimeError", "generate": "RuntimeError", "job": "generation_failed"}
    assert b"zeppelin" not in b"".join(body for _, body in collector.requests)


def test_a_caller_continues_its_trace_only_where_the_settings_allow_it(
    traced_client: Client, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_TRACES__CONTINUE_REQUESTS", "true")
    get_settings.cache_clear()
    for flag in ("00", "01"):
        headers = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-{flag}"}
        assert traced_client.get(f"{API}/jobs", headers=headers).status_code == 200
    assert traced_client.get(f"{API}/jobs", headers={"traceparent": "nonsense"}).status_code == 200
    tracing.stop()
    requests = [span for span in collector.spans if span.name == "GET /api/v1/jobs"]
    assert sorted((span.trace_id == "1" * 32, span.parent_id) for span in requests) == [(False, ""), (True, "2" * 16)]


def test_probes_and_background_work_are_not_recorded(traced_client: Client, collector: Collector) -> None:
    assert traced_client.get("/health").status_code == 200
    assert traced_client.get("/metrics").status_code == 200
    queue.dispatch_jobs("cheap")
    assert traced_client.get(f"{API}/jobs/none?secret=zeppelin").status_code == 422
    assert traced_client.get("/no/such/zeppelin").status_code == 404
    tracing.stop()
    assert {span.name for span in collector.spans if not span.parent_id} == {"GET /api/v1/jobs/<job_id>", "GET unknown"}
    assert b"zeppelin" not in b"".join(body for _, body in collector.requests)
