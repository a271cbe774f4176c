"""Does the retriever find the right images? By concept names, and by keywords."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.evaluate.metrics import Floats, Integers, first_hits, mean_reciprocal_rank, precision_at, recall_at
from scripts.evaluate.store import Store
from shared.settings import RetrievalSettings

KEYWORD_IMAGES = 5
"""A keyword is asked for when at least this many images carry it: then five right answers are possible."""
CHUNK = 256
"""Queries compared at a time, so that a large corpus needs no matrix of queries times images."""


def by_name(queries: Mapping[str, Floats], vectors: Floats, concepts: Sequence[str]) -> dict[str, Any]:
    """Recall of every query's own concept among images of these vectors (n, dim) and concepts (n).

    queries: L2-normalised vector by concept; those without an image are left out.
    """
    shown = set(concepts)
    names = [name for name in queries if name in shown]
    ranks = _ranks(np.stack([queries[name] for name in names]), names, vectors, np.array(concepts))
    return {
        "r_at_1": recall_at(1, ranks),
        "r_at_5": recall_at(5, ranks),
        "mrr": mean_reciprocal_rank(ranks),
        "queries": len(names),
        "images": len(vectors),
    }


def _ranks(queries: Floats, names: Sequence[str], vectors: Floats, concepts: np.ndarray) -> Integers:
    chunks = [
        first_hits(queries[rows] @ vectors.T, concepts[None, :] == np.array(names[rows])[:, None])
        for rows in _chunks(len(queries))
    ]
    return np.concatenate(chunks)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def by_keyword(store: Store, encode: Callable[[list[str]], Floats]) -> dict[str, Any] | None:
    """Share of an image's tags among the five nearest to each tag; None when no tag is on `KEYWORD_IMAGES` images.

    encode: texts to L2-normalised vectors, shape (n, dim).
    """
    carried = [set(picture.tags) for picture in store.pictures]
    counts = Counter(tag for tags in carried for tag in tags)
    keywords = sorted(tag for tag, count in counts.items() if count >= KEYWORD_IMAGES)
    if not keywords:
        return None
    queries = encode(keywords)
    precisions = []
    for rows in _chunks(len(keywords)):
        relevant = np.array([[keyword in tags for tags in carried] for keyword in keywords[rows]])
        precisions += [precision_at(5, store.similarities(queries[rows]), relevant)] * len(relevant)
    return {"p_at_5": float(np.mean(precisions)), "keywords": len(keywords)}


def relevance(store: Store, queries: Mapping[str, Floats], settings: RetrievalSettings) -> dict[str, float]:
    """How near the nearest image of each query is, and how often the gate leaves a prompt without references."""
    vectors = np.stack(list(queries.values()))
    best = np.concatenate([store.similarities(vectors[rows]).max(axis=1) for rows in _chunks(len(vectors))])
    return {
        "mean_top1_similarity": float(best.mean()),
        "share_without_references": float((best < settings.min_similarity).mean()),
    }
