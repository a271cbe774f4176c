"""Keeps chosen images different from each other."""

from collections.abc import Sequence

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
    remaining, chosen = list(found), list[ScoredImage]()
    while remaining and len(chosen) < k:

        def marginal_relevance(candidate: ScoredImage) -> float:
            redundancy = max((float(candidate.vector @ other.vector) for other in chosen), default=0.0)
            return (1 - diversity) * candidate.similarity - diversity * redundancy

        best = max(remaining, key=marginal_relevance)
        remaining.remove(best)
        chosen.append(best)
    return chosen
