"""Measures how many candidates the approximate index of a space must examine, and builds this index again.

The recall of HNSW depends on the data. So `measure` compares the index with an exact search, for vectors of the space
itself, and `store` lets searches use what it found.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from statistics import median

import numpy as np
from sqlalchemy import ColumnElement, Text, cast, func, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.images import ImageState
from shared.contracts.search_tuning import IndexKind, SearchTuning, TunedSearch
from shared.db import images
from shared.db.images import ScoredImage, Vector
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace, Image
from shared.errors import ResourceNotFoundError
from shared.vectors import l2_normalised

WIDTHS: tuple[int, ...] = (20, 40, 60, 100, 150, 250, 400, 630, 1000)
"""The values of `ef_search` that are tried, from the quickest on."""
KS = (10, 40, 100)
FILTERED_SHARE = 10
"""The filter that recall is measured under lets one of so many images through, whatever they show."""
ONLY_THE_INDEX, ANY_PLAN = (
    text(f"select set_config('enable_sort', '{value}', true), set_config('enable_seqscan', '{value}', true)")
    for value in ("off", "on")
)
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

    A filter leaves fewer of the images that the index examines, so searches with one have a value of their own. If no
    value suffices, the largest is taken.

    Raises:
        ResourceNotFoundError: the space has too few vectors to measure anything.
    """
    kind = find_kind(session, space)
    vectors = session.scalar(select(func.count()).select_from(space.table)) or 0
    if vectors <= max(KS):
        raise ResourceNotFoundError(f"The space has {vectors} vectors. Too few to measure: searches compare all.")
    sample = _queries(session, space, queries)
    everything = [Image.state == ImageState.READY]
    filters = [everything, [*everything, _one_of(FILTERED_SHARE)]]
    # 1. The true nearest images, once for the largest k.
    truths = [
        [images.compare_all(session, space, query, k=max(KS), conditions=conditions) for query in sample]
        for conditions in filters
    ]
    # 2. For each k the first values that suffice. A larger k never needs a smaller one. The planner may find that
    # comparing all is cheaper, for these searches or for later ones: the index itself is measured.
    session.execute(ONLY_THE_INDEX)
    searches: list[TunedSearch] = []
    narrowest = [WIDTHS[0], WIDTHS[0]]
    for k in KS:
        results = [
            _narrowest(
                partial(_recall, session, space, sample, truth, k=k, conditions=conditions, kind=kind),
                target=target,
                least=least,
            )
            for conditions, truth, least in zip(filters, truths, narrowest, strict=True)
        ]
        (width, plain, seconds), (filtered_width, filtered, filtered_seconds) = results
        searches.append(
            TunedSearch(
                k=k,
                ef_search=width,
                recall=min(plain, filtered),
                recall_all=plain,
                recall_filtered=filtered,
                median_ms=1000 * seconds,
                ef_search_filtered=filtered_width,
                median_ms_filtered=1000 * filtered_seconds,
            )
        )
        on_progress(searches[-1])
        narrowest = [width, filtered_width]
    session.execute(ANY_PLAN)
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


def _queries(session: Session, space: Space, count: int) -> list[Vector]:
    """Up to `count` queries among the vectors of the space, each in the middle of three random images.

    Like the query of a text, it is farther from images than they are from their neighbours. An image itself would be
    too easy: the index finds it at once, and with it the neighbours that it has stored.
    """
    embedding = space.table.c.embedding
    drawn = session.scalars(select(embedding).order_by(func.random()).limit(3 * count)).all()
    vectors = np.stack([images.as_vector(each) for each in drawn[: len(drawn) // 3 * 3]])
    return list(l2_normalised(vectors.reshape(-1, 3, space.dim).mean(axis=1)))


def _one_of(share: int) -> ColumnElement[bool]:
    return func.hashtext(cast(Image.id, Text)) % share == 0


def _narrowest(measured: Callable[..., tuple[float, float]], *, target: float, least: int) -> tuple[int, float, float]:
    """The first of WIDTHS from `least` on that reaches `target`, or the last one, and its results.

    measured: `_recall` of a `width`.
    """
    for width in (each for each in WIDTHS if each >= least):
        recall, seconds = measured(width=width)
        if recall >= target:
            break
    return width, recall, seconds


def _recall(
    session: Session,
    space: Space,
    sample: Sequence[Vector],
    truths: Sequence[Sequence[ScoredImage]],
    *,
    k: int,
    conditions: Sequence[ColumnElement[bool]],
    kind: IndexKind,
    width: int,
) -> tuple[float, float]:
    """The mean recall of the index, and the median seconds of a search."""
    recalls, seconds = [], []
    for query, truth in zip(sample, truths, strict=True):
        started = time.perf_counter()
        found = images.scan_index(session, space, query, k=k, conditions=conditions, kind=kind, ef_search=width)
        seconds.append(time.perf_counter() - started)
        wanted = truth[:k]
        if wanted:
            lowest = wanted[-1].similarity - SAME_SIMILARITY
            recalls.append(min(1.0, sum(each.similarity >= lowest for each in found) / len(wanted)))
    return sum(recalls) / len(recalls) if recalls else 1.0, median(seconds)
