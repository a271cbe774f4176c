"""Places in the queue, without counting all of it for everybody who asks."""

from bisect import bisect_left
from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select, tuple_
from sqlalchemy.orm import Session

from shared.cache import get_cache_manager
from shared.contracts.jobs import JobState
from shared.db.tables import Job

STRIDE = 500
REMEMBERED_S = 5

Place = tuple[int, datetime, UUID]
"""Lane, time of submit and id: the order in which jobs of one owner go."""


def queue_position(session: Session, job: Job) -> int:
    """How many queued jobs of the same model go first; 0 for the next one.

    Exact among the first `STRIDE`. Behind them it is counted from the nearest of marks that were set some seconds ago,
    so it lags behind by what has left the queue since.
    """
    mine = (job.lane, job.created_at, job.id)
    marks = _marks(session, job.model)
    passed = bisect_left(marks, mine)
    place = tuple_(Job.lane, Job.created_at, Job.id)
    ahead = select(func.count()).where(Job.model == job.model, Job.state == JobState.QUEUED, place < tuple_(*mine))
    if passed:
        ahead = ahead.where(place >= tuple_(*marks[passed - 1]))
    return (session.scalar(ahead) or 0) + passed * STRIDE


def _marks(session: Session, model: str) -> list[Place]:
    """The place of every `STRIDE`-th queued job, the first to go first."""
    cache, key = get_cache_manager(), f"places:{model}"
    known = cache.get(key)
    if known is None:
        known = [[lane, at.isoformat(), str(job_id)] for lane, at, job_id in _every_stride(session, model)]
        cache.set(key, known, REMEMBERED_S)
    return [(lane, datetime.fromisoformat(at), UUID(job_id)) for lane, at, job_id in known]


def _every_stride(session: Session, model: str) -> Iterable[tuple[int, datetime, UUID]]:
    order = (Job.lane, Job.created_at, Job.id)
    number = func.row_number().over(order_by=order).label("number")
    line = select(*order, number).where(Job.model == model, Job.state == JobState.QUEUED).subquery()
    marks = select(line.c.lane, line.c.created_at, line.c.id).where(line.c.number > 1, line.c.number % STRIDE == 1)
    return ((row.lane, row.created_at, row.id) for row in session.execute(marks.order_by(line.c.number)))
