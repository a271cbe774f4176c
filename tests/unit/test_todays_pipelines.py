"""The pipeline classes that people run today, each with small random weights: they load, draw and keep the promises.

Several references in one call are in `test_native_references`, and several by an IP-Adapter in
`test_diffusion_references`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.contracts.generation import Mode
from shared.settings import GeneratorSettings, ModelSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import REQUEST, ROUNDING, distance, generate_images, reference
from worker_service.models.generation import schedulers
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.interface import ImageRequest
from worker_service.models.pipelines.probe import INVISIBLE

TEXT_ONLY = ["caption", "none"]
WITH_REFERENCES = ["caption", "reference", "none"]
WITH_INITIAL_IMAGE = ["img2img", "caption", "none"]
WITH_ADAPTER = ["image_prompt", "img2img", "image_prompt+img2img", "caption", "none"]
DIFFUSION_SCHEDULERS = tuple(schedulers.ALLOWED)

pytestmark = pytest.mark.usefixtures("small_references")


def not_told(_folder: Path) -> dict[str, Any]:
    """Settings of an operator for a pipeline that does not name its size."""
    return {"defaults": {"width": 64, "height": 64}}


def smaller_than_told(_folder: Path) -> dict[str, Any]:
    """Settings for a pipeline that names a size of a megapixel, which takes a CPU seconds."""
    return {"native_side": 64}


def with_adapter_of_vectors(folder: Path) -> dict[str, Any]:
    return {"ip_adapter": {"source": str(folder), "conditions_on": "embedding_space"}}


def with_adapter_of_images(folder: Path) -> dict[str, Any]:
    adapter = {
        "source": str(folder),
        "subfolder": "sdxl_models",
        "weight_name": "ip-adapter_sdxl_vit-h.safetensors",
        "image_encoder_folder": "models/image_encoder",
        "conditions_on": "image",
    }
    return {"ip_adapter": adapter}


@dataclass(frozen=True)
class Case:
    """A small pipeline and what it declares."""

    save: Callable[[Path], None]
    pipeline: str
    modes: list[str]
    native: int
    multiple: int
    steps: int
    guidance: float
    """The default of the call; 0 where the model takes none."""
    negative_prompt: bool
    schedulers: tuple[str, ...] = ()
    settings: Callable[[Path], dict[str, Any]] = lambda folder: {}
    previews: bool = True
    needs_reference: bool = False
    extra_steps: int = 0
    """Steps that the model's own scheduler takes beyond those of the request."""


CASES = {
    "FLUX.1 dev": Case(
        small_pipelines.save_flux_dev, "FluxPipeline", WITH_INITIAL_IMAGE, 256, 4, 28, 3.5, negative_prompt=False
    ),
    "FLUX.1 Kontext": Case(
        small_pipelines.save_kontext, "FluxKontextPipeline", WITH_REFERENCES, 256, 4, 28, 3.5, negative_prompt=False
    ),
    "FLUX.2 klein": Case(
        small_pipelines.save_flux2_klein, "Flux2KleinPipeline", WITH_REFERENCES, 256, 4, 8, 0, negative_prompt=False
    ),
    "FLUX.2 klein Base": Case(
        partial(small_pipelines.save_flux2_klein, distilled=False),
        *("Flux2KleinPipeline", WITH_REFERENCES, 256, 4, 50, 4.0),
        negative_prompt=False,
    ),
    "FLUX.2 klein KV": Case(
        partial(small_pipelines.save_flux2_klein, kv=True),
        *("Flux2KleinKVPipeline", WITH_REFERENCES, 256, 4, 4, 0),
        negative_prompt=False,
    ),
    "FLUX.2 dev": Case(
        small_pipelines.save_flux2_dev, "Flux2Pipeline", WITH_REFERENCES, 256, 4, 50, 4.0, negative_prompt=False
    ),
    "Qwen-Image": Case(
        small_pipelines.save_qwen_image,
        *("QwenImagePipeline", WITH_INITIAL_IMAGE, 256, 4, 50, 4.0),
        negative_prompt=True,
    ),
    "Qwen-Image 2.1": Case(
        small_pipelines.save_qwen_image_21,
        *("QwenImage21Pipeline", WITH_REFERENCES, 64, 32, 40, 1.0),
        negative_prompt=True,
        settings=not_told,
    ),
    "Krea 2": Case(
        small_pipelines.save_krea2,
        *("Krea2Pipeline", TEXT_ONLY, 64, 4, 28, 4.5),
        negative_prompt=True,
        settings=not_told,
    ),
    "Krea 2 Turbo": Case(
        partial(small_pipelines.save_krea2, distilled=True),
        *("Krea2Pipeline", TEXT_ONLY, 64, 4, 8, 0),
        negative_prompt=False,
        settings=not_told,
    ),
    "JoyImage-Edit-Plus": Case(
        small_pipelines.save_joyimage_edit_plus,
        *("JoyImageEditPlusPipeline", WITH_REFERENCES, 64, 16, 30, 4.0),
        negative_prompt=True,
        settings=not_told,
        previews=False,  # its latents are patches of the image and of all references, in one padded tensor
    ),
    "SD3": Case(
        small_pipelines.save_sd3, "StableDiffusion3Pipeline", WITH_INITIAL_IMAGE, 64, 16, 28, 7.0, negative_prompt=True
    ),
    "Sana": Case(
        small_pipelines.save_sana,
        *("SanaPipeline", TEXT_ONLY, 64, 32, 20, 4.5),
        negative_prompt=True,
        schedulers=("dpm++_2m", "dpm++_2m_sde", "unipc"),
    ),
    "Z-Image": Case(
        small_pipelines.save_z_image,
        *("ZImagePipeline", WITH_INITIAL_IMAGE, 64, 4, 50, 5.0),
        negative_prompt=True,
        settings=not_told,
    ),
    "Chroma": Case(small_pipelines.save_chroma, "ChromaPipeline", TEXT_ONLY, 256, 4, 35, 5.0, negative_prompt=True),
    "Qwen-Image-Edit": Case(
        small_pipelines.save_qwen_image_edit,
        *("QwenImageEditPipeline", ["reference"], 64, 16, 50, 4.0),
        negative_prompt=True,
        settings=smaller_than_told,
        needs_reference=True,
    ),
    "Qwen-Image-Edit-Plus": Case(
        partial(small_pipelines.save_qwen_image_edit, plus=True),
        *("QwenImageEditPlusPipeline", ["reference"], 64, 16, 50, 4.0),
        negative_prompt=True,
        settings=smaller_than_told,
        needs_reference=True,
    ),
    "Stable Diffusion 1.5": Case(
        small_pipelines.save_sd15,
        *("StableDiffusionPipeline", WITH_ADAPTER, 64, 16, 50, 7.5),
        negative_prompt=True,
        schedulers=DIFFUSION_SCHEDULERS,
        settings=with_adapter_of_vectors,
        extra_steps=1,  # PNDM
    ),
    "Stable Diffusion XL": Case(
        small_pipelines.save_sdxl,
        *("StableDiffusionXLPipeline", WITH_ADAPTER, 64, 16, 50, 5.0),
        negative_prompt=True,
        schedulers=DIFFUSION_SCHEDULERS,
        settings=with_adapter_of_images,
    ),
    "Lumina 2": Case(small_pipelines.save_lumina2, "Lumina2Pipeline", TEXT_ONLY, 64, 16, 30, 4.0, negative_prompt=True),
}
LoadCase = Callable[[str], Diffusion]
every_case = pytest.mark.parametrize("name", CASES)


def load(folder: Path, settings: Any) -> Diffusion:
    generator = {"source": str(folder), "reference_side": 64, **settings}
    return Diffusion.load(
        "model",
        ModelSettings(
            generators={"model": GeneratorSettings.model_validate(generator)}, default_generator="model", threads=1
        ),
    )


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> LoadCase:
    """`case("Sana")` gives the model of that case. Its first call saves and loads it, and warms it up."""

    @cache
    def load_case(name: str) -> Diffusion:
        folder = tmp_path_factory.mktemp("model")
        CASES[name].save(folder)
        model = load(folder, CASES[name].settings(folder))
        model.warm_up()
        return model

    return load_case


def request_for(model: Diffusion, **changes: Any) -> ImageRequest:
    """A request of few steps with the model's own guidance, for one of its smallest sizes."""
    side = max(32, 2 * model.capabilities.size_multiple)
    request = REQUEST
    if model.capabilities.needs_reference:
        request = replace(request, mode=Mode.REFERENCE, references=(reference(1),))
    common = {"guidance_scale": model.defaults.guidance_scale, "num_inference_steps": 2, "width": side, "height": side}
    return replace(request, **common | changes)


def draw(model: Diffusion, *requests: ImageRequest) -> np.ndarray:
    """Images before they are rounded: shape (n, height, width, 3), in [0, 1]."""
    return model.draw(requests, lambda step, steps: True)


@every_case
def test_it_declares_what_its_parts_and_its_call_can_do(case: LoadCase, name: str) -> None:
    expected, model = CASES[name], case(name)
    declared = model.capabilities
    assert declared.pipeline == expected.pipeline
    assert declared.modes == expected.modes
    assert (declared.native_width, declared.native_height) == (expected.native, expected.native)
    assert declared.size_multiple == expected.multiple
    assert tuple(declared.schedulers) == expected.schedulers
    assert declared.supports_negative_prompt is expected.negative_prompt
    assert declared.supports_guidance is (expected.guidance > 0)
    assert declared.needs_reference is expected.needs_reference
    assert declared.defaults == model.defaults
    assert (model.defaults.num_inference_steps, model.defaults.guidance_scale) == (expected.steps, expected.guidance)
    assert (model.defaults.width, model.defaults.height) == (expected.native, expected.native)


@every_case
def test_it_draws_its_native_size_and_others(case: LoadCase, name: str) -> None:
    model = case(name)
    native, multiple = model.capabilities.native_width, model.capabilities.size_multiple
    for width, height in [(native, native), (3 * multiple, 5 * multiple), (10 * multiple, 4 * multiple)]:
        request = request_for(model, width=width, height=height, num_inference_steps=1)
        assert generate_images(model, request)[0].shape == (height, width, 3)


@every_case
def test_each_scheduler_draws(case: LoadCase, name: str) -> None:
    model = case(name)
    for scheduler in [None, *model.capabilities.schedulers]:
        request = request_for(model, scheduler=scheduler, num_inference_steps=3)
        assert generate_images(model, request)[0].std() > 0


@every_case
def test_each_input_of_each_mode_changes_the_picture(case: LoadCase, name: str) -> None:
    model = case(name)
    plain = request_for(model, prompt="a red apple on a table")
    changed = {"prompt": replace(plain, prompt="two zebras"), "seed": replace(plain, seed=8)}
    if model.capabilities.supports_guidance:
        changed["guidance"] = replace(plain, guidance_scale=plain.guidance_scale + 4)
    before = draw(model, plain)
    for other in changed.values():
        assert np.abs(draw(model, other) - before).max() > ROUNDING / 255
    for mode in map(Mode, model.capabilities.modes):
        if mode is Mode.NONE:
            continue
        request = replace(plain, mode=mode)
        if mode.traits.uses_initial_image:
            request = replace(request, num_inference_steps=4, strength=0.5)
        first, second = (
            draw(model, replace(request, references=(reference(seed, caption=text),)))
            for seed, text in ((1, "xx"), (2, "q z q"))
        )
        # Random weights attend to all tokens alike, so that references hardly differ.
        signal = INVISIBLE if mode is Mode.REFERENCE else ROUNDING / 255
        assert np.abs(first - second).max() > signal, mode
        assert np.abs(first - before).max() > signal or plain.references, mode


@pytest.mark.parametrize("name", [name for name, expected in CASES.items() if expected.negative_prompt])
def test_a_negative_prompt_changes_the_picture(case: LoadCase, name: str) -> None:
    model = case(name)
    plain = request_for(model, guidance_scale=4.0)
    without, one, other = (
        draw(model, replace(plain, negative_prompt=text)) for text in (None, "blurry", "many hands on a clock")
    )
    assert np.abs(one - without).max() > ROUNDING / 255
    assert np.abs(one - other).max() > ROUNDING / 255


@pytest.mark.parametrize("name", ["FLUX.2 klein", "FLUX.2 klein KV", "Krea 2 Turbo"])
def test_a_distilled_model_is_never_guided(case: LoadCase, name: str) -> None:
    model = case(name)
    one, other = (draw(model, request_for(model, guidance_scale=scale)) for scale in (0.0, 7.0))
    assert np.abs(one - other).max() == 0


def test_a_model_with_true_guidance_is_guided_without_a_negative_prompt(case: LoadCase) -> None:
    model = case("Qwen-Image")
    off, on = (draw(model, request_for(model, guidance_scale=scale)) for scale in (1.0, 4.0))
    assert np.abs(off - on).max() > ROUNDING / 255
    blank = draw(model, request_for(model, guidance_scale=4.0, negative_prompt=" "))
    assert np.abs(on - blank).max() == 0


@every_case
def test_an_image_is_the_same_alone_in_a_batch_and_inside_another_call(case: LoadCase, name: str) -> None:
    model = case(name)
    short = request_for(model, prompt="a cat")
    long = replace(short, prompt="a green pear and a blue cup on a table", seed=8)
    other = long if model.batch_key(short) == model.batch_key(long) else replace(short, seed=8)
    alone = np.concatenate([draw(model, short), draw(model, other)])
    together = draw(model, short, other)
    nested = draw(model, long)
    inside: list[np.ndarray] = []

    def draw_between(step: int, steps: int) -> bool:
        inside.append(draw(model, long))
        return True

    outside = model.draw([short], draw_between)
    assert np.abs(outside - alone[:1]).max() == 0
    assert [np.abs(image - nested).max() for image in inside] == [0] * (2 + CASES[name].extra_steps)
    changed = bool(np.abs(together - alone).max() > ROUNDING / 255)
    assert changed is model.capabilities.batching_changes_images is (name == "Qwen-Image 2.1")
    assert model.capabilities.max_batch_size == (1 if changed else 4)
    assert not model.capabilities.interruption_changes_images


class EveryPreview:
    def __init__(self) -> None:
        self.seen: list[np.ndarray] = []

    def is_due(self, step: int, total_steps: int) -> bool:
        return True

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        self.seen.append(pixels)


@every_case
def test_the_preview_of_the_last_step_is_the_image(case: LoadCase, name: str) -> None:
    model, listener = case(name), EveryPreview()
    multiple = model.capabilities.size_multiple
    request = request_for(model, width=2 * multiple, height=4 * multiple, num_inference_steps=3)
    (image,) = generate_images(model, replace(request, preview_listener=listener))
    if CASES[name].previews:
        assert distance(listener.seen[-1], image) <= ROUNDING
        assert distance(listener.seen[0], image) > ROUNDING
    assert len(listener.seen) == (3 + CASES[name].extra_steps if CASES[name].previews else 0)


@pytest.mark.parametrize("name", ["FLUX.1 dev", "SD3", "FLUX.2 dev", "Qwen-Image 2.1"])
def test_a_text_is_counted_by_the_encoder_that_reads_most_of_it(case: LoadCase, name: str) -> None:
    model = case(name)
    assert model.unread_texts(request_for(model, prompt="word " * 20)).prompt == "", "more than the 77 tokens of CLIP"
    assert model.unread_texts(request_for(model, prompt="word " * 1000)).prompt != ""
