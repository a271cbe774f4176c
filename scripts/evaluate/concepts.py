"""Measure the splitting of prompts into concepts: are both things of a prompt among its references?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.evaluate.gate import Outcome, as_dict
from scripts.evaluate.queries import Kind
from scripts.evaluate.statistics import estimate

ONE_THING = (Kind.NAME, Kind.PLURAL, Kind.KEYWORD)


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the figures of the queries for two things, and how prompts were split, each with its interval.

    - `both`: share of the queries for two things for which both are among the used references.
    - `first`, `second`: the same of one thing, in the order of the prompt.
    - `two_split_in_two`, `one_left_whole`: share of prompts that have as many concepts as things.
    """
    two = [outcome for outcome in outcomes if outcome.query.kind is Kind.TWO]
    one = [outcome for outcome in outcomes if outcome.query.kind in ONE_THING]
    return {
        "both": _share([all(outcome.covered) for outcome in two]),
        "first": _share([outcome.covered[0] for outcome in two]),
        "second": _share([outcome.covered[1] for outcome in two]),
        "two_split_in_two": _share([len(outcome.concepts) == 2 for outcome in two]),
        "one_left_whole": _share([len(outcome.concepts) == 1 for outcome in one]),
    }


def _share(held: Sequence[bool]) -> dict[str, Any] | None:
    return as_dict(estimate(np.array(held, float)))
