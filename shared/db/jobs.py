"""Every change of a job's state, each one statement that says what it expects to find.

A worker's writes name its attempt, so that of two attempts at one job only the one that owns it can publish a result:
a write that returns False found the job canceled, finished or taken over, and its caller discards what it has.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, text, tuple_, update
from sqlalchemy.orm import Session, aliased

from shared.contracts.bulks import BulkState
from shared.contracts.generation import GenerationParameters, Webhook
from shared.contracts.jobs import EventType, JobKind, JobQuery, JobState, Lane
from shared.db import paging, quotas, webhooks
from shared.db.tables import Bulk, Generation, GenerationReference, Job, JobEvent, Owner
from shared.errors import BaseAppException, JobCrashedError, JobStateError, ResourceNotFoundError
from shared.metrics import JOBS_FINISHED

FINAL = [state for state in JobState if state.is_final]


@dataclass(frozen=True)
class Claim:
    """The right to write to a job: holds as long as no other attempt takes it over."""

    job_id: UUID
    attempt: int


@dataclass(frozen=True)
class Output:
    """One stored image of a finished attempt, about to be published with its job."""

    generation: Generation
    references: Sequence[GenerationReference]


@dataclass(frozen=True)
class DeadJob:
    job: Job
    owner: str
    tried_again: bool


# --- submit -------------------------------------------------------------------------------------------------------


def insert(
    session: Session,
    *,
    owner_id: UUID,
    kind: JobKind,
    lane: Lane,
    parameters: GenerationParameters,
    metadata: dict[str, str],
    timeout_s: float,
    expires_in_s: float | None = None,
    webhook: Webhook | None = None,
    retry_of: UUID | None = None,
    replay_of: UUID | None = None,
) -> Job:
    """A new `queued` job and the first event of its story.

    timeout_s: longest run from the start of the model's work. expires_in_s: longest wait for it.
    """
    job = Job(
        id=uuid4(),
        owner_id=owner_id,
        kind=kind,
        state=JobState.QUEUED,
        lane=lane.rank,
        model=parameters.model,
        images=len(parameters.seeds),
        timeout_s=timeout_s,
        expires_at=None if expires_in_s is None else func.now() + timedelta(seconds=expires_in_s),
        parameters=parameters.model_dump(mode="json"),
        job_metadata=metadata,
        webhook=None if webhook is None else webhook.model_dump(mode="json"),
        retry_of=retry_of,
        replay_of=replay_of,
        last_seq=1,
    )
    session.add(job)
    session.flush()  # the event's foreign key needs the row
    _tell(session, EventType.QUEUED, {}, [job])
    session.flush()
    return job


def insert_retry(session: Session, old: Job) -> Job:
    """A new job that does the same as one that ended without success.

    Raises:
        JobStateError: the job has not ended, or has succeeded.
    """
    if old.state == JobState.SUCCEEDED or not JobState(old.state).is_final:
        raise JobStateError("Only a job that ended without success can be tried again.", state=old.state)
    return insert(
        session,
        owner_id=old.owner_id,
        kind=JobKind(old.kind),
        lane=list(Lane)[old.lane],
        parameters=GenerationParameters.model_validate(old.parameters),
        metadata=old.job_metadata,
        timeout_s=old.timeout_s,
        webhook=None if old.webhook is None else Webhook.model_validate(old.webhook),
        retry_of=old.id,
        replay_of=old.replay_of,
    )


# --- reading ------------------------------------------------------------------------------------------------------


def get(session: Session, job_id: UUID, *, owner_id: UUID) -> Job:
    """
    Raises:
        ResourceNotFoundError: there is none, or it belongs to somebody else.
    """
    job = session.scalar(select(Job).where(Job.id == job_id, Job.owner_id == owner_id))
    if job is None:
        raise ResourceNotFoundError("There is no such job.", job_id=str(job_id))
    return job


def state_of(session: Session, job_id: UUID) -> str | None:
    """The job's state alone, for those who look often; None when the job is gone."""
    return session.scalar(select(Job.state).where(Job.id == job_id))


def page(session: Session, query: JobQuery, *, owner_id: UUID) -> tuple[list[Job], str | None]:
    """An owner's jobs, newest first."""
    statement = select(Job).where(Job.owner_id == owner_id)
    if query.state is not None:
        statement = statement.where(Job.state == query.state)
    if query.kind is not None:
        statement = statement.where(Job.kind == query.kind)
    if query.bulk_id is not None:
        statement = statement.where(Job.bulk_id == query.bulk_id)
    if query.created_after is not None:
        statement = statement.where(Job.created_at >= query.created_after)
    if query.created_before is not None:
        statement = statement.where(Job.created_at < query.created_before)
    return paging.page(session, statement, created_at=Job.created_at, id=Job.id, cursor=query.cursor, limit=query.limit)


def events(session: Session, job_id: UUID, *, after: int, limit: int = 1000) -> list[JobEvent]:
    """The job's events with `seq > after`, in order."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after)
    return list(session.scalars(statement.order_by(JobEvent.seq).limit(limit)))


# --- one attempt --------------------------------------------------------------------------------------------------


def claim(session: Session, job_id: UUID, *, worker: str, lease_s: float) -> tuple[Claim, Job] | None:
    """Take a queued job for `lease_s` seconds; None when it is owned, finished, unknown, paused or not due yet."""
    taken = _transition(
        session,
        Job.id == job_id,
        Job.state == JobState.QUEUED,
        or_(Job.run_after.is_(None), Job.run_after <= func.now()),
        _not_expired(),
        _bulk_runs(),
        event=EventType.STARTED,
        data={"worker": worker},
        state=JobState.PROCESSING,
        attempt=Job.attempt + 1,
        worker=worker,
        model_started=False,
        lease_until=_from_now(lease_s),
        started_at=func.coalesce(Job.started_at, func.now()),
        safety=None,
        error=None,
        run_after=None,
    )
    if not taken:
        return None
    job = session.get_one(Job, job_id, populate_existing=True)
    return Claim(job.id, job.attempt), job


def renew(session: Session, claims: Iterable[Claim], *, lease_s: float) -> set[UUID]:
    """Extend the leases of these attempts; the ids still owned."""
    statement = update(Job).where(_owned(claims)).values(lease_until=_from_now(lease_s)).returning(Job.id)
    return set(session.scalars(statement))


def still_owned(session: Session, claims: Iterable[Claim]) -> set[UUID]:
    """Which of these attempts may go on; the others were canceled or taken over."""
    return set(session.scalars(select(Job.id).where(_owned(claims))))


def resolved(
    session: Session, claim: Claim, resolution: dict[str, Any], *, safety: dict[str, Any] | None = None
) -> bool:
    """Record what the attempt will do: the mode and the references, and why; and that a policy lets it."""
    owned = _owned([claim])
    return bool(
        _transition(session, owned, event=EventType.RESOLVED, data=resolution, resolution=resolution, safety=safety)
    )


def moderated(session: Session, claim: Claim, data: dict[str, Any], *, safety: dict[str, Any]) -> bool:
    """Tell what a policy has just decided. safety: all that it has decided about the job so far."""
    return bool(_transition(session, _owned([claim]), event=EventType.MODERATED, data=data, safety=safety))


def degraded(session: Session, claim: Claim, data: dict[str, Any]) -> bool:
    """Tell that the attempt drew in a way that changes pixels, because otherwise memory would not have sufficed."""
    return bool(_transition(session, _owned([claim]), event=EventType.DEGRADED, data=data))


def model_started(session: Session, claim: Claim) -> bool:
    """From here on a lost lease counts as a crash, and the job's wait is over: False also when that took too long."""
    statement = update(Job).where(_owned([claim]), _not_expired()).values(model_started=True).returning(Job.id)
    return session.scalar(statement) is not None


def expire(session: Session, claim: Claim) -> bool:
    """End an attempt whose model work did not begin in time; False when its time is not over."""
    return _end(session, and_(_owned([claim]), ~_not_expired()), JobState.EXPIRED, data={})


def finish(session: Session, claim: Claim, outputs: Sequence[Output], *, timings: dict[str, float]) -> bool:
    """Publish the outputs and end the job `succeeded`, all or nothing."""
    done = _end(
        session,
        _owned([claim]),
        JobState.SUCCEEDED,
        data={"outputs": [str(output.generation.id) for output in outputs]},
        timings=timings,
    )
    if done:
        session.add_all(output.generation for output in outputs)
        session.flush()  # references need their generation's row
        session.add_all(reference for output in outputs for reference in output.references)
    return done


def fail(session: Session, claim: Claim, error: BaseAppException) -> bool:
    return _end(session, _owned([claim]), JobState.FAILED, data=error.body(), error=error.body())


def retry_later(
    session: Session, claim: Claim, error: BaseAppException, *, delay_s: float, most: int
) -> JobState | None:
    """After a passing fault: back to the queue with a doubled wait, or `failed` when that happened `most` times.

    What has become of the job; None when it was not owned any more.
    """
    job = session.scalar(select(Job).where(_owned([claim])).with_for_update())
    if job is None:
        return None
    if job.transient_retries >= most:
        return JobState.FAILED if fail(session, claim, error) else None
    wait_s = delay_s * 2**job.transient_retries
    requeued = _requeue(
        session,
        _owned([claim]),
        data={"reason": error.code, "wait_s": wait_s},
        transient_retries=Job.transient_retries + 1,
        run_after=_from_now(wait_s),
    )
    return JobState.QUEUED if requeued else None


def hand_back(session: Session, claims: Iterable[Claim]) -> int:
    """Return unfinished attempts to the queue at once, as on shutdown; how many were still owned."""
    return len(_requeue(session, _owned(claims), data={"reason": "shutdown"}))


# --- what users and operators do ----------------------------------------------------------------------------------


def cancel(session: Session, job_id: UUID, *, owner_id: UUID) -> bool:
    """End a job that has not ended; False when it had. A running attempt finds out when it looks or writes next."""
    return _end(
        session,
        and_(Job.id == job_id, Job.owner_id == owner_id, Job.state.not_in(FINAL)),
        JobState.CANCELED,
        data={},
    )


def revoke(session: Session, job_ids: Collection[UUID]) -> list[UUID]:
    """End those of these jobs that have not ended, whoever owns them, as an operator does; their ids."""
    canceled = and_(Job.id.in_(job_ids), Job.state.not_in(FINAL))
    return _end_all(session, canceled, JobState.CANCELED, data={"reason": "revoked"})


def cancel_bulk(session: Session, bulk_id: UUID) -> list[UUID]:
    """End every job of a bulk that has not ended; their ids."""
    return _end_all(session, and_(Job.bulk_id == bulk_id, Job.state.not_in(FINAL)), JobState.CANCELED, data={})


def delete(session: Session, job: Job) -> None:
    """Remove an ended job with its outputs; the sweeper removes their bytes.

    Raises:
        JobStateError: the job has not ended.
    """
    if not JobState(job.state).is_final:
        raise JobStateError("A job can be deleted once it has ended: cancel it first.", state=job.state)
    session.delete(job)


def dead(session: Session, *, limit: int) -> list[DeadJob]:
    """Jobs that killed their process too often, those that ended last first."""
    again = aliased(Job)
    tried_again = select(again.id).where(again.retry_of == Job.id).exists()
    statement = (
        select(Job, Owner.name, tried_again)
        .join(Owner, Owner.id == Job.owner_id)
        .where(Job.state == JobState.DEAD)
        .order_by(Job.finished_at.desc(), Job.id)
        .limit(limit)
    )
    return [DeadJob(job, owner, retried) for job, owner, retried in session.execute(statement)]


# The models are found by hopping through the index from one to the next, not by looking at every job that waits.
WAITING_MODELS = text(
    """
    with recursive waiting(model) as (
        (select model from jobs where state = 'queued' and published_at is null order by model limit 1)
        union all
        select next.model from waiting cross join lateral (
            select model from jobs
            where state = 'queued' and published_at is null and model > waiting.model
            order by model limit 1
        ) next
    )
    select model from waiting where exists (
        select from jobs
        where jobs.model = waiting.model and state = 'queued' and published_at is null
            and (run_after is null or run_after <= now())
    )
    """
)


# --- what the reconciler does -------------------------------------------------------------------------------------


def take_back_expired(session: Session, *, max_crashes: int, limit: int = 100) -> list[UUID]:
    """Attempts whose worker went silent: back to the queue, or `dead` after `max_crashes` during model work."""
    lost = session.execute(
        select(Job.id, Job.attempt, Job.crashes, Job.model_started)
        .where(Job.state == JobState.PROCESSING, Job.lease_until < func.clock_timestamp())
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    for job in lost:
        owned = _owned([Claim(job.id, job.attempt)])
        crashes = job.crashes + int(job.model_started)
        if crashes >= max_crashes:
            error = JobCrashedError(crashes=crashes).body()
            _end(session, owned, JobState.DEAD, data=error, error=error, crashes=crashes)
        else:
            _requeue(session, owned, data={"reason": "lease_expired", "crashes": crashes}, crashes=crashes)
    return [job.id for job in lost]


def end_expired(session: Session, *, limit: int = 1000) -> list[UUID]:
    """Queued jobs that have waited longer than they allow: `expired`."""
    overdue = select(Job.id).where(Job.state == JobState.QUEUED, Job.expires_at <= func.now())
    overdue = overdue.order_by(Job.expires_at).limit(limit).with_for_update(skip_locked=True)
    return _end_all(session, Job.id.in_(overdue.scalar_subquery()), JobState.EXPIRED, data={})


def published(session: Session, *, older_than_s: float) -> list[tuple[UUID, str]]:
    """Jobs that should be in the broker or about to be claimed: (id, model)."""
    statement = select(Job.id, Job.model).where(
        Job.state == JobState.QUEUED, Job.published_at < func.now() - timedelta(seconds=older_than_s)
    )
    return [(row.id, row.model) for row in session.execute(statement)]


def unpublish(session: Session, job_ids: Sequence[UUID]) -> int:
    """Give jobs that the broker lost their place in the queue again; how many were not claimed in the meantime."""
    statement = (
        update(Job)
        .where(Job.id.in_(job_ids), Job.state == JobState.QUEUED)
        .values(published_at=None, published_lane=None)
        .returning(Job.id)
    )
    return len(session.scalars(statement).all())


def queued_by_model(session: Session) -> dict[str, int]:
    """How many jobs wait, published or not."""
    statement = select(Job.model, func.count()).where(Job.state == JobState.QUEUED).group_by(Job.model)
    return {str(model): count for model, count in session.execute(statement)}


def waiting_models(session: Session) -> list[str]:
    """Models with jobs that could be published now."""
    return list(session.scalars(WAITING_MODELS))


# --- the statements behind them -----------------------------------------------------------------------------------


def _owned(claims: Iterable[Claim]) -> ColumnElement[bool]:
    pairs = [(claim.job_id, claim.attempt) for claim in claims]
    return and_(tuple_(Job.id, Job.attempt).in_(pairs), Job.state == JobState.PROCESSING)


def _from_now(seconds: float) -> ColumnElement[Any]:
    return func.clock_timestamp() + timedelta(seconds=seconds)


def _not_expired() -> ColumnElement[bool]:
    return or_(Job.expires_at.is_(None), Job.expires_at > func.clock_timestamp())


def _bulk_runs() -> ColumnElement[bool]:
    """The job belongs to no bulk, or to one that is not paused or over. `shared.db.dispatch` asks the same in SQL."""
    return or_(Job.bulk_id.is_(None), exists().where(Bulk.id == Job.bulk_id, Bulk.state == BulkState.RUNNING))


def _end(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> bool:
    return bool(_end_all(session, condition, state, data=data, **values))


def _end_all(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> list[UUID]:
    ended = _transition(
        session,
        condition,
        event=EventType(state.value),
        data=data,
        state=state,
        lease_until=None,
        published_at=None,
        published_lane=None,
        finished_at=func.now(),
        **values,
    )
    JOBS_FINISHED.labels(state.value).inc(len(ended))
    if ended and state is not JobState.SUCCEEDED:
        quotas.give_back(session, ended)
    return ended


def _requeue(session: Session, condition: ColumnElement[bool], *, data: dict[str, Any], **values: Any) -> list[UUID]:
    return _transition(
        session,
        condition,
        event=EventType.REQUEUED,
        data=data,
        state=JobState.QUEUED,
        lease_until=None,
        published_at=None,
        published_lane=None,
        worker=None,
        **values,
    )


def _transition(
    session: Session, *conditions: ColumnElement[bool], event: EventType, data: dict[str, Any], **values: Any
) -> list[UUID]:
    """Change the rows that are as expected and add to each its event, numbered by that same statement; their ids."""
    statement = (
        update(Job)
        .where(*conditions)
        .values(**values, last_seq=Job.last_seq + 1)
        .returning(Job.id, Job.owner_id, Job.last_seq, Job.webhook)
        .execution_options(synchronize_session=False)
    )
    rows = session.execute(statement).all()
    _tell(session, event, data, rows)
    return [row.id for row in rows]


def _tell(session: Session, event: EventType, data: dict[str, Any], rows: Iterable[Any]) -> None:
    """Add the event to each job's story, and to the outbox of those whose webhook asks for it."""
    for row in rows:
        session.add(JobEvent(job_id=row.id, seq=row.last_seq, type=event, data=data))
        if row.webhook is not None and event in row.webhook["events"]:
            session.flush()  # the delivery's foreign key needs the event
            webhooks.enqueue(session, row.id, row.last_seq, owner_id=row.owner_id, url=row.webhook["url"])
