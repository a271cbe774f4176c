"""Sizes, modes and parameters of a request, checked against the declared capabilities of a model."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.capabilities import (
    check_parameters,
    default_references,
    drawable_size,
    resolve_defaults,
    resolve_mode,
    supports,
)
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities, ModelDefaults
from shared.errors import NoReferenceError, UnsupportedModeError, UnsupportedParameterError
from shared.settings import GeneratorDefaults

ALL_MODES = [mode.value for mode in Mode if mode is not Mode.AUTO]


def capabilities(**overrides: Any) -> Capabilities:
    declared: dict[str, Any] = {
        "modes": ALL_MODES,
        "native_width": 512,
        "native_height": 512,
        "size_multiple": 64,
        "any_size": True,
        "max_batch_size": 4,
        "max_references": 4,
        "schedulers": ["euler"],
        "loras": ["ink"],
        "supports_negative_prompt": True,
        "supports_guidance": True,
        "pipeline": "StableDiffusionPipeline",
        "weights_digest": "0" * 64,
        "device": "cpu",
        "dtype": "float32",
    }
    return Capabilities(**declared | overrides)


@pytest.mark.parametrize(
    ("requested", "generated"),
    [
        ((512, 512), (512, 512)),
        ((640, 448), (640, 448)),
        ((500, 500), (512, 512)),  # the nearest size that the model's layers divide evenly
        ((1024, 1024), (704, 704)),  # too large for a coherent picture: about twice the native area
        ((64, 64), (384, 384)),
        ((2048, 256), (1280, 448)),  # too wide: about 3:1
    ],
)
def test_a_size_is_kept_if_the_model_can_generate_it_and_adapted_otherwise(
    requested: tuple[int, int], generated: tuple[int, int]
) -> None:
    assert drawable_size(capabilities(), *requested) == generated


def test_a_model_with_one_size_generates_that_size() -> None:
    one_size = capabilities(any_size=False, native_width=64, native_height=96)
    assert drawable_size(one_size, 512, 512) == (64, 96)


@given(width=st.integers(16, 2048), height=st.integers(16, 2048), multiple=st.sampled_from([1, 8, 16, 64]))
def test_every_requested_size_gives_a_size_that_can_be_generated(width: int, height: int, multiple: int) -> None:
    model = capabilities(size_multiple=multiple)
    generated = drawable_size(model, width, height)
    assert all(side > 0 and side % multiple == 0 for side in generated)
    assert 0.3 < generated[0] * generated[1] / (512 * 512) < 2.6


@given(width=st.integers(6, 12), height=st.integers(6, 10))
def test_a_divisible_size_near_the_native_one_is_never_changed(width: int, height: int) -> None:
    assert drawable_size(capabilities(), 64 * width, 64 * height) == (64 * width, 64 * height)


def test_auto_prefers_the_image_prompt() -> None:
    mode, reason = resolve_mode(capabilities(), Mode.AUTO, references=2, captions=2)
    assert mode is Mode.IMAGE_PROMPT
    assert "image prompts" in reason


def test_auto_uses_captions_where_the_model_takes_no_images() -> None:
    without_image_prompts = capabilities(modes=["none", "caption", "img2img"])
    assert resolve_mode(without_image_prompts, Mode.AUTO, references=2, captions=1)[0] is Mode.CAPTION
    assert resolve_mode(without_image_prompts, Mode.AUTO, references=2)[0] is Mode.CAPTION
    assert resolve_mode(without_image_prompts, Mode.AUTO, references=2, captions=0)[0] is Mode.NONE


@pytest.mark.parametrize("mode", list(Mode))
def test_without_references_every_mode_becomes_none(mode: Mode) -> None:
    assert resolve_mode(capabilities(), mode, references=0)[0] is Mode.NONE


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.AUTO])
def test_an_explicit_mode_is_kept(mode: Mode) -> None:
    assert resolve_mode(capabilities(), mode, references=1, captions=0)[0] is mode


@pytest.mark.parametrize("references", [0, 2])
def test_an_unsupported_explicit_mode_is_refused(references: int) -> None:
    without_image_prompts = capabilities(modes=["none", "caption"])
    assert not supports(without_image_prompts, Mode.IMG2IMG)
    with pytest.raises(UnsupportedModeError, match=r"'img2img'.*none, caption"):
        resolve_mode(without_image_prompts, Mode.IMG2IMG, references=references)


@pytest.mark.parametrize(
    ("request_", "parameter"),
    [
        ({"scheduler": "dpm_sde"}, "scheduler"),
        ({"loras": ["ink", "paint"]}, "loras"),
        ({"references": 5}, "reference_ids"),
    ],
)
def test_a_parameter_that_the_model_does_not_support_is_refused(request_: dict[str, Any], parameter: str) -> None:
    with pytest.raises(UnsupportedParameterError) as refused:
        check_parameters(capabilities(), **request_)
    assert refused.value.context["parameter"] == parameter


def test_a_negative_prompt_is_refused_where_it_would_be_ignored() -> None:
    distilled = capabilities(supports_negative_prompt=False)
    check_parameters(distilled, negative_prompt="")
    with pytest.raises(UnsupportedParameterError, match="negative prompt"):
        check_parameters(distilled, negative_prompt="blurry")


def test_a_request_within_the_capabilities_passes() -> None:
    check_parameters(
        capabilities(), mode=Mode.IMAGE_PROMPT, scheduler="euler", loras=["ink"], references=4, negative_prompt="blurry"
    )


READS_PICTURES = ["reference", "caption", "none"]


def test_auto_prefers_pictures_to_captions() -> None:
    mode, reason = resolve_mode(capabilities(modes=READS_PICTURES), Mode.AUTO, references=2, captions=2)
    assert mode is Mode.REFERENCE
    assert "several reference images" in reason
    assert resolve_mode(capabilities(modes=["image_prompt", *READS_PICTURES]), Mode.AUTO, references=1)[0] is (
        Mode.IMAGE_PROMPT
    )


@pytest.mark.parametrize("mode", [Mode.AUTO, Mode.REFERENCE])
def test_a_model_that_only_edits_pictures_fails_without_one(mode: Mode) -> None:
    edits = capabilities(modes=["reference"], needs_reference=True)
    assert resolve_mode(edits, mode, references=1)[0] is Mode.REFERENCE
    with pytest.raises(NoReferenceError):
        resolve_mode(edits, mode, references=0)
    with pytest.raises(NoReferenceError):
        check_parameters(edits, mode=Mode.NONE)


@pytest.mark.parametrize(
    ("modes", "mode", "k"),
    [
        (READS_PICTURES, Mode.AUTO, 3),
        (READS_PICTURES, Mode.REFERENCE, 3),
        (READS_PICTURES, Mode.CAPTION, 4),
        (["image_prompt", *READS_PICTURES], Mode.AUTO, 4),
        (None, Mode.REFERENCE, 3),
        (None, Mode.AUTO, 4),
    ],
)
def test_mode_reference_searches_three_references(modes: list[str] | None, mode: Mode, k: int) -> None:
    known = None if modes is None else capabilities(modes=modes)
    assert default_references(known, mode, default=4) == k
    assert default_references(known, mode, default=2) == 2


def test_the_settings_decide_a_default_and_the_model_decides_what_they_leave_open() -> None:
    of_the_model = ModelDefaults(
        width=1024, height=768, num_inference_steps=28, guidance_scale=3.5, ip_adapter_scale=1, strength=0.5
    )
    loaded = capabilities(defaults=of_the_model)
    silent = resolve_defaults(GeneratorDefaults(), loaded)
    assert (silent.width, silent.height, silent.num_inference_steps, silent.guidance_scale) == (1024, 768, 28, 3.5)
    decided = resolve_defaults(GeneratorDefaults(num_inference_steps=7, guidance_scale=0, scheduler="euler"), loaded)
    assert (decided.num_inference_steps, decided.guidance_scale, decided.scheduler) == (7, 0, "euler")
    assert (decided.width, decided.height) == (1024, 768)


@pytest.mark.parametrize("published", [None, capabilities()], ids=["no worker yet", "a worker of the last release"])
def test_until_a_worker_has_published_defaults_those_of_the_last_release_hold(published: Capabilities | None) -> None:
    assert Capabilities.model_validate(capabilities().model_dump(exclude={"defaults"})).defaults is None
    known = resolve_defaults(GeneratorDefaults(guidance_scale=2), published)
    assert (known.width, known.height, known.num_inference_steps, known.guidance_scale) == (512, 512, 30, 2)
