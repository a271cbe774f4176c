"""The first images of a loaded pipeline: they take the slow first call, and show what only a call can show."""

from __future__ import annotations  # for Diffusion, which imports this module

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from shared.capabilities import supports
from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import InvalidOutputError
from worker_service.execution.steps import go_on
from worker_service.models.generate_batch import generate_batch
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.pipelines.probe import probe

if TYPE_CHECKING:
    from worker_service.models.generation.diffusion import Diffusion


def warm_up(model: Diffusion) -> Capabilities:
    """Draw a native image in two steps, with a reference if the model takes one, and a few small ones.

    The result is the model's capabilities with the findings: the multiple of which it draws every size, and whether it
    keeps the promises of `probe`. Like an image of a job, the native one may need memory savers. The others then have
    them too.

    Raises:
        Exception: any error of a call for one image.
    """
    request = _native_request(model)
    width, height = _probed_size(model.capabilities)
    native = generate_batch(model, [request], go_on)[0]
    with model.saving_memory(native.memory_savers):
        verdict = probe(
            model.draw,
            replace(request, width=width, height=height),
            model=model.name,
            batches=model.capabilities.max_batch_size > 1,
            key=model.batch_key,
        )
        multiple = _drawn_multiple(model, request)
    return verdict.apply(model.capabilities).model_copy(update={"size_multiple": multiple})


def _native_request(model: Diffusion) -> ImageRequest:
    blank = Reference(
        vector=None if model.reference_dim is None else np.zeros(model.reference_dim, np.float32),
        image=Image.new("RGB", (64, 64)),
        weight=1,
        caption=None,
    )
    first_choices = (Mode.IMAGE_PROMPT, Mode.NONE)
    mode = next((mode for mode in first_choices if supports(model.capabilities, mode)), Mode.REFERENCE)
    request = ImageRequest.of(
        model.defaults,
        prompt="warm up",
        seed=0,
        width=model.capabilities.native_width,
        height=model.capabilities.native_height,
        mode=mode,
        references=() if mode is Mode.NONE else [blank],
    )
    return replace(request, num_inference_steps=2)


def _probed_size(known: Capabilities) -> tuple[int, int]:
    """A small (width, height) where the model draws it, because the promises do not depend on the size."""
    side = 4 * known.size_multiple
    if known.any_size and side < min(known.native_width, known.native_height):
        return side, side
    return known.native_width, known.native_height


def _drawn_multiple(model: Diffusion, request: ImageRequest) -> int:
    """The multiple of which the model draws every size.

    QwenImage21Pipeline rounds sizes down to twice the multiple that its image processor names.
    """
    declared = model.capabilities.size_multiple
    if not model.capabilities.any_size:
        return declared
    for multiple in (declared, 2 * declared):
        try:
            model.draw([replace(request, width=3 * multiple, height=3 * multiple)], go_on)
        except (InvalidOutputError, ValueError):
            continue
        return multiple
    return declared
