"""How fast the workers of a model draw, from what they finished lately: when a queued job will start is guessed by it.

Every statement here reads a bounded number of rows, whatever waits or has ever ended.
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

LOOKED_AT = 300
"""Jobs, the latest ended ones of all models, that speed is taken from."""
RECENT_S = 3600
SAMPLED = 100
"""Jobs at the head of the queue whose mean size stands for all of it."""


@dataclass(frozen=True)
class Pace:
    """What a model's workers do now. `seconds_per_image`: of one worker; None when none has ended a job lately."""

    workers: int
    images_in_work: int
    images_per_job: float
    seconds_per_image: float | None

    def start_in_s(self, jobs_ahead: int) -> float | None:
        """Seconds until the images ahead are drawn, if all goes on as it did; None when nothing is known."""
        if self.workers == 0:
            return None
        images = self.images_in_work + jobs_ahead * self.images_per_job
        if images == 0:
            return 0.0
        return None if self.seconds_per_image is None else images * self.seconds_per_image / self.workers


def of_model(session: Session, model: str) -> Pace:
    in_work = select(func.sum(Job.images)).where(Job.state == JobState.PROCESSING, Job.model == model)
    head = select(Job.images).where(Job.state == JobState.QUEUED, Job.model == model)
    head = head.order_by(Job.lane, Job.created_at, Job.id).limit(SAMPLED)
    return Pace(
        workers=sum(worker.model == model and worker.state == "ready" for worker in workers.live(session)),
        images_in_work=session.scalar(in_work) or 0,
        images_per_job=float(session.scalar(select(func.avg(head.subquery().c.images))) or 0),
        seconds_per_image=_seconds_per_image(session, model),
    )


def _seconds_per_image(session: Session, model: str) -> float | None:
    ended = (
        select(Job.model, Job.state, Job.attempt, Job.worker, Job.images, Job.started_at, Job.finished_at)
        .where(Job.finished_at > func.now() - timedelta(seconds=RECENT_S))
        .order_by(Job.finished_at.desc())
        .limit(LOOKED_AT)
        .subquery()
    )
    # A job that was tried again has waited between its start and its end.
    statement = select(ended).where(
        ended.c.model == model, ended.c.state == JobState.SUCCEEDED, ended.c.attempt == 1, ended.c.worker.is_not(None)
    )
    images, spans = 0, defaultdict(list)
    for row in session.execute(statement):
        images += row.images
        spans[row.worker].append((row.started_at, row.finished_at))
    return sum(map(_covered_s, spans.values())) / images if images else None


def _covered_s(spans: Iterable[tuple[datetime, datetime]]) -> float:
    """Seconds in at least one of the spans: a worker walks through several jobs at a time and may idle in between."""
    total, until = timedelta(), None
    for start, end in sorted(spans):
        begins = start if until is None else max(start, until)
        if end > begins:
            total, until = total + (end - begins), end
    return total.total_seconds()
