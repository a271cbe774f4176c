"""One soak: a stack, thousands of jobs and requests, and measurements of its processes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import orjson
from pydantic import SecretStr
from sqlalchemy import Engine, func, select

from shared.contracts.jobs import JobState
from shared.db.session import build_engine
from shared.db.tables import BulkItem, Job
from shared.settings import DatabaseSettings, JobSettings, ModelSettings
from tests.soak.flow import Flow
from tests.soak.gauges import LEAST_SAMPLES, Gauges, Trend
from tests.soak.requests import Requests
from tests.stack import RunningStack, running_stack, wait_until

STALLED_S = 180
"""A run fails when no job ends for this long."""


@dataclass(frozen=True)
class Plan:
    cheap: int = 10_000
    requests: int = 5_000
    starter: int = 300
    sample_s: float = 5
    durable: bool = True

    def environment(self) -> dict[str, str]:
        generators: dict[str, Any] = {"cheap": {"kind": "fake", "cost_ms": 20, "max_batch_size": 4}}
        if self.starter:
            generators["starter"] = ModelSettings().generators["starter"].model_dump(mode="json", exclude_defaults=True)
        return {
            "AFTERIMAGE_ENVIRONMENT": "test",
            "AFTERIMAGE_MODEL__GENERATORS": orjson.dumps(generators).decode(),
            "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
            # Flower grows until it has this many tasks. That should happen before the first measurement that counts.
            "FLOWER_MAX_TASKS": "500",
        }


@dataclass
class Part:
    """The cheap jobs with the requests beside them, or the starter model's."""

    name: str
    jobs: int
    succeeded: int = 0
    took_s: float = 0
    flow: Flow | None = None
    statuses: dict[int, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    samples: int = 0
    trends: dict[str, dict[str, Trend]] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    reborn: list[str] = field(default_factory=list)
    """Processes that had more than one process id: they died and were started again."""

    def wrong(self, *, reconcile_s: float) -> list[str]:
        """The problems that make a soak fail. Growth and rates are judged only when there are enough samples."""
        problems = [f"{self.jobs - self.succeeded} of {self.jobs} jobs did not succeed"] * (self.succeeded != self.jobs)
        problems += [f"request failed: {failure}" for failure in self.failures[:10]]
        problems += [f"{name} died" for name in self.reborn]
        if self.flow is not None and self.flow.starts_on_ticks(reconcile_s):
            problems.append(
                f"the next job started {self.flow.gap_median_s} s (median) after the end of one: on a tick?"
            )
        if self.samples < LEAST_SAMPLES:
            return [f"{self.name}: {each}" for each in problems]
        if self.flow is not None and self.flow.slowest < 0.5:
            problems.append(f"not a steady rate: {self.flow.per_s} jobs/s")
        problems += [
            f"{process}: {what} grew from {trend.first} to {trend.last}"
            for process, trends in self.trends.items()
            for what, trend in trends.items()
            if trend.grew and what != "rss_mib"  # most of it in Postgres is shared buffers
        ]
        return [f"{self.name}: {each}" for each in problems]

    def summary(self) -> dict[str, Any]:
        return asdict(self) | {"median_per_s": self.flow and statistics.median(self.flow.per_s)}


@dataclass
class Soak:
    plan: Plan
    parts: list[Part] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        reconcile_s = JobSettings().reconcile_s
        return [each for part in self.parts for each in part.wrong(reconcile_s=reconcile_s)]

    def summary(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "reconcile_s": JobSettings().reconcile_s,
            "wrong": self.wrong,
            "parts": {part.name: part.summary() for part in self.parts},
        }


def soak(plan: Plan, folder: Path, *, say: Callable[[str], None] = print) -> Soak:
    """Run the whole plan on a stack in `folder`."""
    outcome = Soak(plan)
    say(f"starting the stack in {folder}")
    with running_stack(folder, environment=plan.environment(), durable=plan.durable) as stack:
        url = stack.environment()["AFTERIMAGE_DATABASE__URL"]
        engine = build_engine(DatabaseSettings(url=SecretStr(url)))
        try:
            for model, jobs, requests in (("cheap", plan.cheap, plan.requests), ("starter", plan.starter, 0)):
                if jobs:
                    outcome.parts.append(_part(stack, engine, model, jobs, requests, plan.sample_s, say))
        finally:
            engine.dispose()
    return outcome


def _part(
    stack: RunningStack,
    engine: Engine,
    model: str,
    jobs: int,
    requests: int,
    sample_s: float,
    say: Callable[[str], None],
) -> Part:
    started = time.monotonic()
    part = Part(model, jobs)
    gauges = Gauges(stack, engine)
    bulk_id = _begin(stack.url, model, jobs)
    succeeded = _Progress(engine, bulk_id)
    clients = Requests(stack.url, bulk_id, total=requests, done=lambda: succeeded.count / jobs)
    with gauges.watching(sample_s), clients:
        tenths_reported = 0
        while not succeeded.over:
            if succeeded.count * 10 // jobs > tenths_reported:
                tenths_reported = succeeded.count * 10 // jobs
                say(f"{model}: {succeeded.count} of {jobs} jobs after {time.monotonic() - started:.0f} s")
            before = succeeded.count
            wait_until(
                lambda seen=before: succeeded.read() > seen or succeeded.over,  # type: ignore[misc]
                timeout_s=STALLED_S,
                what=f"the next of the {model} jobs to end",
            )
        clients.wait()
    part.succeeded, part.took_s = succeeded.count, round(time.monotonic() - started, 1)
    part.flow = Flow.of(*succeeded.times()) if jobs >= 20 else None
    part.statuses, part.failures = dict(clients.statuses), clients.failures
    part.samples = len(gauges.connections["database"])
    part.trends, part.series = gauges.trends(), gauges.series()
    part.reborn = [name for name, pids in gauges.pids.items() if len(pids) > 1]
    return part


def _begin(url: str, model: str, jobs: int) -> str:
    """Send the jobs as one bulk. Return its id."""
    lines: list[Any] = [{"bulk": {"defaults": {"kind": "generate", "model": model}}}]
    lines += [{"prompt": f"one of many {number}"} for number in range(jobs)]
    answer = httpx.post(
        f"{url}/api/v1/bulks",
        content=b"".join(orjson.dumps(line) + b"\n" for line in lines),
        headers={"Content-Type": "application/jsonl"},
        timeout=600,
    )
    return str(answer.raise_for_status().json()["id"])


class _Progress:
    """How many jobs of a bulk have ended. It asks the database, so that the API gets only planned requests."""

    def __init__(self, engine: Engine, bulk_id: str) -> None:
        self._engine = engine
        self._jobs = select(BulkItem.job_id).where(BulkItem.bulk_id == UUID(bulk_id))
        self._items = select(func.count()).where(BulkItem.bulk_id == UUID(bulk_id))
        self.count = 0
        self.over = False
        self._read_at = 0.0

    def read(self) -> int:
        """Return the number of succeeded jobs. Query the database at most twice a second."""
        if time.monotonic() - self._read_at < 0.5:
            return self.count
        self._read_at = time.monotonic()
        final = [state.value for state in JobState if state.is_final]
        ended = select(Job.state, func.count()).where(Job.id.in_(self._jobs), Job.state.in_(final)).group_by(Job.state)
        with self._engine.connect() as connection:
            counts = {str(state): int(number) for state, number in connection.execute(ended)}
            self.over = sum(counts.values()) >= connection.execute(self._items).scalar_one()
        self.count = counts.get(JobState.SUCCEEDED.value, 0)
        return self.count

    def times(self) -> tuple[list[float], list[float]]:
        """The Unix times at which the ended jobs started and ended."""
        started, finished = (func.extract("epoch", column) for column in (Job.started_at, Job.finished_at))
        with self._engine.connect() as connection:
            ended = select(started, finished).where(Job.id.in_(self._jobs), Job.finished_at.is_not(None))
            rows = connection.execute(ended).all()
        return [float(start) for start, _ in rows if start is not None], [float(end) for _, end in rows]
