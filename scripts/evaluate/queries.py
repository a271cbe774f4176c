"""The labelled queries of the parts `gate` and `concepts`: prompts with the things that are right for them."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from shared.errors import ConfigurationError


class QuerySet(StrEnum):
    TEST = "test"
    """Queries by an author who had not seen the rules, and had seen only about 20 tuning queries.

    The author of the search by shorter names (`shared.concepts.heads`), and of the later rules for the singular, had
    seen the results on them.
    """
    TUNING = "tuning"
    """Queries by the author of the rules, who tuned these on them."""


QUERIES = {
    QuerySet.TEST: Path(__file__).with_name("test_queries.json"),
    QuerySet.TUNING: Path(__file__).with_name("queries.json"),
}
"""200 queries for the starter corpus in each set, written by hand. `right` has one list of captions for each thing."""


class Kind(StrEnum):
    NAME = "name"
    """A thing of the corpus by its name."""
    PLURAL = "plural"
    """Several of a thing."""
    KEYWORD = "keyword"
    """A thing by another word than its name."""
    TWO = "two"
    """Two things of the corpus."""
    THREE = "three"
    """Three things of the corpus."""
    OUTSIDE = "outside"
    """A thing that the corpus does not have."""
    NONSENSE = "nonsense"
    """No thing at all."""


ONE_THING = (Kind.NAME, Kind.PLURAL, Kind.KEYWORD)
IN_CORPUS = (*ONE_THING, Kind.TWO, Kind.THREE)
THINGS = {**dict.fromkeys(ONE_THING, 1), Kind.TWO: 2, Kind.THREE: 3, Kind.OUTSIDE: 0, Kind.NONSENSE: 0}
"""The number of things of the corpus in a query, by kind."""


@dataclass(frozen=True)
class Query:
    kind: Kind
    text: str
    right: Sequence[frozenset[str]]
    """For each thing of the query, the captions that show it; empty if the corpus does not have it."""
    query_set: QuerySet = QuerySet.TEST


def read_queries(path: Path, captions: Collection[str], *, query_set: QuerySet = QuerySet.TEST) -> list[Query]:
    """Read labelled queries. captions: of the corpus.

    Raises:
        ConfigurationError: the file has another form, or names a caption that the corpus does not have.
    """
    known = set(captions)
    queries = []
    try:
        for row in json.loads(path.read_text(encoding="utf-8")):
            kind, right = Kind(row["kind"]), [frozenset(names) for names in row["right"]]
            if len(right) != THINGS[kind] or not all(right):
                raise ConfigurationError(f"{path}: the query {row['query']!r} has the wrong number of things.")
            if missing := sorted(frozenset[str]().union(*right) - known):
                raise ConfigurationError(f"{path} names captions that the corpus does not have: {missing[:5]}.")
            queries.append(Query(kind=kind, text=str(row["query"]), right=right, query_set=query_set))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigurationError(f"{path} has no labelled queries: {error}") from error
    return queries
