"""Updates of jobs over a real pub/sub, and without it."""

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
    publish_job_update,
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


def test_updates_reach_every_watch_of_that_job_and_no_other(listening: Subscriber) -> None:
    job, other = uuid4(), uuid4()
    with listening.watch(job) as first, listening.watch(job) as second, listening.watch(other) as other_watch:
        publish_progress(job, 3, 8)
        for watch in (first, second):
            assert watch.wait(5) == (False, Progress(step=3, total_steps=8), [])
        assert listening.latest_progress(job) == Progress(step=3, total_steps=8)
        publish_job_update(job)
        for watch in (first, second):
            assert watch.wait(5) == (True, None, [])
        assert listening.latest_progress(job) is None, "an old step is not a step of the next attempt"
        assert other_watch.wait(0) == (False, None, [])


def test_a_slow_listener_gets_the_latest_step_only(listening: Subscriber) -> None:
    job = uuid4()
    with listening.watch(job) as watch:
        for step in range(1, 9):
            publish_progress(job, step, 8)
        wait_until(
            lambda: listening.latest_progress(job) == Progress(step=8, total_steps=8), timeout_s=5, what="the last step"
        )
        assert watch.wait(5) == (False, Progress(step=8, total_steps=8), [])


def test_while_redis_is_silent_a_watch_polls_each_second_and_updates_resume_later(
    listening: Subscriber, servers: LocalStack
) -> None:
    job = uuid4()
    with listening.watch(job) as watch:
        servers.control.freeze("queue")
        try:
            wait_until(lambda: not listening.connected, timeout_s=10, what="the silence to be noticed")
            watch.wait(0)  # takes the change that the lost connection itself reports
            for _ in range(2):
                asked = time.monotonic()
                assert watch.wait(30) == (True, None, [])
                assert time.monotonic() - asked < 3
            started = time.monotonic()
            publish_job_update(job)
            publish_progress(job, 1, 8)
            assert time.monotonic() - started < 0.1, "publishing does not wait"
        finally:
            servers.control.thaw("queue")
        wait_until(lambda: listening.connected, timeout_s=10, what="the subscription to come back")
        publish_progress(job, 7, 8)
        wait_until(
            lambda: listening.latest_progress(job) == Progress(step=7, total_steps=8),
            timeout_s=10,
            what="updates to resume",
        )


def test_an_invalid_message_is_ignored(listening: Subscriber) -> None:
    from shared.messaging.job_updates import CHANNEL_PREFIX, channel
    from shared.messaging.queue import broker

    job = uuid4()
    for where, what in [(f"{CHANNEL_PREFIX}nonsense", "null"), (channel(job), "nonsense"), (channel(job), "[-1, 2]")]:
        broker().publish(where, what)
    publish_progress(job, 2, 8)
    wait_until(
        lambda: listening.latest_progress(job) == Progress(step=2, total_steps=8), timeout_s=5, what="the valid message"
    )


def picture(side: int = 64, *, red: int = 255) -> np.ndarray:
    return np.full((side, side, 3), (red, 0, 0), np.uint8)


def opened(preview: Preview) -> Image.Image:
    return Image.open(io.BytesIO(b64decode(preview.image.removeprefix("data:image/jpeg;base64,"))))


def test_previews_reach_a_watch_and_are_due_as_requested_but_not_too_often(listening: Subscriber) -> None:
    job = uuid4()
    first, second = PreviewStream(job, 0, every=2), PreviewStream(job, 1, every=2)
    assert [step for step in range(1, 9) if first.is_due(step, 8)] == [2, 4, 6], (
        "the image itself follows the last step"
    )
    with listening.watch(job) as watch:
        first.show(picture(), 2, 8)
        second.show(picture(red=0), 2, 8)
        assert not first.is_due(4, 8), "at most a few per second"
        seen: dict[int, Preview] = {}
        while len(seen) < 2:
            update = watch.wait(5)
            assert update.previews, "in time"
            seen |= {preview.index: preview for preview in update.previews}
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


def test_a_preview_that_is_not_uint8_is_rejected(listening: Subscriber) -> None:
    with pytest.raises(ValueError, match="uint8"):
        PreviewStream(uuid4(), 0, every=1).show(np.zeros((4, 4)), 1, 2)


def test_a_stream_sends_previews_without_an_id_and_the_table_stores_no_preview(
    client: Any, listening: Subscriber
) -> None:
    submitted = client.post("/api/v1/generate", json={"prompt": "a red apple", "preview_every": 2}).json
    assert submitted["parameters"]["preview_every"] == 2
    job = UUID(submitted["id"])
    stream = client.get(submitted["events_url"]).response
    assert b"retry" in next(stream)
    assert b"event: queued" in next(stream)
    PreviewStream(job, 0, every=2).show(picture(), 2, 8)
    sent = next(stream).decode()
    assert sent.startswith("event: preview\ndata: ")
    assert opened(Preview.model_validate_json(sent.partition("data: ")[2])).size == (64, 64)
    stream.close()
    with session_scope() as session:
        assert [event.type for event in jobs.list_events(session, job, after=0)] == ["queued"]


def test_closing_ends_every_wait_at_once(settings: Settings) -> None:
    with subscriber().watch(uuid4()) as watch:
        close_subscriber()
        asked = time.monotonic()
        watch.wait(30)
        assert time.monotonic() - asked < 2
