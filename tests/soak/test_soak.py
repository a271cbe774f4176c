"""The short version of `make soak`, and tests of its checks."""

from pathlib import Path

import pytest

from shared.settings import JobSettings
from tests.soak.flow import Flow
from tests.soak.gauges import Trend
from tests.soak.run import Part, Plan, soak

pytestmark = pytest.mark.timeout(600)


@pytest.mark.extended
def test_a_few_hundred_jobs_and_requests_flow_and_leave_nothing_behind(tmp_path: Path) -> None:
    outcome = soak(Plan(cheap=200, requests=120, starter=0, sample_s=1, durable=False), tmp_path / "stack")
    (part,) = outcome.parts
    assert part.succeeded == part.jobs == 200
    assert part.failures == []
    assert sum(part.statuses.values()) - part.statuses.get(503, 0) == 120
    assert part.reborn == []
    assert part.flow is not None
    assert not part.flow.starts_on_ticks(JobSettings().reconcile_s), "a job starts when another ends, not on a tick"
    assert {"api", "embed", "generate-cheap", "io", "reconciler", "postgres", "queue", "cache"} <= set(part.trends)
    for name, trends in part.trends.items():
        for what in {"files", "threads", "connections"} & set(trends):
            # Half of this short run is warm-up. A leak of one for each job or request would still exceed a hundred.
            assert trends[what].last - trends[what].first < 40, f"{name}: {what}"


def test_growth_is_reported_and_a_wavering_value_is_not() -> None:
    grows = [(float(at), 200 + at * 0.5) for at in range(120)]
    wavers = [(float(at), 200 + 5 * (at % 2)) for at in range(120)]
    filled = [(float(at), 100.0 if at < 20 else 200.0) for at in range(120)]
    assert Trend.of(grows, slack=12).grew
    assert Trend.of(grows, slack=12).slope_per_hour == pytest.approx(1800)
    assert not Trend.of(wavers, slack=12).grew
    assert not Trend.of(filled, slack=12).grew, "the warm-up does not count"


def test_jobs_that_start_on_reconciler_ticks_are_reported() -> None:
    steady = Flow.of([n * 0.1 for n in range(200)], [n * 0.1 + 0.09 for n in range(200)])
    # Ten jobs start at a time, every five seconds.
    ticked = Flow.of([n // 10 * 5 for n in range(200)], [n // 10 * 5 + 0.09 for n in range(200)])
    assert steady.gap_p99_s == pytest.approx(0.01, abs=0.002)
    assert steady.per_s == pytest.approx([10] * 10, rel=0.02)
    assert Part("steady", 200, succeeded=200, flow=steady).wrong(reconcile_s=5) == []
    assert ticked.gap_p99_s > 4
    (problem,) = Part("ticked", 200, succeeded=200, flow=ticked).wrong(reconcile_s=5)
    assert "on a tick" in problem
