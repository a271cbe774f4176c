"""Requests of the last minutes, over a real Redis and without one."""

import pytest
from redis import Redis

from ops.local.stack import LocalStack
from shared.request_stats import RequestWindows
from tests.integration.conftest import API, Client
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
def replicas(cache_url: str, clock: Clock) -> list[RequestWindows]:
    """The counts of two processes."""
    return [RequestWindows(Redis.from_url(cache_url, socket_timeout=0.5), clock=clock) for _ in range(2)]


def test_every_replica_tells_of_the_requests_of_all(replicas: list[RequestWindows]) -> None:
    one, other = replicas
    for _ in range(98):
        one.add(status=200, seconds=0.004)
    other.add(status=404, seconds=0.2)
    other.add(status=503, seconds=2)
    for replica in replicas:
        replica.hand_over()
    minute, _, hour = one.read()
    assert one.read() == other.read()
    assert (minute.seconds, minute.requests, minute.client_errors, minute.server_errors) == (90, 100, 1, 1)
    assert minute.rate_per_s == pytest.approx(100 / 90, abs=0.001)
    assert minute.p50_s == pytest.approx(0.0025 + 0.0025 * 50 / 98, abs=1e-5), "interpolated within its step"
    assert minute.p99_s == pytest.approx(0.25), "the upper end of the step that the 99th request fills"
    assert hour.requests == 100
    assert hour.seconds == 3630


def test_what_is_counted_is_told_at_once_and_once(replicas: list[RequestWindows]) -> None:
    one = replicas[0]
    one.add(status=200, seconds=0.01)
    assert one.read()[0].requests == 1, "before it was handed over"
    one.hand_over()
    one.hand_over()
    assert one.read()[0].requests == 1, "after it was handed over"


def test_requests_leave_each_window_when_their_minute_does(replicas: list[RequestWindows], clock: Clock) -> None:
    one = replicas[0]
    one.add(status=200, seconds=0.01)
    one.hand_over()
    for minutes, expected in ((1, [1, 1, 1]), (2, [0, 1, 1]), (5, [0, 1, 1]), (6, [0, 0, 1]), (61, [0, 0, 0])):
        clock.now = HALF_PAST + minutes * 60
        assert [window.requests for window in one.read()] == expected, f"after {minutes} minutes"


def test_without_redis_a_process_tells_of_its_own_requests_and_nothing_is_counted_twice_later(
    replicas: list[RequestWindows], servers: LocalStack
) -> None:
    one, other = replicas
    one.add(status=200, seconds=0.01)
    one.hand_over()
    servers.control.freeze("cache")
    try:
        for _ in range(3):
            one.add(status=200, seconds=0.01)
            one.hand_over()
        minute = one.read()[0]
        assert (minute.requests, minute.everyones) == (4, False)
    finally:
        servers.control.thaw("cache")
    wait_until(lambda: other.read()[0].everyones, timeout_s=10, what="Redis to answer")
    one.add(status=200, seconds=0.01)
    one.hand_over()
    assert 2 <= other.read()[0].requests <= 5, "the two that were told, and at most the three that were not answered"


def test_statistics_tell_of_recent_requests_and_jobs(client: Client) -> None:
    # Buffered: a request counts when its answer is closed.
    submitted = client.post(f"{API}/generate", json={"prompt": "a cat"}, buffered=True).json
    client.post(f"{API}/jobs/{submitted['id']}/cancel", buffered=True)
    stats = client.get(f"{API}/stats").json
    assert [window["requests"] for window in stats["recent_requests"]] == [2, 2, 2]
    assert [window["ended"] for window in stats["recent_jobs"]] == [{"canceled": 1}] * 3
    assert stats["recent_jobs"][0]["wait_p50_s"] is None, "it was never started"
    assert 0 <= stats["recent_jobs"][0]["total_p50_s"] < 60
