"""Measure the retriever: searches by concept name, and by keyword."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from scripts.evaluate.metrics import (
    Floats,
    Integers,
    best_relevant_ranks,
    mean_reciprocal_rank,
    precision_at,
    recall_at,
)
from scripts.evaluate.store import Store
from shared.retrieval import resolve_gate
from shared.settings import RetrievalSettings

KEYWORD_IMAGES = 5
"""Least number of images with a keyword to search it, so that five right answers are possible."""
CHUNK = 256
"""Queries per step, so that a large corpus does not need a full matrix of queries times images."""


def recall_by_name(queries: Mapping[str, Floats], vectors: Floats, concepts: Sequence[str]) -> dict[str, Any]:
    """Return recall and MRR of each query for images of its own concept.

    Args:
        queries: L2-normalised vector by concept; concepts without an image are left out.
        vectors: of the images, L2-normalised, shape (n, dim).
        concepts: of the images, n names.
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
        best_relevant_ranks(queries[rows] @ vectors.T, concepts[None, :] == np.array(names[rows])[:, None])
        for rows in _chunks(len(queries))
    ]
    return np.concatenate(chunks)


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def precision_by_keyword(store: Store, encode: Callable[[list[str]], Floats]) -> dict[str, Any] | None:
    """Search every tag; return the mean precision at 5. None if no tag is on at least `KEYWORD_IMAGES` images.

    encode: maps texts to L2-normalised vectors, shape (n, dim).
    """
    carried = [set(image.tags) for image in store.images]
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


def relevance_figures(store: Store, queries: Mapping[str, Floats], settings: RetrievalSettings) -> dict[str, float]:
    """Return the mean similarity of the nearest image, and the share of queries with none above `min_similarity`."""
    vectors = np.stack(list(queries.values()))
    best = np.concatenate([store.similarities(vectors[rows]).max(axis=1) for rows in _chunks(len(vectors))])
    return {
        "mean_top1_similarity": float(best.mean()),
        "share_without_references": float((best < resolve_gate(None, settings.min_similarity).min_similarity).mean()),
    }
