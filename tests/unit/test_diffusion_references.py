"""References condition the image as diffusers' own calls do, which take one image at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shared.contracts.generation import Mode
from shared.errors import ImageGenerationError, ReferenceUnavailableError
from tests.unit.test_diffusion_batches import (
    DIFFERENT,
    REQUEST,
    ROUNDING,
    distance,
    generate_images,
    record_steps,
    reference,
)
from worker_service.execution.steps import CallStopped
from worker_service.models.generation import conditioning, framing, schedulers
from worker_service.models.generation.diffusion import Diffusion, PipelineState
from worker_service.models.generation.long_prompts import TextReader
from worker_service.models.interface import ImageRequest, Reference

Loaded = Callable[[str], Diffusion]
PROMPTED = replace(REQUEST, mode=Mode.IMAGE_PROMPT, references=(reference(1),))


@pytest.fixture(scope="module")
def reader(loaded: Loaded) -> TextReader:
    return loaded("sd15").text_reader


def generated_by_diffusers(model: Diffusion, request: ImageRequest, **conditions: object) -> np.ndarray:
    """The image of `request` from the bare pipeline, called as its documentation says."""
    pipeline = model.text_to_image
    pipeline.scheduler = schedulers.new_scheduler(model.own_scheduler, None)
    images = pipeline(
        request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="np",
        **conditions,
    ).images
    return np.asarray((images[0] * 255).round(), np.uint8)


def test_a_stored_vector_conditions_like_the_image_embeds_of_diffusers(loaded: Loaded) -> None:
    model = loaded("sd15")
    generated = generate_images(model, PROMPTED)[0]
    assert PROMPTED.references[0].vector is not None
    vector = torch.from_numpy(PROMPTED.references[0].vector)[None, None]
    model.text_to_image.set_ip_adapter_scale(PROMPTED.ip_adapter_scale)
    by_diffusers = generated_by_diffusers(
        model, PROMPTED, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(vector), vector])]
    )
    assert distance(generated, by_diffusers) <= ROUNDING


@pytest.mark.parametrize("pipeline", ["sdxl", "sdxl_plus"])
def test_an_image_is_encoded_by_the_adapters_own_encoder(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    generated = generate_images(model, PROMPTED)[0]
    model.text_to_image.set_ip_adapter_scale(PROMPTED.ip_adapter_scale)
    by_diffusers = generated_by_diffusers(model, PROMPTED, ip_adapter_image=PROMPTED.references[0].image)
    assert distance(generated, by_diffusers) <= ROUNDING
    without_vector = replace(PROMPTED, references=(replace(PROMPTED.references[0], vector=None),))
    assert distance(generate_images(model, without_vector)[0], generated) == 0


def test_an_adapter_encodes_only_the_middle_of_a_very_long_picture(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder scales the short side and then crops. A picture of 20,000 x 1 pixels would take gigabytes."""
    model = loaded("sdxl")
    encode_image = model.text_to_image.encode_image
    sizes: list[tuple[int, int]] = []

    def recording(images: list[Image.Image], *arguments: Any) -> Any:
        sizes.extend(image.size for image in images)
        return encode_image(images, *arguments)

    monkeypatch.setattr(model.text_to_image, "encode_image", recording)
    strip = replace(reference(1), image=Image.linear_gradient("L").resize((5000, 1)))
    generate_images(model, replace(PROMPTED, references=(strip,)))
    assert sizes == [(framing.MAX_ASPECT, 1)]


def test_weights_act_like_one_scale_per_image_in_diffusers(loaded: Loaded) -> None:
    model = loaded("sdxl")
    request = replace(PROMPTED, references=(reference(1, weight=1), reference(2, weight=3)))
    generated = generate_images(model, request)[0]
    model.text_to_image.set_ip_adapter_scale([[0.25 * request.ip_adapter_scale, 0.75 * request.ip_adapter_scale]])
    by_diffusers = generated_by_diffusers(
        model,
        request,
        ip_adapter_image=[[used.image for used in request.references]],
        cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 2, 64, 64)]},
    )
    assert distance(generated, by_diffusers) <= ROUNDING
    evenly = replace(PROMPTED, references=(reference(1), reference(2)))
    assert distance(generate_images(model, evenly)[0], generated) > DIFFERENT


@pytest.mark.parametrize("pipeline", ["sd15", "sdxl"])
def test_only_the_ratio_of_the_weights_counts(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    request = replace(PROMPTED, references=(reference(1, weight=0.1), reference(2, weight=0.3)))
    tenfold = replace(PROMPTED, references=(reference(1, weight=1), reference(2, weight=3)))
    assert distance(generate_images(model, request)[0], generate_images(model, tenfold)[0]) <= ROUNDING


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_a_reference_without_weight_has_no_effect(loaded: Loaded, weight: float) -> None:
    model = loaded("sd15")
    more = replace(PROMPTED, references=(reference(2, weight=weight), *PROMPTED.references))
    assert distance(generate_images(model, more)[0], generate_images(model, PROMPTED)[0]) <= ROUNDING


@pytest.mark.parametrize("guidance_scale", [3.0, 0.0])
@pytest.mark.parametrize("mode", [Mode.NONE, Mode.CAPTION, Mode.IMG2IMG])
def test_a_mode_without_image_prompt_ignores_the_adapter(loaded: Loaded, mode: Mode, guidance_scale: float) -> None:
    adapted, plain = loaded("sd15"), loaded("sd15_plain")
    request = replace(REQUEST, mode=mode, guidance_scale=guidance_scale, references=(reference(1),))
    prompted = replace(
        request, mode=Mode.IMAGE_PROMPT_IMG2IMG if mode.traits.uses_initial_image else Mode.IMAGE_PROMPT, seed=8
    )
    expected = generate_images(plain, request)[0]
    assert distance(generate_images(adapted, request)[0], expected) <= ROUNDING
    without_image_prompt, with_image_prompt = generate_images(adapted, request, prompted)
    assert distance(without_image_prompt, expected) <= ROUNDING
    assert distance(with_image_prompt, generate_images(plain, replace(prompted, mode=mode))[0]) > DIFFERENT


def test_the_adapter_scale_applies_only_to_its_own_call(loaded: Loaded) -> None:
    model = loaded("sd15")
    strong, weak = (replace(PROMPTED, ip_adapter_scale=scale) for scale in (1.0, 0.0))
    first = generate_images(model, strong)[0]
    assert (
        distance(generate_images(model, weak)[0], generate_images(model, replace(weak, mode=Mode.NONE))[0]) <= ROUNDING
    )
    assert distance(generate_images(model, strong)[0], first) == 0


def test_the_initial_image_is_the_reference_with_the_highest_weight(loaded: Loaded) -> None:
    model = loaded("sd15_plain")
    light, heavy = reference(1, weight=1), reference(2, weight=2)
    request = replace(REQUEST, mode=Mode.IMG2IMG, references=(light, heavy))
    generated = generate_images(model, request)[0]
    assert distance(generated, generate_images(model, replace(request, references=(heavy,)))[0]) == 0
    assert distance(generated, generate_images(model, replace(request, references=(light,)))[0]) > DIFFERENT


def test_a_drawing_of_another_ratio_starts_from_the_whole_reference(loaded: Loaded) -> None:
    model = loaded("sd15_plain")
    drawn, requested = (REQUEST.width, REQUEST.height), (3 * REQUEST.width, REQUEST.height)
    asked = replace(REQUEST, mode=Mode.IMG2IMG, references=(reference(1),), output_size=requested)
    image = asked.references[0].image
    assert image is not None
    framed = replace(asked.references[0], image=framing.initial_image(image, drawn, requested))
    generated = generate_images(model, asked)[0]
    assert distance(generated, generate_images(model, replace(asked, references=(framed,), output_size=drawn))[0]) == 0
    assert distance(generated, generate_images(model, replace(asked, output_size=drawn))[0]) > DIFFERENT


@pytest.mark.parametrize("pipeline", ["sd15_plain", "sdxl_turbo", "flux"])
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.6), (1, 0.05), (4, 0.1), (3, 1.0), (2, 1 / 49), (1, 1e-7)])
def test_a_low_strength_still_runs_a_step(loaded: Loaded, pipeline: str, steps: int, strength: float) -> None:
    request = replace(
        REQUEST, mode=Mode.IMG2IMG, references=(reference(1),), num_inference_steps=steps, strength=strength
    )
    reported: list[tuple[int, int]] = []
    loaded(pipeline).generate([request], record_steps(reported))
    # PNDM repeats a step, and Flux rounds the number of steps up.
    assert reported[-1][0] == reported[-1][1] <= math.ceil(steps * strength) + 1


def test_at_most_two_captions_follow_the_prompt_in_order_of_weight(reader: TextReader) -> None:
    references = tuple(
        reference(i, weight=weight, caption=caption)
        for i, (weight, caption) in enumerate([(1, "a pear"), (3, "a plum"), (2, "a fig"), (0.5, "a lime")])
    )
    request = replace(REQUEST, mode=Mode.CAPTION, references=references)
    assert conditioning.with_captions(request, reader) == ("a red apple, a plum, a fig", [])


@pytest.mark.parametrize(
    ("prompt", "captions", "text"),
    [
        ("a red apple", ["Red Apple", "a plum", " a PLUM ", None, "", "a fig"], "a red apple, a plum, a fig"),
        ("a caterpillar", ["cat", "pillar", "Caterpillar"], "a caterpillar, cat, pillar"),
        ("a cat, in a garden", ["cat in a garden", "cat garden"], "a cat, in a garden, cat garden"),
        ("a cafe\u0301 table", ["caf\u00e9", "table top"], "a cafe\u0301 table, table top"),
        ("!", ["?", "!"], "!, ?"),
    ],
)
def test_an_empty_caption_or_one_whose_words_are_there_is_left_out(
    reader: TextReader, prompt: str, captions: list[str | None], text: str
) -> None:
    references = tuple(replace(reference(i), caption=caption) for i, caption in enumerate(captions))
    request = replace(REQUEST, prompt=prompt, mode=Mode.CAPTION, references=references)
    assert conditioning.with_captions(request, reader)[0] == text


def test_a_caption_beyond_the_text_that_the_model_reads_is_left_out_and_named(loaded: Loaded) -> None:
    model = loaded("flux")  # 511 tokens, two for each word of one letter
    request = replace(
        REQUEST,
        mode=Mode.CAPTION,
        references=(reference(1, weight=2, caption="a " * 250), reference(2, caption="b " * 100)),
    )
    assert conditioning.with_captions(request, model.text_reader) == (
        "a red apple, " + ("b " * 100).strip(),
        [("a " * 250).strip()],
    )
    assert list(model.unread_texts(request).captions) == [("a " * 250).strip()]


def test_the_image_prompt_mode_uses_no_captions(reader: TextReader) -> None:
    assert conditioning.with_captions(PROMPTED, reader) == (PROMPTED.prompt, [])


@pytest.mark.parametrize(
    ("pipeline", "request_", "error", "words"),
    [
        ("sd15", replace(PROMPTED, references=(Reference(None, None, 1, None),)), ReferenceUnavailableError, "vector"),
        ("sdxl", replace(PROMPTED, references=(Reference(None, None, 1, None),)), ReferenceUnavailableError, "image"),
        ("sd15", replace(REQUEST, mode=Mode.IMG2IMG), ReferenceUnavailableError, "needs a reference"),
        (
            "sd15",
            replace(PROMPTED, references=(Reference(np.zeros(7, np.float32), None, 1, None),)),
            ImageGenerationError,
            r"\(7,\).*\(24,\)",
        ),
    ],
)
def test_an_unusable_reference_is_an_error_that_names_the_cause(
    loaded: Loaded, pipeline: str, request_: ImageRequest, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        generate_images(loaded(pipeline), request_)


def test_an_image_prompt_with_a_wrong_number_of_rows_is_refused(loaded: Loaded) -> None:
    model = loaded("sd15")
    two_rows = conditioning.ImagePrompt.of(
        model.text_to_image, [PROMPTED, PROMPTED], conditions_on="embedding_space", guided=True, aspect=(4, 4)
    )
    with (
        model._with_state(PipelineState(image_prompt=two_rows)),
        pytest.raises(ImageGenerationError, match="runs 2 rows, the image prompt has 4"),
    ):
        generated_by_diffusers(model, PROMPTED, **two_rows.arguments())


def test_the_pipeline_state_of_a_call_ends_with_it(loaded: Loaded) -> None:
    model = loaded("sd15")
    generate_images(model, PROMPTED)
    with pytest.raises(CallStopped):
        model.generate([PROMPTED], lambda step, steps: False)
    assert model.state == PipelineState()
