"""The judge: a CLIP other than the retriever, and its scores for the images of one case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from PIL import Image

from scripts.evaluate import metrics
from scripts.evaluate.metrics import Floats, Pixels
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip


@dataclass(frozen=True)
class Judge:
    clip: Clip
    row_by_concept: Mapping[str, int]
    """Row of `name_vectors` by concept."""
    name_vectors: Floats
    """Vectors of the concepts' names, L2-normalised, shape (concepts, dim)."""

    @classmethod
    def of(cls, clip: Clip, concepts: Sequence[str]) -> Self:
        return cls(clip, {name: row for row, name in enumerate(concepts)}, l2_normalised(clip.encode_text(concepts)))

    def encode_images(self, images: Sequence[Image.Image]) -> Floats:
        """Return L2-normalised vectors, shape (n, dim)."""
        return l2_normalised(self.clip.encode_image(images)) if images else np.zeros((0, self.clip.dim), np.float32)

    def name_scores(self, concept: str, vectors: Floats) -> dict[str, float]:
        """Score how well the images of these vectors match the concept's name; means over the images."""
        ranks = metrics.name_ranks(vectors, self.name_vectors, self.row_by_concept[concept])
        return {
            "judge_top1": metrics.recall_at(1, ranks),
            "judge_top5": metrics.recall_at(5, ranks),
            "clip_score": float((vectors @ self.name_vectors[self.row_by_concept[concept]]).mean()),
        }


@dataclass(frozen=True)
class JudgedImages:
    """Images and the judge's vectors of them, L2-normalised, shape (n, dim)."""

    images: Sequence[Image.Image]
    vectors: Floats


def scores(
    concept: str, generated: Sequence[Pixels], *, judge: Judge, references: JudgedImages, targets: JudgedImages
) -> dict[str, float]:
    """Score the images of one case in one arm; means over the images, NaN without data.

    Args:
        references: the references that the images were generated with.
        targets: real images of the concept that are not among the references.
    """
    images = [Image.fromarray(image) for image in generated]
    judged = JudgedImages(images, judge.encode_images(images))
    return {
        **judge.name_scores(concept, judged.vectors),
        "clip_i": float(metrics.mean_similarity(judged.vectors, targets.vectors).mean()),
        **copy_scores(judged, references),
        "diversity": metrics.diversity(judged.vectors),
    }


def copy_scores(images: JudgedImages, references: JudgedImages) -> dict[str, float]:
    """Compare each image with its nearest reference; means over the images, NaN without references."""
    distances = [metrics.min_pixel_distance(image, references.images) for image in images.images]
    return {
        "copy_similarity": float(metrics.max_similarity(images.vectors, references.vectors).mean()),
        "copy_pixel_distance": float(np.mean(distances)),
    }
