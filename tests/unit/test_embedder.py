"""The embedder: how threads share CLIP, which calls wait, and how many cores each call gets."""

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
from worker_service.execution.cpu_threads import CpuThreads
from worker_service.execution.watchdog import Watchdog
from worker_service.models.clip import Clip, ImageInput
from worker_service.models.embedder import Embedder


@dataclass
class BlockedClip(Clip):
    """Blocks every batch of images until `go` is set."""

    go: threading.Event = field(default_factory=threading.Event)
    threads_of_calls: list[int] = field(default_factory=list)

    def encode_image(self, images: Sequence[ImageInput]) -> np.ndarray:
        self.threads_of_calls.append(torch.get_num_threads())
        assert self.go.wait(10)
        return super().encode_image(images)

    def wait_for_calls(self, calls: int) -> None:
        wait_until(lambda: len(self.threads_of_calls) == calls, timeout_s=10, what=f"{calls} calls of the model")


@pytest.fixture
def clip(model_settings: ModelSettings) -> BlockedClip:
    return BlockedClip.load(model_settings)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(8) as pool:
        yield pool
    torch.set_num_threads(threads)


def make_embedder(clip: Clip, *, cores: int) -> Embedder:
    space = Space(id=1, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    return Embedder(clip, space, Watchdog(WatchdogSettings()), cores=cores)


def submit_images(pool: ThreadPoolExecutor, embedder: Embedder, *shades: int) -> "Future[np.ndarray]":
    pictures = [Image.new("RGB", (40, 40), (shade, 0, 0)) for shade in shades]
    return pool.submit(embedder.embed_corpus_images, pictures)


def test_a_query_does_not_wait_for_images_on_a_cpu(pool: ThreadPoolExecutor, clip: BlockedClip) -> None:
    embedder = make_embedder(clip, cores=1)
    blocked = submit_images(pool, embedder, 1)
    clip.wait_for_calls(1)
    assert pool.submit(embedder.embed, ["a cat"]).result(10).shape == (1, clip.dim)
    assert not blocked.done()
    clip.go.set()
    assert blocked.result(10).shape == (1, clip.dim)


def test_a_short_query_does_not_wait_for_all_parts_of_a_long_one(clip: BlockedClip, pool: ThreadPoolExecutor) -> None:
    embedder = make_embedder(clip, cores=0)
    blocked = submit_images(pool, embedder, 1)
    clip.wait_for_calls(1)
    long = pool.submit(embedder.embed, ["ab" * 1000])
    wait_until(lambda: len(embedder._queries._queue) > 100, timeout_s=10, what="the parts of the long query")
    short = pool.submit(embedder.embed, ["a cat"])
    wait_until(lambda: len(embedder._queries._queue) > 128, timeout_s=10, what="the short query")
    ended: list[str] = []
    long.add_done_callback(lambda _: ended.append("long"))
    short.add_done_callback(lambda _: ended.append("short"))
    clip.go.set()
    assert np.allclose(long.result(30), clip.encode_text(["ab" * 1000]), atol=1e-4)
    short.result(30)
    blocked.result(30)
    assert ended == ["short", "long"]


def test_one_batch_of_images_runs_per_cpu_core(pool: ThreadPoolExecutor, clip: BlockedClip) -> None:
    embedder = make_embedder(clip, cores=2)
    first = submit_images(pool, embedder, 1)
    clip.wait_for_calls(1)
    second = submit_images(pool, embedder, 2)
    clip.wait_for_calls(2)
    third = submit_images(pool, embedder, 3)
    clip.go.set()
    vectors = np.concatenate([each.result(10) for each in (first, second, third)])
    single = np.concatenate([clip.encode_image([Image.new("RGB", (40, 40), (shade, 0, 0))]) for shade in (1, 2, 3)])
    assert np.allclose(vectors, single, atol=1e-4)
    assert clip.threads_of_calls[:2] == [2, 1]
    embedder.close(10)


def test_on_an_accelerator_one_call_runs_at_a_time(pool: ThreadPoolExecutor, clip: BlockedClip) -> None:
    embedder = make_embedder(clip, cores=0)
    blocked = submit_images(pool, embedder, 1)
    clip.wait_for_calls(1)
    later, query = submit_images(pool, embedder, 2), pool.submit(embedder.embed, ["a cat"])
    with pytest.raises(TimeoutError):
        query.result(0.3)
    assert len(clip.threads_of_calls) == 1
    clip.go.set()
    for each in (blocked, later, query):
        each.result(10)


def test_a_single_call_gets_all_cores_and_every_call_at_least_one(pool: ThreadPoolExecutor) -> None:
    cores, threads = CpuThreads(3), []
    with cores.share():
        threads.append(torch.get_num_threads())
        for _ in range(3):
            with cores.share(), cores.share(), cores.share():
                threads.append(torch.get_num_threads())
    with cores.share():
        threads.append(torch.get_num_threads())
    with cores.reserve_one(), cores.share():
        threads.append(torch.get_num_threads())
    assert threads == [3, 1, 1, 1, 3, 2]


@pytest.mark.parametrize("cores", [0, 1])
def test_closing_takes_no_longer_than_its_time_limit(pool: ThreadPoolExecutor, clip: BlockedClip, cores: int) -> None:
    embedder = make_embedder(clip, cores=cores)
    blocked = submit_images(pool, embedder, 1)
    clip.wait_for_calls(1)
    started = time.monotonic()
    embedder.close(0.5)
    assert time.monotonic() - started < 0.9
    clip.go.set()
    blocked.result(10)
