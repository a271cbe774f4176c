"""Measures at start whether a model keeps two promises of `ImageModel.generate`, which some classes of diffusers break.

An image must not depend on the other images of its batch. Qwen-Image 2.1 breaks this: the padding of the shorter of two
prompts moves the positions of its image. And an image must not depend on calls between two of its steps, as with a
cache that all calls share.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shared.contracts.service import Capabilities
from shared.errors import ModelOutOfMemoryError
from worker_service.execution.steps import OnStep, go_on
from worker_service.models.interface import ImageRequest

logger = logging.getLogger(__name__)

SHORT, LONG = "a cat", "a red apple, a green pear and a blue cup on a table"
"""Prompts of different length. Both are one part for a text encoder with 77 tokens."""
STEPS = 2
INVISIBLE = 1e-3
"""Differences of a channel, in [0, 1], that count as rounding in any case: a quarter of the steps of a stored image."""
MORE_THAN_ROUNDING = 5
"""Factor by which a difference exceeds that of equal prompts in a batch, whose only cause are other kernels."""

REFUSALS = (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""How classes of diffusers refuse a call of several images: a ValueError of QwenImageEditPlusPipeline, for example."""

Draw = Callable[[Sequence[ImageRequest], OnStep], np.ndarray]
"""The images of one call: shape (n, height, width, 3), float32, in [0, 1]."""
Key = Callable[[ImageRequest], Hashable]


@dataclass(frozen=True)
class Verdict:
    """The findings of the probe."""

    largest_batch: int | None
    """1 if the model must draw each image alone, or two small ones do not fit in memory; None: no limit."""
    batching_changes_images: bool
    interruption_changes_images: bool

    def apply(self, capabilities: Capabilities) -> Capabilities:
        """The capabilities with what was found."""
        return capabilities.model_copy(
            update={
                "max_batch_size": self.largest_batch or capabilities.max_batch_size,
                "batching_changes_images": self.batching_changes_images,
                "interruption_changes_images": self.interruption_changes_images,
            }
        )


def probe(draw: Draw, request: ImageRequest, *, model: str, batches: bool, key: Key) -> Verdict:
    """Draw two prompts in one call, and one between the steps of the other, and compare the images.

    A model that keeps both promises draws the same twice, and that takes the fewest calls. If the images differ, each
    prompt is also drawn alone.

    request: all but prompt, seed and steps. batches: whether calls of several images are tried at all. key: requests
    with unequal keys never share a call.

    Raises:
        Exception: `draw` failed for a single image.
    """
    short = replace(request, prompt=SHORT, seed=1, num_inference_steps=STEPS)
    long = replace(short, prompt=LONG, seed=2)
    equal_prompts = [short, replace(short, seed=2)]
    share_a_call = key(short) == key(long)
    inside: list[np.ndarray] = []

    def draw_between(step: int, _steps: int) -> bool:
        if step == 1:
            inside.append(draw([long], go_on))
        return True

    nested = np.concatenate([draw([short], draw_between), *inside])
    batch, largest_batch = None, None
    if batches:
        try:
            batch = draw([short, long] if share_a_call else equal_prompts, go_on)
        except (*REFUSALS, ModelOutOfMemoryError) as error:
            largest_batch = 1
            logger.warning("batches_refused", extra={"model": model, "cause": f"{type(error).__name__}: {error}"})
    together = batch if share_a_call else None
    if together is not None and _difference(together, nested) <= INVISIBLE:
        return Verdict(None, batching_changes_images=False, interruption_changes_images=False)

    alone = np.concatenate([draw([short], go_on), draw([long], go_on)])
    rounding = 0.0 if together is None else _difference(draw(equal_prompts, go_on)[:1], alone[:1])
    in_batch = 0.0 if together is None else _difference(together, alone)
    interrupted = _difference(nested, alone)
    verdict = Verdict(
        largest_batch=1 if _exceeds(in_batch, rounding) else largest_batch,
        batching_changes_images=_exceeds(in_batch, rounding),
        interruption_changes_images=_exceeds(interrupted, rounding),
    )
    if verdict.batching_changes_images:
        extra = {"model": model, "difference": in_batch, "rounding": rounding}
        logger.warning("batching_changes_images", extra=extra)
    if verdict.interruption_changes_images:
        logger.warning("interruption_changes_images", extra={"model": model, "difference": interrupted})
    return verdict


def _difference(images: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(images - others).max())


def _exceeds(difference: float, rounding: float) -> bool:
    return difference > max(INVISIBLE, MORE_THAN_ROUNDING * rounding)
