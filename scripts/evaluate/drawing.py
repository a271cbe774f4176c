"""The arms of one split: every case drawn by the generator and judged, batch by batch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
from PIL import Image

from scripts.evaluate.arms import Arm, Case, requests
from scripts.evaluate.judging import Judge, Known, copying, scores
from scripts.evaluate.metrics import Floats, Pixels
from scripts.evaluate.store import Store
from worker_service.models.interface import ImageModel, ImageRequest

SHEET_CASES = 12
"""Cases per split that keep their first image for the sheet."""


@dataclass
class Split:
    """What was measured on the cases of one split, in their order."""

    cases: Sequence[Case]
    scores: dict[Arm, dict[str, Floats]] = field(default_factory=dict)
    """By measure one value per case; NaN where there was nothing to measure."""
    real: dict[str, Floats] = field(default_factory=dict)
    """What the targets get as if they had been drawn, the retrieved references given."""
    seconds_per_image: dict[Arm, float] = field(default_factory=dict)
    shown: dict[Arm, list[Pixels]] = field(default_factory=dict)
    """The first image of the first `SHEET_CASES` cases."""


def draw_and_judge(
    cases: Sequence[Case],
    *,
    model: ImageModel,
    store: Store,
    targets: Mapping[str, Image.Image],
    judge: Judge,
    on_images: Callable[[int], None],
) -> Split:
    """Draw all arms of the cases.

    targets: by concept a real image that no arm draws from. on_images: called after every batch with its size.

    Raises:
        ModelOutOfMemoryError, InvalidOutputError
    """
    split = Split(cases)
    known = _Album(judge)
    goals = [known.of({case.concept: targets[case.concept]} if case.concept in targets else {}) for case in cases]
    # What the copy guard compares an image with that was drawn from nothing.
    retrieved = [known.of(_referenced(case, Arm.RETRIEVED, store)) for case in cases]
    split.real = _by_measure(
        [
            judge.naming(case.concept, goal.vectors) | copying(goal, references)
            for case, goal, references in zip(cases, goals, retrieved, strict=True)
            if goal.images
        ]
    )
    for arm in Arm:
        timed = _Timed(model)
        images = timed.draw(requests(cases, arm, model=model, store=store), on_images)
        rows: list[Mapping[str, float]] = []
        shown: list[Pixels] = []
        for case, goal, would_be in zip(cases, goals, retrieved, strict=True):
            drawn = list(islice(images, len(case.seeds)))
            references = would_be if arm is Arm.NONE else known.of(_referenced(case, arm, store))
            rows.append(scores(case.concept, drawn, judge=judge, references=references, targets=goal))
            shown += drawn[:1] if len(shown) < SHEET_CASES else []
        split.scores[arm] = _by_measure(rows)
        split.seconds_per_image[arm] = timed.seconds / sum(len(case.seeds) for case in cases)
        split.shown[arm] = shown
    return split


@dataclass
class _Album:
    """Real images as the judge sees them, each looked at once."""

    judge: Judge
    seen: dict[str, Floats] = field(default_factory=dict)

    def of(self, images: Mapping[str, Image.Image]) -> Known:
        """images: by a name that is an image's own."""
        new = [name for name in images if name not in self.seen]
        self.seen |= dict(zip(new, self.judge.see([images[name] for name in new]), strict=True))
        vectors = [self.seen[name] for name in images]
        return Known(list(images.values()), np.stack(vectors) if vectors else self.judge.see([]))


@dataclass
class _Timed:
    """A generator and the seconds it was at work."""

    model: ImageModel
    seconds: float = 0.0

    def draw(self, requests: Iterator[ImageRequest], on_images: Callable[[int], None]) -> Iterator[Pixels]:
        """The images in order. All requests have one batch key, as those of one arm have."""
        while batch := list(islice(requests, self.model.capabilities.max_batch_size)):
            began = time.perf_counter()
            images = self.model.generate(batch, lambda step, steps: True)
            self.seconds += time.perf_counter() - began
            on_images(len(images))
            yield from images


def _referenced(case: Case, arm: Arm, store: Store) -> dict[str, Image.Image]:
    pictures = [store.picture(reference.found) for reference in case.references[arm]]
    return {picture.sha256: picture.open() for picture in pictures}


def _by_measure(rows: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    return {measure: np.array([row[measure] for row in rows]) for measure in (rows[0] if rows else ())}
