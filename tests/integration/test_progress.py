"""News of jobs over a real pub/sub, and without it."""

import time
from collections.abc import Iterator
from uuid import uuid4

import pytest

from ops.local.stack import LocalStack
from shared.contracts.jobs import Progress
from shared.progress import Subscriber, close_subscriber, publish_changed, publish_progress, subscriber
from shared.settings import Settings
from tests.stack import wait_until


@pytest.fixture
def listening(settings: Settings) -> Iterator[Subscriber]:
    wait_until(lambda: subscriber().connected, timeout_s=10, what="the subscription")
    yield subscriber()
    close_subscriber()


def test_news_reach_every_watch_of_that_job_and_no_other(listening: Subscriber) -> None:
    job, other = uuid4(), uuid4()
    with listening.watch(job) as one, listening.watch(job) as two, listening.watch(other) as elsewhere:
        publish_progress(job, 3, 8)
        for watch in (one, two):
            assert watch.wait(5) == (False, Progress(step=3, total_steps=8), [])
        assert listening.latest(job) == Progress(step=3, total_steps=8)
        publish_changed(job)
        for watch in (one, two):
            assert watch.wait(5) == (True, None, [])
        assert listening.latest(job) is None, "an old step says nothing of the next attempt"
        assert elsewhere.wait(0) == (False, None, [])


def test_a_slow_listener_gets_the_latest_step_only(listening: Subscriber) -> None:
    job = uuid4()
    with listening.watch(job) as watch:
        for step in range(1, 9):
            publish_progress(job, step, 8)
        wait_until(lambda: listening.latest(job) == Progress(step=8, total_steps=8), timeout_s=5, what="the last step")
        assert watch.wait(5) == (False, Progress(step=8, total_steps=8), [])


def test_while_redis_is_silent_a_watch_asks_for_a_look_each_second_and_news_come_again_after_the_thaw(
    listening: Subscriber, servers: LocalStack
) -> None:
    job = uuid4()
    with listening.watch(job) as watch:
        servers.control.freeze("queue")
        try:
            wait_until(lambda: not listening.connected, timeout_s=10, what="the silence to be noticed")
            watch.wait(0)  # the one look that losing the connection is worth
            for _ in range(2):
                asked = time.monotonic()
                assert watch.wait(30) == (True, None, [])
                assert time.monotonic() - asked < 3
            told = time.monotonic()
            publish_changed(job)
            publish_progress(job, 1, 8)
            assert time.monotonic() - told < 0.1, "telling waits for nobody"
        finally:
            servers.control.thaw("queue")
        wait_until(lambda: listening.connected, timeout_s=10, what="the subscription to come back")
        publish_progress(job, 7, 8)
        wait_until(
            lambda: listening.latest(job) == Progress(step=7, total_steps=8), timeout_s=10, what="news to come again"
        )


def test_a_message_that_makes_no_sense_is_passed_over(listening: Subscriber) -> None:
    from shared.progress import CHANNEL_PREFIX, channel
    from shared.queue import broker

    job = uuid4()
    for where, what in [(f"{CHANNEL_PREFIX}nonsense", "null"), (channel(job), "nonsense"), (channel(job), "[-1, 2]")]:
        broker().publish(where, what)
    publish_progress(job, 2, 8)
    wait_until(lambda: listening.latest(job) == Progress(step=2, total_steps=8), timeout_s=5, what="the good one")


def test_closing_ends_every_wait_at_once(settings: Settings) -> None:
    with subscriber().watch(uuid4()) as watch:
        close_subscriber()
        asked = time.monotonic()
        watch.wait(30)
        assert time.monotonic() - asked < 2
