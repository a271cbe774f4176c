"""May one more job come in? Caps on what is queued, in all and for one owner."""

from uuid import UUID

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from shared.cache import get_cache_manager
from shared.contracts.jobs import JobState
from shared.db.tables import Job
from shared.errors import OwnerQueueFullError, QueueFullError
from shared.settings import QueueSettings

SPARE = 1000
REMEMBERED_S = 1
"""Counting a long queue takes long, so a count that leaves room for `SPARE` more jobs stands for a second."""


def refuse_when_full(session: Session, owner_id: UUID, settings: QueueSettings) -> None:
    """Near a cap the transactions that would add a job go one by one, so that no number of them exceeds it.

    Raises:
        OwnerQueueFullError, QueueFullError
    """
    queued = select(Job.id).where(Job.state == JobState.QUEUED)
    most = settings.max_queued_per_owner
    if _count(session, f"queued:{owner_id}", queued.where(Job.owner_id == owner_id), most) >= most:
        raise OwnerQueueFullError(queued=most)
    most = settings.max_queued
    if _count(session, "queued", queued, most) >= most:
        raise QueueFullError(queued=most)


def queued_of(session: Session, owner_id: UUID, *, at_most: int) -> int:
    """An owner's queued jobs, counted no further than `at_most`."""
    return _counted(session, select(Job.id).where(Job.state == JobState.QUEUED, Job.owner_id == owner_id), at_most)


def _count(session: Session, name: str, queued: Select[UUID], at_most: int) -> int:
    cache = get_cache_manager()
    known = cache.get(name)
    if known is not None and known + SPARE <= at_most:
        return int(known)
    # Held until the end of the transaction, by when the job is there to be counted.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))
    count = _counted(session, queued, at_most)
    if count + SPARE <= at_most:
        cache.set(name, count, REMEMBERED_S)
    return count


def _counted(session: Session, queued: Select[UUID], at_most: int) -> int:
    return session.scalar(select(func.count()).select_from(queued.limit(at_most).subquery())) or 0
