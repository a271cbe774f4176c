"""The judge: a CLIP that is not the retriever, and what it says of the images of one case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from scripts.evaluate import metrics
from scripts.evaluate.metrics import Floats, Pixels
from worker_service.models.clip import Clip


def unit(vectors: Floats) -> Floats:
    """Rows divided by their lengths."""
    normalised: Floats = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalised


@dataclass(frozen=True)
class Judge:
    clip: Clip
    places: Mapping[str, int]
    """Row of `names` by concept."""
    names: Floats
    """What images are told apart by: the concepts' vectors, L2-normalised, shape (concepts, dim)."""

    @classmethod
    def of(cls, clip: Clip, concepts: Sequence[str]) -> Self:
        return cls(clip, {name: place for place, name in enumerate(concepts)}, unit(clip.encode_text(concepts)))

    def see(self, images: Sequence[Image.Image]) -> Floats:
        """L2-normalised vectors, shape (n, dim)."""
        return unit(self.clip.encode_image(images)) if images else np.zeros((0, self.clip.dim), np.float32)

    def naming(self, concept: str, seen: Floats) -> dict[str, float]:
        """How well the images of these vectors show the concept, told by its name; means over the images."""
        ranks = metrics.named_ranks(seen, self.names, self.places[concept])
        return {
            "judge_top1": metrics.recall_at(1, ranks),
            "judge_top5": metrics.recall_at(5, ranks),
            "clip_score": float((seen @ self.names[self.places[concept]]).mean()),
        }


@dataclass(frozen=True)
class Known:
    """Real images and their vectors by the judge, L2-normalised, shape (n, dim)."""

    images: Sequence[Image.Image]
    vectors: Floats


def scores(
    concept: str, drawn: Sequence[Pixels], *, judge: Judge, references: Known, targets: Known
) -> dict[str, float]:
    """Means over the images of one case in one arm; NaN where there is nothing to measure.

    references: what the images were drawn from. targets: real images of the concept that are not among them.
    """
    images = [Image.fromarray(image) for image in drawn]
    seen = Known(images, judge.see(images))
    return {
        **judge.naming(concept, seen.vectors),
        "clip_i": float(metrics.mean_similarity(seen.vectors, targets.vectors).mean()),
        **copying(seen, references),
        "diversity": metrics.diversity(seen.vectors),
    }


def copying(images: Known, references: Known) -> dict[str, float]:
    """How near the images come to the nearest of the references; means over the images, NaN without references."""
    distances = [metrics.least_pixel_distance(image, references.images) for image in images.images]
    return {
        "copy_similarity": float(metrics.greatest_similarity(images.vectors, references.vectors).mean()),
        "copy_pixel_distance": float(np.mean(distances)),
    }
