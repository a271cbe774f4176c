"""The probe at start finds models whose images depend on their batch, or on a call between two of their steps."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared.errors import ModelLoadError, ModelOutOfMemoryError
from shared.settings import ModelSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import REQUEST
from tests.unit.test_diffusion_loading import load
from worker_service.execution.steps import OnStep
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest
from worker_service.models.pipelines.probe import Verdict, probe

KEEPS_THE_PROMISES = Verdict(largest_batch=None, batching_changes_images=False, interruption_changes_images=False)


@dataclass
class Painter:
    """Draws one grey per prompt and seed. Each defect is one that a class of diffusers has, or could have."""

    rounding: float = 0.0
    """Change of every image in a batch of two, as by other kernels."""
    padding: float = 0.0
    """Change of an image by a longer prompt in its batch."""
    one_at_a_time: bool = False
    fits_one: bool = False
    """Two images do not fit in memory."""
    shared_cache: bool = False
    """The state of the steps is kept in the model and not in the call."""
    calls: list[int] = field(default_factory=list)
    state: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def draw(self, requests: Sequence[ImageRequest], on_step: OnStep) -> np.ndarray:
        self.calls.append(len(requests))
        if self.one_at_a_time and len(requests) > 1:
            raise ValueError("only batch_size=1 is supported")
        if self.fits_one and len(requests) > 1:
            raise ModelOutOfMemoryError
        longest = max(len(request.prompt) for request in requests)
        greys = [len(request.prompt) / 100 + request.seed / 1000 for request in requests]
        if len(requests) > 1:
            greys = [
                grey + self.rounding + self.padding * (len(request.prompt) < longest)
                for grey, request in zip(greys, requests, strict=True)
            ]
        self.state = np.zeros(len(requests))
        for step in range(requests[0].num_inference_steps):
            self.state = self.state + greys
            on_step(step + 1, requests[0].num_inference_steps)
        drawn = np.array(greys) + (self.state / 100 if self.shared_cache else 0)
        return np.ones((len(requests), 8, 8, 3)) * drawn[:, None, None, None]


@pytest.mark.parametrize(
    ("painter", "verdict"),
    [
        (Painter(), KEEPS_THE_PROMISES),
        (Painter(rounding=0.02, padding=0.02), KEEPS_THE_PROMISES),
        (Painter(padding=0.006), Verdict(1, batching_changes_images=True, interruption_changes_images=False)),
        (Painter(one_at_a_time=True), Verdict(1, batching_changes_images=False, interruption_changes_images=False)),
        (Painter(fits_one=True), Verdict(1, batching_changes_images=False, interruption_changes_images=False)),
        (Painter(shared_cache=True), Verdict(None, batching_changes_images=False, interruption_changes_images=True)),
    ],
    ids=[
        "sound",
        "half precision",
        "padding moves the image",
        "one prompt per call",
        "room for one",
        "cache of all calls",
    ],
)
def test_it_tells_a_broken_promise_from_rounding(painter: Painter, verdict: Verdict) -> None:
    assert probe(painter.draw, REQUEST, model="model", batches=True, key=lambda request: None) == verdict


def test_a_batch_that_never_runs_is_not_tried() -> None:
    alone, apart = Painter(padding=1), Painter(padding=1)
    assert probe(alone.draw, REQUEST, model="m", batches=False, key=lambda request: None) == KEEPS_THE_PROMISES
    assert set(alone.calls) == {1}
    by_prompt: Callable[[ImageRequest], str] = lambda request: request.prompt  # noqa: E731
    assert probe(apart.draw, REQUEST, model="m", batches=True, key=by_prompt) == KEEPS_THE_PROMISES


def test_a_model_of_diffusers_that_changes_images_in_a_batch_draws_each_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_pipelines.save_qwen_image_21(tmp_path)
    model = load(source=str(tmp_path), defaults={"width": 64, "height": 64})
    assert model.capabilities.max_batch_size == 4
    with caplog.at_level(logging.WARNING, "worker_service.models.pipelines.probe"):
        model.warm_up()
    assert model.capabilities.max_batch_size == 1
    assert model.capabilities.batching_changes_images
    assert not model.capabilities.interruption_changes_images
    assert [record.message for record in caplog.records] == ["batching_changes_images"]


@pytest.mark.parametrize("pipeline", ["sd15_lora", "sdxl_turbo"])
def test_a_sound_model_of_diffusers_keeps_its_batches(model_settings: ModelSettings, pipeline: str) -> None:
    model = Diffusion.load(pipeline, model_settings)
    before = model.capabilities
    model.warm_up()
    assert model.capabilities == before


def test_a_model_whose_images_need_a_memory_saver_starts(
    model_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Diffusion.load("sd15_plain", model_settings)
    vae = model.text_to_image.vae
    decode = vae.decode

    def decode_in_tiles(*arguments: Any, **options: Any) -> Any:
        if not vae.use_tiling:
            raise torch.OutOfMemoryError
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", decode_in_tiles)
    before = model.capabilities
    model.warm_up()
    assert model.capabilities == before
    assert not vae.use_tiling


def test_a_model_that_draws_nothing_is_refused_in_one_line(model_settings: ModelSettings) -> None:
    broken = Diffusion.load("sd15_plain", model_settings)
    with torch.no_grad():
        broken.text_to_image.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ModelLoadError, match="could not draw its first image: InvalidOutputError") as refused:
        broken.warm_up()
    assert "\n" not in refused.value.message
