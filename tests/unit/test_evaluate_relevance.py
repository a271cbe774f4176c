"""The parts `gate` and `concepts` of the evaluation: the labelled queries and the figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.evaluate import concepts, gate
from scripts.evaluate.gate import Outcome
from scripts.evaluate.queries import QUERIES, Kind, Query, QuerySet, read_queries
from scripts.evaluate.statistics import ratio
from scripts.index_images.sources import read_samples
from shared.errors import ConfigurationError
from shared.settings import STARTER

CAT, HAT, DOG = frozenset({"cat", "black cat"}), frozenset({"top hat"}), frozenset({"dog"})


def outcome(
    kind: Kind,
    *right: frozenset[str],
    used: str = "",
    query_set: QuerySet = QuerySet.TEST,
    concepts: int = 1,
) -> Outcome:
    names = [name for name in used.split(", ") if name]
    return Outcome(Query(kind, f"a {kind}", right, query_set), ["a thing"] * concepts, names)


@pytest.fixture(scope="module")
def captions() -> set[str]:
    return {sample.fields.get("caption", "") for sample in read_samples(STARTER / "corpus.tar.gz")}


@pytest.mark.parametrize(
    ("query_set", "kinds"),
    [
        (
            QuerySet.TUNING,
            {Kind.NAME: 50, Kind.PLURAL: 30, Kind.KEYWORD: 40, Kind.TWO: 30, Kind.OUTSIDE: 25, Kind.NONSENSE: 25},
        ),
        (
            QuerySet.TEST,
            {
                Kind.NAME: 30,
                Kind.PLURAL: 25,
                Kind.KEYWORD: 35,
                Kind.TWO: 40,
                Kind.THREE: 10,
                Kind.OUTSIDE: 40,
                Kind.NONSENSE: 20,
            },
        ),
    ],
)
def test_the_committed_queries_fit_the_starter_corpus(
    query_set: QuerySet, kinds: dict[Kind, int], captions: set[str]
) -> None:
    queries = read_queries(QUERIES[query_set], captions, query_set=query_set)

    assert Counter(query.kind for query in queries) == kinds
    assert {query.query_set for query in queries} == {query_set}
    assert not [query.text for query in queries if query.kind in (Kind.OUTSIDE, Kind.PLURAL) and query.text in captions]


def test_no_query_is_in_both_sets_or_twice_in_one(captions: set[str]) -> None:
    texts = Counter(query.text.lower() for path in QUERIES.values() for query in read_queries(path, captions))
    assert texts.total() == 400
    assert [text for text, times in texts.items() if times > 1] == []


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "name", "query": "a dog", "right": [["dog"]]},
        {"kind": "name", "query": "a cat", "right": []},
        {"kind": "name", "query": "a cat", "right": [[]]},
        {"kind": "two", "query": "a cat and a hat", "right": [["cat"]]},
        {"kind": "three", "query": "a cat and a hat", "right": [["cat"], ["top hat"]]},
        {"kind": "nonsense", "query": "x", "right": [["cat"]]},
        {"kind": "other", "query": "a cat", "right": [["cat"]]},
        {"query": "a cat"},
        "a cat",
    ],
)
def test_queries_that_do_not_fit_are_refused(tmp_path: Path, row: Any) -> None:
    path = tmp_path / "queries.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(ConfigurationError, match=r"queries\.json"):
        read_queries(path, {"cat", "top hat"})


def test_precision_counts_references_and_recall_counts_queries() -> None:
    found = gate.figures(
        [
            outcome(Kind.NAME, CAT, used="cat, black cat, top hat"),
            outcome(Kind.PLURAL, CAT, used="top hat"),
            outcome(Kind.KEYWORD, CAT),
            outcome(Kind.TWO, CAT, HAT, used="top hat"),
            outcome(Kind.OUTSIDE, used="cat"),
            outcome(Kind.OUTSIDE),
            outcome(Kind.NONSENSE),
        ]
    )
    assert found["precision"]["mean"] == pytest.approx(3 / 5)
    assert found["recall"]["mean"] == pytest.approx(2 / 4)
    assert found["nothing_used"]["mean"] == pytest.approx(2 / 3)
    assert found["by_kind"]["outside"] == {"nothing_used": found["by_kind"]["outside"]["nothing_used"], "queries": 2}
    assert found["by_kind"]["outside"]["nothing_used"]["mean"] == 0.5
    assert found["by_kind"]["keyword"]["precision"] is None
    assert found["precision"]["low"] <= found["precision"]["mean"] <= found["precision"]["high"]


def test_all_things_of_a_prompt_have_to_be_shown() -> None:
    found = concepts.figures(
        [
            outcome(Kind.TWO, CAT, HAT, used="cat, top hat", concepts=2),
            outcome(Kind.TWO, CAT, HAT, used="cat, black cat", concepts=2),
            outcome(Kind.TWO, CAT, HAT, used="top hat"),
            outcome(Kind.TWO, CAT, HAT),
            outcome(Kind.THREE, CAT, HAT, DOG, used="dog, cat, top hat", concepts=3),
            outcome(Kind.THREE, CAT, HAT, DOG, used="cat, top hat", concepts=3),
            outcome(Kind.NAME, CAT, used="cat"),
            outcome(Kind.NAME, CAT, used="cat", concepts=2),
        ]
    )
    means = {name: figure["mean"] for name, figure in found.items()}
    assert means == {
        "both": 0.25,
        "first": 0.5,
        "second": 0.5,
        "all_three": 0.5,
        "two_split_in_two": 0.5,
        "three_split_in_three": 1.0,
        "one_left_whole": 0.5,
    }


def test_each_set_has_figures_of_its_own() -> None:
    found_and_missed = [outcome(Kind.NAME, CAT, used="cat", query_set=QuerySet.TUNING), outcome(Kind.NAME, CAT)]
    outcomes = {gate.Way.SERVICE: found_and_missed, gate.Way.ONE_VECTOR: [outcome(Kind.NAME, CAT)]}

    found = gate.by_set(outcomes, gate.figures)

    recall = {way: {name: figures["recall"]["mean"] for name, figures in sets.items()} for way, sets in found.items()}
    assert recall == {"service": {"test": 0.0, "tuning": 1.0}, "one_vector": {"test": 0.0}}
    assert found["service"]["test"]["nothing_used"] is None


def test_a_ratio_of_sums_has_an_interval_around_it() -> None:
    rng = np.random.default_rng(3)
    used = rng.integers(0, 5, 80).astype(float)
    right = np.floor(used * 0.7)
    found = ratio(right, used)
    assert found is not None
    assert found.mean == pytest.approx(right.sum() / used.sum())
    assert found.low < found.mean < found.high
    assert found.high - found.low < 0.3
    assert ratio(np.zeros(3), np.zeros(3)) is None
