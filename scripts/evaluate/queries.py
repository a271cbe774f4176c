"""The labelled queries of the parts `gate` and `concepts`: prompts with the things that are right for them."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path

from shared.errors import ConfigurationError

QUERIES = Path(__file__).with_name("queries.json")
"""200 queries for the starter corpus, written by hand. `right` has one list of captions for each thing of the query."""


class Kind(StrEnum):
    NAME = "name"
    """A thing of the corpus by its name."""
    PLURAL = "plural"
    """Several of a thing."""
    KEYWORD = "keyword"
    """A thing by another word than its name."""
    TWO = "two"
    """Two things of the corpus."""
    OUTSIDE = "outside"
    """A thing that the corpus does not have."""
    NONSENSE = "nonsense"
    """No thing at all."""


IN_CORPUS = (Kind.NAME, Kind.PLURAL, Kind.KEYWORD, Kind.TWO)


class Half(StrEnum):
    TUNING = "tuning"
    """The rules were tuned on these queries."""
    KEPT_BACK = "kept back"
    """Not used for tuning. The author of the rules wrote these queries too, so they are no independent test."""


@dataclass(frozen=True)
class Query:
    kind: Kind
    text: str
    right: Sequence[frozenset[str]]
    """For each thing of the query, the captions that show it; empty if the corpus does not have it."""
    half: Half


def read_queries(path: Path, captions: Collection[str]) -> list[Query]:
    """Read labelled queries. The queries of each kind belong to the two halves in turn.

    captions: of the corpus.

    Raises:
        ConfigurationError: the file has another form, or names a caption that the corpus does not have.
    """
    known, places = set(captions), {kind: count() for kind in Kind}
    queries = []
    try:
        for row in json.loads(path.read_text(encoding="utf-8")):
            kind, right = Kind(row["kind"]), [frozenset(names) for names in row["right"]]
            if len(right) != {Kind.TWO: 2, Kind.OUTSIDE: 0, Kind.NONSENSE: 0}.get(kind, 1) or not all(right):
                raise ConfigurationError(f"{path}: the query {row['query']!r} has the wrong number of things.")
            if missing := sorted(frozenset[str]().union(*right) - known):
                raise ConfigurationError(f"{path} names captions that the corpus does not have: {missing[:5]}.")
            half = list(Half)[next(places[kind]) % 2]
            queries.append(Query(kind=kind, text=str(row["query"]), right=right, half=half))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{path} has no labelled queries: {error}") from error
    return queries
