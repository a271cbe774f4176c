"""Text-to-image pipelines of diffusers: one loaded pipeline that draws batches of unrelated images."""

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline, SchedulerMixin
from PIL import Image

from shared.capabilities import check_parameters
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import InvalidOutputError, ModelLoadError, ModelNotFoundError
from shared.settings import GeneratorDefaults, GeneratorSettings, ModelSettings
from worker_service.execution import accelerator
from worker_service.models import conditioning, load_pipeline, loading, previews, schedulers
from worker_service.models.interface import ImageRequest, Interrupted, OnStep, Reference, to_show
from worker_service.models.safety_checker import SafetyChecker

VAE_SLICING, VAE_TILING = "vae_slicing", "vae_tiling"


@dataclass(frozen=True)
class Conditions:
    """What a call sets in the modules themselves, which all calls share."""

    loras: tuple[tuple[str, float], ...] = ()
    adapter_scale: float = 0.0
    image_prompt: conditioning.ImagePrompt | None = None


@dataclass
class Diffusion:
    """A loaded pipeline, with its adapter and LoRAs: an `ImageModel`.

    Batching changes no image: prompts, seeds, initial images and references belong to their row, and everything that
    diffusers has only once per call is in `ImageRequest.batch_key`. Nor does a call inside of another one, between two
    of its steps: each runs on a copy of the pipeline, and leaves the modules under the conditions it found.
    """

    name: str
    capabilities: Capabilities
    defaults: GeneratorDefaults
    text_to_image: DiffusionPipeline
    image_to_image: DiffusionPipeline | None
    """Shares all weights with `text_to_image`; none where diffusers has no such pipeline."""
    own_scheduler: SchedulerMixin
    """Only a pattern: no call runs it, because a run changes it."""
    settings: GeneratorSettings
    safety_checker: SafetyChecker | None = None
    savers: Sequence[str] = ()
    conditions: Conditions = Conditions()
    """Both: of the running call."""

    def __post_init__(self) -> None:
        if self.settings.ip_adapter is not None:
            self.text_to_image.unet.encoder_hid_proj.register_forward_pre_hook(self._rows_of_their_own)

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> Self:
        """Load the generator `name` of the settings.

        Raises:
            ModelNotFoundError: the settings have no such generator.
            ModelLoadError: it cannot be loaded; the message says what and why.
        """
        generator = settings.generators.get(name)
        if generator is None:
            raise ModelNotFoundError(model=name)
        loading.prepare_process(settings)
        pipeline = load_pipeline.load_pipeline(generator, offline=settings.offline)
        schedulers.refuse_noise_of_its_own(pipeline.scheduler)
        image_to_image = _image_to_image(pipeline)
        with loading.readable_load_errors(type(pipeline).__name__, generator.source):
            capabilities = _capabilities(pipeline, image_to_image, generator)
            check_parameters(capabilities, scheduler=generator.defaults.scheduler)
        checker = SafetyChecker.taken_from(pipeline, image_to_image)
        return cls(
            name=name,
            capabilities=capabilities,
            defaults=generator.defaults,
            text_to_image=pipeline,
            image_to_image=image_to_image,
            own_scheduler=pipeline.scheduler,
            settings=generator,
            safety_checker=None if generator.safety_checker == "off" else checker,
        )

    @property
    def reference_dim(self) -> int | None:
        """Length that the references' vectors must have; none when the pipeline conditions on no vectors."""
        adapter = self.settings.ip_adapter
        if adapter is None or adapter.conditions_on != "embedding_space":
            return None
        return load_pipeline.reference_dim(self.text_to_image)

    def warm_up(self) -> None:
        """Draw one image in two steps, through the adapter where there is one."""
        blank = Reference(
            vector=None if self.reference_dim is None else np.zeros(self.reference_dim, np.float32),
            image=Image.new("RGB", (64, 64)),
            weight=1,
            caption=None,
        )
        adapted = self.settings.ip_adapter is not None
        request = ImageRequest(
            prompt="warm up",
            negative_prompt=None,
            seed=0,
            width=self.capabilities.native_width,
            height=self.capabilities.native_height,
            num_inference_steps=2,
            guidance_scale=self.defaults.guidance_scale,
            scheduler=self.defaults.scheduler,
            loras=(),
            mode=Mode.IMAGE_PROMPT if adapted else Mode.NONE,
            ip_adapter_scale=self.defaults.ip_adapter_scale,
            strength=self.defaults.strength,
            references=(blank,) if adapted else (),
        )
        self.generate([request], lambda step, steps: True)

    @property
    def has_safety_checker(self) -> bool:
        return self.safety_checker is not None

    def memory_savers(self, images: int) -> Sequence[str]:
        """Asked of the VAE, whose decoding is the peak: slices take the images of a batch one by one, tiles take an
        image in parts. Slices change nothing for one image, and where there are several, halves come before tiles."""
        vae = getattr(self.text_to_image, "vae", None)
        if images > 1:
            return [VAE_SLICING] if hasattr(vae, "use_slicing") else []
        return [VAE_TILING] if hasattr(vae, "use_tiling") else []

    @contextmanager
    def saving_memory(self, savers: Sequence[str]) -> Iterator[None]:
        before = self.savers
        try:
            self._save_memory_by(savers)
            yield
        finally:
            self._save_memory_by(before)

    def _save_memory_by(self, savers: Sequence[str]) -> None:
        self.savers = savers
        vae: Any = getattr(self.text_to_image, "vae", None)
        if hasattr(vae, "use_slicing"):
            (vae.enable_slicing if VAE_SLICING in savers else vae.disable_slicing)()
        if hasattr(vae, "use_tiling"):
            (vae.enable_tiling if VAE_TILING in savers else vae.disable_tiling)()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Draw one image per request: see `ImageModel.generate`.

        Raises:
            UnsupportedModeError, UnsupportedParameterError: accepted before the model's capabilities were known.
            ReferenceUnavailableError: a reference lacks the vector or the image that its mode needs.
        """
        if len({request.batch_key() for request in requests}) != 1:
            raise ValueError("the images of one call must have one batch key")
        for request in requests:
            check_parameters(
                self.capabilities,
                mode=request.mode,
                scheduler=request.scheduler,
                loras=(name for name, _ in request.loras),
                negative_prompt=request.negative_prompt,
            )
        return accelerator.run_on(self.text_to_image.device, lambda: self._call(requests, on_step), items=len(requests))

    def unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        checker = self.safety_checker
        if checker is None:
            return [False for _ in images]
        return accelerator.run_on(self.text_to_image.device, lambda: checker.objects_to(images), items=len(images))

    def _call(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        first = requests[0]
        pipeline = self.text_to_image
        arguments: dict[str, Any] = {
            "prompt": [conditioning.worded_prompt(r, getattr(pipeline, "tokenizer", None)) for r in requests],
            "num_inference_steps": first.num_inference_steps,
            # On the CPU whatever the device is, so that a seed means the same noise everywhere.
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "output_type": "np",
        }
        if first.mode.uses_initial_image:
            assert self.image_to_image is not None, "the capabilities say so"
            pipeline = self.image_to_image
            arguments["image"] = [conditioning.initial_image(request) for request in requests]
            arguments["strength"] = first.strength
            # Of `num_inference_steps` only the share `strength` is run, rounded down, and at least one is needed.
            arguments["num_inference_steps"] = max(first.num_inference_steps, math.ceil(1 / first.strength))
        if first.negative_prompt:
            arguments["negative_prompt"] = [request.negative_prompt for request in requests]
        accepted = inspect.signature(type(pipeline).__call__).parameters
        optional = {"guidance_scale": first.guidance_scale, "width": first.width, "height": first.height}
        arguments |= {name: value for name, value in optional.items() if name in accepted}

        pipeline = copy.copy(pipeline)
        pipeline.scheduler = schedulers.fresh(self.own_scheduler, first.scheduler)
        arguments["callback_on_step_end"] = _between_steps(requests, on_step, previews.Sight.of(pipeline, requests))
        image_prompt = self._image_prompt(pipeline, requests)
        if image_prompt is not None:
            arguments |= image_prompt.arguments()
        # A scale of 0 spares the whole branch.
        conditioned = any(conditioning.shares(request) for request in requests)
        with self._under(Conditions(first.loras, first.ip_adapter_scale if conditioned else 0.0, image_prompt)):
            return _checked(pipeline(**arguments).images, requests)

    def _image_prompt(
        self, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest]
    ) -> conditioning.ImagePrompt | None:
        """What conditions the call on the rows' references; None without an adapter."""
        adapter = self.settings.ip_adapter
        if adapter is None:
            return None
        first = requests[0]
        multiple = self.capabilities.size_multiple
        return conditioning.ImagePrompt.of(
            pipeline,
            requests,
            conditions_on=adapter.conditions_on,
            guided=_is_guided(pipeline, first.guidance_scale),
            aspect=(max(1, first.height // multiple), max(1, first.width // multiple)),
        )

    @contextmanager
    def _under(self, conditions: Conditions) -> Iterator[None]:
        before = self.conditions
        vae = getattr(self.text_to_image, "vae", None)
        dtype = getattr(vae, "dtype", None)
        try:
            self._set(conditions)
            yield
        finally:
            self._set(before)
            # SDXL decodes in float32, and one that ran out of memory meanwhile does not take it back.
            if vae is not None and vae.dtype != dtype:
                vae.to(dtype)

    def _set(self, conditions: Conditions) -> None:
        self.conditions = conditions
        if self.settings.ip_adapter is not None:
            self.text_to_image.set_ip_adapter_scale(conditions.adapter_scale)
        if not self.settings.loras:
            return
        if not conditions.loras:
            self.text_to_image.disable_lora()
            return
        self.text_to_image.enable_lora()
        self.text_to_image.set_adapters(
            [name for name, _ in conditions.loras], [scale for _, scale in conditions.loras]
        )

    def _rows_of_their_own(
        self, _projection: torch.nn.Module, arguments: tuple[list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor]]:
        """A forward pre-hook of the adapter's projection."""
        ((repeated,),) = arguments
        image_prompt = self.conditions.image_prompt
        return ([repeated if image_prompt is None else image_prompt.instead_of(repeated)],)


def _between_steps(
    requests: Sequence[ImageRequest], on_step: OnStep, sight: previews.Sight | None
) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: DiffusionPipeline, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step, steps = index + 1, pipeline.num_timesteps
        if step == steps and not torch.isfinite(tensors["latents"]).all():
            # Decoders turn infinities into white and black, which would look like a picture.
            raise InvalidOutputError("The model's latents are not numbers.")
        shown = to_show(requests, step, steps) if sight is not None else []
        if sight is not None and shown:
            for (_, onlooker), picture in zip(
                shown, sight.pictures(tensors["latents"], [row for row, _ in shown]), strict=False
            ):
                onlooker.show(picture, step, steps)
        # Setting pipeline._interrupt instead would still decode the picture.
        if not on_step(step, steps):
            raise Interrupted
        return tensors

    return callback


def _is_guided(pipeline: DiffusionPipeline, guidance_scale: float) -> bool:
    """Will the pipeline run every row twice? It knows once its call has set this attribute."""
    pipeline._guidance_scale = guidance_scale
    return bool(pipeline.do_classifier_free_guidance)


def _checked(images: Any, requests: Sequence[ImageRequest]) -> list[np.ndarray]:
    """float32 in [0, 1] -> uint8, after a look at whether these are pictures at all."""
    expected = (len(requests), requests[0].height, requests[0].width, 3)
    if not isinstance(images, np.ndarray) or images.shape != expected:
        raise InvalidOutputError(f"The model returned {getattr(images, 'shape', type(images))}, not {expected}.")
    if not np.isfinite(images).all():
        raise InvalidOutputError("The model returned pixels that are not numbers.")
    return list((images * 255).round().astype(np.uint8))


def _image_to_image(pipeline: DiffusionPipeline) -> DiffusionPipeline | None:
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError:  # diffusers has none for this class
        return None
    sibling.set_progress_bar_config(disable=True)
    accepted = inspect.signature(type(sibling).__call__).parameters
    return sibling if {"image", "strength"} <= accepted.keys() else None


def _capabilities(
    pipeline: DiffusionPipeline, image_to_image: DiffusionPipeline | None, settings: GeneratorSettings
) -> Capabilities:
    """What the loaded pipeline can do, asked of its parts and of its call's signature."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    missing = {"prompt", "num_inference_steps", "generator", "callback_on_step_end"} - accepted.keys()
    if missing:
        raise ModelLoadError(f"{type(pipeline).__name__} takes no {', '.join(sorted(missing))}.")
    modes = [Mode.NONE, Mode.CAPTION]
    if image_to_image is not None:
        modes.append(Mode.IMG2IMG)
    if settings.ip_adapter is not None:
        modes.append(Mode.IMAGE_PROMPT)
        if image_to_image is not None:
            modes.append(Mode.IMAGE_PROMPT_IMG2IMG)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    native_width, native_height = _native_size(pipeline, denoiser, settings.defaults)
    return Capabilities(
        modes=[mode.value for mode in modes],
        native_width=native_width,
        native_height=native_height,
        size_multiple=pipeline.image_processor.config.vae_scale_factor * 2 ** getattr(denoiser, "num_upsamplers", 0),
        any_size=settings.any_size,
        max_batch_size=settings.max_batch_size,
        max_references=settings.max_references,
        schedulers=schedulers.choices(pipeline.scheduler),
        loras=sorted(settings.loras),
        # Where a negative prompt works only with `true_cfg_scale`, plain guidance ignores it.
        supports_negative_prompt="negative_prompt" in accepted and "true_cfg_scale" not in accepted,
        supports_guidance="guidance_scale" in accepted and denoiser.config.get("guidance_embeds", True),
        pipeline=type(pipeline).__name__,
        weights_digest=loading.weights_digest(
            (name, part) for name, part in sorted(pipeline.components.items()) if isinstance(part, torch.nn.Module)
        ),
        device=str(pipeline.device),
        dtype=str(pipeline.dtype).removeprefix("torch."),
    )


def _native_size(pipeline: DiffusionPipeline, denoiser: Any, defaults: GeneratorDefaults) -> tuple[int, int]:
    """(width, height) in pixels of what the pipeline draws when nothing is asked for."""
    sample_size = getattr(pipeline, "default_sample_size", None) or denoiser.config.get("sample_size")
    if sample_size is None:
        return defaults.width, defaults.height
    height, width = sample_size if isinstance(sample_size, list | tuple) else (sample_size, sample_size)
    return width * pipeline.vae_scale_factor, height * pipeline.vae_scale_factor
