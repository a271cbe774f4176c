"""Keeps chosen images different from each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.db.images import ScoredImage
from shared.imaging import hash_distance


def without_near_duplicates(found: Sequence[ScoredImage], *, similarity: float) -> list[ScoredImage]:
    """Keep the first image of each group of near-duplicates."""
    kept: list[ScoredImage] = []
    for candidate in found:
        if not any(is_near_duplicate(candidate, other, similarity) for other in kept):
            kept.append(candidate)
    return kept


def is_near_duplicate(a: ScoredImage, b: ScoredImage, similarity: float) -> bool:
    """Whether both show the same. similarity: lowest cosine of such images; 0.05 less if their hashes nearly agree."""
    if a.image.id == b.image.id:
        return True
    cosine = float(a.vector @ b.vector)
    # Similar hashes alone prove little: a red and a green apple have the same gradients. They only lower the threshold.
    return cosine >= similarity or (
        cosine >= similarity - 0.05 and hash_distance(a.image.perceptual_hash, b.image.perceptual_hash) <= 2
    )


def diversify(found: Sequence[ScoredImage], *, k: int, diversity: float) -> list[ScoredImage]:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): the best `k` by relevance minus redundancy.

    diversity: 0 keeps the order by similarity. 1 counts only how different an image is from those already chosen.
    """
    if not found:
        return []
    vectors = np.stack([each.vector for each in found])
    relevance = (1 - diversity) * np.array([each.similarity for each in found])
    redundancy: NDArray[np.floating[Any]] | None = None
    chosen: list[int] = []
    for _ in range(min(k, len(found))):
        merit = relevance if redundancy is None else relevance - diversity * redundancy
        merit = merit.copy()
        merit[chosen] = -np.inf
        best = int(merit.argmax())
        chosen.append(best)
        to_best = vectors @ vectors[best]
        redundancy = to_best if redundancy is None else np.maximum(redundancy, to_best)
    return [found[index] for index in chosen]
