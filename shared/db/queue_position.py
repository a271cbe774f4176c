"""Positions in the queue, without counting the whole queue for every request."""

from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from shared.cache import get_cache_manager
from shared.contracts.jobs import JobState
from shared.db.tables import Job

JOBS_PER_MARK = 500
"""Every 500th queued job of a model is a mark: its position is cached, and other positions are counted from it."""
MARKS_TTL_S = 5

Position = tuple[int, datetime, UUID]
"""Lane, time of submit and id: the order in which the jobs of one owner run."""


def queue_position(session: Session, job: Job) -> int:
    """How many queued jobs of the same model are in a higher-priority lane, or in the same lane and older.

    Fair share between owners and starving lanes can change the real order.

    The result is exact for the first `JOBS_PER_MARK` jobs. Behind them it is counted from the nearest mark before the
    job. Marks are up to `MARKS_TTL_S` old, so the result may include jobs that have left the queue since.
    """
    position = (job.lane, job.created_at, job.id)
    marks = _marks(session, job.model)
    marks_ahead = bisect_left(marks, position)
    columns = tuple_(Job.lane, Job.created_at, Job.id)
    ahead = select(func.count()).where(
        Job.model == job.model, Job.state == JobState.QUEUED, columns < tuple_(*position)
    )
    if marks_ahead:
        ahead = ahead.where(columns >= tuple_(*marks[marks_ahead - 1]))
    return (session.scalar(ahead) or 0) + marks_ahead * JOBS_PER_MARK


def _marks(session: Session, model: str) -> list[Position]:
    """The positions of the marks, in the order of the queue, from the cache or the database."""
    cache, key = get_cache_manager(), f"places:{model}"
    marks: list[Position] | None = cache.get(key, _read_marks)
    if marks is None:
        marks = list(_query_marks(session, model))
        cache.set(key, [[lane, at.isoformat(), str(job_id)] for lane, at, job_id in marks], MARKS_TTL_S)
    return marks


def _read_marks(cached: Any) -> list[Position]:
    return [(int(lane), datetime.fromisoformat(at), UUID(job_id)) for lane, at, job_id in cached]


def _query_marks(session: Session, model: str) -> Iterable[Position]:
    order = (Job.lane, Job.created_at, Job.id)
    number = func.row_number().over(order_by=order).label("number")
    queued = select(*order, number).where(Job.model == model, Job.state == JobState.QUEUED).subquery()
    marks = select(queued.c.lane, queued.c.created_at, queued.c.id).where(
        queued.c.number > 1, queued.c.number % JOBS_PER_MARK == 1
    )
    return ((row.lane, row.created_at, row.id) for row in session.execute(marks.order_by(queued.c.number)))
