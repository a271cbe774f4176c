"""Measures how fast the workers of a model generate, to estimate when a queued job will start.

Every statement here reads a bounded number of rows, however many jobs wait or have ended.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import workers
from shared.db.tables import Job

SAMPLED_ENDED_JOBS = 300
"""Speed is measured from so many of the latest ended jobs of all models."""
SAMPLE_WINDOW_S = 3600
"""Only jobs that ended within this time count."""
SAMPLED_QUEUED_JOBS = 100
"""The mean images per job are taken from so many jobs at the head of the queue."""


@dataclass(frozen=True)
class Throughput:
    """The current work of a model's workers.

    seconds_per_image: of one worker; None when no job was sampled.
    """

    workers: int
    images_in_work: int
    images_per_job: float
    seconds_per_image: float | None

    def start_in_s(self, jobs_ahead: int) -> float | None:
        """Seconds until the images ahead are generated at the measured speed; None without workers or speed."""
        if self.workers == 0:
            return None
        images = self.images_in_work + jobs_ahead * self.images_per_job
        if images == 0:
            return 0.0
        return None if self.seconds_per_image is None else images * self.seconds_per_image / self.workers


def measure(session: Session, model: str) -> Throughput:
    """The throughput of `model` now."""
    in_work = select(func.sum(Job.images)).where(Job.state == JobState.PROCESSING, Job.model == model)
    head = select(Job.images).where(Job.state == JobState.QUEUED, Job.model == model)
    head = head.order_by(Job.lane, Job.created_at, Job.id).limit(SAMPLED_QUEUED_JOBS)
    return Throughput(
        workers=sum(worker.model == model and worker.state == "ready" for worker in workers.list_live(session)),
        images_in_work=session.scalar(in_work) or 0,
        images_per_job=float(session.scalar(select(func.avg(head.subquery().c.images))) or 0),
        seconds_per_image=_seconds_per_image(session, model),
    )


def _seconds_per_image(session: Session, model: str) -> float | None:
    ended = (
        select(Job.model, Job.state, Job.attempt, Job.worker, Job.images, Job.started_at, Job.finished_at)
        .where(Job.finished_at > func.now() - timedelta(seconds=SAMPLE_WINDOW_S))
        .order_by(Job.finished_at.desc())
        .limit(SAMPLED_ENDED_JOBS)
        .subquery()
    )
    # Only first attempts count: a requeued job waited in the queue between its start and its end.
    statement = select(ended).where(
        ended.c.model == model, ended.c.state == JobState.SUCCEEDED, ended.c.attempt == 1, ended.c.worker.is_not(None)
    )
    images, spans = 0, defaultdict(list)
    for row in session.execute(statement):
        images += row.images
        spans[row.worker].append((row.started_at, row.finished_at))
    return sum(map(_covered_s, spans.values())) / images if images else None


def _covered_s(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """The length of the union of the spans in seconds: jobs of one worker overlap, and it may idle between them."""
    total, covered_until = timedelta(), None
    for start, end in sorted(spans):
        new_start = start if covered_until is None else max(start, covered_until)
        if end > new_start:
            total, covered_until = total + (end - new_start), end
    return total.total_seconds()
