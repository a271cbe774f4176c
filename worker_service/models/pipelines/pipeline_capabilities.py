"""Capabilities of a loaded pipeline, from its parts and from the signature of its call, not from its name."""

import copy
import inspect
from math import lcm
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

from shared.capabilities import nearest_multiple, resolve_defaults
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import ModelLoadError
from shared.settings import GeneratorSettings
from worker_service.models.generation import schedulers
from worker_service.models.generation.guidance import Guidance
from worker_service.models.generation.native_references import NativeReferences
from worker_service.models.pipelines import placement, quantization, weights_digest

NEEDED_PARAMETERS = {
    "prompt": "no prompt",
    "num_inference_steps": "no number of steps",
    "generator": "no seeds",
    "callback_on_step_end": "no callback between two steps, so no call could be stopped",
    "output_type": "no type of output",
}
"""Parameters of a call without which the service cannot use it, and what their lack means."""
UNKNOWN_NATIVE_SIDE = 1024
"""Pixels per side for which most current models were trained. For pipelines that do not name their size."""
DISTILLED_STEPS = 8
"""Steps of a pipeline that is marked as distilled. Its signature names the steps of the model that was not distilled.
Between the 4 of FLUX.2 klein, which loses nothing by more, and the 8 of Krea 2."""


def of(
    pipeline: DiffusionPipeline, image_to_image: DiffusionPipeline | None, settings: GeneratorSettings
) -> Capabilities:
    """Capabilities of the loaded pipeline, from its parts and from the signature of its call.

    Raises:
        ModelLoadError: the pipeline lacks something that this service needs.
    """
    _require_usable(pipeline, settings)
    parameters = inspect.signature(type(pipeline).__call__).parameters
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    references = NativeReferences.of(pipeline, settings)
    guidance = Guidance.of(pipeline)
    size_multiple = _size_multiple(pipeline, denoiser)
    native_width, native_height = _native_size(pipeline, denoiser, settings, multiple=size_multiple)
    needs_reference = references is not None and not _draws_from_text(pipeline, settings, size=4 * size_multiple)
    capabilities = Capabilities(
        modes=[mode.value for mode in _modes(image_to_image, references, settings, needs_reference=needs_reference)],
        native_width=native_width,
        native_height=native_height,
        size_multiple=size_multiple,
        any_size=settings.any_size,
        max_batch_size=settings.max_batch_size,
        max_references=settings.max_references if references is None else references.max_references,
        reference_side=None if references is None else references.side,
        reference_side_of_several=None if references is None else references.side_of_several,
        needs_reference=needs_reference,
        weighs_references=references is not None and references.weighs,
        schedulers=schedulers.compatible_names(pipeline.scheduler),
        loras=sorted(settings.loras),
        supports_negative_prompt=guidance.takes_negative_prompt,
        supports_guidance=guidance.takes_scale,
        pipeline=type(pipeline).__name__,
        weights_digest=weights_digest.of_pipeline(pipeline, settings),
        weights_digest_kind=weights_digest.KIND,
        device=str(placement.device_of(pipeline)),
        dtype=quantization.describe(settings, str(pipeline.dtype).removeprefix("torch.")),
    )
    steps = min(parameters["num_inference_steps"].default, schedulers.most_steps(pipeline.scheduler))
    of_the_pipeline = {
        "width": native_width,
        "height": native_height,
        "num_inference_steps": min(steps, DISTILLED_STEPS) if pipeline.config.get("is_distilled") else steps,
        "guidance_scale": guidance.default,
    }
    return capabilities.model_copy(update={"defaults": resolve_defaults(settings.defaults, of_the_pipeline)})


def _require_usable(pipeline: DiffusionPipeline, settings: GeneratorSettings) -> None:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    lacks = [lack for name, lack in NEEDED_PARAMETERS.items() if name not in parameters]
    lacks += [f"no {name}, which the settings name" for name in settings.text_arguments if name not in parameters]
    if getattr(pipeline, "unet", None) is None and getattr(pipeline, "transformer", None) is None:
        lacks.append("neither a UNet nor a transformer")
    if not hasattr(pipeline, "scheduler"):
        lacks.append("no scheduler")
    if not hasattr(pipeline, "image_processor"):
        lacks.append("no image processor, so it draws no images")
    if lacks:
        raise ModelLoadError(f"{type(pipeline).__name__} cannot work here. It has {'; '.join(lacks)}.")


def _size_multiple(pipeline: DiffusionPipeline, denoiser: Any) -> int:
    """Pixels of which width and height are multiples: the VAE's factor, with the patches of the denoiser."""
    factor: int = pipeline.image_processor.config.vae_scale_factor
    patch = denoiser.config.get("patch_size") or 1
    patch = patch[-1] if isinstance(patch, list | tuple) else patch
    upsamplers = 2 ** getattr(denoiser, "num_upsamplers", 0)
    return lcm(factor * upsamplers, getattr(pipeline, "vae_scale_factor", factor) * patch)


def _draws_from_text(pipeline: DiffusionPipeline, settings: GeneratorSettings, *, size: int) -> bool:
    """Whether the pipeline draws without a reference. One that diffusers does not list for it is asked to draw a step.

    size: pixels per side of that image.
    """
    if type(pipeline) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values():
        return True
    trial = copy.copy(pipeline)
    trial.scheduler = schedulers.new_scheduler(pipeline.scheduler, None)
    try:
        trial(
            prompt=["trial"],
            width=size,
            height=size,
            num_inference_steps=1,
            generator=[torch.Generator("cpu").manual_seed(0)],
            output_type="latent",
            **settings.text_arguments,
        )
    except Exception:  # such as AttributeError on None; with any other cause, the warm-up fails with that cause
        return False
    return True


def _modes(
    image_to_image: DiffusionPipeline | None,
    references: NativeReferences | None,
    settings: GeneratorSettings,
    *,
    needs_reference: bool,
) -> list[Mode]:
    """The modes that the loaded parts support."""
    return [
        mode
        for mode in Mode
        if mode is not Mode.AUTO
        and (settings.ip_adapter is not None or not mode.traits.uses_image_prompt)
        and (image_to_image is not None or not mode.traits.uses_initial_image)
        and (references is not None or not mode.traits.uses_native_references)
        and (mode.traits.uses_native_references or not needs_reference)
    ]


def _native_size(
    pipeline: DiffusionPipeline, denoiser: Any, settings: GeneratorSettings, *, multiple: int
) -> tuple[int, int]:
    """(width, height) in pixels for which the model was trained.

    As `native_side` says, then the pipeline, then the default size of the settings. Sizes of the settings become
    multiples of `multiple`, because the model draws no others.
    """
    if settings.native_side is not None:
        side = nearest_multiple(settings.native_side, multiple)
        return side, side
    sample_size = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size")
    if sample_size is None:
        defaults = settings.defaults
        sides = defaults.width or UNKNOWN_NATIVE_SIDE, defaults.height or UNKNOWN_NATIVE_SIDE
        return nearest_multiple(sides[0], multiple), nearest_multiple(sides[1], multiple)
    height, width = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor
