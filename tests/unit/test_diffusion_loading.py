"""Loading of diffusion pipelines: declared capabilities, load errors and refused requests."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from shared.contracts.generation import Mode
from shared.errors import (
    InvalidOutputError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModeError,
    UnsupportedParameterError,
)
from shared.settings import GeneratorDefaults, GeneratorSettings, IPAdapterSettings, ModelSettings
from tests import small_pipelines
from tests.unit.test_diffusion_batches import (
    DIFFERENT,
    PIPELINES,
    REQUEST,
    ROUNDING,
    distance,
    generate_images,
    reference,
)
from worker_service.models import loading
from worker_service.models.generation import schedulers
from worker_service.models.generation.diffusion import Diffusion

Loaded = Callable[[str], Diffusion]
WITHOUT_ADAPTER = [Mode.IMG2IMG, Mode.CAPTION, Mode.NONE]
WITH_ADAPTER = [Mode.IMAGE_PROMPT, Mode.IMG2IMG, Mode.IMAGE_PROMPT_IMG2IMG, Mode.CAPTION, Mode.NONE]
"""In the order of `Mode`."""


def load(**generator: Any) -> Diffusion:
    settings = ModelSettings(
        generators={"model": GeneratorSettings.model_validate(generator)}, default_generator="model", threads=1
    )
    return Diffusion.load("model", settings)


@pytest.mark.parametrize(
    ("pipeline", "declared"),
    [
        ("sd15", {"pipeline": "StableDiffusionPipeline", "modes": WITH_ADAPTER, "native_width": 64}),
        ("sd15_plain", {"pipeline": "StableDiffusionPipeline", "modes": WITHOUT_ADAPTER, "loras": []}),
        ("sd15_lora", {"loras": ["ink", "neon"]}),
        ("sdxl", {"pipeline": "StableDiffusionXLPipeline", "modes": WITH_ADAPTER, "supports_negative_prompt": True}),
        ("sdxl_turbo", {"modes": WITHOUT_ADAPTER, "supports_guidance": True, "size_multiple": 16}),
        (
            "flux",
            {
                "pipeline": "FluxPipeline",
                "modes": WITHOUT_ADAPTER,
                "native_width": 1024,
                "schedulers": [],
                "supports_negative_prompt": False,
                "supports_guidance": True,
            },
        ),
    ],
)
def test_a_pipeline_declares_its_capabilities(loaded: Loaded, pipeline: str, declared: dict[str, Any]) -> None:
    assert declared.items() <= loaded(pipeline).capabilities.model_dump().items()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_declared_mode_generates_an_image(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    for mode in map(Mode, model.capabilities.modes):
        generated = generate_images(model, replace(REQUEST, mode=mode, references=(reference(1),)))[0]
        assert generated.shape == (64, 64, 3)


@pytest.mark.parametrize("pipeline", ["sd15", "sd15_plain", "sd15_lora", "sdxl", "sdxl_plus", "sdxl_turbo"])
def test_a_model_warms_up(loaded: Loaded, pipeline: str) -> None:
    model = loaded(pipeline)
    before = generate_images(model, REQUEST)[0]
    model.warm_up()
    assert distance(generate_images(model, REQUEST)[0], before) == 0


def test_guidance_is_off_up_to_a_scale_of_1(loaded: Loaded) -> None:
    model = loaded("sdxl_turbo")
    off, one, on = (
        generate_images(model, replace(REQUEST, guidance_scale=scale, num_inference_steps=1))[0] for scale in (0, 1, 3)
    )
    assert distance(off, one) == 0
    assert distance(off, on) > 0


def test_the_weights_digest_changes_with_the_weights(loaded: Loaded, tmp_path: Path) -> None:
    digest = loaded("sd15_plain").capabilities.weights_digest
    small_pipelines.save_sd15(tmp_path / "same")
    small_pipelines.save_sd15(tmp_path / "other", seed=1)
    assert load(source=str(tmp_path / "same")).capabilities.weights_digest == digest
    assert load(source=str(tmp_path / "other")).capabilities.weights_digest != digest
    assert loaded("sd15").capabilities.weights_digest != digest


def test_half_precision_generates_a_similar_image(model_settings: ModelSettings, loaded: Loaded) -> None:
    settings = model_settings.generators["sd15_lora"].model_copy(update={"dtype": "bfloat16"})
    half = load(**settings.model_dump())
    assert half.capabilities.dtype == "bfloat16"
    parts = [half.text_to_image.unet, half.text_to_image.vae, half.text_to_image.text_encoder]
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.bfloat16}
    request = replace(
        REQUEST, mode=Mode.IMAGE_PROMPT_IMG2IMG, references=(reference(1), reference(2)), loras=(("ink", 0.5),)
    )
    generated = generate_images(half, request)[0].astype(float)
    expected = generate_images(loaded("sd15_lora"), request)[0].astype(float)
    assert abs(generated - expected).mean() < 10


def test_a_lora_changes_only_the_calls_that_name_it(loaded: Loaded) -> None:
    model, plain = loaded("sd15_lora"), loaded("sd15")
    request = replace(REQUEST, mode=Mode.IMAGE_PROMPT, references=(reference(1),))
    bare = generate_images(plain, request)[0]
    assert distance(generate_images(model, request)[0], bare) <= ROUNDING
    ink, neon, both, scale_0 = (
        generate_images(model, replace(request, loras=loras))[0]
        for loras in [(("ink", 1.0),), (("neon", 1.0),), (("ink", 1.0), ("neon", 1.0)), (("ink", 0.0),)]
    )
    images = [bare, ink, neon, both]
    assert all(distance(a, b) > DIFFERENT for i, a in enumerate(images) for b in images[:i])
    assert distance(scale_0, bare) <= ROUNDING
    assert distance(generate_images(model, request)[0], bare) <= ROUNDING
    assert distance(generate_images(model, replace(request, loras=(("ink", 1.0),)))[0], ink) == 0


@pytest.mark.parametrize(
    ("pipeline", "change", "error"),
    [
        ("sd15_plain", {"mode": Mode.IMAGE_PROMPT, "references": (reference(1),)}, UnsupportedModeError),
        ("sd15_plain", {"mode": Mode.REFERENCE, "references": (reference(1),)}, UnsupportedModeError),
        ("sd15", {"scheduler": "no-such-scheduler"}, UnsupportedParameterError),
        ("flux", {"scheduler": "euler"}, UnsupportedParameterError),
        ("sd15_lora", {"loras": (("paint", 1.0),)}, UnsupportedParameterError),
        ("flux", {"negative_prompt": "blurry"}, UnsupportedParameterError),
    ],
)
def test_the_model_refuses_an_unsupported_request_with_the_error_of_the_api(
    loaded: Loaded, pipeline: str, change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        generate_images(loaded(pipeline), replace(REQUEST, **change))


def test_pixels_that_are_not_finite_are_an_error(model_settings: ModelSettings) -> None:
    broken = Diffusion.load("sd15_plain", model_settings)
    with torch.no_grad():
        broken.text_to_image.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(InvalidOutputError, match="not finite numbers"):
        generate_images(broken, REQUEST)


def test_a_generator_that_is_not_in_the_settings_is_not_found(model_settings: ModelSettings) -> None:
    with pytest.raises(ModelNotFoundError) as refused:
        Diffusion.load("nobody", model_settings)
    assert refused.value.context == {"model": "nobody", "models": sorted(model_settings.generators)}


def sd15_adapter(folder: Path, **changes: Any) -> dict[str, Any]:
    return IPAdapterSettings(source=str(folder), conditions_on="embedding_space").model_dump() | changes


def sd15_lora(models: Path, weight_name: str | None = "ink.safetensors") -> dict[str, Any]:
    return {"loras": {"ink": {"source": str(models / "sd15" / "lora"), "weight_name": weight_name}}}


@pytest.mark.parametrize(
    ("generator", "cause"),
    [
        (lambda models: {"source": "/nowhere/at/all"}, "/nowhere/at/all"),
        (lambda models: {"source": str(models)}, "model_index.json"),
        (lambda models: {"source": "nobody/no-such-pipeline", "revision": "main"}, "nobody/no-such-pipeline.*offline"),
        (
            lambda models: {"source": str(models / "sd15"), "ip_adapter": sd15_adapter(models / "clip")},
            "IP-Adapter .*clip",
        ),
        (
            lambda models: {
                "source": str(models / "sd15"),
                "ip_adapter": sd15_adapter(
                    models / "sdxl", subfolder="sdxl_models", weight_name="ip-adapter_sdxl_vit-h.safetensors"
                ),
            },
            "IP-Adapter .*sdxl",
        ),
        (
            lambda models: {
                "source": str(models / "sdxl"),
                "ip_adapter": sd15_adapter(
                    models / "sdxl", subfolder="sdxl_models", weight_name="ip-adapter-plus_sdxl_vit-h.safetensors"
                ),
            },
            "hidden states",
        ),
        (
            lambda models: {
                "source": str(models / "sd15"),
                "ip_adapter": sd15_adapter(models / "sd15", conditions_on="image"),
            },
            "has an image encoder",
        ),
        (
            lambda models: {
                "source": str(models / "sd15"),
                "ip_adapter": sd15_adapter(models / "sd15", weight_name="ip_adapter.bin"),
            },
            "not a safetensors file",
        ),
        (
            lambda models: {"source": str(models / "flux"), "ip_adapter": sd15_adapter(models / "sd15")},
            "FluxPipeline supports no IP-Adapter",
        ),
        (
            lambda models: {
                "source": str(models / "sd15"),
                "loras": {"ink": {"source": str(models / "clip"), "weight_name": "none.safetensors"}},
            },
            "LoRA 'ink'",
        ),
        (lambda models: {"source": str(models / "flux"), **sd15_lora(models)}, "'ink' has no weights for FluxPipeline"),
        (lambda models: {"source": str(models / "sdxl"), **sd15_lora(models)}, "LoRA 'ink'.*size mismatch for"),
        (
            lambda models: {"source": str(models / "sd15"), **sd15_lora(models, "ink.bin")},
            "'ink.bin' is not a safetensors file",
        ),
        (
            lambda models: {"source": str(models / "sd15"), **sd15_lora(models, None)},
            "weight_name has to be one of ink.safetensors, neon.safetensors",
        ),
        (
            lambda models: {"source": str(models / "sd15"), "defaults": {"scheduler": "no-such-scheduler"}},
            "no-such-scheduler",
        ),
    ],
)
def test_a_load_error_names_the_cause_in_one_line(
    small_models: Path, generator: Callable[[Path], dict[str, Any]], cause: str
) -> None:
    with pytest.raises(ModelLoadError, match=cause) as refused:
        load(**generator(small_models))
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"])
def test_a_pickle_is_never_read(small_models: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(small_models / "sd15", tmp_path / "sd15")
    weights = tmp_path / "sd15" / f"{part}.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    torch.save({}, weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(source=str(tmp_path / "sd15"))


def test_a_scheduler_that_adds_unseeded_noise_is_refused(small_models: Path, tmp_path: Path) -> None:
    shutil.copytree(small_models / "flux", tmp_path / "flux")
    config = tmp_path / "flux" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"stochastic_sampling": false', '"stochastic_sampling": true'))
    with pytest.raises(ModelLoadError, match="does not depend on the images' seeds"):
        load(source=str(tmp_path / "flux"))


def set_class_of_part(pipeline: Path, part: str, library: str, class_name: str) -> None:
    index = pipeline / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: [library, class_name]}))


def test_code_that_comes_with_a_model_is_never_run(small_models: Path, tmp_path: Path) -> None:
    shutil.copytree(small_models / "sd15", tmp_path / "sd15")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom diffusers import UNet2DConditionModel as MyUNet\n"
    (tmp_path / "sd15" / "unet" / "my_unet.py").write_text(code)
    set_class_of_part(tmp_path / "sd15", "unet", "my_unet", "MyUNet")
    with pytest.raises(ModelLoadError):
        load(source=str(tmp_path / "sd15"))
    assert not ran.exists()


def test_code_of_a_pipeline_that_comes_with_a_model_is_never_run(small_models: Path, tmp_path: Path) -> None:
    shutil.copytree(small_models / "sd15", tmp_path / "sd15")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom diffusers import StableDiffusionPipeline as MyPipeline\n"
    (tmp_path / "sd15" / "my_pipeline.py").write_text(code)
    index = tmp_path / "sd15" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["my_pipeline", "MyPipeline"]}))
    with pytest.raises(ModelLoadError) as refused:
        load(source=str(tmp_path / "sd15"))
    assert "\n" not in refused.value.message
    assert not ran.exists()


def save_unconditional(folder: Path) -> None:
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(folder)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (
            small_pipelines.save_pixart_sigma,
            "PixArtSigmaPipeline cannot work here. It has no callback between two steps, so no call could be stopped.",
        ),
        (
            save_unconditional,
            "DDPMPipeline cannot work here. It has no prompt; no callback between two steps, so no call could be "
            "stopped; no image processor, so it draws no images.",
        ),
    ],
    ids=["PixArt-Sigma", "without a prompt"],
)
def test_a_pipeline_that_cannot_work_here_is_refused_with_what_it_lacks(
    tmp_path: Path, save: Callable[[Path], None], message: str
) -> None:
    save(tmp_path)
    with pytest.raises(ModelLoadError) as refused:
        load(source=str(tmp_path))
    assert refused.value.message == message


def test_a_zero_snr_model_offers_only_schedulers_that_start_from_pure_noise(small_models: Path, tmp_path: Path) -> None:
    shutil.copytree(small_models / "sd15", tmp_path / "sd15")
    own = DDIMScheduler(
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )
    own.save_pretrained(tmp_path / "sd15" / "scheduler")
    set_class_of_part(tmp_path / "sd15", "scheduler", "diffusers", "DDIMScheduler")
    model = load(source=str(tmp_path / "sd15"))
    assert {"ddim", "euler", "dpm++_2m"} <= set(model.capabilities.schedulers)
    assert {"pndm", "heun", "dpm++_2m_karras"}.isdisjoint(model.capabilities.schedulers)
    for scheduler in model.capabilities.schedulers:
        assert generate_images(model, replace(REQUEST, scheduler=scheduler, num_inference_steps=12))[0].std() > 0


def test_no_offered_scheduler_adds_unseeded_noise() -> None:
    assert "DPMSolverSDEScheduler" not in {class_name for class_name, _ in schedulers.ALLOWED.values()}


def test_a_process_that_loads_offline_sets_the_hub_to_offline_mode(loaded: Loaded) -> None:
    loaded("sd15")
    assert huggingface_hub.is_offline_mode()


def test_the_settings_decide_the_threads_of_a_model_process(model_settings: ModelSettings) -> None:
    before = torch.get_num_threads()
    loading.prepare_process(model_settings.model_copy(update={"threads": before + 1}))
    assert torch.get_num_threads() == before + 1
    loading.prepare_process(model_settings.model_copy(update={"threads": 0}))
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_a_native_size_of_the_settings_becomes_one_that_the_model_draws(small_models: Path, tmp_path: Path) -> None:
    model = load(source=str(small_models / "sd15"), native_side=100)
    model.warm_up()
    assert (model.capabilities.size_multiple, model.capabilities.native_width) == (16, 96)
    small_pipelines.save_krea2(tmp_path)  # the pipeline does not name its size
    known = load(source=str(tmp_path), defaults={"width": 90, "height": 99}).capabilities
    assert (known.size_multiple, known.native_width, known.native_height) == (4, 88, 100)


def test_a_generator_has_the_defaults_of_its_settings(small_models: Path) -> None:
    model = load(source=str(small_models / "sd15"), defaults=GeneratorDefaults(num_inference_steps=7).model_dump())
    assert model.defaults.num_inference_steps == 7
