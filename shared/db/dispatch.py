"""Which waiting jobs go to the broker next: by lane, then fair share of owners, then age.

Each model has a small published window. What waits behind it stays in SQL, so that a hundred thousand bulk jobs
neither flood the broker nor delay an interactive user: of one lane, what is published can no longer be overtaken.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Row, func, or_, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState, Lane
from shared.db import bulks
from shared.db.tables import Job

LOWEST = len(Lane) - 1

# The distinct (lane, owner) pairs are found by hopping through the index (a "loose index scan"), and of each only as
# many of its oldest jobs are read as could be chosen: the cost follows the number of owners who wait and the room there
# is, not the number of jobs.
CANDIDATES = text(
    """
    with recursive waiting(lane, owner_id) as (
        (
            select lane, owner_id from jobs
            where model = :model and state = 'queued' and published_at is null
            order by lane, owner_id limit 1
        )
        union all
        select next.lane, next.owner_id
        from waiting cross join lateral (
            select lane, owner_id from jobs
            where model = :model and state = 'queued' and published_at is null
                and (lane, owner_id) > (waiting.lane, waiting.owner_id)
            order by lane, owner_id limit 1
        ) next
    )
    select oldest.* from waiting cross join lateral (
        select id, lane, owner_id, images, extract(epoch from now() - created_at) as waited_s from jobs
        where model = :model and state = 'queued' and published_at is null
            and lane = waiting.lane and owner_id = waiting.owner_id
            and (run_after is null or run_after <= now())
            and (expires_at is null or expires_at > now())
            and (bulk_id is null or exists (select from bulks where bulks.id = bulk_id and bulks.state = 'running'))
        order by created_at, id limit (cast(:rooms as integer[]))[waiting.lane + 1]
    ) oldest
    """
)


@dataclass(frozen=True)
class Published:
    """A job marked as published. `lane` is its priority in the broker; a promoted job has a better one than its own."""

    job_id: UUID
    lane: int


def next_jobs(session: Session, model: str, *, window: int, starving_s: float) -> list[Published]:
    """Mark the next jobs of `model` as published and return them, the first to go first.

    At most `window` unclaimed jobs of a lane and the lanes above it are out at a time, so a better lane always finds
    room. Of one lane, the owner with the fewest images in flight goes first. A lane that has waited for `starving_s`
    with nothing in flight gets one job published ahead of all others: a steady stream above it cannot starve it.

    The caller commits, then publishes. A crash in between is repaired by the reconciler, which finds the jobs absent
    from the broker.
    """
    # One feeder per model at a time: two would each see the same room and fill it twice.
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"feed:{model}", 0))))
    bulks.top_up(session, model, window=window)
    in_flight = session.execute(
        select(Job.owner_id, Job.lane, Job.published_lane, Job.state, func.count(), func.sum(Job.images))
        .where(
            Job.model == model,
            or_(Job.state == JobState.PROCESSING, (Job.state == JobState.QUEUED) & Job.published_at.is_not(None)),
        )
        .group_by(Job.owner_id, Job.lane, Job.published_lane, Job.state)
    ).all()
    published, lanes_in_flight, images = Counter[int](), set[int](), Counter[UUID]()
    for owner_id, lane, published_lane, state, jobs, job_images in in_flight:
        lanes_in_flight.add(lane)
        images[owner_id] += job_images
        if state == JobState.QUEUED and published_lane is not None:
            published[published_lane] += jobs
    if published[Lane.HIGH.rank] >= window:
        return []
    # One at least, of every lane: it may starve.
    rooms = [max(window - sum(published[better] for better in range(lane + 1)), 1) for lane in range(LOWEST + 1)]
    candidates = session.execute(CANDIDATES, {"model": model, "rooms": rooms}).all()
    chosen = _choose(candidates, window, published, lanes_in_flight, images, starving_s)
    return _mark(session, chosen)


def _choose(
    candidates: Sequence[Row[tuple[UUID, int, UUID, int, float]]],
    window: int,
    published: Counter[int],
    lanes_in_flight: set[int],
    images: Counter[UUID],
    starving_s: float,
) -> list[Published]:
    chosen: list[Published] = []
    remaining = list(candidates)

    def take(candidate: Row[tuple[UUID, int, UUID, int, float]], lane: int) -> None:
        remaining.remove(candidate)
        chosen.append(Published(candidate.id, lane))
        published[lane] += 1
        images[candidate.owner_id] += candidate.images

    for lane in range(1, LOWEST + 1):
        starving = [c for c in remaining if c.lane == lane and c.waited_s >= starving_s]
        if starving and lane not in lanes_in_flight:
            take(min(starving, key=lambda c: (images[c.owner_id], -c.waited_s)), Lane.HIGH.rank)
    while remaining:
        best = min(remaining, key=lambda c: (c.lane, images[c.owner_id], -c.waited_s, c.id))
        if sum(published[lane] for lane in range(best.lane + 1)) >= window:
            break  # nor is there room for any lane below
        take(best, best.lane)
    return chosen


def _mark(session: Session, chosen: Sequence[Published]) -> list[Published]:
    by_lane = defaultdict(list)
    for each in chosen:
        by_lane[each.lane].append(each.job_id)
    marked: set[UUID] = set()
    for lane, job_ids in by_lane.items():
        statement = (
            update(Job)
            .where(Job.id.in_(job_ids), Job.state == JobState.QUEUED, Job.published_at.is_(None))
            .values(published_at=func.now(), published_lane=lane)
            .returning(Job.id)
        )
        marked.update(session.scalars(statement))
    return [each for each in chosen if each.job_id in marked]
