"""The corpus with its vectors: what Postgres is to the service, with exact search."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self
from uuid import NAMESPACE_OID, UUID, uuid5

import numpy as np

from scripts.evaluate.corpus import Picture
from shared import retrieval
from shared.db.images import Found, Vector
from shared.db.tables import Image as ImageRow
from shared.settings import RetrievalSettings


@dataclass(frozen=True)
class Store:
    """Pictures and vectors in the same order."""

    pictures: Sequence[Picture]
    vectors: Vector
    """Shape (n, dim), float32, L2-normalised, rounded to half precision as the service stores them."""
    norms: Vector
    """Shape (n,): lengths before normalisation."""

    @classmethod
    def of(cls, pictures: Sequence[Picture], projections: Vector) -> Self:
        """projections: of the pictures by the retrieval CLIP, not normalised, shape (n, dim), float32."""
        norms = np.linalg.norm(projections, axis=1)
        return cls(pictures, (projections / norms[:, None]).astype(np.float16).astype(np.float32), norms)

    def without(self, left_out: set[str]) -> "Store":
        """The store without the pictures of these sha256."""
        kept = [i for i, picture in enumerate(self.pictures) if picture.sha256 not in left_out]
        return Store([self.pictures[i] for i in kept], self.vectors[kept], self.norms[kept])

    def similarities(self, queries: Vector) -> Vector:
        """Cosines of L2-normalised queries (m, dim) with every picture: shape (m, n)."""
        return queries @ self.vectors.T

    def nearest(self, query: Vector, *, k: int) -> list[Found]:
        """As `shared.db.images.nearest`, exact and without a filter."""
        return self._found(np.argsort(-(self.vectors @ query), kind="stable")[:k], query)

    def plan(
        self, query: Vector, *, k: int, settings: RetrievalSettings, not_of: str | None = None
    ) -> list[retrieval.Reference]:
        """As `shared.retrieval.plan`: its decisions on the nearest pictures. query: shape (dim,), L2-normalised.

        not_of: a concept whose pictures are passed over.
        """
        passed_over = sum(picture.concept == not_of for picture in self.pictures)
        nearest = self.nearest(query, k=k * retrieval.OVERFETCH + passed_over)
        candidates = [found for found in nearest if self.picture(found).concept != not_of][: k * retrieval.OVERFETCH]
        return retrieval.decide(candidates, k=k, min_similarity=settings.min_similarity, settings=settings)

    def own(self, concept: str, query: Vector, *, k: int) -> list[retrieval.Reference]:
        """Up to `k` pictures of the concept as if a request had pinned them: alike in weight, through no gate."""
        indices = [i for i, picture in enumerate(self.pictures) if picture.concept == concept][:k]
        return [
            retrieval.Reference(found=found, used=True, reason="of the concept", weight=1 / len(indices), pinned=True)
            for found in self._found(indices, query)
        ]

    def picture(self, found: Found) -> Picture:
        return self._by_id[found.image.id]

    def _found(self, indices: Sequence[int] | np.ndarray, query: Vector) -> list[Found]:
        return [
            Found(
                image=_row(self.pictures[i]),
                similarity=float(self.vectors[i] @ query),
                vector=self.vectors[i],
                norm=float(self.norms[i]),
            )
            for i in indices
        ]

    @cached_property
    def _by_id(self) -> dict[UUID, Picture]:
        return {_id(picture): picture for picture in self.pictures}


def _row(picture: Picture) -> ImageRow:
    """What the decisions read of a row; it belongs to no session."""
    return ImageRow(
        id=_id(picture), sha256=picture.sha256, perceptual_hash=picture.perceptual_hash, caption=picture.caption
    )


def _id(picture: Picture) -> UUID:
    return uuid5(NAMESPACE_OID, picture.sha256)
