"""Traces of a whole stack, read in the collector that receives them."""

import json
from collections.abc import Iterator

import pytest

from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, running_stack, wait_until
from tests.trace_collector import CollectedSpan, Collector, running_collector

PROMPT = "a crimson zeppelin over water"
TOKEN = "collector-token-5d2c"
STAGES = ["claim", "embed", "retrieve", "resolve", "load_references", "generate", "store"]
BATCH_IMAGES = 4

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry libraries are not installed")


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced_stack(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack with API keys that records every trace."""
    generators = {"cheap": {"kind": "fake", "cost_ms": 300, "max_batch_size": BATCH_IMAGES}}
    environment = TEST_ENVIRONMENT | {
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps(generators),
        "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
        "AFTERIMAGE_TRACES__ENABLED": "true",
        "AFTERIMAGE_TRACES__ENDPOINT": collector.url,
        "AFTERIMAGE_TRACES__HEADERS": json.dumps({"X-Token": TOKEN}),
    }
    with running_stack(tmp_path_factory.mktemp("traced"), environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
def key(traced_stack: RunningStack) -> str:
    return traced_stack.new_key("painter", "generate", "search", "corpus:write")


@pytest.fixture
def api(traced_stack: RunningStack, key: str) -> Iterator[Api]:
    with Api(traced_stack.url, key) as api:
        yield api


def trace_of(collector: Collector, job_id: str) -> list[CollectedSpan]:
    """The spans of the job's trace, once those of all processes have arrived."""

    def spans() -> list[CollectedSpan]:
        found = [span for span in collector.of_job(job_id) if span.name == "job"]
        return collector.of_trace(found[0].trace_id) if found else []

    def is_complete() -> bool:
        known = {span.span_id for span in spans()} | {""}
        return {"job", "publish"} <= {span.name for span in spans()} and {span.parent_id for span in spans()} <= known

    wait_until(is_complete, timeout_s=30, what="the trace of the job")
    return spans()


def test_a_job_and_its_request_are_one_trace_with_every_stage(
    api: Api, collector: Collector, traced_stack: RunningStack, key: str
) -> None:
    image = api.upload(disc("crimson", background="navy"), caption="a zeppelin")
    api.searchable(image["id"])
    answer = api.http.post(
        "/rag/generate",
        json={"prompt": PROMPT, "num_images": 2, "min_similarity": -1},
        headers={"X-Request-ID": "the-request", "traceparent": f"00-{'1' * 32}-{'2' * 16}-01"},
    )
    job = api.ended(answer.raise_for_status().json()["id"])
    assert job["state"] == "succeeded"
    spans = trace_of(collector, job["id"])
    by_id = {span.span_id: span for span in spans}
    named = {span.name: span for span in spans}

    # 1. One trace, all of whose spans are connected, begun by the request; the caller did not choose its id.
    (first,) = (span for span in spans if not span.parent_id)
    assert (first.name, first.service) == ("POST /api/v1/rag/generate", "afterimage-api")
    assert {span.parent_id for span in spans} - {""} <= by_id.keys()
    assert first.trace_id != "1" * 32

    # 2. Every stage, in the process that runs it, below the job's span.
    assert [name for name in STAGES if name not in named] == []
    assert {by_id[named[name].parent_id].name for name in STAGES} == {"job"}
    assert {named[name].service for name in STAGES} == {"afterimage-worker.generate"}
    assert named["publish"].attributes["model"] == "cheap"
    assert by_id[named["embed batch"].parent_id].name == "embed"
    assert by_id[named["generate batch"].parent_id].name == "generate"
    assert named["generate batch"].attributes["items_of_job"] == 2
    assert named["generate batch"].end_ns - named["generate batch"].start_ns > 0.3e9
    assert {by_id[span.parent_id].name for span in spans if span.name in ("encode", "put")} == {"store"}
    assert named["job"].attributes["outcome"] == "succeeded"
    assert named["job"].start_ns >= named["publish"].start_ns >= first.start_ns

    # 3. The database: statements without their parameters, at the request and in the stages of the job.
    statements = [span for span in spans if "db.statement" in span.attributes and "postgres" in str(span.attributes)]
    assert {by_id[span.parent_id].name for span in statements} >= {first.name, "retrieve", "commit"}

    # 4. Ids on every span, and the trace's id on the log lines of both processes.
    assert {span.attributes.get("request_id") for span in spans} == {"the-request"}
    assert {span.attributes.get("job_id") for span in spans if span.service != "afterimage-api"} == {job["id"]}
    assert first.attributes["job_id"] == job["id"]
    for process, event in (("api", "request"), ("generate-cheap", "job_ended")):
        lines = [line for line in traced_stack.log(process).splitlines() if event in line and first.trace_id in line]
        assert lines, process

    # 5. Nothing secret leaves the service.
    sent = b"".join(body for _, body in collector.requests)
    for secret in (PROMPT, "zeppelin", key, TOKEN):
        assert secret.encode() not in sent
    assert {headers["x-token"] for headers, _ in collector.requests} == {TOKEN}


def test_each_job_of_a_bulk_is_a_trace_that_links_to_the_request_of_the_bulk(api: Api, collector: Collector) -> None:
    header = {"bulk": {"defaults": {"kind": "rag_generate", "num_images": 1, "min_similarity": -1}}}
    lines = [json.dumps(row) for row in (header, *({"prompt": f"{PROMPT} {n}"} for n in range(8)))]
    answer = api.http.post(
        "/bulks",
        content="\n".join(lines) + "\n",
        headers={"Content-Type": "application/jsonl", "X-Request-ID": "the-bulk", "Idempotency-Key": "traced"},
    )
    bulk = answer.raise_for_status().json()
    wait_until(
        lambda: api.http.get(f"/bulks/{bulk['id']}").json()["state"] == "completed", timeout_s=60, what="the bulk"
    )
    items = api.http.get(f"/bulks/{bulk['id']}/items").json()["items"]
    traces = {item["job_id"]: trace_of(collector, item["job_id"]) for item in items}
    assert len({spans[0].trace_id for spans in traces.values()}) == len(traces) == 8
    (request,) = (span for span in collector.spans if span.name == "POST /api/v1/bulks")
    for job_id, spans in traces.items():
        by_id = {span.span_id: span for span in spans}
        named = {span.name: span for span in spans}
        (first,) = (span for span in spans if not span.parent_id)
        assert (first.name, first.linked_traces) == ("bulk item", (request.trace_id,))
        assert first.attributes["bulk_id"] == bulk["id"]
        assert {span.parent_id for span in spans} - {""} <= by_id.keys()
        assert {"publish", "job", "embed batch", "generate batch", "encode", "put", *STAGES} <= named.keys()
        assert {span.attributes.get("request_id") for span in spans} == {"the-bulk"}
        assert {span.attributes.get("job_id") for span in spans} == {job_id}

    # A batch of several jobs is one more trace, and the jobs' own spans of it link there.
    batches = [span for span in collector.spans if span.name == "generate batch" and not span.parent_id]
    assert batches
    for batch in batches:
        assert len(set(batch.linked_traces)) == batch.attributes["items"] > 1
        for trace_id in batch.linked_traces:
            shares = [span for span in collector.of_trace(trace_id) if span.name == "generate batch"]
            assert [share.linked_traces for share in shares] == [(batch.trace_id,)]
            assert shares[0].attributes["items_of_job"] == 1


def test_a_search_reaches_into_the_embed_worker(api: Api, collector: Collector) -> None:
    answer = api.http.post("/search", json={"query": PROMPT}, headers={"X-Request-ID": "the-search"})
    assert answer.status_code == 200

    def spans() -> list[CollectedSpan]:
        return [span for span in collector.spans if span.attributes.get("request_id") == "the-search"]

    wait_until(lambda: any(span.name == "embed query" for span in spans()), timeout_s=30, what="the embed worker")
    wait_until(lambda: any(not span.parent_id for span in spans()), timeout_s=30, what="the request")
    assert len({span.trace_id for span in spans()}) == 1
    assert {"POST /api/v1/search", "publish query", "embed query", "embed batch"} <= {span.name for span in spans()}


def test_the_span_of_a_stream_ends_with_the_stream(api: Api, collector: Collector, traced_stack: RunningStack) -> None:
    job = api.submit(prompt=PROMPT, min_similarity=-1)
    name = "GET /api/v1/jobs/<job_id>/events"
    assert "succeeded" in api.http.get(f"/jobs/{job['id']}/events").raise_for_status().text
    wait_until(lambda: any(span.name == name for span in collector.spans), timeout_s=30, what="the stream's span")
    (stream,) = (span for span in collector.spans if span.name == name)
    assert stream.end_ns - stream.start_ns > 0.3e9, "as long as the job"
    for process in ("api", "generate-cheap", "embed"):
        assert "Failed to detach context" not in traced_stack.log(process)


def test_background_work_and_probes_are_no_traces(api: Api, collector: Collector, traced_stack: RunningStack) -> None:
    api.http.get("/health")
    first = {span.name for span in collector.spans if not span.parent_id}
    assert first
    assert all(
        name.startswith(("GET /", "POST /", "DELETE /", "bulk item")) or name.endswith(("batch", "commit"))
        for name in first
    ), first
    assert not any("/health" in name for name in first)
