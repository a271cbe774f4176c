"""Measures at start what engines do not say: whether they draw the requested size, and keep an image to its seed.

Afterwards `GET /models` shows it. A seed has to give the same image again, from each engine, and in company too.
"""

from __future__ import annotations  # for OpenAIGenerator, which imports this module

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from shared.contracts.generation import Mode
from shared.contracts.service import Capabilities
from shared.errors import BaseAppException, EngineRefusedError, InvalidOutputError, ModelLoadError
from worker_service.models.interface import ImageRequest, Reference

if TYPE_CHECKING:
    from worker_service.models.engines.generator import OpenAIGenerator

logger = logging.getLogger(__name__)

STEPS = 2
"""Enough for all that is measured, where the engine takes a number of steps."""
COMPANION = "a red apple, a green pear and a blue cup on a table"
"""Longer than the other prompt: padding is what makes images depend on their company."""
ROUNDING = 0.01
"""Root mean square of the differences, as a share of the range, that counts as rounding. A replay counts so too."""


def probe(model: OpenAIGenerator) -> Capabilities:
    """The capabilities of the model, with what was measured.

    Raises:
        ModelLoadError: an engine cannot draw; the message gives the cause.
    """
    known = model.capabilities
    try:
        request = _request(model)
        first = _drawn(model, request)
        if Mode.REFERENCE.value in known.modes and request.mode is not Mode.REFERENCE:
            _drawn(model, _with_reference(request))
        repeats = _repeats(model, request, first)
        depends = repeats and model.pool.concurrency > 1 and _depends_on_company(model, request)
        any_size = known.any_size and _draws_other_sizes(model, request)
    except BaseAppException as error:
        raise ModelLoadError(
            f"The engine could not draw its first images: {error.message}", model=model.name
        ) from error
    return known.model_copy(
        update={
            "any_size": any_size,
            "repeating_changes_images": not repeats,
            "batching_changes_images": depends,
            "images_at_once": len(model.pool.engines) if depends else known.images_at_once,
        }
    )


def _request(model: OpenAIGenerator) -> ImageRequest:
    """A request at the native size, with a reference only if the model needs one."""
    request = ImageRequest.of(
        model.defaults,
        prompt="a cat",
        seed=1,
        width=model.capabilities.native_width,
        height=model.capabilities.native_height,
        mode=Mode.NONE,
    )
    request = replace(request, num_inference_steps=STEPS)
    return _with_reference(request) if model.capabilities.needs_reference else request


def _with_reference(request: ImageRequest) -> ImageRequest:
    picture = Image.linear_gradient("L").convert("RGB")
    return replace(request, mode=Mode.REFERENCE, references=(Reference(None, picture, weight=1, caption=None),))


def _drawn(model: OpenAIGenerator, *requests: ImageRequest) -> np.ndarray:
    return model.draw(requests, lambda *_: True)[0]


def _repeats(model: OpenAIGenerator, request: ImageRequest, first: np.ndarray) -> bool:
    """Whether every engine that answers draws the image again."""
    assert model.settings.engine is not None, "checked by the settings"
    if not model.settings.engine.fields["seed"]:
        return False
    for engine in model.pool.engines:
        if engine.is_away:
            continue
        (again,) = model.draw([request], lambda *_: True, only=engine)
        if (difference := _difference(first, again)) > ROUNDING:
            fields = {"model": model.name, "engine": engine.url, "difference": round(difference, 4)}
            logger.warning("repeating_changes_images", extra=fields)
            return False
    return True


def _depends_on_company(model: OpenAIGenerator, request: ImageRequest) -> bool:
    """Whether an engine draws another image while it draws others too. All calls go to one engine."""
    engine = next((each for each in model.pool.engines if not each.is_away), model.pool.engines[0])
    (alone,) = model.draw([request], lambda *_: True, only=engine)
    companions = [replace(request, prompt=COMPANION, seed=2 + i) for i in range(model.pool.concurrency - 1)]
    together, *_ = model.draw([request, *companions], lambda *_: True, only=engine)
    if (difference := _difference(alone, together)) <= ROUNDING:
        return False
    fields = {"model": model.name, "engine": engine.url, "difference": round(difference, 4)}
    logger.warning("batching_changes_images", extra=fields)
    return True


def _draws_other_sizes(model: OpenAIGenerator, request: ImageRequest) -> bool:
    multiple = model.capabilities.size_multiple
    width = max(1, round(request.width * 0.75 / multiple)) * multiple
    try:
        _drawn(model, replace(request, width=width))
    except (EngineRefusedError, InvalidOutputError) as error:
        logger.warning("sizes_refused", extra={"model": model.name, "width": width, "cause": error.message})
        return False
    return True


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square of the differences of two images, as a share of the range."""
    return float(np.sqrt(np.mean(np.square(one.astype(np.float32) - other.astype(np.float32))))) / 255
