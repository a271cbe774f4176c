"""What an image model is asked for: the words between the jobs and the models, free of torch."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.settings import GeneratorDefaults

OnStep = Callable[[int, int], bool]
"""Called after every denoising step with (steps done, steps in all); returning False stops the whole call."""


class Interrupted(Exception):  # noqa: N818 - not a failure: the caller asked for it
    """The call was stopped by its `on_step`; nothing was decoded."""


class Onlooker(Protocol):
    """Somebody who wants to see an image while it is drawn. Called on the model's thread: memory only."""

    def is_due(self, step: int, total_steps: int) -> bool:
        """Is this step to be shown? A model that cannot show it cheaply just does not."""

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        """The image as it is after `step`: uint8, shape (height, width, 3), RGB, no side over `PREVIEW_SIDE`."""


PREVIEW_SIDE = 256
"""Pixels of the longer side of a preview, at most."""


@dataclass(frozen=True)
class Reference:
    """One memory that conditions an image."""

    vector: np.ndarray | None
    """Shape (dim,), float32: projection of the retrieval CLIP, not normalised."""
    image: Image.Image | None
    weight: float
    """Relative to the image's other references; 0 or less leaves the reference out."""
    caption: str | None


@dataclass(frozen=True)
class ImageRequest:
    """One image: the unit of batching."""

    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    """Pixels; with `height`, a size that the model can draw: see `shared.capabilities.drawable_size`."""
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    """A name from the capabilities' `schedulers`; none: the model's own."""
    loras: tuple[tuple[str, float], ...]
    """Configured names and their scales."""
    mode: Mode
    """Resolved, never `auto`."""
    ip_adapter_scale: float
    strength: float
    references: tuple[Reference, ...]
    onlooker: Onlooker | None = field(default=None, compare=False, repr=False)
    """Has no effect on the image."""

    def batch_key(self) -> Hashable:
        """Images whose keys are equal can share one call: the key holds all that is one value per call in diffusers.

        A negative prompt counts as present or absent, because SDXL encodes an absent one as zeros and a present one,
        even an empty one, with its text encoders. `ip_adapter_scale` counts even where no image prompt is used, so
        that the images which the relevance gate left without references still share a batch with the others.
        """
        return (
            self.width,
            self.height,
            self.num_inference_steps,
            self.guidance_scale,
            self.scheduler,
            tuple(sorted(self.loras)),
            self.ip_adapter_scale,
            self.strength if self.mode.uses_initial_image else None,
            bool(self.negative_prompt),
        )


def to_show(requests: Sequence[ImageRequest], step: int, total_steps: int) -> list[tuple[int, Onlooker]]:
    """Which rows of a batch have somebody to show them to after this step."""
    return [
        (row, request.onlooker)
        for row, request in enumerate(requests)
        if request.onlooker is not None and request.onlooker.is_due(step, total_steps)
    ]


class ImageModel(Protocol):
    """A loaded generator. It is not thread-safe: one thread owns it.

    That thread may enter it again from within `on_step`, for images of a better lane: neither call changes a bit of the
    other's images, and what a call has set, also by `saving_memory`, holds again when the one inside of it has ended.
    """

    name: str
    capabilities: Capabilities
    defaults: GeneratorDefaults

    @property
    def has_safety_checker(self) -> bool:
        """Did it bring a safety checker, and is it to be asked?"""

    @property
    def reference_dim(self) -> int | None:
        """Length that the references' vectors must have; none when the model conditions on no vectors."""

    def warm_up(self) -> None:
        """Pay the first call's costs before a job does."""

    def memory_savers(self, images: int) -> Sequence[str]:
        """Names of what it can do to need less memory in a call of `images` images, the least harmful first."""

    def saving_memory(self, savers: Sequence[str]) -> AbstractContextManager[None]:
        """While this is open, calls do all of these; they may change pixels."""

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        """Draw one image per request, in order: uint8, shape (height, width, 3), RGB.

        All requests have equal batch keys. Each image equals, within rounding, the one its request gives alone.
        Onlookers are shown what they are due, after a step and before `on_step` hears of it.

        Raises:
            Interrupted: `on_step` returned False.
            ModelOutOfMemoryError: the batch does not fit; a smaller one may.
            InvalidOutputError: the model returned something that is not an image.
        """

    def unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        """Which of the images that it drew its safety checker objects to; none where it has none.

        Raises:
            ModelOutOfMemoryError
        """
