"""The parts `gate` and `concepts` of the evaluation: the labelled queries and the figures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.evaluate import concepts, gate
from scripts.evaluate.gate import Outcome
from scripts.evaluate.queries import QUERIES, Half, Kind, Query, read_queries
from scripts.evaluate.statistics import ratio
from scripts.index_images.sources import read_samples
from shared.errors import ConfigurationError
from shared.settings import STARTER

CAT, HAT = frozenset({"cat", "black cat"}), frozenset({"top hat"})


def outcome(kind: Kind, *right: frozenset[str], used: str = "", half: Half = Half.TUNING, concepts: int = 1) -> Outcome:
    names = [name for name in used.split(", ") if name]
    return Outcome(Query(kind, f"a {kind}", right, half), ["a thing"] * concepts, names)


def test_the_committed_queries_fit_the_starter_corpus() -> None:
    captions = {sample.fields.get("caption", "") for sample in read_samples(STARTER / "corpus.tar")}

    queries = read_queries(QUERIES, captions)

    assert Counter(query.kind for query in queries) == {
        Kind.NAME: 50,
        Kind.PLURAL: 30,
        Kind.KEYWORD: 40,
        Kind.TWO: 30,
        Kind.OUTSIDE: 25,
        Kind.NONSENSE: 25,
    }
    assert len({query.text for query in queries}) == 200
    assert 0 <= sum(1 if query.half is Half.TUNING else -1 for query in queries) <= 2
    assert not [query.text for query in queries if query.kind in (Kind.OUTSIDE, Kind.PLURAL) and query.text in captions]


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "name", "query": "a dog", "right": [["dog"]]},
        {"kind": "name", "query": "a cat", "right": []},
        {"kind": "name", "query": "a cat", "right": [[]]},
        {"kind": "two", "query": "a cat and a hat", "right": [["cat"]]},
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


def test_both_things_of_a_prompt_have_to_be_shown() -> None:
    found = concepts.figures(
        [
            outcome(Kind.TWO, CAT, HAT, used="cat, top hat", concepts=2),
            outcome(Kind.TWO, CAT, HAT, used="cat, black cat", concepts=2),
            outcome(Kind.TWO, CAT, HAT, used="top hat"),
            outcome(Kind.TWO, CAT, HAT),
            outcome(Kind.NAME, CAT, used="cat"),
            outcome(Kind.NAME, CAT, used="cat", concepts=2),
        ]
    )
    means = {name: figure["mean"] for name, figure in found.items()}
    assert means == {"both": 0.25, "first": 0.5, "second": 0.5, "two_split_in_two": 0.5, "one_left_whole": 0.5}


def test_each_half_has_figures_of_its_own() -> None:
    outcomes = {
        gate.Way.SERVICE: [
            outcome(Kind.NAME, CAT, used="cat"),
            outcome(Kind.NAME, CAT, half=Half.KEPT_BACK),
        ],
        gate.Way.ONE_VECTOR: [outcome(Kind.NAME, CAT), outcome(Kind.NAME, CAT, half=Half.KEPT_BACK)],
    }
    found = gate.by_half(outcomes, gate.figures)
    recall = {(way, part): found[way][part]["recall"]["mean"] for way in found for part in found[way]}
    assert recall == {
        ("service", "all"): 0.5,
        ("service", "tuning"): 1.0,
        ("service", "kept back"): 0.0,
        ("one_vector", "all"): 0.0,
        ("one_vector", "tuning"): 0.0,
        ("one_vector", "kept back"): 0.0,
    }
    assert found["service"]["all"]["nothing_used"] is None


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
