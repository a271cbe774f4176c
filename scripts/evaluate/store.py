"""The corpus with its vectors in memory, with exact search, in place of the service's database."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self
from uuid import NAMESPACE_OID, UUID, uuid5

import numpy as np

from scripts.evaluate.corpus import CorpusImage
from shared import retrieval
from shared.db.images import ScoredImage, Vector
from shared.db.tables import Image as ImageRow
from shared.settings import RetrievalSettings


@dataclass(frozen=True)
class Store:
    """Images and vectors in the same order."""

    images: Sequence[CorpusImage]
    vectors: Vector
    """Shape (n, dim), float32, L2-normalised, rounded to half precision as the service stores them."""
    norms: Vector
    """Lengths before normalisation, shape (n,)."""

    @classmethod
    def of(cls, images: Sequence[CorpusImage], projections: Vector) -> Self:
        """Build a store. projections: CLIP vectors of the images, not normalised, shape (n, dim), float32."""
        norms = np.linalg.norm(projections, axis=1)
        return cls(images, (projections / norms[:, None]).astype(np.float16).astype(np.float32), norms)

    def without(self, left_out: set[str]) -> "Store":
        """Return a store without the images with these sha256."""
        kept = [i for i, image in enumerate(self.images) if image.sha256 not in left_out]
        return Store([self.images[i] for i in kept], self.vectors[kept], self.norms[kept])

    def similarities(self, queries: Vector) -> Vector:
        """Return the cosines of L2-normalised queries, shape (m, dim), with every image: shape (m, n)."""
        return queries @ self.vectors.T

    def nearest(self, query: Vector, *, k: int) -> list[ScoredImage]:
        """Return the `k` nearest images, as `shared.db.images.nearest` does; exact and without a filter."""
        return self._found(np.argsort(-(self.vectors @ query), kind="stable")[:k], query)

    def plan(
        self, query: Vector, *, k: int, settings: RetrievalSettings, not_of: str | None = None
    ) -> list[retrieval.Candidate]:
        """Decide on the nearest images, as `shared.retrieval.plan_concepts` does.

        Args:
            query: shape (dim,), L2-normalised.
            not_of: a concept whose images are left out.
        """
        left_out = sum(image.concept == not_of for image in self.images)
        most = retrieval.depth(k) * retrieval.OVERFETCH
        candidates = [each for each in self.nearest(query, k=most + left_out) if self.image(each).concept != not_of]
        return retrieval.decide(
            [retrieval.ConceptImages("", candidates[:most])],
            most=k,
            gate=retrieval.resolve_gate(None, settings.min_similarity),
            settings=settings,
        ).candidates

    def pinned_references(self, concept: str, query: Vector, *, k: int) -> list[retrieval.Candidate]:
        """Return up to `k` images of the concept as pinned references: with equal weights and any similarity."""
        indices = [i for i, image in enumerate(self.images) if image.concept == concept][:k]
        return [
            retrieval.Candidate(
                scored=found,
                used=True,
                reason="of the concept",
                weight=1 / len(indices),
                pinned=True,
                concepts=(concept,),
            )
            for found in self._found(indices, query)
        ]

    def image(self, found: ScoredImage) -> CorpusImage:
        return self._by_id[found.image.id]

    def _found(self, indices: Sequence[int] | np.ndarray, query: Vector) -> list[ScoredImage]:
        return [
            ScoredImage(
                image=_row(self.images[i]),
                similarity=float(self.vectors[i] @ query),
                vector=self.vectors[i],
                norm=float(self.norms[i]),
            )
            for i in indices
        ]

    @cached_property
    def _by_id(self) -> dict[UUID, CorpusImage]:
        return {_id(image): image for image in self.images}


def _row(image: CorpusImage) -> ImageRow:
    """Return a row with the columns that the decisions read; it is not attached to a session."""
    return ImageRow(id=_id(image), sha256=image.sha256, perceptual_hash=image.perceptual_hash, caption=image.caption)


def _id(image: CorpusImage) -> UUID:
    return uuid5(NAMESPACE_OID, image.sha256)
