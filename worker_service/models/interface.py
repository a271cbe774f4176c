"""The interface between jobs and image models: requests, references, and the protocol of a model. Without torch."""

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
from PIL import Image

from shared.contracts.generation import GenerationParameters, Mode
from shared.contracts.service import Capabilities, ModelDefaults
from shared.errors import ReferenceUnavailableError
from worker_service.execution.steps import OnStep


class PreviewListener(Protocol):
    """Receives previews of one image. The model's thread calls it, so it touches memory only."""

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether a preview is wanted after this step. A model without cheap previews makes none."""

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        """Receive the image after `step`: uint8, shape (height, width, 3), RGB, no side over `PREVIEW_SIDE`."""


PREVIEW_SIDE = 256
"""Pixels of the longer side of a preview, at most."""


@dataclass(frozen=True)
class Reference:
    """One corpus image that conditions a generated image."""

    vector: np.ndarray | None
    """Projection by the retrieval CLIP: shape (dim,), float32, not normalised. None: no vector is stored."""
    image: Image.Image | None
    """None: the mode does not need the pixels."""
    weight: float
    """Relative to the other references of the image. A reference of weight 0 or less is not used."""
    caption: str | None
    sha256: str | None = None
    """Digest of the stored file; None: the image was not stored."""
    concepts: tuple[str, ...] = ()
    """Things of the prompt that it stands for; empty: not known."""

    @property
    def digest(self) -> str:
        """A value that is equal for equal images only.

        Raises:
            ReferenceUnavailableError: the reference has neither a digest nor an image.
        """
        if self.sha256 is not None:
            return self.sha256
        if self.image is None:
            raise ReferenceUnavailableError("A reference has no image, and this mode reads images.")
        return hashlib.sha256(f"{self.image.mode} {self.image.size}".encode() + self.image.tobytes()).hexdigest()


@dataclass(frozen=True)
class ImageRequest:
    """Request for one image. The batcher puts requests with equal `batch_key` into one call."""

    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    """Pixels; with `height`, a size that the model can generate: see `shared.capabilities.drawable_size`."""
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    """A name from the capabilities' `schedulers`; None: the model's own scheduler."""
    loras: tuple[tuple[str, float], ...]
    """Configured names and their scales."""
    mode: Mode
    """Resolved, never `auto`."""
    ip_adapter_scale: float
    """Scale of the image prompt, or of references that the model itself weighs; with 0 they have no effect."""
    strength: float
    """Share of the noise schedule that runs on an initial image, in (0, 1]. At least one step runs."""
    references: tuple[Reference, ...]
    output_size: tuple[int, int] | None = None
    """(width, height) to which the image is cropped and scaled afterwards: see `framing`; None: as it is drawn."""
    preview_listener: PreviewListener | None = field(default=None, compare=False, repr=False)
    """Has no effect on the image."""

    @classmethod
    def of(
        cls,
        sampling: GenerationParameters | ModelDefaults,
        *,
        prompt: str,
        seed: int,
        width: int,
        height: int,
        mode: Mode,
        references: Sequence[Reference] = (),
        negative_prompt: str | None = None,
        loras: Mapping[str, float] = MappingProxyType({}),
        output_size: tuple[int, int] | None = None,
        preview_listener: PreviewListener | None = None,
    ) -> Self:
        """A request that takes its steps, guidance, scheduler and scales from `sampling`."""
        return cls(
            prompt=prompt,
            negative_prompt=negative_prompt,
            seed=seed,
            width=width,
            height=height,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            scheduler=sampling.scheduler,
            loras=tuple(sorted(loras.items())),
            mode=mode,
            ip_adapter_scale=sampling.ip_adapter_scale,
            strength=sampling.strength,
            references=tuple(references),
            output_size=output_size,
            preview_listener=preview_listener,
        )

    def batch_key(self) -> Hashable:
        """Images with unequal keys cannot share one call: the key contains what diffusers takes once per call.

        A negative prompt counts only as present or absent. SDXL encodes an absent one as zeros, and any other with its
        text encoders.

        `ip_adapter_scale` counts in every mode. A request whose references were all irrelevant can therefore share
        a batch with requests that have references.
        """
        return (
            self.width,
            self.height,
            self.num_inference_steps,
            self.guidance_scale,
            self.scheduler,
            tuple(sorted(self.loras)),
            self.ip_adapter_scale,
            self.strength if self.mode.traits.uses_initial_image else None,
            bool(self.negative_prompt),
        )


@dataclass(frozen=True)
class UnreadTexts:
    """The parts of a request's texts that are beyond a limit of the model."""

    prompt: str = ""
    """The end of the prompt; empty when all of it is read."""
    negative_prompt: str = ""
    captions: Sequence[str] = ()
    """Captions that the mode would append to the prompt."""


def previews_due(requests: Sequence[ImageRequest], step: int, total_steps: int) -> list[tuple[int, PreviewListener]]:
    """Row and listener of each request of a batch that wants a preview after this step."""
    return [
        (row, request.preview_listener)
        for row, request in enumerate(requests)
        if request.preview_listener is not None and request.preview_listener.is_due(step, total_steps)
    ]


class ImageModel(Protocol):
    """A loaded generator. It is not thread-safe: one thread owns it, unless its `images_at_once` is more than 1.

    That thread may call `generate` again from within `on_step`, for images of a higher-priority lane. The inner call
    must leave the outer call's images bit-identical. It must restore the outer call's state, including the memory
    savers that `saving_memory` set.

    To add a class: register it in `GENERATORS` of `worker_service.models.worker_models`, and add its name to `kind` of
    `shared.settings.GeneratorSettings`.
    """

    name: str
    capabilities: Capabilities
    defaults: ModelDefaults
    """Parameters for requests that do not set them."""

    @property
    def has_safety_checker(self) -> bool:
        """Whether the model includes a safety checker that is switched on."""

    @property
    def reference_dim(self) -> int | None:
        """Length of the references' vectors; None when the model does not condition on vectors."""

    def warm_up(self) -> None:
        """Run one small call, because the first call of a process is slow. It may change `capabilities`.

        Raises:
            ModelLoadError: the model cannot generate; the message gives the cause.
        """

    def batch_key(self, request: ImageRequest) -> Hashable:
        """Images with equal keys can share one call. It contains `request.batch_key()`. Any thread may call it."""

    def text_parts(self, request: ImageRequest) -> int:
        """In how many parts the model reads the texts of the request: 1, unless they are long."""

    def unread_texts(self, request: ImageRequest) -> UnreadTexts:
        """The parts of the request's texts that the model will not read. Any thread may call it."""

    def reference_call(self, request: ImageRequest) -> dict[str, Any] | None:
        """How the model reads the references of a request in mode `reference`, as JSON for the provenance.

        None in other modes. Any thread may call it.
        """

    def memory_savers(self, images: int) -> Sequence[str]:
        """Names of ways to need less memory in a call of `images` images, the one that changes least first."""

    def saving_memory(self, savers: Sequence[str]) -> AbstractContextManager[None]:
        """Use all of these memory savers in calls inside the block; they may change pixels."""

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Generate one image per request, in order: uint8, shape (height, width, 3), RGB.

        All requests have equal batch keys. Each image equals, within rounding, the image of its request alone. After a
        step, preview listeners are called before `on_step`.

        Raises:
            CallStopped: `on_step` returned False.
            ModelOutOfMemoryError: the batch does not fit in memory; a smaller one may fit.
            InvalidOutputError: the model returned something that is not an image.
        """

    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Whether the safety checker finds each image unsafe; all False without a checker.

        images: uint8, shape (height, width, 3), RGB.

        Raises:
            ModelOutOfMemoryError: the images do not fit in memory.
        """
