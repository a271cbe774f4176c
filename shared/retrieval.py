"""Retrieval: chooses the references of a generated image, with their weights and the reasons.

The API uses it to show planned references (`GET /rag/search`), and the worker to generate. So both choose the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from shared.contracts.generation import PinnedReference
from shared.contracts.jobs import ReferenceKind
from shared.contracts.search import ImageFilter
from shared.db import images
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.errors import ReferenceUnavailableError
from shared.imaging import hash_distance
from shared.settings import RetrievalSettings

OVERFETCH = 4
"""Candidates fetched per wanted reference, so that enough remain after near-duplicates are removed."""


@dataclass(frozen=True)
class Candidate:
    """A corpus image, or a picture of the request, and the decision whether to use it as a reference.

    weight: its share of the conditioning. The weights of the used candidates sum to 1; the others have 0.
    """

    scored: ScoredImage
    used: bool
    reason: str
    weight: float = 0.0
    pinned: bool = False
    kind: ReferenceKind = ReferenceKind.CORPUS


def plan(
    session: Session,
    space: Space,
    vector: Vector,
    *,
    k: int,
    min_similarity: float,
    collection_id: UUID,
    where: ImageFilter,
    settings: RetrievalSettings,
) -> list[Candidate]:
    """Up to `k` candidates for a query, most similar first. Those below `min_similarity` are not `used`.

    vector: shape (space.dim,), float32, L2-normalised.
    """
    if k == 0:
        return []
    nearest = images.nearest(
        session,
        space,
        vector,
        k=k * OVERFETCH,
        collection_id=collection_id,
        where=where,
        ef_search=settings.ef_search,
        exact_below=settings.exact_below,
    )
    return decide(nearest.images, k=k, min_similarity=min_similarity, settings=settings)


def decide(
    candidates: Sequence[ScoredImage], *, k: int, min_similarity: float, settings: RetrievalSettings
) -> list[Candidate]:
    """Decide on images that are sorted by similarity, best first.

    Near-duplicates are removed. The best `k` remain, and those that reach `min_similarity` are used and get weights.
    """
    distinct = without_near_duplicates(candidates, similarity=settings.duplicate_similarity)[:k]
    gated = [
        Candidate(scored=found, used=True, reason=f"similarity {found.similarity:.3f} reaches {min_similarity:g}")
        if found.similarity >= min_similarity
        else Candidate(
            scored=found, used=False, reason=f"similarity {found.similarity:.3f} is below {min_similarity:g}"
        )
        for found in distinct
    ]
    return _with_weights(gated, temperature=settings.weight_temperature)


def plan_pinned(
    session: Session,
    space: Space,
    references: Sequence[PinnedReference],
    vector: Vector | None,
    *,
    sent: Sequence[tuple[ScoredImage, float | None]] = (),
) -> list[Candidate]:
    """Exactly these references in this order, whatever their similarity.

    sent: pictures of the request with their relative weights (None: 1). They come after the corpus images.

    Raises:
        ReferenceUnavailableError: an image was deleted or has no vector in this space.
    """
    found = images.find_by_ids(session, space, [reference.image_id for reference in references], vector)
    missing = [str(reference.image_id) for reference in references if reference.image_id not in found]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
    pinned = [(found[reference.image_id], reference.weight) for reference in references]
    total = sum(_relative(weight) for _, weight in (*pinned, *sent))
    return [
        Candidate(scored=scored, used=True, reason=reason, weight=_relative(weight) / total, pinned=True, kind=kind)
        for kind, reason, group in (
            (ReferenceKind.CORPUS, "pinned by the request", pinned),
            (ReferenceKind.REQUEST, "sent with the request", sent),
        )
        for scored, weight in group
    ]


def _relative(weight: float | None) -> float:
    return 1.0 if weight is None else weight


def without_near_duplicates(found: Sequence[ScoredImage], *, similarity: float) -> list[ScoredImage]:
    """Keep the first image of each group of near-duplicates."""
    kept: list[ScoredImage] = []
    for candidate in found:
        if not any(_is_near_duplicate(candidate, other, similarity) for other in kept):
            kept.append(candidate)
    return kept


def _is_near_duplicate(a: ScoredImage, b: ScoredImage, similarity: float) -> bool:
    # Similar hashes alone prove little: a red and a green apple have the same gradients. They only lower the threshold.
    similar_hash = hash_distance(a.image.perceptual_hash, b.image.perceptual_hash) <= 2
    threshold = similarity - 0.05 if similar_hash else similarity
    return float(a.vector @ b.vector) >= threshold


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


def _with_weights(candidates: Sequence[Candidate], *, temperature: float) -> list[Candidate]:
    """Set the weights of the used candidates to the softmax of their similarities."""
    similarities = np.array([each.scored.similarity if each.used else -np.inf for each in candidates])
    if not np.isfinite(similarities).any():
        return list(candidates)
    weights = np.exp((similarities - similarities.max()) / temperature)
    weights /= weights.sum()
    return [replace(candidate, weight=float(weight)) for candidate, weight in zip(candidates, weights, strict=True)]
