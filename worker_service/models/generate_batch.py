"""Runs one batch on an image model: uses memory savers when it does not fit, and checks the images."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.contracts.safety import SafetyDecision
from shared.errors import InvalidOutputError, ModelOutOfMemoryError
from shared.metrics import GENERATION_MEMORY_SAVED
from worker_service.execution.steps import OnStep
from worker_service.models.interface import ImageModel, ImageRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneratedImage:
    """One image as the model returned it."""

    pixels: np.ndarray
    """uint8, shape (height, width, 3), RGB."""
    memory_savers: tuple[str, ...] = ()
    """Memory savers that were used, such as `vae_tiling`. The pixels differ slightly from those without."""
    unsafe: bool = False
    """Whether the model's own safety checker finds the image unsafe."""
    decisions: tuple[SafetyDecision, ...] = ()
    """Decisions of the content policy about the image."""


def generate_batch(model: ImageModel, requests: Sequence[ImageRequest], on_step: OnStep) -> list[GeneratedImage]:
    """Generate one image per request, in order.

    A call that does not fit in memory is repeated with one more of the model's memory savers each time.

    Raises:
        ModelOutOfMemoryError: the batch does not fit with all memory savers either; half of it may fit.
        InvalidOutputError: the model did not return one image per request.
        CallStopped: `on_step` returned False.
        Exception: every other error of `ImageModel.generate`, unchanged.
    """
    available = model.memory_savers(len(requests))
    for count in range(len(available) + 1):
        savers = tuple(available[:count])
        if savers:
            GENERATION_MEMORY_SAVED.labels(model.name, savers[-1]).inc()
            logger.warning("memory_saved", extra={"model": model.name, "images": len(requests), "by": savers})
        try:
            with model.saving_memory(savers):
                images = model.generate(requests, on_step)
                _check_images(images, requests)
                unsafe = model.detect_unsafe(images)
        except ModelOutOfMemoryError:
            continue
        return [GeneratedImage(image, savers, is_unsafe) for image, is_unsafe in zip(images, unsafe, strict=True)]
    first = requests[0]
    raise ModelOutOfMemoryError(
        f"{len(requests)} image(s) of {first.width} x {first.height} do not fit in memory.",
        images=len(requests),
        width=first.width,
        height=first.height,
        tried=list(available),
    )


def _check_images(images: Sequence[np.ndarray], requests: Sequence[ImageRequest]) -> None:
    """Raise `InvalidOutputError` unless each request has one valid image, so that no invalid image is published."""
    if not isinstance(images, list) or len(images) != len(requests):
        number = len(images) if isinstance(images, list) else "no list"
        raise InvalidOutputError(f"The model returned {number} for {len(requests)} image(s).")
    for image, request in zip(images, requests, strict=True):
        expected = (request.height, request.width, 3)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            actual = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
            raise InvalidOutputError(f"The model returned {actual} instead of uint8 {expected}.")
        if not image.any():
            # NaN becomes black in uint8. A working decoder never returns exact black in every pixel.
            raise InvalidOutputError("The model returned an image that is black in every pixel.")
