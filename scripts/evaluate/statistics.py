"""Confidence intervals by a bootstrap over concepts.

The sample consists of concepts, not of images: concepts are resampled, and the seeds of a concept stay together. Arms
are compared concept by concept: resampling the differences is the paired bootstrap.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
LEVEL = 0.95

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A mean with its percentile interval."""

    mean: float
    low: float
    high: float
    concepts: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The difference of two arms over the same concepts."""

    win_rate: float
    """Share of concepts in which the first arm is better; a tie counts half."""


def estimate(values: Floats, *, seed: int = 0) -> Estimate | None:
    """Return mean and interval of one value per concept, shape (n,), without NaNs; None if all values are NaN."""
    measured = values[~np.isnan(values)]
    if not len(measured):
        return None
    low, high = _interval(measured, seed)
    return Estimate(mean=float(measured.mean()), low=low, high=high, concepts=len(measured))


def ratio(numerators: Floats, denominators: Floats, *, seed: int = 0) -> Estimate | None:
    """Return the sum of `numerators` divided by that of `denominators`, shapes (n,), one value per concept.

    None if all denominators are zero.
    """
    if not denominators.sum():
        return None
    picks = _picks(len(numerators), seed)
    totals = denominators[picks].sum(axis=1)
    resampled = numerators[picks].sum(axis=1)[totals > 0] / totals[totals > 0]
    low, high = _percentiles(resampled)
    mean = float(numerators.sum() / denominators.sum())
    return Estimate(mean=mean, low=low, high=high, concepts=len(numerators))


def difference(a: Floats, b: Floats, *, seed: int = 0) -> Difference | None:
    """Return mean and interval of `a - b`, shapes (n,), over concepts with both values; None without such concepts."""
    measured = (a - b)[~np.isnan(a - b)]
    if not len(measured):
        return None
    low, high = _interval(measured, seed)
    wins = (measured > 0) + 0.5 * (measured == 0)
    return Difference(
        mean=float(measured.mean()), low=low, high=high, concepts=len(measured), win_rate=float(wins.mean())
    )


def _interval(values: Floats, seed: int) -> tuple[float, float]:
    return _percentiles(values[_picks(len(values), seed)].mean(axis=1))


def _picks(count: int, seed: int) -> npt.NDArray[np.integer]:
    """Return the places that each resample takes, shape (RESAMPLES, count)."""
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _percentiles(resampled: Floats) -> tuple[float, float]:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)
