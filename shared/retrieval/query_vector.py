"""The vector of a query that has several parts."""

from collections.abc import Sequence

import numpy as np

from shared.db.images import Vector
from shared.vectors import l2_normalised

NEGATIVE_SHARE = 0.5
SAME_DIRECTION = 0.999
"""The cosine from which the wanted and the unwanted parts count as the same."""
LEAST_LENGTH = 1e-3
"""A shorter sum has no direction that means something: its parts cancel each other."""


def combine(wanted: Sequence[tuple[Vector, float]], unwanted: Sequence[tuple[Vector, float]] = ()) -> Vector | None:
    """The direction of the wanted vectors, moved away from the unwanted ones: Rocchio's formula.

    The weighted sum of the wanted vectors is normalised. Half of the weighted sum of the unwanted ones is subtracted.
    The formula is from Rocchio, "Relevance feedback in information retrieval" (1971). Manning et al., "Introduction to
    Information Retrieval" (section 9.1.1), also weigh unwanted parts less. On the starter corpus, a subtraction of all
    of it, or a projection, left the subject: a book that is not red became a burrito.

    wanted, unwanted: L2-normalised vectors of shape (dim,), float32, with positive weights; at least one is wanted.
    Returns a vector of the same form, or `None` if the parts cancel each other or contradict themselves.
    """
    direction = _unit(_weighted_sum(wanted))
    if direction is None or not unwanted:
        return direction
    away = _weighted_sum(unwanted)
    away_direction = _unit(away)
    if away_direction is not None and float(direction @ away_direction) > SAME_DIRECTION:
        return None
    return _unit(direction - NEGATIVE_SHARE * away)


def _weighted_sum(parts: Sequence[tuple[Vector, float]]) -> Vector:
    total: Vector = np.sum([weight * vector for vector, weight in parts], axis=0, dtype=np.float32)
    return total


def _unit(vector: Vector) -> Vector | None:
    length = float(np.linalg.norm(vector))
    return l2_normalised(vector) if np.isfinite(length) and length > LEAST_LENGTH else None
