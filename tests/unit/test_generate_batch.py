"""Calls of an image model that runs out of memory, returns invalid images, or loses its device."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import InvalidOutputError, ModelError, ModelOutOfMemoryError
from shared.metrics import GENERATION_MEMORY_SAVED
from shared.settings import WatchdogSettings
from tests.unit.test_fake_generator import REQUEST, SETTINGS
from worker_service.execution.accelerator import run_on
from worker_service.execution.batcher import Batcher
from worker_service.execution.steps import OnStep, go_on
from worker_service.execution.watchdog import AcceleratorLostError, Watchdog
from worker_service.models.fake import FakeGenerator
from worker_service.models.generate_batch import GeneratedImage, generate_batch
from worker_service.models.interface import ImageRequest

CPU = torch.device("cpu")
LOST = torch.device("meta")
"""Accepts tensors and returns no values, as a GPU does after an illegal memory access."""


class LowMemoryModel(FakeGenerator):
    """Has memory for one image; with `slices` for a batch if `slices_help`, with `small_tiles` for a large image."""

    def __init__(self) -> None:
        super().__init__(**vars(FakeGenerator.load("cheap", SETTINGS)))
        self.calls: list[tuple[int, tuple[str, ...]]] = []
        self.savers: tuple[str, ...] = ()
        self.slices_help = False

    def memory_savers(self, images: int) -> Sequence[str]:
        return ["slices"] if images > 1 else ["tiles", "small_tiles"]

    @contextmanager
    def saving_memory(self, savers: Sequence[str]) -> Iterator[None]:
        self.savers = tuple(savers)
        yield
        self.savers = ()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.calls.append((len(requests), self.savers))
        fits = len(requests) == 1 or (self.slices_help and "slices" in self.savers)
        for request in requests:
            fits &= "large" not in request.prompt or "small_tiles" in self.savers
            fits &= "huge" not in request.prompt
        if not fits:
            raise ModelOutOfMemoryError
        return super().generate(requests, on_step)


class Broken(FakeGenerator):
    def __init__(self, returned: Any) -> None:
        super().__init__(**vars(FakeGenerator.load("cheap", SETTINGS)))
        self.returned = returned

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> Any:
        return self.returned


def request_for(prompt: str) -> ImageRequest:
    return replace(REQUEST, prompt=prompt)


def test_an_image_that_fits_is_generated_without_memory_savers() -> None:
    model = LowMemoryModel()
    (generated,) = generate_batch(model, [REQUEST], go_on)
    assert generated.memory_savers == ()
    assert model.calls == [(1, ())]


def test_an_image_that_does_not_fit_is_tried_with_one_more_memory_saver_each_time() -> None:
    model = LowMemoryModel()
    counter = GENERATION_MEMORY_SAVED.labels("cheap", "small_tiles")
    before = counter._value.get()
    (generated,) = generate_batch(model, [request_for("large")], go_on)
    assert generated.memory_savers == ("tiles", "small_tiles")
    assert model.calls == [(1, ()), (1, ("tiles",)), (1, ("tiles", "small_tiles"))]
    assert counter._value.get() == before + 1


def test_the_error_for_an_image_that_never_fits_lists_the_memory_savers_tried() -> None:
    with pytest.raises(ModelOutOfMemoryError) as refused:
        generate_batch(LowMemoryModel(), [request_for("huge")], go_on)
    assert refused.value.body() == {
        "code": "out_of_memory",
        "detail": "1 image(s) of 32 x 16 do not fit in memory.",
        "context": {"images": 1, "width": 32, "height": 16, "tried": ["tiles", "small_tiles"]},
    }


def batched(model: LowMemoryModel, *requests: ImageRequest) -> list[GeneratedImage]:
    batcher: Batcher[ImageRequest, GeneratedImage] = Batcher(
        lambda items, on_step: generate_batch(model, items, on_step),
        key=ImageRequest.batch_key,
        max_batch_size=4,
        name="cheap",
        watchdog=Watchdog(WatchdogSettings()),
    )
    try:
        return batcher.submit(requests)
    finally:
        batcher.close(5)


def test_a_batch_that_fits_in_slices_is_not_halved() -> None:
    model = LowMemoryModel()
    model.slices_help = True
    assert [generated.memory_savers for generated in batched(model, REQUEST, REQUEST)] == [("slices",)] * 2
    assert model.calls == [(2, ()), (2, ("slices",))]


def test_memory_savers_are_used_only_for_the_image_that_needs_them() -> None:
    generated = batched(LowMemoryModel(), REQUEST, request_for("large"), REQUEST)
    assert [each.memory_savers for each in generated] == [(), ("tiles", "small_tiles"), ()]


GOOD = np.full((16, 32, 3), 7, np.uint8)


@pytest.mark.parametrize(
    "returned",
    [
        None,
        [],
        [GOOD, GOOD],
        [None],
        [GOOD[:, :, 0]],
        [GOOD[:8]],
        [GOOD.astype(np.float32)],
        [np.full(GOOD.shape, np.nan, np.float32)],
        [np.zeros_like(GOOD)],
    ],
    ids=["nothing", "none", "too many", "no array", "grey", "other size", "floats", "no numbers", "black"],
)
def test_a_result_that_is_not_an_image_is_an_error(returned: Any) -> None:
    with pytest.raises(InvalidOutputError):
        generate_batch(Broken(returned), [REQUEST], go_on)
    assert len(generate_batch(Broken([GOOD]), [REQUEST], go_on)) == 1


# --- the device of the calls --------------------------------------------------------------------------------------


def raising(error: Exception) -> Any:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_out_of_memory_error_gets_one_type_and_keeps_no_tensor_alive(error: Exception) -> None:
    with pytest.raises(ModelOutOfMemoryError) as refused:
        run_on(CPU, raising(error), items=3)
    assert refused.value.context == {"items": 3}
    assert refused.value.__context__ is None


def test_other_errors_of_a_device_that_answers_are_not_changed() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run_on(CPU, raising(RuntimeError("shapes do not match")), items=1)
    with pytest.raises(ModelError):
        run_on(LOST, raising(ModelError()), items=1)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), MemoryError()])
def test_a_device_that_does_not_answer_after_an_error_is_lost(error: Exception) -> None:
    with pytest.raises(AcceleratorLostError):
        run_on(LOST, raising(error), items=1)
