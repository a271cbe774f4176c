"""Finds the images for a query: by vectors, by words, or by both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy.orm import Session

from shared.contracts.search import FoundBy, ImageFilter, SearchMode
from shared.db import images, text_search
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.db.text_search import Match
from shared.settings import RetrievalSettings

RRF_K = 60
"""The constant of reciprocal rank fusion, as in the paper."""
FUSED_DEPTH = 10
"""Least length of the two lists that are fused. So a small `k` ranks as a larger one does."""


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
        )
        return Found(_load(session, space, matches.found, with_vectors=with_vectors), exact=matches.exact)
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
    )
    similarities = {match.image_id: match.similarity for match in matches.found}
    near = {each.image.id: each for each in nearest.images}
    similarities |= {image_id: each.similarity for image_id, each in near.items()}
    order = [
        image_id
        for image_id in fuse(list(near), matches.found)
        if threshold is None or similarities[image_id] >= threshold
    ]
    by_words_alone = set(order[:k]) - near.keys()
    by_words = [match for match in matches.found if match.image_id in by_words_alone]
    loaded = {each.image.id: each for each in _load(session, space, by_words, with_vectors=with_vectors)}
    shares = {match.image_id: match.word_share for match in matches.found}
    near |= {
        image_id: replace(each, found_by=(FoundBy.VECTOR, FoundBy.TEXT), word_share=shares[image_id])
        for image_id, each in near.items()
        if image_id in shares
    }
    found = near | loaded
    return Found(
        [found[image_id] for image_id in order if image_id in found][:k], exact=nearest.exact and matches.exact
    )


def _from(found: list[ScoredImage], threshold: float | None) -> list[ScoredImage]:
    return found if threshold is None else [each for each in found if each.similarity >= threshold]


def _load(session: Session, space: Space, matches: Sequence[Match], *, with_vectors: bool) -> list[ScoredImage]:
    """The images of matches, in order. An image that was deleted meanwhile is left out."""
    ids = [match.image_id for match in matches]
    loaded = images.find_by_ids(session, space, ids, None, with_vectors=with_vectors) if ids else {}
    return [
        replace(
            loaded[match.image_id],
            similarity=match.similarity,
            found_by=(FoundBy.TEXT,),
            word_share=match.word_share,
        )
        for match in matches
        if match.image_id in loaded
    ]


def fuse(nearest: Sequence[UUID], matches: Sequence[Match]) -> list[UUID]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009) of two lists; each image once.

    An image scores the sum of `1 / (60 + rank)` over the lists that have it. Of equal scores, the nearest come first.
    """
    scores = {image_id: 1 / (RRF_K + rank) for rank, image_id in enumerate(nearest, start=1)}
    for match in matches:
        scores[match.image_id] = scores.get(match.image_id, 0.0) + 1 / (RRF_K + match.rank)
    return sorted(scores, key=lambda image_id: -scores[image_id])
