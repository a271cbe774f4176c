"""How steadily jobs went through a worker, by the database's own clock."""

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
    """Jobs per second in each tenth of the jobs, in the order of their ends."""
    gap_median_s: float
    gap_p99_s: float
    gap_most_s: float
    """From the end of a job to the next start of one, while there were jobs left to start."""

    @property
    def slowest(self) -> float:
        """The slowest tenth, as a share of the median."""
        return min(self.per_s) / statistics.median(self.per_s)

    def is_fed_by_ticks(self, period_s: float) -> bool:
        """Whether ends are followed by starts so late that it takes a tick for that; on a busy machine everything is
        slow, so the pace of the jobs counts as well."""
        return self.gap_median_s > max(period_s / 4, 2 / statistics.median(self.per_s))

    @classmethod
    def of(cls, starts_s: Sequence[float], ends_s: Sequence[float]) -> "Flow":
        """starts_s, ends_s: seconds, in any order; at least ten of each."""
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
