"""Measures how many candidates the approximate index of a space must examine, and builds this index again.

The recall of HNSW depends on the data. So `measure` compares the index with an exact search, for vectors of the space
itself, and `store` lets searches use what it found.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from statistics import median
from uuid import UUID

from sqlalchemy import ColumnElement, Text, cast, func, select, update
from sqlalchemy.orm import Session

from shared.contracts.images import ImageState
from shared.contracts.search_tuning import IndexKind, SearchTuning, TunedSearch
from shared.db import images
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace, Image
from shared.errors import ResourceNotFoundError

WIDTHS: tuple[int, ...] = (20, 40, 60, 100, 150, 250, 400, 630, 1000)
"""The values of `ef_search` that are tried, from the quickest on."""
KS = (10, 40, 100)
FILTERED_SHARE = 10
"""The filter that recall is measured under lets one of so many images through, whatever they show."""
SAME_SIMILARITY = 1e-6
"""Images this near to the last true one count as found: equal images may come in any order."""


def measure(
    session: Session,
    space: Space,
    *,
    target: float,
    queries: int,
    on_progress: Callable[[TunedSearch], None] = lambda _: None,
) -> SearchTuning:
    """Find the smallest `ef_search` for each number of images at which the mean recall reaches `target`.

    The queries are random vectors of the space, each without its own image. If no value suffices, the largest is taken.

    Raises:
        ResourceNotFoundError: the space has too few vectors to measure anything.
    """
    kind = find_kind(session, space)
    vectors = session.scalar(select(func.count()).select_from(space.table)) or 0
    sample = _sample(session, space, queries)
    if len(sample) < 2 or vectors <= max(KS):
        raise ResourceNotFoundError(f"The space has {vectors} vectors. Too few to measure: searches compare all.")
    filters = [[Image.state == ImageState.READY], [Image.state == ImageState.READY, _one_of(FILTERED_SHARE)]]
    # 1. The true nearest images, once for the largest k.
    truths = [
        [
            images.compare_all(session, space, vector, k=max(KS), conditions=[*conditions, Image.id != image_id])
            for image_id, vector in sample
        ]
        for conditions in filters
    ]
    # 2. For each k the first value that suffices. A larger k never needs a smaller one.
    searches: list[TunedSearch] = []
    widths = WIDTHS
    for k in KS:
        for width in widths:
            (plain, seconds), (filtered, _) = (
                _recall(session, space, sample, truth, k=k, conditions=conditions, kind=kind, width=width)
                for conditions, truth in zip(filters, truths, strict=True)
            )
            found = TunedSearch(
                k=k,
                ef_search=width,
                recall=min(plain, filtered),
                recall_all=plain,
                recall_filtered=filtered,
                median_ms=1000 * seconds,
            )
            if found.recall >= target:
                break
        searches.append(found)
        on_progress(found)
        widths = tuple(each for each in widths if each >= found.ef_search)
    return SearchTuning(
        target=target,
        index_kind=kind,
        vectors=vectors,
        queries=len(sample),
        measured_at=datetime.now(UTC),
        searches=searches,
    )


def store(session: Session, space: Space, tuning: SearchTuning | None) -> None:
    """Let searches in the space use `tuning`; `None`: the built-in value."""
    value = None if tuning is None else tuning.model_dump(mode="json")
    session.execute(update(EmbeddingSpace).where(EmbeddingSpace.id == space.id).values(search_tuning=value))


def find_kind(session: Session, space: Space) -> IndexKind:
    return IndexKind(session.scalars(select(EmbeddingSpace.index_kind).where(EmbeddingSpace.id == space.id)).one())


def _sample(session: Session, space: Space, count: int) -> list[tuple[UUID, Vector]]:
    """Up to `count` random vectors of the space, with the ids of their images."""
    table = space.table
    rows = session.execute(select(table.c.image_id, table.c.embedding).order_by(func.random()).limit(count))
    return [(row.image_id, images.as_vector(row.embedding)) for row in rows]


def _one_of(share: int) -> ColumnElement[bool]:
    return func.hashtext(cast(Image.id, Text)) % share == 0


def _recall(
    session: Session,
    space: Space,
    sample: Sequence[tuple[UUID, Vector]],
    truths: Sequence[Sequence[ScoredImage]],
    *,
    k: int,
    conditions: Sequence[ColumnElement[bool]],
    kind: IndexKind,
    width: int,
) -> tuple[float, float]:
    """The mean recall of the index, and the median seconds of a search."""
    recalls, seconds = [], []
    for (image_id, vector), truth in zip(sample, truths, strict=True):
        others = [*conditions, Image.id != image_id]
        started = time.perf_counter()
        found = images.scan_index(session, space, vector, k=k, conditions=others, kind=kind, ef_search=width)
        seconds.append(time.perf_counter() - started)
        wanted = truth[:k]
        if wanted:
            lowest = wanted[-1].similarity - SAME_SIMILARITY
            recalls.append(min(1.0, sum(each.similarity >= lowest for each in found) / len(wanted)))
    return sum(recalls) / len(recalls) if recalls else 1.0, median(seconds)
