"""Dispatch: chooses which waiting jobs of a model go to the broker next, by lane, fair share of owners, and age.

Only a small window of each model's jobs is published, that is, has a message in the broker. The other queued jobs
wait in Postgres. The broker serves the jobs of one lane in the order of publishing, and a published job cannot be
moved. With a small window, a deep queue neither fills the broker nor delays an interactive user. See
docs/decisions/0007-which-waiting-job-is-published-next.md.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy import Row, and_, case, func, or_, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState, Lane
from shared.db import bulks, leasing
from shared.db.tables import Job

LOWEST_LANE = len(Lane) - 1

# The recursive part finds the distinct (lane, owner) pairs with one index look-up each (a "loose index scan"). For each
# pair, only as many of its oldest jobs are read as could be chosen. The cost depends on the number of waiting owners
# and of free slots, not on the number of jobs.
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
        order by created_at, id limit (cast(:free_slots as integer[]))[waiting.lane + 1]
    ) oldest
    """
)


@dataclass(frozen=True)
class DispatchedJob:
    """A job marked as published.

    lane: its rank in the broker; 0, the highest priority, if its lane starves. trace_context: see `shared.tracing`.
    """

    job_id: UUID
    lane: int
    trace_context: dict[str, str] | None = None


def mark_next_published(
    session: Session, model: str, *, window: int, starvation_timeout_s: float
) -> list[DispatchedJob]:
    """Mark the next jobs of `model` as published and return them, the first to run first.

    window: limit on published, unclaimed jobs, counted over a lane and all higher-priority lanes. Published jobs of
    lower-priority lanes do not count, so they never take the slots of a higher-priority lane. One job of each starving
    lane may exceed the limit.

    Within a lane, the job of the owner with the fewest images in flight goes first, then the oldest. In flight means
    published or running. A lane with no job in flight starves when one of its jobs has waited for
    `starvation_timeout_s`. One such job is published in the highest-priority lane, before all others.

    First, running bulks get jobs for their next items: see `bulks.top_up`. The caller commits, then publishes. If it
    crashes in between, the reconciler finds the jobs missing from the broker and makes them wait again.
    """
    # One dispatch per model at a time: two at once would see the same free slots and fill them twice. The key keeps its
    # old name, "feed", because during an upgrade two releases share this lock.
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
    # At least one candidate per lane is read, even without a free slot, because the lane may be starving.
    free_slots = [max(window - sum(published[rank] for rank in range(lane + 1)), 1) for lane in range(LOWEST_LANE + 1)]
    candidates = session.execute(CANDIDATES, {"model": model, "free_slots": free_slots}).all()
    chosen = _choose(candidates, window, published, lanes_in_flight, images, starvation_timeout_s)
    return _mark_published(session, chosen)


def _choose(
    candidates: Sequence[Row[tuple[UUID, int, UUID, int, float]]],
    window: int,
    published: Counter[int],
    lanes_in_flight: set[int],
    images: Counter[UUID],
    starvation_timeout_s: float,
) -> list[DispatchedJob]:
    chosen: list[DispatchedJob] = []
    remaining = list(candidates)

    def take(candidate: Row[tuple[UUID, int, UUID, int, float]], lane: int) -> None:
        remaining.remove(candidate)
        chosen.append(DispatchedJob(candidate.id, lane))
        published[lane] += 1
        images[candidate.owner_id] += candidate.images

    for lane in range(1, LOWEST_LANE + 1):
        starving = [c for c in remaining if c.lane == lane and c.waited_s >= starvation_timeout_s]
        if starving and lane not in lanes_in_flight:
            take(min(starving, key=lambda c: (images[c.owner_id], -c.waited_s)), Lane.HIGH.rank)
    while remaining:
        best = min(remaining, key=lambda c: (c.lane, images[c.owner_id], -c.waited_s, c.id))
        if sum(published[lane] for lane in range(best.lane + 1)) >= window:
            break  # the window is full for the lower-priority lanes too
        take(best, best.lane)
    return chosen


def _mark_published(session: Session, chosen: Sequence[DispatchedJob]) -> list[DispatchedJob]:
    if not chosen:
        return []
    lanes = {each.job_id: each.lane for each in chosen}
    waiting = and_(Job.id.in_(lanes), Job.state == JobState.QUEUED, Job.published_at.is_(None))
    statement = (
        update(Job)
        .where(leasing.in_lock_order(Job, waiting))
        .values(published_at=func.now(), published_lane=case(lanes, value=Job.id))
        .returning(Job.id, Job.trace_context)
        .execution_options(synchronize_session=False)
    )
    marked = {row.id: row.trace_context for row in session.execute(statement)}
    return [replace(each, trace_context=marked[each.job_id]) for each in chosen if each.job_id in marked]
