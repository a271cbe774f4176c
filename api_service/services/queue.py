"""The queue as people watch it: whether it changed, how many jobs each lane has, and which jobs the workers hold.

Many pages may watch the queue. A process reads it at most once a second for each owner and state, and without news only
every few seconds.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from uuid import UUID

import orjson
from sqlalchemy import func, select

from api_service.http.auth import Caller
from api_service.services import status
from shared.contracts.jobs import JobQuery, JobState, Lane
from shared.db import jobs
from shared.db.session import session_scope
from shared.db.tables import Job
from shared.messaging.job_updates import subscriber
from shared.recent import Recent
from shared.singleton import process_singleton

LOOK_TTL_S = 1.0


@dataclass(frozen=True)
class QueueLook:
    """The first page of an owner's jobs at one moment."""

    changes: int
    """Value of `Subscriber.changes` before the look."""
    digest: bytes
    """It differs when a job came, moved, changed or ended."""
    drawing: tuple[UUID, ...]
    """The jobs whose images a model draws."""


def look(query: JobQuery, *, caller: Caller) -> QueueLook:
    """Return a recent look at the caller's jobs. Viewers of the same jobs share it.

    Raises:
        DatabaseConnectionError: the database does not answer.
    """
    return _recent_looks().get((caller.owner_id, query.state), lambda: _look(query, caller.owner_id))


def _look(query: JobQuery, owner_id: UUID) -> QueueLook:
    changes = subscriber().changes
    places = _recent_places().get("all owners", status.places_before_model)
    with session_scope() as session:
        rows, _ = jobs.list_page(session, query, owner_id=owner_id)
    shown = [(each.id, each.state, each.last_seq, places.get(each.id)) for each in rows]
    drawing = tuple(each.id for each in rows if each.state == JobState.PROCESSING and each.id not in places)
    return QueueLook(changes, hashlib.sha256(orjson.dumps(shown)).digest(), drawing)


@process_singleton
def _recent_looks() -> Recent[QueueLook]:
    return Recent(LOOK_TTL_S)


@process_singleton
def _recent_places() -> Recent[dict[UUID, int]]:
    return Recent(LOOK_TTL_S)


@dataclass(frozen=True)
class QueueNumbers:
    """Counts of the jobs that have not ended."""

    lanes: dict[str, int]
    """Queued jobs by lane. Every lane is there."""
    held: dict[str, int]
    """Jobs that a worker has taken, by its id; only its name before the host if the jobs of one owner are counted."""


def count(*, owner_id: UUID | None) -> QueueNumbers:
    """owner_id: count only the jobs of this owner; `None`: of all."""
    own = [] if owner_id is None else [Job.owner_id == owner_id]
    queued = select(Job.lane, func.count()).where(Job.state == JobState.QUEUED, *own).group_by(Job.lane)
    taken = select(Job.worker, func.count()).where(Job.state == JobState.PROCESSING, *own).group_by(Job.worker)
    with session_scope() as session:
        by_rank = {int(rank): number for rank, number in session.execute(queued)}
        held: Counter[str] = Counter()
        for worker, number in session.execute(taken):
            name = str(worker)
            held[name if owner_id is None else name.partition("@")[0]] += number
    return QueueNumbers({lane.value: by_rank.get(lane.rank, 0) for lane in Lane}, dict(held))
