"""Choosing references: which memories an image is conditioned on, with what weight, and why.

The API previews with it (`GET /rag/search`) and the worker generates with it, so that both tell the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from shared.contracts.generation import PinnedReference
from shared.contracts.search import ImageFilter
from shared.db import images
from shared.db.images import Found, Vector
from shared.db.spaces import Space
from shared.errors import ReferenceUnavailableError
from shared.imaging import hash_distance
from shared.settings import RetrievalSettings

OVERFETCH = 4
"""Candidates looked at per reference wanted, so that collapsed near-duplicates do not leave the plan short."""


@dataclass(frozen=True)
class Reference:
    """A candidate and the decision on it. `weight` is its share of the conditioning; those of the used sum to 1."""

    found: Found
    used: bool
    reason: str
    weight: float = 0.0
    pinned: bool = False


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
) -> list[Reference]:
    """Up to `k` references for a query, most similar first, those refused by the relevance gate marked so.

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
    return decide(nearest.found, k=k, min_similarity=min_similarity, settings=settings)


def decide(
    candidates: Sequence[Found], *, k: int, min_similarity: float, settings: RetrievalSettings
) -> list[Reference]:
    """The decision on candidates, most similar first: repetitions left out, the best `k` gated, the used weighed."""
    distinct = without_near_duplicates(candidates, similarity=settings.duplicate_similarity)[:k]
    gated = [
        Reference(found=found, used=True, reason=f"similarity {found.similarity:.3f} reaches {min_similarity:g}")
        if found.similarity >= min_similarity
        else Reference(found=found, used=False, reason=f"similarity {found.similarity:.3f} is below {min_similarity:g}")
        for found in distinct
    ]
    return _weigh(gated, temperature=settings.weight_temperature)


def plan_pinned(
    session: Session, space: Space, references: Sequence[PinnedReference], vector: Vector | None
) -> list[Reference]:
    """Exactly these references in this order; a pinned one passes no gate.

    Raises:
        ReferenceUnavailableError: an image is gone or has no vector in this space.
    """
    found = images.pinned(session, space, [reference.image_id for reference in references], vector)
    missing = [str(reference.image_id) for reference in references if reference.image_id not in found]
    if missing:
        raise ReferenceUnavailableError(image_ids=missing)
    total = sum(reference.weight or 1.0 for reference in references)
    return [
        Reference(
            found=found[reference.image_id],
            used=True,
            reason="pinned by the request",
            weight=(reference.weight or 1.0) / total,
            pinned=True,
        )
        for reference in references
    ]


def without_near_duplicates(found: Sequence[Found], *, similarity: float) -> list[Found]:
    """Keep the first of every group that looks the same."""
    kept: list[Found] = []
    for candidate in found:
        if not any(_same(candidate, other, similarity) for other in kept):
            kept.append(candidate)
    return kept


def _same(a: Found, b: Found, similarity: float) -> bool:
    # Equal hashes alone prove little: a red and a green apple differ in no gradient. They only lower the bar.
    bar = similarity - 0.05 if hash_distance(a.image.perceptual_hash, b.image.perceptual_hash) <= 2 else similarity
    return float(a.vector @ b.vector) >= bar


def diversify(found: Sequence[Found], *, k: int, diversity: float) -> list[Found]:
    """Maximal marginal relevance (Carbonell & Goldstein, SIGIR 1998): the best `k` by relevance less repetition.

    diversity: 0 keeps the order by similarity; 1 looks only at how different the next one is from those chosen.
    """
    remaining, chosen = list(found), list[Found]()
    while remaining and len(chosen) < k:

        def worth(candidate: Found) -> float:
            repeated = max((float(candidate.vector @ other.vector) for other in chosen), default=0.0)
            return (1 - diversity) * candidate.similarity - diversity * repeated

        best = max(remaining, key=worth)
        remaining.remove(best)
        chosen.append(best)
    return chosen


def _weigh(references: Sequence[Reference], *, temperature: float) -> list[Reference]:
    """Softmax of the used references' similarities."""
    similarities = np.array([r.found.similarity if r.used else -np.inf for r in references])
    if not np.isfinite(similarities).any():
        return list(references)
    shares = np.exp((similarities - similarities.max()) / temperature)
    shares /= shares.sum()
    return [replace(reference, weight=float(share)) for reference, share in zip(references, shares, strict=True)]
