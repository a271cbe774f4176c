"""The parts `gate` and `concepts`: plan the references of labelled queries with the service's code, and report."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from scripts.evaluate import concepts, gate
from scripts.evaluate.gate import Outcomes, Way
from scripts.evaluate.queries import QuerySet, read_queries
from scripts.evaluate.report import clip_conditions, markdown_table, rounded
from scripts.evaluate.service_corpus import service_corpus
from scripts.evaluate.statistics import LEVEL, RESAMPLES
from scripts.evaluate.store import Store
from shared import retrieval
from shared.db import calibrations
from shared.settings import Settings
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip

GATE_ROWS = {
    "precision": ("used references that are right", 0.90),
    "recall": ("queries with a right reference", 0.85),
    "nothing_used": ("queries for other things, and nonsense, without reference", 0.90),
}
"""For each figure, what it is the share of, and its target."""
CONCEPT_ROWS: dict[str, tuple[str, float | None]] = {
    "both": ("queries for two things with both among the references", 0.80),
    "first": ("... with the first thing", None),
    "second": ("... with the second thing", None),
    "two_split_in_two": ("... split into two concepts", None),
    "all_three": ("queries for three things with all among the references", None),
    "three_split_in_three": ("... split into three concepts", None),
    "one_left_whole": ("queries for one thing left as one concept", None),
}
WHAT = """\
Each query is planned twice on the same images in Postgres. `service` is the plan of the API and the workers: concepts,
hybrid search, and the gate in force. `one vector` is the whole prompt as one vector, without words, with a lowest
similarity of {one_vector:g}. Queries and right captions were written by hand. Of the starter's sets, `tuning` is by the
author of the rules for splitting and for the singular, who tuned them on it. The author of `test` had not seen the
rules, and had seen only about 20 queries of `tuning`. But the search by shorter names was made for failures on `test`,
so this set tests it less strictly.
Intervals are 95 % percentile intervals of a bootstrap over queries."""


@dataclass(frozen=True)
class Relevance:
    """The figures as JSON, and what is used for each query."""

    summary: dict[str, Any]
    outcomes: Outcomes


def measure(
    store: Store,
    clip: Clip,
    settings: Settings,
    progress: Progress,
    *,
    queries: Mapping[QuerySet, Path],
    corpus_digest: str,
) -> Relevance:
    """Plan all labelled queries on a Postgres of its own, and compute the figures of each set.

    Raises:
        ConfigurationError: a file of `queries` has no labelled queries for this corpus.
        StackError: Postgres cannot be started.
    """
    captions = {image.caption for image in store.images if image.caption is not None}
    labelled = [
        query for query_set, path in queries.items() for query in read_queries(path, captions, query_set=query_set)
    ]
    calibration = calibrations.shipped(clip.space_digest)
    in_force = retrieval.resolve_gate(calibration, settings.retrieval.min_similarity)
    planning = progress.add_task("planning references", total=None)
    with service_corpus(store, clip) as corpus:
        outcomes = gate.plan_queries(
            labelled, corpus, lambda texts: l2_normalised(clip.encode_text(texts)), in_force, settings.retrieval
        )
    progress.update(planning, total=1, completed=1)
    summary = {
        "conditions": {
            "retriever": clip_conditions(clip),
            "corpus": {"digest": corpus_digest, "images": len(store.images)},
            "queries": {
                query_set.value: dict(Counter(query.kind.value for query in labelled if query.query_set is query_set))
                for query_set in queries
            },
            "references_per_prompt": settings.retrieval.default_k,
            "gate": asdict(in_force),
            "one_vector_min_similarity": gate.ONE_VECTOR_MIN_SIMILARITY,
            "bootstrap": {"resamples": RESAMPLES, "level": LEVEL},
        },
        "gate": gate.by_set(outcomes, gate.figures),
        "concepts": gate.by_set(outcomes, concepts.figures),
    }
    return Relevance(rounded(summary), outcomes)


def write_files(relevance: Relevance, out: Path) -> list[Path]:
    """Write the figures, the tables, and the references of each query into the folder `out`; return the paths."""
    out.mkdir(parents=True, exist_ok=True)
    figures, tables, references = paths = [out / f"relevance{ending}" for ending in (".json", ".md", ".jsonl")]
    figures.write_text(json.dumps(relevance.summary, indent=2) + "\n", encoding="utf-8")
    tables.write_text(markdown_report(relevance.summary), encoding="utf-8")
    by_query = zip(relevance.outcomes[Way.SERVICE], relevance.outcomes[Way.ONE_VECTOR], strict=True)
    rows = [service.record() | {"one_vector": one_vector.record()["used"]} for service, one_vector in by_query]
    references.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return paths


def markdown_report(summary: Mapping[str, Any]) -> str:
    """Format the summary as Markdown."""
    parts = [
        "# Are the references right?",
        "## Gate",
        _figure_table(summary["gate"], GATE_ROWS),
        *(
            f"By kind of query of the set `{query_set}`:\n\n{_kind_table(summary['gate'], query_set)}"
            for query_set in summary["conditions"]["queries"]
        ),
        "## Concepts",
        _figure_table(summary["concepts"], CONCEPT_ROWS),
        "## What was measured",
        WHAT.format(one_vector=summary["conditions"]["one_vector_min_similarity"]),
        _conditions_text(summary["conditions"]),
    ]
    return "\n\n".join(parts) + "\n"


def _figure_table(figures: Mapping[str, Any], rows: Mapping[str, tuple[str, float | None]]) -> str:
    service, one_vector = figures[Way.SERVICE], figures[Way.ONE_VECTOR]
    header = [
        "share of",
        "target",
        *(f"{way}: {query_set}" for way in ("service", "one vector") for query_set in service),
    ]
    cells = [
        [
            label,
            "" if target is None else f"{target:.2f}",
            *(_share(found[name], with_interval=True) for found in service.values()),
            *(_share(found[name], with_interval=True) for found in one_vector.values()),
        ]
        for name, (label, target) in rows.items()
    ]
    return markdown_table(header, cells)


def _kind_table(figures: Mapping[str, Any], query_set: str) -> str:
    names = ("precision", "recall", "nothing_used")
    service, one_vector = (figures[way][query_set]["by_kind"] for way in (Way.SERVICE, Way.ONE_VECTOR))
    header = [
        "kind",
        "queries",
        *(name.replace("_", " ") for name in names),
        *(f"one vector: {name.replace('_', ' ')}" for name in names),
    ]
    cells = [
        [
            kind,
            str(found["queries"]),
            *(_share(found.get(name)) for name in names),
            *(_share(one_vector[kind].get(name)) for name in names),
        ]
        for kind, found in service.items()
    ]
    return markdown_table(header, cells)


def _share(found: Mapping[str, float] | None, *, with_interval: bool = False) -> str:
    if found is None:
        return ""
    interval = f" [{found['low']:.2f}, {found['high']:.2f}]" if with_interval else ""
    return f"{found['mean']:.2f}{interval}"


def _conditions_text(given: Mapping[str, Any]) -> str:
    thresholds: Sequence[str] = [
        f"{name} {value:g}" for name, value in given["gate"].items() if isinstance(value, float)
    ]
    return (
        f"Retriever {given['retriever']['name']} `{given['retriever']['weights_digest'][:12]}`, corpus "
        f"`{given['corpus']['digest'][:12]}` of {given['corpus']['images']} images, gate: {', '.join(thresholds)}, "
        f"{given['references_per_prompt']} references per prompt. `relevance.jsonl` has the references of each query."
    )
