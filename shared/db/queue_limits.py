"""Limits on the number of queued jobs, in total and per owner."""

from uuid import UUID

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from shared.cache import get_cache_manager
from shared.contracts.jobs import JobState
from shared.db.tables import Job
from shared.errors import OwnerQueueFullError, QueueFullError
from shared.settings import QueueSettings

CACHE_HEADROOM_JOBS = 1000
COUNT_TTL_S = 1
"""Counting a long queue is slow, so a count at least `CACHE_HEADROOM_JOBS` below the limit is cached for a second."""


def refuse_when_full(session: Session, owner_id: UUID, settings: QueueSettings) -> None:
    """Check that one more job may be queued. Near a limit, transactions that add a job run one after the other.

    Raises:
        OwnerQueueFullError: the owner has `max_queued_per_owner` queued jobs.
        QueueFullError: `max_queued` jobs are queued in total.
    """
    queued = select(Job.id).where(Job.state == JobState.QUEUED)
    most = settings.max_queued_per_owner
    if _cached_count(session, f"queued:{owner_id}", queued.where(Job.owner_id == owner_id), most) >= most:
        raise OwnerQueueFullError(queued=most)
    most = settings.max_queued
    if _cached_count(session, "queued", queued, most) >= most:
        raise QueueFullError(queued=most)


def count_queued(session: Session, owner_id: UUID, *, at_most: int) -> int:
    """How many queued jobs an owner has; `at_most` when there are more."""
    return _count_rows(session, select(Job.id).where(Job.state == JobState.QUEUED, Job.owner_id == owner_id), at_most)


def _cached_count(session: Session, name: str, queued: Select[UUID], at_most: int) -> int:
    cache = get_cache_manager()
    cached = cache.get(name)
    if isinstance(cached, int) and cached + CACHE_HEADROOM_JOBS <= at_most:
        return int(cached)
    # The lock is held until the transaction ends, so the next count includes the job that this transaction adds.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    count = _count_rows(session, queued, at_most)
    if count + CACHE_HEADROOM_JOBS <= at_most:
        cache.set(name, count, COUNT_TTL_S)
    return count


def _count_rows(session: Session, queued: Select[UUID], at_most: int) -> int:
    return session.scalar(select(func.count()).select_from(queued.limit(at_most).subquery())) or 0
