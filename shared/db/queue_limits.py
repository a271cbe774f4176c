"""Limits on the number of queued jobs, in total and per owner."""

from uuid import UUID

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db.tables import Job
from shared.errors import OwnerQueueFullError, QueueFullError
from shared.recent import Recent
from shared.settings import QueueSettings
from shared.singleton import process_singleton

CACHE_HEADROOM_JOBS = 1000
COUNT_TTL_S = 1
"""Counting a long queue is slow. So a process keeps a count for a second if it is at least `CACHE_HEADROOM_JOBS` below
the limit. Nearer to the limit, transactions that add a job count one after the other."""


def refuse_when_full(session: Session, owner_id: UUID, settings: QueueSettings) -> None:
    """Check that one more job may be queued. Near a limit, transactions that add a job run one after the other.

    Raises:
        OwnerQueueFullError: the owner has `max_queued_per_owner` queued jobs.
        QueueFullError: `max_queued` jobs are queued in total.
    """
    queued = select(Job.id).where(Job.state == JobState.QUEUED)
    most = settings.max_queued_per_owner
    if _count(session, f"queued:{owner_id}", queued.where(Job.owner_id == owner_id), most) >= most:
        raise OwnerQueueFullError(queued=most)
    most = settings.max_queued
    if _count(session, "queued", queued, most) >= most:
        raise QueueFullError(queued=most)


def count_queued(session: Session, owner_id: UUID, *, at_most: int) -> int:
    """How many queued jobs an owner has; `at_most` when there are more."""
    return _count_rows(session, select(Job.id).where(Job.state == JobState.QUEUED, Job.owner_id == owner_id), at_most)


def _count(session: Session, name: str, queued: Select[UUID], at_most: int) -> int:
    def is_roomy(count: int) -> bool:
        return count + CACHE_HEADROOM_JOBS <= at_most

    # A limit of the settings is part of the key, because `is_roomy` depends on it.
    count = _recent_counts().get((name, at_most), lambda: _count_rows(session, queued, at_most), keep=is_roomy)
    if is_roomy(count):
        return count
    # The lock is held until the transaction ends, so the next count includes the job that this transaction adds.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    return _count_rows(session, queued, at_most)


@process_singleton
def _recent_counts() -> Recent[int]:
    return Recent(COUNT_TTL_S)


def _count_rows(session: Session, queued: Select[UUID], at_most: int) -> int:
    return session.scalar(select(func.count()).select_from(queued.limit(at_most).subquery())) or 0
