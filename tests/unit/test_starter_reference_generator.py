"""The product loads the reference generator of the starter by its settings alone. Untrained weights of its classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from PIL import Image

from shared.contracts.generation import Mode
from shared.errors import ModelLoadError
from shared.settings import GeneratorDefaults, GeneratorSettings, ModelSettings
from starter.train.autoencoder import build_autoencoder
from starter.train.generator import (
    TEXT_LAYERS,
    TEXT_TOKENS,
    build_text_encoder,
    build_transformer,
    learn_tokenizer,
)
from tests import small_pipelines
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest, Reference

STEPS = 2
SETTINGS: dict[str, Any] = {
    "native_side": 128,
    "max_sequence_length": TEXT_TOKENS,
    "text_encoder_out_layers": [TEXT_LAYERS],
    "reference_side": 128,
    "reference_side_of_several": 64,
    "any_size": False,
    "defaults": GeneratorDefaults(width=128, height=128, num_inference_steps=STEPS, guidance_scale=2.5),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = learn_tokenizer(["a dog and a red car", "two cats"])
    transformer = build_transformer()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    folder = tmp_path_factory.mktemp("reference_generator")
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=build_autoencoder(),
        text_encoder=build_text_encoder(len(tokenizer), tokenizer.pad_token_id),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def load(folder: Path, **settings: Any) -> Diffusion:
    generator = GeneratorSettings(source=str(folder), **settings)
    return Diffusion.load(
        "starter", ModelSettings(generators={"starter": generator}, default_generator="starter", threads=1)
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> Diffusion:
    return load(folder, **SETTINGS)


def request(model: Diffusion, *concepts: str, prompt: str = "a dog and a red car") -> ImageRequest:
    """A request with one reference for each concept."""
    references = [
        Reference(
            vector=None,
            image=Image.new("RGB", (128, 128), (60 * number, 200, 90)),
            weight=1,
            caption=None,
            concepts=(concept,),
        )
        for number, concept in enumerate(concepts)
    ]
    return ImageRequest.of(
        model.defaults, prompt=prompt, seed=3, width=128, height=128, mode=Mode.REFERENCE, references=references
    )


def drawn(model: Diffusion, request: ImageRequest) -> np.ndarray:
    return model.generate([request], lambda step, steps: True)[0]


def drawn_by_diffusers(folder: Path, prompt: str, pictures: list[Image.Image]) -> np.ndarray:
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=prompt,
        image=pictures,
        width=128,
        height=128,
        num_inference_steps=STEPS,
        guidance_scale=2.5,
        max_sequence_length=TEXT_TOKENS,
        text_encoder_out_layers=(TEXT_LAYERS,),
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images
    return np.asarray((images[0] * 255).round(), np.uint8)


def test_it_warms_up_and_declares_what_it_can(model: Diffusion) -> None:
    model.warm_up()
    known = model.capabilities
    assert (known.native_width, known.native_height, known.any_size) == (128, 128, False)
    assert {"reference", "none"} <= set(known.modes)
    assert (known.reference_side, known.reference_side_of_several) == (128, 64)
    assert (known.supports_guidance, known.needs_reference) == (True, False)
    assert (known.batching_changes_images, known.interruption_changes_images) == (False, False)
    assert (model.defaults.num_inference_steps, model.defaults.guidance_scale) == (STEPS, 2.5)


@pytest.mark.parametrize(
    ("concepts", "side"), [(["a dog"], 128), (["a dog", "a dog"], 128), (["a dog", "a red car"], 64)]
)
def test_the_worker_draws_what_the_pipeline_draws(
    model: Diffusion, folder: Path, concepts: list[str], side: int
) -> None:
    asked = request(model, *concepts)
    pictures = [each.image.resize((side, side)) for each in asked.references if each.image is not None]
    by_diffusers = drawn_by_diffusers(folder, asked.prompt, pictures)
    assert np.abs(drawn(model, asked).astype(int) - by_diffusers.astype(int)).max() <= 1


def test_the_settings_say_how_much_of_a_prompt_is_read(model: Diffusion) -> None:
    long = request(model, prompt="a dog " * TEXT_TOKENS)
    assert model.unread_texts(request(model)).prompt == ""
    assert model.unread_texts(long).prompt != ""


def test_a_pipeline_without_such_a_parameter_is_refused(tmp_path: Path) -> None:
    small_pipelines.save_sd15(tmp_path)
    with pytest.raises(ModelLoadError, match="no text_encoder_out_layers, which the settings name"):
        load(tmp_path, text_encoder_out_layers=[3])
