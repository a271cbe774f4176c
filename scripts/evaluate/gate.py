"""Measure the relevance gate: which references the service uses for labelled queries, and whether they are right.

Each query is planned in two ways. `service`: as the API and the workers do, by concepts, hybrid search and the gate in
force. `one_vector`: the whole prompt as one vector, with a fixed lowest similarity, as before there were concepts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from scripts.evaluate.queries import IN_CORPUS, Kind, Query, QuerySet
from scripts.evaluate.service_corpus import ServiceCorpus
from scripts.evaluate.statistics import Estimate, estimate, ratio
from shared import retrieval
from shared.concepts import searched_texts, split_prompt
from shared.contracts.search import ImageFilter, SearchMode
from shared.db.images import Vector
from shared.settings import RetrievalSettings

ONE_VECTOR_MIN_SIMILARITY = 0.42
"""The lowest similarity that was chosen by hand for the starter's CLIP."""

Encode = Callable[[Sequence[str]], Vector]
"""Maps texts to L2-normalised vectors, shape (n, dim), float32."""


class Way(StrEnum):
    SERVICE = "service"
    ONE_VECTOR = "one_vector"


@dataclass(frozen=True)
class Outcome:
    """The references that are used for a query."""

    query: Query
    concepts: Sequence[str]
    used: Sequence[str]
    """Captions, in the order of the plan."""

    @property
    def right(self) -> list[bool]:
        """For each used reference, whether it shows a thing of the query."""
        things = frozenset[str]().union(*self.query.right)
        return [caption in things for caption in self.used]

    @property
    def covered(self) -> list[bool]:
        """For each thing of the query, whether a used reference shows it."""
        return [not thing.isdisjoint(self.used) for thing in self.query.right]

    def record(self) -> dict[str, Any]:
        return {
            "query": self.query.text,
            "kind": self.query.kind,
            "set": self.query.query_set,
            "concepts": list(self.concepts),
            "used": [
                {"caption": caption, "right": right} for caption, right in zip(self.used, self.right, strict=True)
            ],
        }


Outcomes = Mapping[Way, Sequence[Outcome]]


def plan_queries(
    queries: Sequence[Query], corpus: ServiceCorpus, encode: Encode, gate: retrieval.Gate, settings: RetrievalSettings
) -> Outcomes:
    """Plan the references of each query in both ways. gate: the one of the way `service`."""
    return {
        Way.SERVICE: _plan(
            [(query, split_prompt(query.text)) for query in queries],
            corpus,
            encode,
            gate=gate,
            mode=SearchMode.HYBRID,
            settings=settings,
        ),
        Way.ONE_VECTOR: _plan(
            [(query, [query.text]) for query in queries],
            corpus,
            encode,
            gate=retrieval.Gate(ONE_VECTOR_MIN_SIMILARITY),
            mode=SearchMode.VECTOR,
            settings=settings,
        ),
    }


def _plan(
    queries: Sequence[tuple[Query, Sequence[str]]],
    corpus: ServiceCorpus,
    encode: Encode,
    *,
    gate: retrieval.Gate,
    mode: SearchMode,
    settings: RetrievalSettings,
) -> list[Outcome]:
    """Plan the references of queries. queries: each with its concepts. By vectors alone, these have one wording."""
    texts = sorted({text for _, concepts in queries for concept in concepts for text in searched_texts(concept)})
    vectors = dict(zip(texts, encode(texts), strict=True))

    def query_of(concept: str) -> retrieval.ConceptQuery:
        if mode is SearchMode.VECTOR:
            return retrieval.ConceptQuery(concept, [vectors[concept]], corpus.collection_id, ImageFilter())
        return retrieval.ConceptQuery.of(concept, vectors, collection_id=corpus.collection_id, where=ImageFilter())

    outcomes = []
    for query, concepts in queries:
        plan = retrieval.plan_concepts(
            corpus.session,
            corpus.space,
            [query_of(concept) for concept in concepts],
            most=max(settings.default_k, len(concepts)),
            gate=gate,
            settings=settings,
            mode=mode,
        )
        used = [candidate.scored.image.caption or "" for candidate in plan.candidates if candidate.used]
        corpus.session.rollback()  # the server ends a session that idles in a transaction, as during `encode`
        outcomes.append(Outcome(query, concepts, used))
    return outcomes


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return precision, recall, and the share of queries without references, each with its interval.

    - `precision`: share of the used references that are right, over all queries for things of the corpus.
    - `recall`: share of these queries for which at least one right reference is used; also by kind.
    - `nothing_used`: share of the queries for other things, and of nonsense, that get no reference; also by kind.
    """
    known = [outcome for outcome in outcomes if outcome.query.kind in IN_CORPUS]
    unknown = [outcome for outcome in outcomes if outcome.query.kind not in IN_CORPUS]
    return {
        "precision": _precision(known),
        "recall": _share(known, _has_right),
        "nothing_used": _share(unknown, _has_none),
        "by_kind": {
            kind.value: {
                **(
                    {"precision": _precision(chosen), "recall": _share(chosen, _has_right)} if kind in IN_CORPUS else {}
                ),
                "nothing_used": _share(chosen, _has_none),
                "queries": len(chosen),
            }
            for kind in Kind
            if (chosen := [outcome for outcome in outcomes if outcome.query.kind is kind])
        },
    }


def by_set(
    outcomes: Outcomes, measure: Callable[[Sequence[Outcome]], dict[str, Any]]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the figures of each set of queries that was planned, by way."""
    return {
        way.value: {
            query_set.value: measure(chosen)
            for query_set in QuerySet
            if (chosen := [each for each in of_way if each.query.query_set is query_set])
        }
        for way, of_way in outcomes.items()
    }


def _has_right(outcome: Outcome) -> bool:
    return any(outcome.right)


def _has_none(outcome: Outcome) -> bool:
    return not outcome.used


def _precision(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    right = np.array([sum(outcome.right) for outcome in outcomes], float)
    return as_dict(ratio(right, np.array([len(outcome.used) for outcome in outcomes], float)))


def _share(outcomes: Sequence[Outcome], holds: Callable[[Outcome], bool]) -> dict[str, Any] | None:
    return as_dict(estimate(np.array([float(holds(outcome)) for outcome in outcomes])))


def as_dict(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    values = asdict(found)
    return {"mean": values["mean"], "low": values["low"], "high": values["high"]}
