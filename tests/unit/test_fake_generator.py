"""The fake generator: images that depend on the request, at a configured cost."""

import time
from dataclasses import replace

import numpy as np
import pytest

from shared.contracts.generation import Mode
from shared.errors import ModelNotFoundError
from shared.settings import GeneratorSettings, ModelSettings
from tests.image_request import IMAGE_REQUEST
from worker_service.execution.steps import CallStopped
from worker_service.models.fake import FakeGenerator
from worker_service.models.interface import Reference

SETTINGS = ModelSettings(
    generators={"cheap": GeneratorSettings(kind="fake", cost_ms=40, max_batch_size=16)}, default_generator="cheap"
)
REFERENCE = Reference(vector=np.ones(4, np.float32), image=None, weight=1, caption=None)
REQUEST = replace(IMAGE_REQUEST, width=32, height=16)


@pytest.fixture
def fake() -> FakeGenerator:
    return FakeGenerator.load("cheap", SETTINGS)


def test_it_supports_every_mode(fake: FakeGenerator) -> None:
    assert set(fake.capabilities.modes) == {mode.value for mode in Mode} - {"auto"}
    assert fake.capabilities.max_batch_size == 16


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a dog"},
        {"seed": 8},
        {"references": (REFERENCE,)},
        {"references": (replace(REFERENCE, vector=np.zeros(4, np.float32)),)},
        {"references": (replace(REFERENCE, weight=2),)},
    ],
)
def test_prompt_seed_and_references_decide_the_image(fake: FakeGenerator, change: dict[str, object]) -> None:
    changed = replace(REQUEST, **change)  # type: ignore[arg-type]
    first, other, again = fake.generate([REQUEST, changed, REQUEST], lambda *_: True)
    assert first.shape == (16, 32, 3)
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert (first != other).any()


def test_a_batch_costs_as_much_as_one_image(fake: FakeGenerator) -> None:
    start = time.perf_counter()
    fake.generate([REQUEST] * 16, lambda *_: True)
    took_s = time.perf_counter() - start
    assert 0.04 <= took_s < 16 * 0.04


def test_it_stops_after_the_step_at_which_it_is_interrupted(fake: FakeGenerator) -> None:
    reported = []

    def on_step(step: int, steps: int) -> bool:
        reported.append((step, steps))
        return step < 2

    with pytest.raises(CallStopped):
        fake.generate([REQUEST], on_step)
    assert reported == [(1, 4), (2, 4)]


def test_a_generator_that_is_not_in_the_settings_is_not_found() -> None:
    with pytest.raises(ModelNotFoundError):
        FakeGenerator.load("nobody", SETTINGS)
