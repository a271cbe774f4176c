"""The stack under faults, from outside: what a user and an operator see while something is down."""

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, running_stack, wait_until

QUICK = {
    # 0.1 s a batch, so that there is work in progress when something is killed.
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "cheap", "cost_ms": 100}}',
    "AFTERIMAGE_JOBS__LEASE_S": "4",
    "AFTERIMAGE_JOBS__HEARTBEAT_S": "1",
    "AFTERIMAGE_JOBS__RECONCILE_S": "1",
    "AFTERIMAGE_JOBS__TRANSIENT_RETRY_DELAY_S": "1",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """Two of every process that may be several, and short leases, so that a lost one is taken back in seconds."""
    options = ("--api", "2", "--embed", "2", "--generate", "2")
    with running_stack(tmp_path_factory.mktemp("pair"), environment=TEST_ENVIRONMENT | QUICK, options=options) as stack:
        yield stack


@pytest.fixture
def one(pair: RunningStack) -> Iterator[Api]:
    api = Api(pair.api_url("api"))
    yield api
    api.http.close()


@pytest.fixture
def other(pair: RunningStack) -> Iterator[Api]:
    api = Api(pair.api_url("api-2"))
    yield api
    api.http.close()


def test_a_job_submitted_here_is_polled_streamed_and_canceled_there(one: Api, other: Api) -> None:
    done = one.submit(prompt="polled elsewhere")
    assert other.ended(done["id"])["state"] == "succeeded"

    streamed = one.submit(prompt="streamed elsewhere")
    with other.http.stream("GET", f"/jobs/{streamed['id']}/events") as stream:
        names = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert [name for name in names if name != "progress"] == ["queued", "started", "resolved", "succeeded"]

    canceled = one.submit(prompt="canceled elsewhere")
    answer = other.http.post(f"/jobs/{canceled['id']}/cancel")
    assert answer.status_code in (200, 409)
    assert one.ended(canceled["id"])["state"] in ("canceled", "succeeded")


def test_an_upload_here_is_searchable_there(one: Api, other: Api) -> None:
    image = one.upload(disc("teal"))
    other.searchable(image["id"])
    found = other.http.post("/search", files={"image": disc("teal")}, data={"k": "1"}).json()
    assert found["results"][0]["image_id"] == image["id"]


def test_every_job_ends_although_the_broker_was_away_for_twenty_seconds(one: Api, pair: RunningStack) -> None:
    submitted = [one.submit(prompt=f"before {number}")["id"] for number in range(20)]
    pair.control.stop("queue")
    away_since = time.monotonic()
    submitted += [one.submit(prompt=f"meanwhile {number}")["id"] for number in range(5)]
    threading.Event().wait(20 - (time.monotonic() - away_since))
    pair.control.start("queue")
    submitted += [one.submit(prompt=f"after {number}")["id"] for number in range(5)]
    assert {one.ended(job_id)["state"] for job_id in submitted} == {"succeeded"}


def test_every_job_ends_although_the_broker_came_back_empty(one: Api, pair: RunningStack) -> None:
    for name in ("generate-cheap", "generate-cheap-2"):
        pair.control.stop(name)
    submitted = [one.submit(prompt=f"wiped {number}")["id"] for number in range(10)]
    pair.flush_queue()
    for name in ("generate-cheap", "generate-cheap-2"):
        pair.control.start(name)
    assert {one.ended(job_id)["state"] for job_id in submitted} == {"succeeded"}


def test_the_jobs_of_a_killed_worker_are_run_by_another(one: Api, pair: RunningStack) -> None:
    submitted = [one.submit(prompt=f"killed {number}", num_images=4)["id"] for number in range(40)]
    wait_until(lambda: one.job(submitted[0])["state"] != "queued", timeout_s=20, what="work to begin")
    pair.control.kill("generate-cheap")
    assert {one.ended(job_id)["state"] for job_id in submitted} == {"succeeded"}
    assert max(one.job(job_id)["attempt"] for job_id in submitted) > 1, "somebody's work was interrupted"
    assert {len(one.job(job_id)["outputs"]) for job_id in submitted} == {4}


def test_a_worker_that_is_asked_to_stop_loses_no_job(one: Api, pair: RunningStack) -> None:
    submitted = [one.submit(prompt=f"stopped {number}")["id"] for number in range(20)]
    pair.control.stop("generate-cheap-2")
    assert {one.ended(job_id)["state"] for job_id in submitted} == {"succeeded"}
    pair.control.start("generate-cheap-2")


def test_with_a_frozen_broker_a_submit_answers_in_time_and_its_job_runs_after_the_thaw(
    one: Api, pair: RunningStack
) -> None:
    pair.control.freeze("queue")
    try:
        started = time.monotonic()
        job = one.submit(prompt="frozen")
        assert time.monotonic() - started < 2
    finally:
        pair.control.thaw("queue")
    assert one.ended(job["id"])["state"] == "succeeded"


ANSWERS_WITHOUT_POSTGRES = ("/health/live", "/api/v1/health/live", "/metrics", "/api/v1/openapi.json", "/docs")


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_without_postgres_every_operation_answers_503_within_three_seconds(
    one: Api, pair: RunningStack, fault: str
) -> None:
    operations = [
        (method, path)
        for path, methods in one.http.get("/openapi.json").json()["paths"].items()
        for method in methods
        if path not in ANSWERS_WITHOUT_POSTGRES
    ]
    assert len(operations) > 20
    (pair.control.stop if fault == "stopped" else pair.control.freeze)("postgres")
    try:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda operation: call(one.url, *operation), operations))
    finally:
        (pair.control.start if fault == "stopped" else pair.control.thaw)("postgres")
    wrong = [answer for answer in answers if answer[2] != 503 or answer[3] > 3]
    assert wrong == []
    assert httpx.get(f"{one.url}/health/live").status_code == 200
    wait_until(lambda: one.http.get("/health").status_code == 200, timeout_s=30, what="the service to recover")
    assert one.ended(one.submit(prompt="recovered")["id"])["state"] == "succeeded"


SOME_ID = "00000000-0000-4000-8000-00000000abcd"
ENDINGS: dict[str, dict[str, Any]] = {
    "post .../rag/generate": {"json": {"prompt": "a cat"}},
    "post .../generate": {"json": {"prompt": "a cat"}},
    "get .../rag/search": {"params": {"prompt": "a cat"}},
    "post .../search": {"json": {"query": "a cat"}},
    "post .../bulks": {"content": b'{"prompt": "a cat"}\n', "headers": {"Content-Type": "application/jsonl"}},
    "post .../lines": {
        "content": b'{"prompt": "a cat"}\n',
        "headers": {"Content-Type": "application/jsonl"},
        "params": {"from_line": 0},
    },
    "post .../complete": {"json": {"lines": 1}},
    "patch .../images/{}": {"json": {"caption": "a cat"}},
    "post .../owners": {"json": {"name": "team"}},
    "patch .../owners/{}": {"json": {"daily_images": 5}},
    "post .../keys": {"json": {"name": "laptop", "scopes": ["search"]}},
    "patch .../keys/{}": {"json": {"expires_at": None}},
    "post .../rotate": {"json": {"overlap_s": 0}},
}
"""What a valid request of an operation needs besides its path; those that are not here need nothing."""


def _ends(operation: str, ending: str) -> bool:
    method, end = ending.split(" ...")
    return operation.startswith(f"{method} ") and operation.endswith(end)


def call(url: str, method: str, path: str) -> tuple[str, str, int, float]:
    """One valid request: method, path, status, seconds."""
    operation = f"{method} {re.sub('{[^}]*}', '{}', path)}"
    arguments = next((ENDINGS[ending] for ending in ENDINGS if _ends(operation, ending)), {})
    if path.endswith("/upload"):
        arguments = {"files": {"file": ("a.png", disc("navy"))}}
    started = time.monotonic()
    answer = httpx.request(method, url + re.sub("{[^}]*}", SOME_ID, path), timeout=20, **arguments)
    return method, path, answer.status_code, time.monotonic() - started


@pytest.mark.parametrize("fault", ["stopped", "frozen"])
def test_without_postgres_every_page_says_so_within_three_seconds(one: Api, pair: RunningStack, fault: str) -> None:
    (pair.control.stop if fault == "stopped" else pair.control.freeze)("postgres")
    try:
        addresses = ("/", "/references?prompt=a+cat", "/search?query=a+cat", "/memory", "/gallery", "/queue")
        for address in (*addresses, f"/jobs/{SOME_ID}"):
            started = time.monotonic()
            answer = httpx.get(one.url + address, timeout=20)
            assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (503, "text/html"), address
            assert time.monotonic() - started < 3, address
    finally:
        (pair.control.start if fault == "stopped" else pair.control.thaw)("postgres")
    wait_until(lambda: one.http.get("/health").status_code == 200, timeout_s=30, what="the service to recover")


def test_with_a_frozen_redis_a_person_still_looks_around_and_generates(one: Api, pair: RunningStack) -> None:
    for name in ("queue", "cache"):
        pair.control.freeze(name)
    try:
        for address in ("/", "/?prompt=a+cat", "/memory", "/gallery", "/queue"):
            started = time.monotonic()
            assert httpx.get(one.url + address, timeout=20).status_code == 200, address
            assert time.monotonic() - started < 6, address  # a prompt waits for its vector: `retrieval.text_timeout_s`
        sent = httpx.post(f"{one.url}/", data={"prompt": "from a page"}, headers={"Origin": one.url})
        assert sent.status_code == 303
    finally:
        for name in ("queue", "cache"):
            pair.control.thaw(name)
    assert one.ended(sent.headers["Location"].rpartition("/")[2])["state"] == "succeeded"


def test_flower_shows_each_job_under_its_own_id_and_failed_jobs_as_failed(one: Api, pair: RunningStack) -> None:
    image = one.upload(disc("olive"))["id"]
    one.searchable(image)
    succeeded = one.submit(prompt="seen in flower")["id"]
    assert one.ended(succeeded)["state"] == "succeeded"
    workers = ("generate-cheap", "generate-cheap-2")
    for name in workers:
        pair.control.stop(name)
    failing = one.submit(prompt="drawn from what is gone", reference_ids=[image])["id"]
    one.http.delete(f"/images/{image}").raise_for_status()
    for name in workers:
        pair.control.start(name)
    assert one.ended(failing)["error"]["code"] == "reference_deleted"

    def state_in_flower(job_id: str) -> str | None:
        answer = httpx.get(f"{pair.flower_url}/api/task/info/{job_id}", auth=pair.flower_login)
        return answer.json()["state"] if answer.is_success else None

    wait_until(lambda: state_in_flower(succeeded) == "SUCCESS", timeout_s=20, what="the success in Flower")
    wait_until(lambda: state_in_flower(failing) == "FAILURE", timeout_s=20, what="the failure in Flower")
    assert httpx.get(f"{pair.flower_url}/api/tasks").status_code == 401, "a password is asked for"
