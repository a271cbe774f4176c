"""Confidence intervals and win rates of the evaluation."""

import numpy as np
import pytest

from scripts.evaluate.statistics import difference, estimate

NOT_MEASURED = float("nan")


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = estimate(values)
    assert found is not None
    assert found.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_a_small_gain_in_every_concept_is_significant_even_if_concepts_differ_more() -> None:
    rng = np.random.default_rng(2)
    without = rng.uniform(0, 1, 50)
    retrieved = without + 0.05 + rng.normal(0, 0.02, 50)
    found = difference(retrieved, without)
    apart = estimate(without)
    assert found is not None
    assert apart is not None
    assert 0.04 < found.low < 0.05 < found.high < 0.06
    assert apart.high - apart.low > 0.1, "without pairs, the interval is wider than the gain"


def test_a_gain_in_half_of_the_concepts_and_a_loss_in_the_rest_is_not_significant() -> None:
    found = difference(np.tile([1.0, 0.0], 20), np.full(40, 0.5))
    assert found is not None
    assert found.low < 0 < found.high
    assert found.win_rate == 0.5


def test_a_tie_counts_as_half_a_win() -> None:
    found = difference(np.array([1.0, 1.0, 0.0, 0.0]), np.array([0.0, 1.0, 0.0, 1.0]))
    assert found is not None
    assert found.win_rate == 0.5
    better = difference(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert better is not None
    assert better.win_rate == 0.75


def test_a_concept_counts_only_where_both_arms_were_measured() -> None:
    found = difference(np.array([1.0, NOT_MEASURED, 0.5, 1.0]), np.array([0.0, 0.0, NOT_MEASURED, 0.5]))
    assert found is not None
    assert (found.mean, found.concepts) == (0.75, 2)


def test_without_measurements_there_is_no_estimate() -> None:
    assert estimate(np.array([NOT_MEASURED])) is None
    assert difference(np.array([NOT_MEASURED]), np.array([1.0])) is None


def test_equal_values_give_equal_intervals() -> None:
    values = np.random.default_rng(3).uniform(size=30)
    assert estimate(values) == estimate(values.copy())
