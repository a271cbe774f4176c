"""Positions in the queue, without counting the whole queue for every request."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Row, Uuid, bindparam, func, select, text
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db.tables import Job
from shared.recent import Recent
from shared.singleton import process_singleton

JOBS_PER_MARK = 500
"""Every 500th queued job of a model is a mark: its position is cached, and other positions are counted from it."""
MARKS_TTL_S = 5

Position = tuple[int, datetime, UUID]
"""Lane, time of submit and id: the order in which the jobs of one owner run."""


def queue_position(session: Session, job: Job) -> int:
    """How many queued jobs of the same model are in a higher-priority lane, or in the same lane and older.

    Fair share between owners and starving lanes can change the real order.

    The result is exact for the first `JOBS_PER_MARK` jobs. Behind them it is counted from the nearest mark before the
    job. Marks are about `MARKS_TTL_S` old, so the result may include jobs that have left the queue since.
    """
    values, before = range_ahead(session, job.model, (job.lane, job.created_at, job.id))
    return (session.scalar(text(COUNT_AHEAD).bindparams(*RANGE_BINDS), values) or 0) + before


def start_of_lane(rank: int) -> Position:
    """A position before all jobs of the lane with this rank, and behind those of all lanes with a lower rank."""
    return rank, datetime.min.replace(tzinfo=UTC), UUID(int=0)


COUNT_AHEAD = """
    select count(*) from jobs where model = :model and state = 'queued'
        and (lane, created_at, id) >= (:mark_lane, :mark_at, :mark_id)
        and (lane, created_at, id) < (:lane, :at, :id)
"""
"""Counts the queued jobs from a mark to a position. Its parameters are those of `range_ahead`."""
RANGE_BINDS = [bindparam(name, type_=Uuid) for name in ("mark_id", "id")]


def range_ahead(session: Session, model: str, position: Position) -> tuple[dict[str, Any], int]:
    """The parameters of `COUNT_AHEAD` for this position, and the number of jobs before its mark."""
    marks = recent_marks().get(model, lambda: list(_query_marks(session, model)))
    marks_ahead = bisect_left(marks, position)
    mark = marks[marks_ahead - 1] if marks_ahead else start_of_lane(0)
    names = ("mark_lane", "mark_at", "mark_id"), ("lane", "at", "id")
    values = {"model": model, **dict(zip(names[0], mark, strict=True)), **dict(zip(names[1], position, strict=True))}
    return values, marks_ahead * JOBS_PER_MARK


def jobs_waiting_for_model(session: Session) -> Sequence[Row[UUID, str, UUID]]:
    """Id, model and owner of the jobs that a worker has taken and whose images the model does not draw yet.

    They are in the order of the queue. They are few: a worker takes only as many jobs as it needs for its next batches.
    """
    taken = select(Job.id, Job.model, Job.owner_id).where(
        Job.state == JobState.PROCESSING, Job.model_started.is_(False)
    )
    return session.execute(taken.order_by(Job.model, Job.lane, Job.created_at, Job.id)).all()


@process_singleton
def recent_marks() -> Recent[list[Position]]:
    """The positions of each model's marks, in the order of the queue."""
    return Recent(MARKS_TTL_S)


def _query_marks(session: Session, model: str) -> Iterable[Position]:
    order = (Job.lane, Job.created_at, Job.id)
    number = func.row_number().over(order_by=order).label("number")
    queued = select(*order, number).where(Job.model == model, Job.state == JobState.QUEUED).subquery()
    marks = select(queued.c.lane, queued.c.created_at, queued.c.id).where(
        queued.c.number > 1, queued.c.number % JOBS_PER_MARK == 1
    )
    return ((row.lane, row.created_at, row.id) for row in session.execute(marks.order_by(queued.c.number)))
