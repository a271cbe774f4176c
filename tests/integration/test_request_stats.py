"""Statistics of the requests of the last minutes, with a real Redis and without one."""

import pytest
from redis import Redis
from sqlalchemy.orm import Session

from ops.local.stack import LocalStack
from shared.contracts.jobs import JobState
from shared.db import workers
from shared.request_stats import RequestStats
from tests.factories import make_job
from tests.integration.conftest import API, Client, a_key
from tests.stack import wait_until

HALF_PAST = 1_800_000_030.0
"""Thirty seconds into a minute."""


class Clock:
    def __init__(self) -> None:
        self.now = HALF_PAST

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replicas(cache_url: str, clock: Clock) -> list[RequestStats]:
    """The statistics of two processes."""
    return [RequestStats(Redis.from_url(cache_url, socket_timeout=0.5), clock=clock) for _ in range(2)]


def test_every_replica_reports_the_requests_of_all_replicas(replicas: list[RequestStats]) -> None:
    first, second = replicas
    for _ in range(98):
        first.add(status=200, seconds=0.004)
    second.add(status=404, seconds=0.2)
    second.add(status=503, seconds=2)
    for replica in replicas:
        replica.flush()
    minute, _, hour = first.read()
    assert first.read() == second.read()
    assert (minute.seconds, minute.requests, minute.client_errors, minute.server_errors) == (90, 100, 1, 1)
    assert minute.rate_per_s == pytest.approx(100 / 90, abs=0.001)
    assert minute.p50_s == pytest.approx(0.0025 + 0.0025 * 50 / 98, abs=1e-5), "interpolated within its bucket"
    assert minute.p99_s == pytest.approx(0.25), "the upper end of the bucket of the 99th request"
    assert hour.requests == 100
    assert hour.seconds == 3630


def test_a_request_is_reported_at_once_and_counted_once(replicas: list[RequestStats]) -> None:
    replica = replicas[0]
    replica.add(status=200, seconds=0.01)
    assert replica.read()[0].requests == 1, "before the flush"
    replica.flush()
    replica.flush()
    assert replica.read()[0].requests == 1, "after the flush"


def test_requests_leave_each_window_when_their_minute_does(replicas: list[RequestStats], clock: Clock) -> None:
    replica = replicas[0]
    replica.add(status=200, seconds=0.01)
    replica.flush()
    for minutes, expected in ((1, [1, 1, 1]), (2, [0, 1, 1]), (5, [0, 1, 1]), (6, [0, 0, 1]), (61, [0, 0, 0])):
        clock.now = HALF_PAST + minutes * 60
        assert [window.requests for window in replica.read()] == expected, f"after {minutes} minutes"


def test_without_redis_a_process_reports_its_own_requests_and_counts_none_twice(
    replicas: list[RequestStats], servers: LocalStack
) -> None:
    first, second = replicas
    first.add(status=200, seconds=0.01)
    first.flush()
    servers.control.freeze("cache")
    try:
        for _ in range(3):
            first.add(status=200, seconds=0.01)
            first.flush()
        minute = first.read()[0]
        assert (minute.requests, minute.everyones) == (4, False)
    finally:
        servers.control.thaw("cache")
    wait_until(lambda: second.read()[0].everyones, timeout_s=10, what="Redis to answer")
    first.add(status=200, seconds=0.01)
    first.flush()
    assert 2 <= second.read()[0].requests <= 5, (
        "the two flushed requests, and at most the three whose flush got no answer"
    )


def test_statistics_contain_recent_requests_and_jobs(client: Client) -> None:
    # Buffered: a request counts when its answer is closed.
    submitted = client.post(f"{API}/generate", json={"prompt": "a cat"}, buffered=True).json
    client.post(f"{API}/jobs/{submitted['id']}/cancel", buffered=True)
    stats = client.get(f"{API}/stats").json
    assert [window["requests"] for window in stats["recent_requests"]] == [2, 2, 2]
    assert [window["ended"] for window in stats["recent_jobs"]] == [{"canceled": 1}] * 3
    assert stats["recent_jobs"][0]["wait_p50_s"] is None, "it was never started"
    assert 0 <= stats["recent_jobs"][0]["total_p50_s"] < 60


def test_only_an_operator_sees_the_statistics_of_the_whole_service(keyed_client: Client, session: Session) -> None:
    make_job(session, owner="team", state=JobState.SUCCEEDED)
    make_job(session, owner="team")
    make_job(session, owner="others")
    workers.heartbeat(session, "generate.cheap-1@secret-host", kind="generate", model="cheap", state="ready")
    own, operator = a_key(session, "search", owner="team"), a_key(session, "admin", owner="operators")

    answer = keyed_client.get(f"{API}/stats", headers=own)
    stats = answer.json
    assert (stats["jobs"], stats["queues"], stats["generations"]) == ({"queued": 1, "succeeded": 1}, {"cheap": 1}, 0)
    assert [worker["model"] for worker in stats["workers"]] == ["cheap"]
    assert "secret-host" not in answer.text
    assert (stats["cache"], stats["pools"], stats["recent_requests"], stats["operations"]) == ({}, {}, [], {})
    page = keyed_client.get("/queue", headers=a_key(session, "generate", owner="team"))
    assert "<b>1</b> jobs queued" in page.text

    stats = keyed_client.get(f"{API}/stats", headers=operator).json
    assert stats["jobs"] == {"queued": 2, "succeeded": 1}
    assert stats["workers"][0]["id"] == "generate.cheap-1@secret-host"
    assert stats["pools"] != {}
