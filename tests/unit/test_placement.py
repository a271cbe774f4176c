"""Offloaded weights: the same images, and every tensor on the device that computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from shared.contracts.generation import Mode
from shared.settings import ModelSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import REQUEST, reference
from tests.unit.test_diffusion_loading import load
from worker_service.execution.steps import CallStopped
from worker_service.models.generation.diffusion import OFFLOAD, Diffusion
from worker_service.models.interface import ImageRequest

Loaded = Callable[[str], Diffusion]
LONG = "a red apple on a wooden table, " * 20
OFFLOADS = ["model", "group"]
TINY = 1e-5
"""The kernels of a CPU round by the addresses of their tensors."""


def offloaded(model_settings: ModelSettings, name: str, offload: str) -> Diffusion:
    return load(**model_settings.generators[name].model_copy(update={"offload": offload}).model_dump())


def draw(model: Diffusion, *requests: ImageRequest) -> np.ndarray:
    return model.draw(requests, lambda step, steps: True)


def hooks(model: Diffusion) -> int:
    """Number of modules that a hook moves to the device."""

    def has_hook(part: Any) -> bool:
        return hasattr(part, "_hf_hook") or bool(hasattr(part, "_diffusers_hook") and part._diffusers_hook.hooks)

    return sum(
        has_hook(part)
        for module in model.text_to_image.components.values()
        if isinstance(module, torch.nn.Module)
        for part in module.modules()
    )


@contextmanager
def without_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the block, `device` of pipelines is useless, as it is while weights are offloaded."""
    with monkeypatch.context() as patched:
        patched.setattr(DiffusionPipeline, "device", torch.device("meta"))
        yield


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", ["sd15_lora", "sdxl", "flux"])
def test_offloading_changes_no_image(
    loaded: Loaded, model_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch, name: str, offload: str
) -> None:
    plain, model = loaded(name), offloaded(model_settings, name, offload)
    assert hooks(plain) == 0
    assert hooks(model) > 0
    assert model.capabilities == plain.capabilities
    requests = [replace(REQUEST, prompt=LONG), replace(REQUEST, mode=Mode.IMG2IMG, references=(reference(1),)), REQUEST]
    if Mode.IMAGE_PROMPT in plain.capabilities.modes:
        requests.append(replace(REQUEST, mode=Mode.IMAGE_PROMPT, references=(reference(1), reference(2))))
    if plain.capabilities.loras:
        requests.append(replace(REQUEST, loras=(("ink", 1.0),)))
    for request in requests:
        expected = draw(plain, request)
        with without_a_device(monkeypatch):
            assert np.abs(draw(model, request) - expected).max() < TINY


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_reads_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offload: str) -> None:
    small_pipelines.save_flux2_klein(tmp_path)
    request = replace(REQUEST, mode=Mode.REFERENCE, references=(reference(1), reference(2)))
    plain, model = (load(source=str(tmp_path), reference_side=64, offload=each) for each in ("none", offload))
    expected = draw(plain, request)
    with without_a_device(monkeypatch):
        assert np.abs(draw(model, request) - expected).max() < TINY


@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_call_can_be_stopped_or_interrupted_by_another(
    loaded: Loaded, model_settings: ModelSettings, offload: str
) -> None:
    plain, model = loaded("sd15"), offloaded(model_settings, "sd15", offload)
    inner = replace(REQUEST, prompt="two zebras", seed=2)
    with pytest.raises(CallStopped):
        model.draw([REQUEST], lambda step, steps: False)
    inside: list[np.ndarray] = []

    def draw_between(step: int, steps: int) -> bool:
        if step == 1:
            inside.append(draw(model, inner))
        return True

    outside = model.draw([REQUEST], draw_between)
    assert np.abs(outside - draw(plain, REQUEST)).max() < TINY
    assert np.abs(inside[0] - draw(plain, inner)).max() < TINY
    assert hooks(model) > 0


def test_offloading_is_the_last_way_to_save_memory_and_ends_with_the_call(
    loaded: Loaded, model_settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded("sd15")
    expected = draw(model, REQUEST)
    with model.saving_memory([OFFLOAD]):
        assert hooks(model) > 0
        assert np.abs(draw(model, REQUEST) - expected).max() < TINY
    assert hooks(model) == 0
    assert np.abs(draw(model, REQUEST) - expected).max() < TINY
    assert OFFLOAD not in model.memory_savers(1), "a CPU has all weights in its memory already"
    already = offloaded(model_settings, "sd15", "model")
    monkeypatch.setattr(Diffusion, "device", torch.device("cuda"))
    assert list(model.memory_savers(1)) == ["vae_tiling", OFFLOAD]
    assert list(already.memory_savers(1)) == ["vae_tiling"]
