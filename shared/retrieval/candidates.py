"""Finds the images for a query: by vectors, by words, or by both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy.orm import Session

from shared.contracts.search import FoundBy, ImageFilter, SearchMode
from shared.db import images, text_search
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.db.text_search import Match, Matches
from shared.settings import RetrievalSettings

RRF_K = 60
"""The constant of reciprocal rank fusion, as in the paper."""
FUSED_DEPTH = 10
"""Least length of the two lists that are fused. So a small `k` ranks as a larger one does."""
OTHER_WORDS = 0.5
"""Share of the words that counts against an image whose caption and tags have none, while other images have them."""


@dataclass(frozen=True)
class Found:
    """The images found, best first. exact: every candidate was compared."""

    images: list[ScoredImage]
    exact: bool


def find_candidates(
    session: Session,
    space: Space,
    *,
    text: str | None,
    vector: Vector | None,
    k: int,
    mode: SearchMode,
    collection_id: UUID,
    where: ImageFilter,
    settings: RetrievalSettings,
    threshold: float | None = None,
    without: Sequence[str] = (),
    with_vectors: bool = True,
) -> Found:
    """The `k` best images. Each has its cosine similarity to `vector`, also when its words found it.

    In the modes `vector` and `hybrid`, fewer come back only when the filter leaves fewer, as in `images.nearest`.

    Args:
        text: words for the modes `text` and `hybrid`; `None`: `hybrid` searches by the vector alone.
        vector: shape (space.dim,), float32, L2-normalised; `None` only in the mode `text`. Similarities are NaN then.
        threshold: lowest similarity of an image that is returned; not for the mode `text`.
        without: texts that keep images from being found by words: those whose caption and tags have all their words.
        with_vectors: False: the images come without their vectors, which is quicker.

    Raises:
        ValueError: the mode needs a text or a vector, and it is `None`.
    """
    if mode is SearchMode.TEXT:
        if text is None:
            raise ValueError("the mode `text` needs a text")
        matches = text_search.matching_images(
            session,
            space,
            text,
            vector,
            k=k,
            collection_id=collection_id,
            where=where,
            without=without,
            alone=True,
            with_vectors=with_vectors,
        )
        return Found([match.scored for match in matches.found if match.scored is not None], exact=matches.exact)
    if vector is None:
        raise ValueError(f"the mode `{mode}` needs a vector")
    fused = mode is SearchMode.HYBRID and text is not None
    depth = max(k, FUSED_DEPTH) if fused else k
    nearest = images.nearest(
        session,
        space,
        vector,
        k=depth,
        collection_id=collection_id,
        where=where,
        ef_search=settings.ef_search,
        exact_below=settings.exact_below,
        with_vectors=with_vectors,
    )
    if not fused or text is None:
        return Found(_from(nearest.images, threshold), exact=nearest.exact)
    matches = text_search.matching_images(
        session,
        space,
        text,
        vector,
        k=depth,
        collection_id=collection_id,
        where=where,
        without=without,
        beside=[each.image.id for each in nearest.images],
        with_vectors=with_vectors,
    )
    found = {each.image.id: replace(each, word_share=_share_of_none(each, matches)) for each in nearest.images}
    for match in matches.found:
        each = match.scored or found[match.image_id]
        found_by = each.found_by if match.scored else (FoundBy.VECTOR, FoundBy.TEXT)
        found[match.image_id] = replace(each, found_by=found_by, word_share=match.word_share)
    order = fuse([each.image.id for each in nearest.images], matches.found)
    best = _from([found[image_id] for image_id in order], threshold)[:k]
    return Found(best, exact=nearest.exact and matches.exact)


def _share_of_none(found: ScoredImage, matches: Matches) -> float:
    """The `word_share` of an image that was not found by words: negative, if it is described in other words."""
    if not found.image.caption or found.image.id in matches.with_a_word:
        return 0.0
    return -OTHER_WORDS * matches.known_share


def _from(found: list[ScoredImage], threshold: float | None) -> list[ScoredImage]:
    return found if threshold is None else [each for each in found if each.similarity >= threshold]


def fuse(nearest: Sequence[UUID], matches: Sequence[Match]) -> list[UUID]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009) of two lists; each image once.

    An image scores the sum of `1 / (60 + rank)` over the lists that have it. Of equal scores, the nearest come first.
    """
    scores = {image_id: 1 / (RRF_K + rank) for rank, image_id in enumerate(nearest, start=1)}
    for match in matches:
        scores[match.image_id] = scores.get(match.image_id, 0.0) + 1 / (RRF_K + match.rank)
    return sorted(scores, key=lambda image_id: -scores[image_id])
