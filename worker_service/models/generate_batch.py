"""One call of an image model, whatever happens in it: too little memory, or something that is no image."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.contracts.safety import SafetyDecision
from shared.errors import InvalidOutputError, ModelOutOfMemoryError
from shared.metrics import GENERATION_MEMORY_SAVED
from worker_service.models.interface import ImageModel, ImageRequest, OnStep

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """One image as a model gave it."""

    pixels: np.ndarray
    """uint8, shape (height, width, 3), RGB."""
    memory_savers: tuple[str, ...] = ()
    """What was done to make it fit, such as `vae_tiling`; its pixels differ from those drawn without."""
    unsafe: bool = False
    """The safety checker that came with the model objects to it."""
    decisions: tuple[SafetyDecision, ...] = ()
    """What the content policy recognised in it."""


def draw(model: ImageModel, requests: Sequence[ImageRequest], on_step: OnStep) -> list[Drawn]:
    """Draw one image per request, in order.

    A call that does not fit in memory is repeated with one more of the model's memory savers each time.

    Raises:
        ModelOutOfMemoryError: it does not fit with all of them either; half of the requests may.
        InvalidOutputError: the model returned something else than a picture for each request.
        Interrupted: as in `ImageModel.generate`, and whatever else that raises.
    """
    known = model.memory_savers(len(requests))
    for used in range(len(known) + 1):
        savers = tuple(known[:used])
        if savers:
            GENERATION_MEMORY_SAVED.labels(model.name, savers[-1]).inc()
            logger.warning("memory_saved", extra={"model": model.name, "images": len(requests), "by": savers})
        try:
            with model.saving_memory(savers):
                images = model.generate(requests, on_step)
                _check(images, requests)
                unsafe = model.unsafe(images)
        except ModelOutOfMemoryError:
            continue
        return [Drawn(image, savers, bad) for image, bad in zip(images, unsafe, strict=True)]
    first = requests[0]
    raise ModelOutOfMemoryError(
        f"{len(requests)} image(s) of {first.width} x {first.height} do not fit in memory.",
        images=len(requests),
        width=first.width,
        height=first.height,
        tried=list(known),
    )


def _check(images: Sequence[np.ndarray], requests: Sequence[ImageRequest]) -> None:
    """A model that broke must not have its garbage published as a success."""
    if not isinstance(images, list) or len(images) != len(requests):
        number = len(images) if isinstance(images, list) else "no list"
        raise InvalidOutputError(f"The model returned {number} for {len(requests)} image(s).")
    for image, request in zip(images, requests, strict=True):
        expected = (request.height, request.width, 3)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != expected:
            is_now = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}".strip()
            raise InvalidOutputError(f"The model returned {is_now} instead of uint8 {expected}.")
        if not image.any():
            # What numbers become that are none: no decoder draws exact black everywhere by itself.
            raise InvalidOutputError("The model returned an image that is black in every pixel.")
