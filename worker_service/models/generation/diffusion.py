"""Image models from diffusers: one loaded text-to-image pipeline that generates batches of unrelated images."""

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from shared.capabilities import check_parameters, resolve_defaults
from shared.contracts.service import Capabilities, ModelDefaults
from shared.errors import InvalidOutputError, UnsupportedParameterError
from shared.settings import GeneratorSettings, ModelSettings
from worker_service.execution import accelerator
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.models import loading
from worker_service.models.generation import conditioning, equal_prompts, long_prompts, previews, schedulers
from worker_service.models.generation.framing import to_requested_ratio
from worker_service.models.generation.guidance import Guidance
from worker_service.models.generation.long_prompts import TextReader
from worker_service.models.generation.native_references import NativeReferences
from worker_service.models.interface import ImageRequest, UnreadTexts, previews_due
from worker_service.models.pipelines import load_pipeline, pipeline_capabilities, placement
from worker_service.models.pipelines.warm_up import warm_up
from worker_service.models.safety_checker import SafetyChecker

VAE_SLICING, VAE_TILING, OFFLOAD = "vae_slicing", "vae_tiling", "offload"


@dataclass(frozen=True)
class PipelineState:
    """State that a call sets in the modules that all calls share. An inner call sets its own, then restores this."""

    loras: tuple[tuple[str, float], ...] = ()
    """Names and scales."""
    adapter_scale: float = 0.0
    """Scale of the IP-Adapter."""
    image_prompt: conditioning.ImagePrompt | None = None


@dataclass
class Diffusion:
    """A loaded pipeline, with its adapter and LoRAs: an `ImageModel`.

    Batching changes no image beyond rounding. Prompts, seeds, initial images and references belong to one row of the
    batch. Everything that diffusers has only once per call is in `ImageRequest.batch_key`.

    A call inside of another call, between two of its steps, changes no image either. Each call runs on a copy of the
    pipeline and restores the state of the shared modules.
    """

    name: str
    capabilities: Capabilities
    defaults: ModelDefaults
    text_to_image: DiffusionPipeline
    image_to_image: DiffusionPipeline | None
    """Shares all weights with `text_to_image`; None where diffusers has no such pipeline."""
    own_scheduler: SchedulerMixin
    """Template of the schedulers of the calls. No call uses it itself, because a scheduler keeps state."""
    settings: GeneratorSettings
    safety_checker: SafetyChecker | None = None
    savers: Sequence[str] = ()
    """Memory savers in use."""
    state: PipelineState = PipelineState()
    """State of the running call."""

    def __post_init__(self) -> None:
        length = self.settings.max_sequence_length
        self.text_reader = TextReader(self.text_to_image, max_sequence_length=length)
        self.native_references = NativeReferences.of(self.text_to_image, self.settings)
        if self.settings.ip_adapter is not None:
            self.text_to_image.unet.encoder_hid_proj.register_forward_pre_hook(self._per_row_embeds)

    @classmethod
    def load(cls, name: str, settings: ModelSettings) -> Self:
        """Load the generator `name` of the settings.

        Raises:
            ModelNotFoundError: the settings have no such generator.
            ModelLoadError: the generator cannot be loaded; the message gives the cause.
        """
        generator = settings.generator(name)
        loading.prepare_process(settings)
        pipeline = load_pipeline.load_pipeline(generator, offline=settings.offline)
        with loading.readable_load_errors(type(pipeline).__name__, generator.source):
            image_to_image = load_pipeline.image_to_image(pipeline)
            capabilities = pipeline_capabilities.of(pipeline, image_to_image, generator)
            schedulers.require_seeded_noise(pipeline.scheduler)
            check_parameters(capabilities, scheduler=generator.defaults.scheduler)
            checker = SafetyChecker.detach_from(pipeline, image_to_image)
            return cls(
                name=name,
                capabilities=capabilities,
                defaults=resolve_defaults(generator.defaults, capabilities),
                text_to_image=pipeline,
                image_to_image=image_to_image,
                own_scheduler=pipeline.scheduler,
                settings=generator,
                safety_checker=None if generator.safety_checker == "off" else checker,
            )

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return placement.device_of(self.text_to_image)

    @property
    def reference_dim(self) -> int | None:
        """See `ImageModel.reference_dim`."""
        adapter = self.settings.ip_adapter
        if adapter is None or adapter.conditions_on != "embedding_space":
            return None
        return load_pipeline.reference_dim(self.text_to_image)

    def warm_up(self) -> None:
        """Draw the first images, and measure what the model keeps and draws: see `warm_up`.

        Raises:
            ModelLoadError: the model cannot generate; the message gives the cause.
        """
        kind = type(self.text_to_image).__name__
        with loading.readable_load_errors(kind, self.settings.source, failed="could not draw its first image"):
            self.capabilities = warm_up(self)

    def batch_key(self, request: ImageRequest) -> Hashable:
        """See `ImageModel.batch_key`. All rows of a call have the same number of text parts.

        A row that is filled up with empty parts would give another image than alone.
        """
        references = None if self.native_references is None else self.native_references.batch_key(request)
        return request.batch_key(), self.text_parts(request), references

    def text_parts(self, request: ImageRequest) -> int:
        """See `ImageModel.text_parts`."""
        return max(len(self._prompt_parts(request)), len(self._negative_prompt_parts(request)))

    def _prompt_parts(self, request: ImageRequest) -> Sequence[str]:
        return self.text_reader.parts(conditioning.with_captions(request, self.text_reader)[0])

    def _negative_prompt_parts(self, request: ImageRequest) -> Sequence[str]:
        # Without guidance it is not read.
        return self.text_reader.parts(request.negative_prompt or "") if request.guidance_scale > 1 else [""]

    def unread_texts(self, request: ImageRequest) -> UnreadTexts:
        """See `ImageModel.unread_texts`."""
        return UnreadTexts(
            prompt=self.text_reader.unread(request.prompt),
            negative_prompt=self.text_reader.unread(request.negative_prompt or ""),
            captions=conditioning.with_captions(request, self.text_reader)[1],
        )

    def reference_call(self, request: ImageRequest) -> dict[str, Any] | None:
        """See `ImageModel.reference_call`."""
        return None if self.native_references is None else self.native_references.record(request)

    @property
    def has_safety_checker(self) -> bool:
        return self.safety_checker is not None

    def memory_savers(self, images: int) -> Sequence[str]:
        """See `ImageModel.memory_savers`. The first ones concern the VAE, because decoding needs the most memory.

        For several images: slices, which decode them one by one. For one image: tiles, which decode it in parts, then
        offload, which moves the other models off the GPU. A batch that does not fit with slices is halved before that.
        """
        vae = getattr(self.text_to_image, "vae", None)
        if images > 1:
            return [VAE_SLICING] if hasattr(vae, "use_slicing") else []
        tiling = [VAE_TILING] if hasattr(vae, "use_tiling") else []
        return [*tiling, OFFLOAD] if self.settings.offload == "none" and self.device.type == "cuda" else tiling

    @contextmanager
    def saving_memory(self, savers: Sequence[str]) -> Iterator[None]:
        """See `ImageModel.saving_memory`."""
        before = self.savers
        try:
            self._use_memory_savers(savers)
            yield
        finally:
            self._use_memory_savers(before)

    def _use_memory_savers(self, savers: Sequence[str]) -> None:
        if self.settings.offload == "none" and (OFFLOAD in savers) != (OFFLOAD in self.savers):
            placement.place(self.text_to_image, self.device, "model" if OFFLOAD in savers else "none")
        self.savers = savers
        vae: Any = getattr(self.text_to_image, "vae", None)
        if hasattr(vae, "use_slicing"):
            (vae.enable_slicing if VAE_SLICING in savers else vae.disable_slicing)()
        if hasattr(vae, "use_tiling"):
            (vae.enable_tiling if VAE_TILING in savers else vae.disable_tiling)()

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Generate one image per request: see `ImageModel.generate`.

        Raises: as `draw`.
        """
        return list((self.draw(requests, on_step) * 255).round().astype(np.uint8))

    def draw(self, requests: Sequence[ImageRequest], on_step: OnStep) -> np.ndarray:
        """As `generate`, but before rounding: shape (n, height, width, 3), float32, in [0, 1].

        Raises:
            ValueError: the requests have different batch keys.
            UnsupportedModeError: the model does not have the mode.
            UnsupportedParameterError: the model does not have the scheduler or a LoRA, takes no negative prompt, or
                takes fewer steps.
            ReferenceUnavailableError: a reference lacks the vector or the image that its mode needs.
        """
        if len({self.batch_key(request) for request in requests}) != 1:
            raise ValueError("the requests of one call must have equal batch keys")
        for request in requests:
            check_parameters(
                self.capabilities,
                mode=request.mode,
                scheduler=request.scheduler,
                loras=(name for name, _ in request.loras),
                negative_prompt=request.negative_prompt,
            )
        return accelerator.run_on(self.device, lambda: self._call(requests, on_step), items=len(requests))

    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        """See `ImageModel.detect_unsafe`."""
        checker = self.safety_checker
        if checker is None:
            return [False for _ in images]
        return accelerator.run_on(self.device, lambda: checker.detect_unsafe(images), items=len(images))

    def _call(self, requests: Sequence[ImageRequest], on_step: OnStep) -> np.ndarray:
        first = requests[0]
        pipeline = self.text_to_image
        scheduler = schedulers.new_scheduler(self.own_scheduler, first.scheduler)
        if first.num_inference_steps > (most := schedulers.most_steps(scheduler)):
            raise UnsupportedParameterError(
                f"The model's scheduler takes at most {most} steps.", parameter="num_inference_steps", maximum=most
            )
        arguments: dict[str, Any] = {
            "prompt": [conditioning.with_captions(request, self.text_reader)[0] for request in requests],
            "num_inference_steps": first.num_inference_steps,
            # On the CPU for every device, so that a seed means the same noise everywhere.
            "generator": [torch.Generator("cpu").manual_seed(request.seed) for request in requests],
            "output_type": "np",
            **self.settings.text_arguments,
        }
        if first.mode.traits.uses_initial_image:
            assert self.image_to_image is not None, "checked by check_parameters"
            pipeline = self.image_to_image
            arguments["image"] = [conditioning.initial_image(request) for request in requests]
            arguments["num_inference_steps"], arguments["strength"] = schedulers.img2img_schedule(
                scheduler,
                first.num_inference_steps,
                first.strength,
                all_steps_run="original_inference_steps" in inspect.signature(type(pipeline).__call__).parameters,
            )
        arguments |= Guidance.of(pipeline).arguments(requests)
        parameters = inspect.signature(type(pipeline).__call__).parameters
        arguments |= {name: value for name, value in _size_arguments(first).items() if name in parameters}

        pipeline = copy.copy(pipeline)
        pipeline.scheduler = scheduler
        equal_prompts.encode_once(pipeline)
        arguments["callback_on_step_end"] = _step_callback(requests, on_step, previews.Previewer.of(pipeline, requests))
        if self.native_references is not None:
            arguments = self.native_references.arguments(pipeline, requests, arguments)
        image_prompt = self._image_prompt(pipeline, requests)
        if image_prompt is not None:
            arguments |= image_prompt.arguments()
        # With a scale of 0, diffusers skips the adapter.
        conditioned = any(conditioning.normalised_weights(request) for request in requests)
        with self._with_state(PipelineState(first.loras, first.ip_adapter_scale if conditioned else 0.0, image_prompt)):
            if self.text_parts(first) > 1:
                del arguments["prompt"]
                arguments |= self._prompt_embeds(pipeline, requests, negated="negative_prompt" in arguments)
                arguments.pop("negative_prompt", None)
            try:
                return _checked(pipeline(**arguments).images, requests)
            except BaseException:
                placement.after_failed_call(pipeline)
                raise

    def _prompt_embeds(
        self, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], *, negated: bool
    ) -> dict[str, torch.Tensor]:
        """The texts as embeddings, for texts that are read in parts. negated: the requests have negative prompts."""
        negative = [self._negative_prompt_parts(request) for request in requests]
        return long_prompts.encode_in_parts(
            pipeline,
            [self._prompt_parts(request) for request in requests],
            negative if negated else None,
            guided=_uses_guidance(pipeline, requests[0].guidance_scale),
        )

    def _image_prompt(
        self, pipeline: DiffusionPipeline, requests: Sequence[ImageRequest]
    ) -> conditioning.ImagePrompt | None:
        """The references of all rows, as the adapter takes them; None without an adapter."""
        adapter = self.settings.ip_adapter
        if adapter is None:
            return None
        first = requests[0]
        multiple = self.capabilities.size_multiple
        return conditioning.ImagePrompt.of(
            pipeline,
            requests,
            conditions_on=adapter.conditions_on,
            guided=_uses_guidance(pipeline, first.guidance_scale),
            aspect=(max(1, first.height // multiple), max(1, first.width // multiple)),
        )

    @contextmanager
    def _with_state(self, state: PipelineState) -> Iterator[None]:
        before = self.state
        vae = getattr(self.text_to_image, "vae", None)
        dtype = getattr(vae, "dtype", None)
        try:
            self._apply_state(state)
            yield
        finally:
            self._apply_state(before)
            # SDXL casts its VAE to float32 to decode, and does not cast it back when it runs out of memory.
            if vae is not None and vae.dtype != dtype:
                vae.to(dtype)

    def _apply_state(self, state: PipelineState) -> None:
        self.state = state
        if self.settings.ip_adapter is not None:
            self.text_to_image.set_ip_adapter_scale(state.adapter_scale)
        if not self.settings.loras:
            return
        if not state.loras:
            self.text_to_image.disable_lora()
            return
        self.text_to_image.enable_lora()
        self.text_to_image.set_adapters([name for name, _ in state.loras], [scale for _, scale in state.loras])

    def _per_row_embeds(
        self, _projection: torch.nn.Module, arguments: tuple[list[torch.Tensor]]
    ) -> tuple[list[torch.Tensor]]:
        """Forward pre-hook of the adapter's projection: give each row its own embeddings."""
        ((repeated,),) = arguments
        image_prompt = self.state.image_prompt
        return ([repeated if image_prompt is None else image_prompt.replace_repeated(repeated)],)


def _size_arguments(request: ImageRequest) -> dict[str, Any]:
    """Arguments with which a pipeline draws exactly the requested size, where its call takes them."""
    return {
        "width": request.width,
        "height": request.height,
        "max_area": request.width * request.height,  # Kontext fits every size to an area
        "_auto_resize": False,
        "use_resolution_binning": False,  # Sana draws the nearest size of a list
    }


def _step_callback(
    requests: Sequence[ImageRequest], on_step: OnStep, previewer: previews.Previewer | None
) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: DiffusionPipeline, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        step, steps = index + 1, pipeline.num_timesteps
        if step == steps and not torch.isfinite(tensors["latents"]).all():
            # A decoder turns infinities into white and black, which would look like a valid image.
            raise InvalidOutputError("The model's latents are not finite numbers.")
        due = previews_due(requests, step, steps) if previewer is not None else []
        if previewer is not None and due:
            for (row, listener), preview in zip(
                due, previewer.images(tensors["latents"], [row for row, _ in due]), strict=False
            ):
                size = requests[row].output_size or (requests[row].width, requests[row].height)
                listener.show(to_requested_ratio(preview, size), step, steps)
        # `pipeline._interrupt` would stop the steps, too, but then decode the image.
        if not on_step(step, steps):
            raise CallStopped
        return tensors

    return callback


def _uses_guidance(pipeline: DiffusionPipeline, guidance_scale: float) -> bool:
    """Whether the pipeline runs every row twice, for classifier-free guidance."""
    # The property reads the scale that the pipeline's call would set.
    pipeline._guidance_scale = guidance_scale
    return bool(pipeline.do_classifier_free_guidance)


def _checked(images: Any, requests: Sequence[ImageRequest]) -> np.ndarray:
    """Check the pipeline's images, float32 in [0, 1], shape (n, height, width, 3). RGBA is composited on white."""
    expected = (len(requests), requests[0].height, requests[0].width, 3)
    images = previews.on_white(images) if getattr(images, "shape", ())[-1:] == (4,) else images
    if not isinstance(images, np.ndarray) or images.shape != expected:
        raise InvalidOutputError(f"The model returned {getattr(images, 'shape', type(images))}, not {expected}.")
    if not np.isfinite(images).all():
        raise InvalidOutputError("The model returned pixels that are not finite numbers.")
    return images
