"""News of jobs over a real pub/sub, and without it."""

import io
import time
from base64 import b64decode
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image

from ops.local.stack import LocalStack
from shared.contracts.jobs import Preview, Progress
from shared.db import jobs
from shared.db.session import session_scope
from shared.messaging.job_updates import (
    PreviewStream,
    Subscriber,
    close_subscriber,
    publish_changed,
    publish_progress,
    subscriber,
)
from shared.settings import Settings
from tests.stack import wait_until
from worker_service.models.interface import PREVIEW_SIDE


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
    from shared.messaging.job_updates import CHANNEL_PREFIX, channel
    from shared.messaging.queue import broker

    job = uuid4()
    for where, what in [(f"{CHANNEL_PREFIX}nonsense", "null"), (channel(job), "nonsense"), (channel(job), "[-1, 2]")]:
        broker().publish(where, what)
    publish_progress(job, 2, 8)
    wait_until(lambda: listening.latest(job) == Progress(step=2, total_steps=8), timeout_s=5, what="the good one")


def picture(side: int = 64, *, red: int = 255) -> np.ndarray:
    return np.full((side, side, 3), (red, 0, 0), np.uint8)


def opened(preview: Preview) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(preview.image.removeprefix("data:image/jpeg;base64,"))))


def test_previews_reach_who_watches_and_are_due_as_often_as_asked_but_not_too_often(listening: Subscriber) -> None:
    job = uuid4()
    first, second = PreviewStream(job, 0, every=2), PreviewStream(job, 1, every=2)
    assert [step for step in range(1, 9) if first.is_due(step, 8)] == [2, 4, 6], "the image itself follows the last"
    with listening.watch(job) as watch:
        first.show(picture(), 2, 8)
        second.show(picture(red=0), 2, 8)
        assert not first.is_due(4, 8), "at most a few per second"
        seen: dict[int, Preview] = {}
        while len(seen) < 2:
            news = watch.wait(5)
            assert news.previews, "in time"
            seen |= {preview.index: preview for preview in news.previews}
    assert (seen[0].step, seen[0].total_steps) == (2, 8)
    assert opened(seen[0]).size == (64, 64)
    assert opened(seen[0]).getpixel((9, 9)) != opened(seen[1]).getpixel((9, 9))
    wait_until(lambda: first.is_due(4, 8), timeout_s=5, what="the next preview to be due")


def test_the_largest_and_least_compressible_preview_fits_into_its_message(listening: Subscriber) -> None:
    job = uuid4()
    noise = np.random.default_rng(1).integers(0, 256, (PREVIEW_SIDE, PREVIEW_SIDE, 3), dtype=np.uint8)
    with listening.watch(job) as watch:
        PreviewStream(job, 0, every=1).show(noise, 1, 2)
        assert [preview.index for preview in watch.wait(5).previews] == [0]


def test_what_is_no_picture_ends_no_telling(listening: Subscriber) -> None:
    with pytest.raises(ValueError, match="uint8"):
        PreviewStream(uuid4(), 0, every=1).show(np.zeros((4, 4)), 1, 2)


def test_a_stream_tells_previews_without_a_number_and_the_table_keeps_none(client: Any, listening: Subscriber) -> None:
    submitted = client.post("/api/v1/generate", json={"prompt": "a red apple", "preview_every": 2}).json
    assert submitted["parameters"]["preview_every"] == 2
    job = UUID(submitted["id"])
    stream = client.get(submitted["events_url"]).response
    assert b"retry" in next(stream)
    assert b"event: queued" in next(stream)
    PreviewStream(job, 0, every=2).show(picture(), 2, 8)
    told = next(stream).decode()
    assert told.startswith("event: preview\ndata: ")
    assert opened(Preview.model_validate_json(told.partition("data: ")[2])).size == (64, 64)
    stream.close()
    with session_scope() as session:
        assert [event.type for event in jobs.events(session, job, after=0)] == ["queued"]


def test_closing_ends_every_wait_at_once(settings: Settings) -> None:
    with subscriber().watch(uuid4()) as watch:
        close_subscriber()
        asked = time.monotonic()
        watch.wait(30)
        assert time.monotonic() - asked < 2
