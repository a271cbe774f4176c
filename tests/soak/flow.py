"""The rate of jobs through a worker, and the gaps between them, by the clock of the database."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TENTHS = 10


@dataclass(frozen=True)
class Flow:
    jobs: int
    per_s: list[float]
    """Jobs per second in each tenth of the jobs, in the order in which they ended."""
    gap_median_s: float
    gap_p99_s: float
    gap_most_s: float
    """The gaps are seconds from the end of a job to the next start of a job, until the last start."""

    @property
    def slowest(self) -> float:
        """The rate of the slowest tenth, as a share of the median rate."""
        return min(self.per_s) / statistics.median(self.per_s)

    def starts_on_ticks(self, period_s: float) -> bool:
        """Whether jobs start on the ticks of the reconciler instead of when another job ends.

        The limit also follows the rate of the jobs, because on a busy machine all jobs are slow.
        """
        return self.gap_median_s > max(period_s / 4, 2 / statistics.median(self.per_s))

    @classmethod
    def of(cls, starts_s: Sequence[float], ends_s: Sequence[float]) -> "Flow":
        """Build a flow from starts and ends in seconds, in any order, at least ten of each."""
        starts, ends = sorted(starts_s), sorted(ends_s)
        gaps = sorted(starts[bisect_left(starts, end)] - end for end in ends if end < starts[-1])
        return cls(
            jobs=len(ends),
            per_s=_rates(ends, since_s=starts[0]),
            gap_median_s=round(statistics.median(gaps), 4),
            gap_p99_s=round(gaps[int(len(gaps) * 0.99)], 4),
            gap_most_s=round(gaps[-1], 4),
        )


def _rates(ends: Sequence[float], *, since_s: float) -> list[float]:
    bounds = [len(ends) * tenth // TENTHS for tenth in range(TENTHS + 1)]
    rates, began_s = [], since_s
    for first, behind in pairwise(bounds):
        ended_s = ends[behind - 1]
        rates.append(round((behind - first) / max(ended_s - began_s, 1e-6), 2))
        began_s = ended_s
    return rates
