"""Choose the thresholds of the relevance gate from measured searches. Pure arithmetic, without a database."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shared.contracts.calibration import Thresholds
from shared.retrieval.gate import ALL_WORDS, Gate

MIN_PRECISION = 0.9
"""Wanted share of the used references that are right."""
MAX_FALSE_ACCEPTS = 0.1
"""Largest wanted share of the queries with a reference though nothing fits them."""
LEAST_RECALL = 0.5
"""With less recall by the vectors alone, the wanted values cost too much, and a compromise takes their place."""
RIGHT_WITHIN_GAP = 0.95
"""Share of the right images that `max_gap` keeps."""
MATCHES_KEPT = 0.95
"""Share of the queries whose best image with all words `matched_min_similarity` keeps."""
WRONG_BELOW = 0.99
"""Share of all wrong pairs below the cosine that counts as a sign that text and image fit."""
STEP = 0.005


@dataclass(frozen=True)
class Found:
    """An image that a search found. word_share: as in `ScoredImage`. right: None: unclear, so it does not count."""

    similarity: float
    word_share: float
    right: bool | None


@dataclass(frozen=True)
class Searches:
    """Searches of a sample.

    fitting: images of each query that has right ones in the corpus, in the order of the service, without
    near-duplicates. unfitting: the same for queries that nothing fits, such as a caption without its own images.
    wrong: cosines of queries with images taken at random.
    """

    fitting: Sequence[Sequence[Found]]
    unfitting: Sequence[Sequence[Found]]
    wrong: Sequence[float]


@dataclass(frozen=True)
class Figures:
    """How the gate decides on searches: as in `Calibration`."""

    precision: float
    recall: float
    recall_without_words: float
    false_accepts: float

    @property
    def are_wanted(self) -> bool:
        return (
            self.precision >= MIN_PRECISION
            and self.false_accepts <= MAX_FALSE_ACCEPTS
            and self.recall_without_words >= LEAST_RECALL
        )


@dataclass(frozen=True)
class Choice:
    """separable: as in `Calibration`."""

    thresholds: Thresholds
    figures: Figures
    separable: bool


def choose(searches: Searches, *, k: int) -> Choice:
    """Choose thresholds for generations with up to `k` references.

    1. `matched_min_similarity` is the cosine that one of 100 wrong pairs reaches. It is lower where more than one of 20
       queries would lose its best image with all words.
    2. `max_gap` keeps 19 of 20 right images.
    3. `min_similarity` is the lowest cosine that keeps both promises: precision, and few false accepts. Recall only
       falls with it, so the lowest one has the best recall. If no cosine keeps both, or it costs too much recall, the
       largest difference of recall and false accepts decides (Youden, Cancer 1950).

    Raises:
        ValueError: there are no searches of one kind.
    """
    if not searches.fitting or not searches.unfitting or not len(searches.wrong):
        raise ValueError("A calibration needs queries that an image fits, queries that nothing fits, and wrong pairs.")
    sign = float(np.quantile(searches.wrong, WRONG_BELOW))
    matched = [best for found in searches.fitting if (best := _best_match(found)) is not None]
    lowest = min(sign, float(np.quantile(matched, 1 - MATCHES_KEPT))) if matched else sign
    lowest = _clamped(math.floor(lowest / STEP) * STEP)
    gap = round(math.ceil(_gap(searches.fitting, k=k) / STEP) * STEP, 3)

    candidates = [
        Gate(_clamped(lowest + step * STEP), gap, lowest) for step in range(math.floor((1 - lowest) / STEP) + 1)
    ]
    measured = [(gate, figures_of(gate, searches, k=k)) for gate in candidates]
    chosen = next(((gate, figures) for gate, figures in measured if figures.are_wanted), None)
    gate, figures = chosen or max(measured, key=lambda each: each[1].recall_without_words - each[1].false_accepts)
    thresholds = Thresholds(
        min_similarity=gate.min_similarity,
        max_gap=gate.max_gap,
        matched_min_similarity=gate.matched_min_similarity,
    )
    return Choice(thresholds, figures, separable=chosen is not None)


def figures_of(gate: Gate, searches: Searches, *, k: int) -> Figures:
    used = [_used(gate, found, k=k) for found in searches.fitting]
    rights = sum(each.right is True for found in used for each in found)
    wrongs = sum(each.right is False for found in used for each in found)
    by_vectors = replace(gate, matched_min_similarity=None)
    return Figures(
        precision=rights / (rights + wrongs) if rights + wrongs else 1.0,
        recall=_share(any(each.right for each in found) for found in used),
        recall_without_words=_share(any(each.right for each in _used(by_vectors, f, k=k)) for f in searches.fitting),
        false_accepts=_share(bool(_used(gate, found, k=k)) for found in searches.unfitting),
    )


def _used(gate: Gate, found: Sequence[Found], *, k: int) -> list[Found]:
    best = gate.best_of(found)
    return [each for each in found[:k] if gate.passes(each.similarity, word_share=each.word_share, best=best)]


def _best_match(found: Sequence[Found]) -> float | None:
    """The highest cosine of an image that has all words of the query."""
    return max((each.similarity for each in found if each.word_share >= ALL_WORDS), default=None)


def _gap(fitting: Sequence[Sequence[Found]], *, k: int) -> float:
    gaps = [
        max(each.similarity for each in found) - right.similarity
        for found in fitting
        for right in found[:k]
        if right.right
    ]
    return float(np.quantile(gaps, RIGHT_WITHIN_GAP)) if gaps else 0.0


def _clamped(cosine: float) -> float:
    return round(min(1.0, max(-1.0, cosine)), 3)


def _share(values: Any) -> float:
    return float(np.mean([bool(value) for value in values]))
