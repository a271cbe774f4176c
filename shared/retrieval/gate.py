"""The relevance gate: decides whether a found image is used as a reference."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, Self

from shared.contracts.calibration import Thresholds
from shared.db.images import ScoredImage

DEFAULT_MIN_SIMILARITY = 0.42
"""Lowest cosine where neither a request, a collection, a setting nor a calibration says otherwise."""
ALL_WORDS = 0.999
"""A share of the words from which an image has all of them. Shares are sums of rounded numbers."""


class Judged(Protocol):
    """An image that a search found. similarity, word_share: as in `ScoredImage`."""

    @property
    def similarity(self) -> float: ...
    @property
    def word_share(self) -> float: ...


@dataclass(frozen=True)
class Gate:
    """Thresholds of relevance."""

    min_similarity: float
    """Lowest cosine similarity to the query."""
    max_gap: float | None = None
    """Largest distance below the most similar image of the same query that reaches its limit; `None`: any."""
    matched_min_similarity: float | None = None
    """Lowest cosine of an image whose caption has all words of the query; `None`: words do not count."""

    @classmethod
    def of(cls, thresholds: Thresholds) -> Self:
        return cls(thresholds.min_similarity, thresholds.max_gap, thresholds.matched_min_similarity)

    def limit(self, word_share: float) -> float:
        """The lowest cosine of an image that has this part of the query's words.

        It falls in proportion to the part, from `min_similarity` to `matched_min_similarity`. It rises for a negative
        one: the image is described in other words, although the query's words are used for other images.
        """
        if self.matched_min_similarity is None:
            return self.min_similarity
        return self.min_similarity + word_share * (self.matched_min_similarity - self.min_similarity)

    def best_of(self, found: Iterable[Judged]) -> float:
        """The similarity of the best image that reaches its limit, 0 without one: `best` of `passes` and `decide`."""
        return max((each.similarity for each in found if each.similarity >= self.limit(each.word_share)), default=0.0)

    def passes(self, similarity: float, *, word_share: float, best: float) -> bool:
        """Whether an image is used. word_share, best: as in `limit` and `decide`."""
        return similarity >= self.limit(word_share) and (self.max_gap is None or best - similarity <= self.max_gap)

    def decide(self, found: ScoredImage, *, best: float) -> tuple[bool, str]:
        """Return whether the image is used, and the reason. best: of `best_of`."""
        similarity, limit = found.similarity, self.limit(found.word_share)
        if self.passes(similarity, word_share=found.word_share, best=best):
            return True, f"similarity {similarity:.3f} reaches {limit:.3g}{self._words(found)}"
        if similarity >= limit:
            below = f"{best - similarity:.3f} below the best hit, and the limit is {self.max_gap:.3g}"
            return False, f"similarity {similarity:.3f} is {below}"
        return False, f"similarity {similarity:.3f} is below {limit:.3g}{self._words(found)}"

    def _words(self, found: ScoredImage) -> str:
        """Explain a limit that the words of the image have changed."""
        if self.matched_min_similarity is None or not found.word_share:
            return ""
        if found.word_share < 0:
            return ", the limit for an image described in other words"
        if found.word_share >= ALL_WORDS:
            return ", the limit for an image with all words"
        return f", the limit for an image with {found.word_share:.0%} of the words"


def resolve_gate(calibration: Thresholds | None, *given: float | None) -> Gate:
    """Return the gate of a search.

    calibration: of its embedding space. given: `min_similarity` of the request, of its collection and of the settings,
    in this order. The first number is the whole rule: the calibration then has no effect.
    """
    for min_similarity in given:
        if min_similarity is not None:
            return Gate(min_similarity)
    return Gate(DEFAULT_MIN_SIMILARITY) if calibration is None else Gate.of(calibration)
