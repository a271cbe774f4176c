"""Measure the splitting of prompts into concepts: are all things of a prompt among its references?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.evaluate.gate import Outcome, as_dict
from scripts.evaluate.queries import ONE_THING, THINGS, Kind
from scripts.evaluate.statistics import estimate


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of the queries for several things, and how prompts were split, each with its interval.

    - `both`: share of the queries for two things for which both are among the used references.
    - `first`, `second`: the same of one thing, in the order of the prompt.
    - `all_three`: share of the queries for three things for which all are among the used references.
    - `two_split_in_two`, `three_split_in_three`, `one_left_whole`: share of prompts with as many concepts as things.
    """
    two = [outcome for outcome in outcomes if outcome.query.kind is Kind.TWO]
    three = [outcome for outcome in outcomes if outcome.query.kind is Kind.THREE]
    one = [outcome for outcome in outcomes if outcome.query.kind in ONE_THING]
    return {
        "both": _share([all(outcome.covered) for outcome in two]),
        "first": _share([outcome.covered[0] for outcome in two]),
        "second": _share([outcome.covered[1] for outcome in two]),
        "all_three": _share([all(outcome.covered) for outcome in three]),
        "two_split_in_two": _share_of_split(two),
        "three_split_in_three": _share_of_split(three),
        "one_left_whole": _share_of_split(one),
    }


def _share_of_split(outcomes: Sequence[Outcome]) -> dict[str, Any] | None:
    return _share([len(outcome.concepts) == THINGS[outcome.query.kind] for outcome in outcomes])


def _share(held: Sequence[bool]) -> dict[str, Any] | None:
    return as_dict(estimate(np.array(held, float)))
