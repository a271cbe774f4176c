"""CLIP as threads share it: who waits for whom, and who gets which cores."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from shared.db.spaces import Space
from shared.settings import ModelSettings, WatchdogSettings
from tests.stack import wait_until
from worker_service.execution.cpu_threads import Cores
from worker_service.execution.watchdog import Watchdog
from worker_service.models.clip import Clip, Picture
from worker_service.models.embedder import IMAGE_LANE, Embedder


@dataclass
class HeldClip(Clip):
    """Holds every batch of images until `go`."""

    go: threading.Event = field(default_factory=threading.Event)
    threads_of_calls: list[int] = field(default_factory=list)

    def encode_image(self, images: Sequence[Picture]) -> np.ndarray:
        self.threads_of_calls.append(torch.get_num_threads())
        assert self.go.wait(10)
        return super().encode_image(images)

    def in_work(self, calls: int) -> None:
        wait_until(lambda: len(self.threads_of_calls) == calls, timeout_s=10, what=f"{calls} calls of the model")


@pytest.fixture
def clip(model_settings: ModelSettings) -> HeldClip:
    return HeldClip.load(model_settings)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(8) as pool:
        yield pool
    torch.set_num_threads(threads)


def an_embedder(clip: Clip, *, cores: int) -> Embedder:
    space = Space(id=1, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    return Embedder(clip, space, Watchdog(WatchdogSettings()), cores=cores)


def images(pool: ThreadPoolExecutor, embedder: Embedder, *shades: int) -> "Future[np.ndarray]":
    pictures = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in shades]
    return pool.submit(embedder.embed, pictures, lane=IMAGE_LANE)


def test_a_query_waits_for_no_images_where_they_have_cores(pool: ThreadPoolExecutor, clip: HeldClip) -> None:
    embedder = an_embedder(clip, cores=1)
    held = images(pool, embedder, 1)
    clip.in_work(1)
    assert pool.submit(embedder.embed, ["a cat"]).result(10).shape == (1, clip.dim)
    assert not held.done()
    clip.go.set()
    assert held.result(10).shape == (1, clip.dim)


def test_images_run_side_by_side_on_as_many_cores_as_there_are(pool: ThreadPoolExecutor, clip: HeldClip) -> None:
    embedder = an_embedder(clip, cores=2)
    first = images(pool, embedder, 1)
    clip.in_work(1)
    second = images(pool, embedder, 2)
    clip.in_work(2)
    third = images(pool, embedder, 3)
    clip.go.set()
    vectors = np.concatenate([each.result(10) for each in (first, second, third)])
    alone = np.concatenate([clip.encode_image([Image.new("RGB", (40, 40), (shade, 0, 0))]) for shade in (1, 2, 3)])
    assert np.allclose(vectors, alone, atol=1e-4)
    assert clip.threads_of_calls[:2] == [2, 1]
    embedder.close(10)


def test_on_an_accelerator_one_call_runs_at_a_time(pool: ThreadPoolExecutor, clip: HeldClip) -> None:
    embedder = an_embedder(clip, cores=0)
    held = images(pool, embedder, 1)
    clip.in_work(1)
    later, query = images(pool, embedder, 2), pool.submit(embedder.embed, ["a cat"])
    with pytest.raises(TimeoutError):
        query.result(0.3)
    assert len(clip.threads_of_calls) == 1
    clip.go.set()
    for each in (held, later, query):
        each.result(10)


def test_a_call_that_is_alone_gets_all_cores_and_none_gets_less_than_one(pool: ThreadPoolExecutor) -> None:
    cores, got = Cores(3), []
    with cores.share():
        got.append(torch.get_num_threads())
        for _ in range(3):
            with cores.share(), cores.share(), cores.share():
                got.append(torch.get_num_threads())
    with cores.share():
        got.append(torch.get_num_threads())
    with cores.leave_one(), cores.share():
        got.append(torch.get_num_threads())
    assert got == [3, 1, 1, 1, 3, 2]


@pytest.mark.parametrize("cores", [0, 1])
def test_closing_takes_no_longer_than_it_may(pool: ThreadPoolExecutor, clip: HeldClip, cores: int) -> None:
    embedder = an_embedder(clip, cores=cores)
    held = images(pool, embedder, 1)
    clip.in_work(1)
    started = time.monotonic()
    embedder.close(0.5)
    assert time.monotonic() - started < 0.9
    clip.go.set()
    held.result(10)
