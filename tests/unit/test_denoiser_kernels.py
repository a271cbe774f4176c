"""Attention backends and compilation: the same images, and one line where a model has not got them."""

import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from diffusers.models.attention_dispatch import AttentionBackendName
from pydantic import ValidationError

from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings, ModelSettings
from tests.unit.test_diffusion_batches import REQUEST
from tests.unit.test_diffusion_loading import load
from worker_service.models.generation.diffusion import Diffusion

Loaded = Callable[[str], Diffusion]


def draw(model: Diffusion) -> np.ndarray:
    return model.draw([REQUEST], lambda step, steps: True)


def load_with(model_settings: ModelSettings, name: str, **changes: Any) -> Diffusion:
    return load(**model_settings.generators[name].model_copy(update=changes).model_dump())


def test_an_attention_backend_changes_the_image_only_by_rounding(loaded: Loaded, model_settings: ModelSettings) -> None:
    model = load_with(model_settings, "flux", attention="_native_math")
    backends = {
        part.processor._attention_backend
        for part in model.text_to_image.transformer.modules()
        if hasattr(part, "processor")
    }
    assert backends == {AttentionBackendName._NATIVE_MATH}
    assert np.abs(draw(model) - draw(loaded("flux"))).max() < 1e-4


def test_the_repeated_blocks_of_the_denoiser_are_compiled(model_settings: ModelSettings) -> None:
    model = load_with(model_settings, "flux", compile="regional")
    compiled = [part for part in model.text_to_image.transformer.modules() if part._compiled_call_impl is not None]
    assert {type(part).__name__ for part in compiled} == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}


@pytest.mark.extended  # the C++ compiler takes a minute
def test_compiled_blocks_draw_the_same_image(loaded: Loaded, model_settings: ModelSettings) -> None:
    model = load_with(model_settings, "flux", compile="regional")
    assert np.abs(draw(model) - draw(loaded("flux"))).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "cause"),
    [
        ("sd15_plain", {"attention": "native"}, "UNet2DConditionModel takes no attention backend"),
        ("flux", {"attention": "sage"}, "sageattention"),
    ],
)
def test_a_backend_that_a_model_or_machine_lacks_is_one_line(
    model_settings: ModelSettings, name: str, changes: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ModelLoadError, match=cause) as refused:
        load_with(model_settings, name, **changes)
    assert "\n" not in refused.value.message


def test_the_settings_offer_only_backends_of_diffusers_that_download_no_code() -> None:
    annotation = GeneratorSettings.model_fields["attention"].annotation
    offered = {name for part in typing.get_args(annotation) for name in typing.get_args(part)}
    assert offered
    assert offered <= {backend.value for backend in AttentionBackendName}
    assert not any(name.endswith("_hub") for name in offered)


@pytest.mark.parametrize(
    "scaled", [{"loras": {"ink": {"source": "/models/ink"}}}, {"ip_adapter": {"source": "/models/a"}}]
)
def test_compilation_is_refused_where_each_scale_would_be_compiled_again(scaled: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="compiled again"):
        GeneratorSettings.model_validate({"source": "/models/flux", "compile": "regional", **scaled})
