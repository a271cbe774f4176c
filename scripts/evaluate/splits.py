"""Generate and judge all arms of one split, batch by batch."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

import numpy as np
from PIL import Image

from scripts.evaluate.arms import Arm, Case, image_requests
from scripts.evaluate.judge import Judge, JudgedImages, copy_scores, scores
from scripts.evaluate.metrics import Floats, Pixels
from scripts.evaluate.store import Store
from worker_service.models.interface import ImageModel, ImageRequest

SHEET_CASES = 12
"""Number of cases per split whose first image is kept for the sheet."""


@dataclass
class Split:
    """The measurements of the cases of one split, in their order."""

    cases: Sequence[Case]
    scores: dict[Arm, dict[str, Floats]] = field(default_factory=dict)
    """By arm and measure: one value per case, NaN without data."""
    real: dict[str, Floats] = field(default_factory=dict)
    """Scores of the targets, as if they had been generated with the retrieved references."""
    seconds_per_image: dict[Arm, float] = field(default_factory=dict)
    shown: dict[Arm, list[Pixels]] = field(default_factory=dict)
    """The first image of the first `SHEET_CASES` cases."""


def measure_split(
    cases: Sequence[Case],
    *,
    model: ImageModel,
    store: Store,
    targets: Mapping[str, Image.Image],
    judge: Judge,
    on_images: Callable[[int], None],
) -> Split:
    """Generate and judge all arms of the cases.

    Args:
        targets: by concept: a real image that no arm may use.
        on_images: called after every batch with its size.

    Raises:
        ModelOutOfMemoryError: a batch does not fit in memory.
        InvalidOutputError: the generator produced an image that is not valid.
    """
    split = Split(cases)
    cache = _JudgedImageCache(judge)
    case_targets = [
        cache.get({case.concept: targets[case.concept]} if case.concept in targets else {}) for case in cases
    ]
    # The copy scores of images without references use the retrieved ones.
    retrieved = [cache.get(_reference_images(case, Arm.RETRIEVED, store)) for case in cases]
    split.real = _by_measure(
        [
            judge.name_scores(case.concept, target.vectors) | copy_scores(target, references)
            for case, target, references in zip(cases, case_targets, retrieved, strict=True)
            if target.images
        ]
    )
    for arm in Arm:
        timed = TimedModel(model)
        images = timed.generate(image_requests(cases, arm, model=model, store=store), on_images)
        rows: list[Mapping[str, float]] = []
        shown: list[Pixels] = []
        for case, target, case_retrieved in zip(cases, case_targets, retrieved, strict=True):
            generated = list(islice(images, len(case.seeds)))
            references = case_retrieved if arm is Arm.NONE else cache.get(_reference_images(case, arm, store))
            rows.append(scores(case.concept, generated, judge=judge, references=references, targets=target))
            shown += generated[:1] if len(shown) < SHEET_CASES else []
        split.scores[arm] = _by_measure(rows)
        split.seconds_per_image[arm] = timed.seconds / sum(len(case.seeds) for case in cases)
        split.shown[arm] = shown
    return split


@dataclass
class _JudgedImageCache:
    """Caches the judge's vectors of real images."""

    judge: Judge
    vectors: dict[str, Floats] = field(default_factory=dict)

    def get(self, images: Mapping[str, Image.Image]) -> JudgedImages:
        """Return the images with their vectors. images: by a unique key."""
        new = [key for key in images if key not in self.vectors]
        self.vectors |= dict(zip(new, self.judge.encode_images([images[key] for key in new]), strict=True))
        vectors = [self.vectors[key] for key in images]
        return JudgedImages(list(images.values()), np.stack(vectors) if vectors else self.judge.encode_images([]))


@dataclass
class TimedModel:
    """A generator, and the seconds that its calls took."""

    model: ImageModel
    seconds: float = 0.0

    def generate(self, requests: Iterator[ImageRequest], on_images: Callable[[int], None]) -> Iterator[Pixels]:
        """Yield the images in order. Neighbours with the same batch key share a call."""
        for _, equal in groupby(requests, self.model.batch_key):
            while batch := list(islice(equal, self.model.capabilities.max_batch_size)):
                started = time.perf_counter()
                images = self.model.generate(batch, lambda step, steps: True)
                self.seconds += time.perf_counter() - started
                on_images(len(images))
                yield from images


def _reference_images(case: Case, arm: Arm, store: Store) -> dict[str, Image.Image]:
    images = [store.image(reference.scored) for reference in case.references[arm]]
    return {image.sha256: image.open() for image in images}


def _by_measure(rows: Sequence[Mapping[str, float]]) -> dict[str, Floats]:
    return {measure: np.array([row[measure] for row in rows]) for measure in (rows[0] if rows else ())}
