"""The safety checker of a model: diffusers' class, small, with chosen thresholds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from shared.contracts.generation import Mode
from shared.settings import GeneratorSettings, ModelSettings
from tests.small_pipelines import save_sd15
from tests.unit.test_diffusion_batches import REQUEST, distance, generate_images, reference
from worker_service.models import generate_batch
from worker_service.models.generation.diffusion import Diffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose safety checker flags every image."""
    folder = tmp_path_factory.mktemp("checked")
    save_sd15(folder, checker_flags=True)
    return folder


@pytest.fixture(scope="module")
def checked(folder: Path) -> Diffusion:
    return load(folder, "block")


def load(folder: Path, safety_checker: str) -> Diffusion:
    generator = GeneratorSettings.model_validate({"source": str(folder), "safety_checker": safety_checker})
    return Diffusion.load("sd15", ModelSettings(generators={"sd15": generator}, default_generator="sd15", threads=1))


def test_a_flagged_image_is_generated_and_marked_as_unsafe(folder: Path, checked: Diffusion) -> None:
    assert checked.has_safety_checker
    (generated,) = generate_batch.generate_batch(checked, [REQUEST], lambda step, steps: True)
    assert generated.unsafe
    unchecked = load(folder, "off")
    assert distance(generated.pixels, generate_images(unchecked, REQUEST)[0]) == 0, (
        "a flagged image is not painted over"
    )
    assert checked.capabilities == unchecked.capabilities


def test_the_checker_runs_in_img2img_too(checked: Diffusion) -> None:
    request = replace(REQUEST, mode=Mode.IMG2IMG, references=(reference(1),))
    (generated,) = generate_batch.generate_batch(checked, [request], lambda step, steps: True)
    assert generated.unsafe


def test_a_checker_that_is_off_or_absent_flags_no_image(folder: Path, loaded: Callable[[str], Diffusion]) -> None:
    for model in (load(folder, "off"), loaded("sd15_plain")):
        assert not model.has_safety_checker
        (generated,) = generate_batch.generate_batch(model, [REQUEST], lambda step, steps: True)
        assert not generated.unsafe


def test_the_checker_flags_the_same_images_as_diffusers(folder: Path, checked: Diffusion) -> None:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 1 + 16 * n, (64, 64, 3)).astype(np.uint8) for n in range(12)]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    assert checked.safety_checker is not None
    checkers: tuple[Any, Any] = (pipeline.safety_checker, checked.safety_checker.model)
    with torch.no_grad():
        inputs = pipeline.feature_extractor(images, return_tensors="pt").pixel_values
        vectors = checkers[0].visual_projection(checkers[0].vision_model(inputs)[1])
        middle = torch.cosine_similarity(vectors, torch.ones_like(vectors)).median()
    for checker in checkers:
        checker.concept_embeds_weights.data.fill_(middle + 0.0005)
    try:
        as_floats = np.stack(images).astype(np.float32) / 255
        _, expected = pipeline.run_safety_checker(as_floats, torch.device("cpu"), torch.float32)
        assert checked.detect_unsafe(images) == expected
        assert 0 < sum(expected) < len(images), "the checker flags some images and not others"
    finally:
        checkers[1].concept_embeds_weights.data.fill_(-2)
