"""Does an image take the colour that its prompt names, where its reference has another colour?"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from scripts.evaluate.arms import Arm, Case, image_requests
from scripts.evaluate.gate import as_dict
from scripts.evaluate.judge import Judge
from scripts.evaluate.metrics import Floats, Pixels
from scripts.evaluate.splits import TimedModel
from scripts.evaluate.statistics import estimate
from scripts.evaluate.store import Store
from shared.contracts.generation import seeds_from
from worker_service.models.interface import ImageModel

HUES: dict[str, float] = {"red": 0, "orange": 30, "yellow": 52, "green": 125, "blue": 215, "purple": 275, "pink": 333}
"""Typical hue of each colour name, in degrees. Pixels have the name of the nearest one."""
COLOURED = (0.3, 0.25)
"""Least saturation and brightness of a pixel whose colour is counted; black, grey and white are not."""
LEAST_SHARE = 0.1
"""Least share of coloured pixels in a reference. A colour of lines and details says nothing about the thing."""


def cases(concepts: Sequence[str], store: Store, queries: Mapping[str, Floats]) -> list[tuple[str, Case]]:
    """Return a colour and its case for each concept with a coloured image: that image, and a prompt with the colour.

    The colour is chosen by the concept's name, and is not that of the image.
    """
    found = []
    for concept in concepts:
        references = store.pinned_references(concept, queries[concept], k=1)
        own = colour_of(np.asarray(store.image(references[0].scored).open())) if references else None
        if own is None:
            continue
        rng = random.Random(concept)
        colour = rng.choice([name for name in HUES if name != own and name not in concept.lower()])
        seeds = seeds_from(rng.getrandbits(32), 1)
        found.append((colour, Case(concept, seeds, {Arm.ORACLE: references}, prompt=f"a {colour} {concept}")))
    return found


def figures(
    given: Sequence[tuple[str, Case]],
    *,
    model: ImageModel,
    store: Store,
    judge: Judge,
    on_images: Callable[[int], None],
) -> dict[str, Any]:
    """Generate one image for each case, and return the number of images and two shares with their intervals.

    - `followed`: of images whose commonest colour is that of the prompt.
    - `judge_top5`: of images for which the judge still finds the thing among its five likeliest names.
    """
    requests = image_requests([case for _, case in given], Arm.ORACLE, model=model, store=store)
    images = list(TimedModel(model).generate(requests, on_images))
    followed = [colour_of(image) == colour for image, (colour, _) in zip(images, given, strict=True)]
    named = [
        judge.name_scores(case.concept, judge.encode_images([Image.fromarray(image)]))["judge_top5"]
        for image, (_, case) in zip(images, given, strict=True)
    ]
    return {
        "images": len(images),
        "followed": as_dict(estimate(np.array(followed, float))),
        "judge_top5": as_dict(estimate(np.array(named, float))),
    }


def colour_of(image: Pixels) -> str | None:
    """Return the name of the commonest hue; None if less than LEAST_SHARE of the pixels are coloured.

    image: RGB, uint8, shape (height, width, 3).
    """
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV")) / 255, 2, 0)
    is_coloured = (saturation >= COLOURED[0]) & (value >= COLOURED[1])
    if is_coloured.mean() < LEAST_SHARE:
        return None
    distance = np.abs(hue[is_coloured, None] * 360 - list(HUES.values()))
    nearest = np.minimum(distance, 360 - distance).argmin(axis=1)
    return list(HUES)[np.bincount(nearest).argmax()]
