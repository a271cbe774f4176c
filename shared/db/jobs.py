"""Jobs outside of their attempts: submit, read, cancel and delete them, and look after those that wait."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID, uuid4

import pydantic
from sqlalchemy import TextualSelect, Uuid, and_, bindparam, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session, aliased

from shared import tracing
from shared.contracts.generation import GenerationParameters, Webhook
from shared.contracts.jobs import EventType, JobKind, JobQuery, JobState, Lane
from shared.db import attempts, leasing, paging, quotas, transitions, webhooks
from shared.db.tables import Job, JobEvent, Owner, split_parameters
from shared.errors import (
    JobStateError,
    JobUnreadableError,
    ModelNotFoundError,
    ReferenceDeletedError,
    ResourceNotFoundError,
)
from shared.settings import LimitSettings

FINAL = [state for state in JobState if state.is_final]


@dataclass(frozen=True)
class DeadJob:
    """A `dead` job, the name of its owner, and whether a later job retries it."""

    job: Job
    owner: str
    retried: bool


def _insert_statement(reservation: str) -> TextualSelect:
    statement = f"""
        with {reservation}, event as (
            insert into job_events (job_id, seq, type) select :id, 1, 'queued' from reservation
        )
        insert into jobs (
            id, owner_id, kind, lane, model, images, quota_day, timeout_s, expires_at, parameters, new_parameters,
            metadata, webhook, retry_of, replay_of, trace_context, last_seq
        )
        select :id, :owner_id, :kind, :lane, :model, :images, reservation.day, :timeout_s,
            now() + cast(:expires_in_s as float) * interval '1 second', :parameters, :new_parameters, :metadata,
            :webhook, :retry_of, :replay_of, :trace_context, 1
        from reservation
        returning {", ".join(f"jobs.{column.name}" for column in Job.__table__.c)}
    """
    ids = (bindparam(name, type_=Uuid) for name in ("id", "owner_id", "retry_of", "replay_of"))
    objects = (
        bindparam(name, type_=JSONB(none_as_null=True))
        for name in ("parameters", "new_parameters", "metadata", "webhook", "trace_context")
    )
    return text(statement).bindparams(*ids, *objects).columns(*Job.__table__.c)


INSERT = _insert_statement(quotas.RESERVATION)
INSERT_UNCOUNTED = _insert_statement("reservation as (select cast(null as date) as day)")


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
    limits: LimitSettings | None = None,
) -> Job:
    """Add a `queued` job and its first event, in one statement.

    timeout_s: the longest run, from the start of the model's work. expires_in_s: the longest wait until then.
    limits: count the images towards the owner's quota of today. The owner's other submits then wait for the end of
    this transaction, so call it late.

    Raises:
        QuotaExceededError: with `limits`, the images exceed the quota.
    """
    stored, new = split_parameters(parameters.model_dump(mode="json"))
    values = {
        "id": uuid4(),
        "owner_id": owner_id,
        "kind": kind.value,
        "lane": lane.rank,
        "model": parameters.model,
        "images": len(parameters.seeds),
        "timeout_s": timeout_s,
        "expires_in_s": expires_in_s,
        "parameters": stored,
        "new_parameters": new,
        "metadata": metadata,
        "webhook": None if webhook is None else webhook.model_dump(mode="json"),
        "retry_of": retry_of,
        "replay_of": replay_of,
        "trace_context": tracing.current(),
    }
    if limits is None:
        statement = INSERT_UNCOUNTED
    else:
        statement, values["daily_images"] = INSERT, limits.daily_images
    job: Job | None = session.scalar(select(Job).from_statement(statement), values)
    if job is None:
        assert limits is not None
        raise quotas.exceeded(session, owner_id, len(parameters.seeds), limits)
    if webhook is not None and EventType.QUEUED in webhook.events:
        webhooks.enqueue(session, job.id, job.last_seq, owner_id=owner_id, url=webhook.url)
    return job


def insert_retry(session: Session, old: Job, *, limits: LimitSettings | None = None) -> Job:
    """Add a job with the parameters of `old`, which ended without success. limits: as in `insert`.

    Raises:
        JobStateError: `old` has not ended, or has succeeded.
        JobUnreadableError: another release wrote `old`, in a form that this release cannot read.
    """
    if old.state == JobState.SUCCEEDED or not JobState(old.state).is_final:
        raise JobStateError("Only a job that ended without success can be retried.", state=old.state)
    try:
        parameters = GenerationParameters.model_validate(old.parameters)
        webhook = None if old.webhook is None else Webhook.model_validate(old.webhook)
    except pydantic.ValidationError as error:
        raise JobUnreadableError from error
    return insert(
        session,
        owner_id=old.owner_id,
        kind=JobKind(old.kind),
        lane=list(Lane)[old.lane],
        parameters=parameters,
        metadata=old.job_metadata,
        timeout_s=old.timeout_s,
        webhook=webhook,
        retry_of=old.id,
        replay_of=old.replay_of,
        limits=limits,
    )


def get(session: Session, job_id: UUID, *, owner_id: UUID, lock: bool = False) -> Job:
    """The job, if it belongs to `owner_id`.

    lock: no other transaction changes or deletes the job until this one ends.

    Raises:
        ResourceNotFoundError: the job does not exist, or belongs to another owner.
    """
    statement = select(Job).where(Job.id == job_id, Job.owner_id == owner_id)
    job = session.scalar(statement.with_for_update() if lock else statement)
    if job is None:
        raise ResourceNotFoundError("There is no such job.", job_id=str(job_id))
    return job


def find_state(session: Session, job_id: UUID) -> str | None:
    """Only the job's state, for callers that poll; None when the job was deleted."""
    return session.scalar(select(Job.state).where(Job.id == job_id))


def list_states(session: Session, job_ids: Collection[UUID]) -> dict[UUID, tuple[JobState, int]]:
    """The state of each job and the number of its latest event. A deleted job is left out."""
    statement = select(Job.id, Job.state, Job.last_seq).where(Job.id.in_(job_ids))
    return {row.id: (JobState(row.state), row.last_seq) for row in session.execute(statement)}


def list_by_id(session: Session, job_ids: Collection[UUID]) -> Sequence[Job]:
    """These jobs, in any order and of any owner."""
    return session.scalars(select(Job).where(Job.id.in_(job_ids))).all()


def list_page(session: Session, query: JobQuery, *, owner_id: UUID) -> tuple[list[Job], str | None]:
    """A page of an owner's jobs, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
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
    return paging.fetch_page(
        session, statement, created_at=Job.created_at, id=Job.id, cursor=query.cursor, limit=query.limit
    )


def list_events(session: Session, job_id: UUID, *, after: int, limit: int = 1000) -> list[JobEvent]:
    """Up to `limit` events of the job with `seq > after`, in order."""
    statement = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.seq > after)
    return list(session.scalars(statement.order_by(JobEvent.seq).limit(limit)))


def cancel(session: Session, job_id: UUID, *, owner_id: UUID) -> bool:
    """Cancel a job; False when it has already ended. A running attempt notices at its next check or write."""
    return transitions.end(
        session,
        and_(Job.id == job_id, Job.owner_id == owner_id, Job.state.not_in(FINAL)),
        JobState.CANCELED,
        data={},
    )


def revoke(session: Session, job_ids: Collection[UUID]) -> list[UUID]:
    """Cancel those of `job_ids` that have not ended, of any owner; return their ids. For operators."""
    canceled = leasing.in_lock_order(Job, and_(Job.id.in_(job_ids), Job.state.not_in(FINAL)))
    return transitions.end_all(session, canceled, JobState.CANCELED, data={"reason": "revoked"})


def cancel_bulk(session: Session, bulk_id: UUID) -> list[UUID]:
    """Cancel every job of a bulk that has not ended; return their ids."""
    canceled = leasing.in_lock_order(Job, and_(Job.bulk_id == bulk_id, Job.state.not_in(FINAL)))
    return transitions.end_all(session, canceled, JobState.CANCELED, data={})


def delete(session: Session, job: Job) -> None:
    """Delete an ended job with its outputs. The sweeper deletes the bytes of the outputs later.

    Raises:
        JobStateError: the job has not ended.
    """
    if not JobState(job.state).is_final:
        raise JobStateError("A job can be deleted once it has ended: cancel it first.", state=job.state)
    session.delete(job)


def fail_using(session: Session, image_ids: Collection[UUID]) -> list[UUID]:
    """End running jobs that draw from one of these images, which were withdrawn, as `failed`; return their ids.

    Queued jobs do not find the images any more. `finish` refuses a job that has not recorded its references yet.
    """
    used = func.jsonb_array_elements(Job.resolution["references"], type_=JSONB).column_valued("used")
    ids = [str(image_id) for image_id in image_ids]
    draws = select(used).where(used["used"].as_boolean(), used["image_id"].astext.in_(ids))
    error = ReferenceDeletedError(attempts.WITHDRAWN).body()
    running = leasing.in_lock_order(Job, and_(Job.state == JobState.PROCESSING, draws.exists()))
    return transitions.end_all(session, running, JobState.FAILED, data=error, error=error)


def list_dead(session: Session, *, limit: int) -> list[DeadJob]:
    """Jobs that are `dead` because they crashed their worker too often, latest first."""
    again = aliased(Job)
    retried = select(again.id).where(again.retry_of == Job.id).exists()
    statement = (
        select(Job, Owner.name, retried)
        .join(Owner, Owner.id == Job.owner_id)
        .where(Job.state == JobState.DEAD)
        .order_by(Job.finished_at.desc(), Job.id)
        .limit(limit)
    )
    return [DeadJob(*row) for row in session.execute(statement)]


# The recursive part finds each model with one index look-up, instead of reading every waiting job.
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


def end_expired(session: Session, *, limit: int = 1000) -> list[UUID]:
    """End queued jobs past their deadline as `expired`; return their ids."""
    overdue = select(Job.id).where(Job.state == JobState.QUEUED, Job.expires_at <= func.now())
    overdue = overdue.order_by(Job.expires_at).limit(limit).with_for_update(skip_locked=True)
    return transitions.end_all(session, Job.id.in_(overdue.scalar_subquery()), JobState.EXPIRED, data={})


def fail_unserved(session: Session, model: str, *, limit: int) -> list[UUID]:
    """End queued jobs of a `model` that is gone as `failed`; return their ids. Jobs of paused bulks stay queued."""
    message = f"The settings do not name the model {model!r} any more, and no worker serves it."
    error = ModelNotFoundError(message, model=model).body()
    waiting = select(Job.id).where(Job.model == model, Job.state == JobState.QUEUED, transitions.bulk_runs())
    waiting = waiting.limit(limit).with_for_update(skip_locked=True)
    return transitions.end_all(session, Job.id.in_(waiting.scalar_subquery()), JobState.FAILED, data=error, error=error)


def list_published(session: Session, *, older_than_s: float) -> list[tuple[UUID, str]]:
    """Jobs published more than `older_than_s` ago and not yet claimed, as (id, model)."""
    statement = select(Job.id, Job.model).where(
        Job.state == JobState.QUEUED, Job.published_at < func.now() - timedelta(seconds=older_than_s)
    )
    return [(row.id, row.model) for row in session.execute(statement)]


def unpublish(session: Session, job_ids: Sequence[UUID]) -> int:
    """Mark queued jobs as not published, so that they are dispatched again; return how many were still queued."""
    statement = (
        update(Job)
        .where(leasing.in_lock_order(Job, and_(Job.id.in_(job_ids), Job.state == JobState.QUEUED)))
        .values(published_at=None, published_lane=None)
        .returning(Job.id)
    )
    return len(session.scalars(statement).all())


def count_queued_by_model(session: Session) -> dict[str, int]:
    """How many jobs of each model are queued, published or not."""
    statement = select(Job.model, func.count()).where(Job.state == JobState.QUEUED).group_by(Job.model)
    return {str(model): count for model, count in session.execute(statement)}


def list_waiting_models(session: Session) -> list[str]:
    """Models with a job that could be published now."""
    return list(session.scalars(WAITING_MODELS))
