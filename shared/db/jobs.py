"""Every change of a job's state. Each is one UPDATE whose condition names the state that it expects.

A worker's writes name its attempt, so that only the attempt that owns the job can store a result. When a write returns
False, the job was canceled, has ended, or another attempt owns it. The caller then discards its results.

A running job has a lease, which its worker renews. When the worker stops, the lease expires, and `take_back_expired`
returns the job to the queue.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from uuid import UUID, uuid4

import pydantic
from sqlalchemy import (
    ARRAY,
    BindParameter,
    Boolean,
    ColumnElement,
    Double,
    Integer,
    Row,
    Select,
    TableValuedAlias,
    TextualSelect,
    Update,
    Uuid,
    and_,
    any_,
    bindparam,
    column,
    exists,
    func,
    literal,
    or_,
    select,
    text,
    update,
)
from sqlalchemy import insert as insert_into
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.event import listen
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased
from sqlalchemy.types import TypeEngine

from shared.contracts.bulks import BulkState
from shared.contracts.generation import GenerationParameters, Webhook
from shared.contracts.jobs import EventType, JobKind, JobQuery, JobState, Lane
from shared.db import leasing, paging, quotas, webhooks, withdrawals
from shared.db.tables import Bulk, Job, JobEvent, Output, OutputReference, Owner, split_parameters
from shared.errors import (
    BaseAppException,
    JobCrashedError,
    JobStateError,
    JobUnreadableError,
    ModelNotFoundError,
    ReferenceDeletedError,
    ResourceNotFoundError,
)
from shared.metrics import JOBS_FINISHED
from shared.settings import LimitSettings

FINAL = [state for state in JobState if state.is_final]
WITHDRAWN = "A reference was withdrawn before the job could use it."


@dataclass(frozen=True)
class Claim:
    """The right to write to a job. It holds until another attempt takes the job over."""

    job_id: UUID
    attempt: int


@dataclass(frozen=True)
class ClaimedJob:
    """The columns of a claimed job that its attempt reads."""

    id: UUID
    owner_id: UUID
    model: str
    lane: int
    published_lane: int | None
    images: int
    timeout_s: float
    attempt: int
    crashes: int
    created_at: datetime
    started_at: datetime
    webhook: dict[str, Any] | None
    replay_of: UUID | None
    stored_parameters: dict[str, Any]
    new_parameters: dict[str, Any] | None

    @property
    def parameters(self) -> dict[str, Any]:
        """`GenerationParameters` as JSON."""
        return {**self.stored_parameters, **(self.new_parameters or {})}


CLAIMED_COLUMNS = [field.name for field in fields(ClaimedJob)]


@dataclass(frozen=True, eq=False)
class Resolution:
    """How an attempt has resolved its mode and references, with the content policy's decisions so far."""

    claim: Claim
    resolution: dict[str, Any]
    safety: dict[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class CrashCount:
    """Whether a lease that is lost from here on counts as a crash. It starts no time limit of the job."""

    claim: Claim
    counted: bool


@dataclass(frozen=True, eq=False)
class Failure:
    """The error that ends an attempt as `failed`."""

    claim: Claim
    error: BaseAppException


@dataclass(frozen=True, eq=False)
class Success:
    """The outputs that end an attempt as `succeeded`. timings: seconds by stage."""

    claim: Claim
    outputs: Sequence["StoredOutput"]
    timings: dict[str, float]


@dataclass(frozen=True)
class StoredOutput:
    """One stored image of a finished attempt, whose rows are added when the job succeeds."""

    output: Output
    references: Sequence[OutputReference]


@dataclass(frozen=True)
class DeadJob:
    """A `dead` job, the name of its owner, and whether a later job retries it."""

    job: Job
    owner: str
    retried: bool


# --- submit -------------------------------------------------------------------------------------------------------


def _insert_statement(reservation: str) -> TextualSelect:
    statement = f"""
        with {reservation}, event as (
            insert into job_events (job_id, seq, type) select :id, 1, 'queued' from reservation
        )
        insert into jobs (
            id, owner_id, kind, lane, model, images, quota_day, timeout_s, expires_at, parameters, new_parameters,
            metadata, webhook, retry_of, replay_of, last_seq
        )
        select :id, :owner_id, :kind, :lane, :model, :images, reservation.day, :timeout_s,
            now() + cast(:expires_in_s as float) * interval '1 second', :parameters, :new_parameters, :metadata,
            :webhook, :retry_of, :replay_of, 1
        from reservation
        returning {", ".join(f"jobs.{column.name}" for column in Job.__table__.c)}
    """
    ids = (bindparam(name, type_=Uuid) for name in ("id", "owner_id", "retry_of", "replay_of"))
    objects = (
        bindparam(name, type_=JSONB(none_as_null=True))
        for name in ("parameters", "new_parameters", "metadata", "webhook")
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


# --- reading ------------------------------------------------------------------------------------------------------


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


# --- attempts -----------------------------------------------------------------------------------------------------
#
# A function for several attempts decides on each of them alone. With `wait=False` it leaves out the jobs that another
# transaction has locked, as if their attempts did not own them: see `leasing.in_lock_order`.


def claim_all(
    session: Session, job_ids: Collection[UUID], *, worker: str, lease_s: float, wait: bool = True
) -> dict[UUID, tuple[Claim, ClaimedJob]]:
    """Claim queued jobs for `lease_s` seconds, by id.

    A job is left out when it is owned, ended, expired, unknown or not due yet, or when its bulk does not run.
    """
    values = {"ids": list(job_ids), "worker": worker, "started": {"worker": worker}, "lease_s": lease_s}
    taken = _run(session, _claim_statement(wait=wait), values, event=EventType.STARTED)
    return {
        row.id: (Claim(row.id, row.attempt), ClaimedJob(**{n: getattr(row, n) for n in CLAIMED_COLUMNS}))
        for row in taken
    }


@cache
def _claim_statement(*, wait: bool) -> Select[Any]:
    claimable = and_(
        Job.id == any_(IDS),
        Job.state == JobState.QUEUED,
        or_(Job.run_after.is_(None), Job.run_after <= func.now()),
        _not_expired(),
        _bulk_runs(),
    )
    return _transition_statement(
        leasing.in_lock_order(Job, claimable, wait=wait),
        event=EventType.STARTED,
        data=bindparam("started", type_=JSONB),
        returning=[getattr(Job, name) for name in CLAIMED_COLUMNS],
        state=JobState.PROCESSING,
        attempt=Job.attempt + 1,
        worker=bindparam("worker"),
        model_started=False,
        lease_until=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, bindparam("lease_s", type_=Double)),
        started_at=func.coalesce(Job.started_at, func.now()),
        safety=None,
        error=None,
        run_after=None,
    )


def claim(session: Session, job_id: UUID, *, worker: str, lease_s: float) -> tuple[Claim, ClaimedJob] | None:
    """`claim_all` for one job; None when it cannot be claimed."""
    return claim_all(session, [job_id], worker=worker, lease_s=lease_s).get(job_id)


def renew(session: Session, claims: Iterable[Claim], *, lease_s: float) -> set[UUID]:
    """Extend the leases of these attempts to `lease_s` from now; return the ids of the jobs they still own."""
    owned = leasing.in_lock_order(Job, _owned(claims))
    statement = update(Job).where(owned).values(lease_until=leasing.from_now(lease_s)).returning(Job.id)
    return set(session.scalars(statement.execution_options(synchronize_session=False)))


def still_owned(session: Session, claims: Iterable[Claim]) -> set[UUID]:
    """The ids of the jobs that these attempts still own. The others were canceled, taken over or handed back."""
    return set(session.scalars(select(Job.id).where(_owned(claims))))


def record_resolutions(session: Session, resolutions: Sequence[Resolution], *, wait: bool = True) -> set[Claim]:
    """Record modes and references, with the reasons, and the content policy's decisions; return what was recorded."""
    values = _rows(
        [each.claim for each in resolutions],
        [{"resolution": each.resolution, "safety": each.safety} for each in resolutions],
    )
    return _claims(_run(session, _resolution_statement(wait=wait), values, event=EventType.RESOLVED))


@cache
def _resolution_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(resolution=JSONB(), safety=JSONB())
    return _transition_statement(
        _owned_by_rows(rows, wait=wait),
        event=EventType.RESOLVED,
        data=rows.c.resolution,
        resolution=rows.c.resolution,
        safety=rows.c.safety,
    )


def record_resolution(
    session: Session, claim: Claim, resolution: dict[str, Any], *, safety: dict[str, Any] | None = None
) -> bool:
    """`record_resolutions` for one attempt."""
    return bool(record_resolutions(session, [Resolution(claim, resolution, safety)]))


def record_moderation(session: Session, claim: Claim, data: dict[str, Any], *, safety: dict[str, Any]) -> bool:
    """Append an event with a policy's latest decision. safety: all of its decisions about the job so far."""
    return bool(_transition(session, _owned([claim]), event=EventType.MODERATED, data=data, safety=safety))


def record_degradation(session: Session, claim: Claim, data: dict[str, Any]) -> bool:
    """Append an event: the attempt saved memory in a way that changes pixels, because otherwise it would not fit."""
    return bool(_transition(session, _owned([claim]), event=EventType.DEGRADED, data=data))


def mark_models_started(session: Session, claims: Collection[Claim], *, wait: bool = True) -> set[Claim]:
    """Record that the model's work starts: from here on, a lost lease counts as a crash and a job cannot expire.

    Returns the claims for which that is recorded. The others are not owned any more, or the job has expired.
    """
    return _claims(session.execute(_model_start_statement(wait=wait), _rows(claims, [{} for _ in claims])))


@cache
def _model_start_statement(*, wait: bool) -> Update:
    rows = _rows_table()
    owned = and_(_owned_by_rows(rows, wait=wait), _not_expired())
    return update(Job).where(owned).values(model_started=True).returning(Job.id, Job.attempt)


def mark_model_started(session: Session, claim: Claim) -> bool:
    """`mark_models_started` for one attempt."""
    return bool(mark_models_started(session, [claim]))


def count_crashes(session: Session, counts: Sequence[CrashCount], *, wait: bool = True) -> set[Claim]:
    """Record from when to when a lost lease counts as a crash; return the claims for which that is recorded."""
    values = _rows([each.claim for each in counts], [{"counted": each.counted} for each in counts])
    return _claims(session.execute(_crash_count_statement(wait=wait), values))


@cache
def _crash_count_statement(*, wait: bool) -> Update:
    rows = _rows_table(counted=Boolean())
    owned = _owned_by_rows(rows, wait=wait)
    return update(Job).where(owned).values(model_started=rows.c.counted).returning(Job.id, Job.attempt)


def expire(session: Session, claim: Claim) -> bool:
    """End the job as `expired`; False when its deadline has not passed or the attempt does not own it."""
    return _end(session, and_(_owned([claim]), ~_not_expired()), JobState.EXPIRED, data={})


def finish_all(session: Session, successes: Sequence[Success], *, wait: bool = True) -> set[Claim]:
    """End jobs as `succeeded` and add their outputs; return the claims whose jobs have ended so.

    Raises:
        ReferenceDeletedError: an image from which an output drew was withdrawn. Without `wait`, its job is left out.
    """
    used = {success.claim: _used_images(success.outputs) for success in successes}
    all_used = set[UUID]().union(*used.values())
    withdrawn = withdrawals.filter_withdrawn(session, all_used) if all_used else set[UUID]()
    if withdrawn and wait:
        raise ReferenceDeletedError(WITHDRAWN, image_ids=sorted(map(str, withdrawn)))
    allowed = [success for success in successes if not used[success.claim] & withdrawn]
    values = _rows(
        [each.claim for each in allowed],
        [
            {"outputs": {"outputs": [str(stored.output.id) for stored in each.outputs]}, "timings": each.timings}
            for each in allowed
        ],
    )
    ended = _claims(_run(session, _success_statement(wait=wait), values, event=EventType.SUCCEEDED))
    _count_ended(session, JobState.SUCCEEDED, len(ended))
    stored = [stored for success in allowed if success.claim in ended for stored in success.outputs]
    session.add_all(each.output for each in stored)
    session.flush()  # references need their output's row
    session.add_all(reference for each in stored for reference in each.references)
    return ended


@cache
def _success_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(outputs=JSONB(), timings=JSONB())
    return _transition_statement(
        _owned_by_rows(rows, wait=wait),
        event=EventType.SUCCEEDED,
        data=rows.c.outputs,
        timings=rows.c.timings,
        **_ended(JobState.SUCCEEDED),
    )


def finish(session: Session, claim: Claim, outputs: Sequence[StoredOutput], *, timings: dict[str, float]) -> bool:
    """`finish_all` for one attempt. Raises: as it."""
    return bool(finish_all(session, [Success(claim, outputs, timings)]))


def fail_all(session: Session, failures: Sequence[Failure], *, wait: bool = True) -> set[Claim]:
    """End jobs as `failed`, with the errors as the reasons; return the claims whose jobs have ended so."""
    values = _rows([each.claim for each in failures], [{"error": each.error.body()} for each in failures])
    ended = _run(session, _failure_statement(wait=wait), values, event=EventType.FAILED)
    _count_ended(session, JobState.FAILED, len(ended))
    if ended:
        quotas.give_back(session, _ids(ended))
    return _claims(ended)


@cache
def _failure_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(error=JSONB())
    return _transition_statement(
        _owned_by_rows(rows, wait=wait),
        event=EventType.FAILED,
        data=rows.c.error,
        error=rows.c.error,
        **_ended(JobState.FAILED),
    )


def fail(session: Session, claim: Claim, error: BaseAppException) -> bool:
    """`fail_all` for one attempt."""
    return bool(fail_all(session, [Failure(claim, error)]))


def retry_later(
    session: Session, claim: Claim, error: BaseAppException, *, delay_s: Callable[[int], float | None]
) -> JobState | None:
    """After a temporary error, return the job to the queue, or end it `failed` when no retry is left.

    delay_s: seconds until the next attempt, given the number of earlier retries; None ends the job.

    Returns the job's new state; None when the attempt no longer owns the job.
    """
    job = session.scalar(select(Job).where(_owned([claim])).with_for_update())
    if job is None:
        return None
    wait_s = delay_s(job.transient_retries)
    if wait_s is None:
        return JobState.FAILED if fail(session, claim, error) else None
    requeued = _requeue(
        session,
        _owned([claim]),
        data={"reason": error.code, "wait_s": wait_s},
        transient_retries=Job.transient_retries + 1,
        run_after=leasing.from_now(wait_s),
    )
    return JobState.QUEUED if requeued else None


def hand_back(
    session: Session, claims: Iterable[Claim], *, reason: str = "shutdown", wait_s: float | None = None
) -> int:
    """Return unfinished jobs to the queue, on shutdown at once; return how many were still owned.

    This counts as no retry. wait_s: seconds until a worker may claim them.
    """
    owned = leasing.in_lock_order(Job, _owned(claims))
    if wait_s is None:
        return len(_requeue(session, owned, data={"reason": reason}))
    return len(_requeue(session, owned, data={"reason": reason, "wait_s": wait_s}, run_after=leasing.from_now(wait_s)))


# --- operations of users and operators ----------------------------------------------------------------------------


def cancel(session: Session, job_id: UUID, *, owner_id: UUID) -> bool:
    """Cancel a job; False when it has already ended. A running attempt notices at its next check or write."""
    return _end(
        session,
        and_(Job.id == job_id, Job.owner_id == owner_id, Job.state.not_in(FINAL)),
        JobState.CANCELED,
        data={},
    )


def revoke(session: Session, job_ids: Collection[UUID]) -> list[UUID]:
    """Cancel those of `job_ids` that have not ended, of any owner; return their ids. For operators."""
    canceled = leasing.in_lock_order(Job, and_(Job.id.in_(job_ids), Job.state.not_in(FINAL)))
    return _end_all(session, canceled, JobState.CANCELED, data={"reason": "revoked"})


def cancel_bulk(session: Session, bulk_id: UUID) -> list[UUID]:
    """Cancel every job of a bulk that has not ended; return their ids."""
    canceled = leasing.in_lock_order(Job, and_(Job.bulk_id == bulk_id, Job.state.not_in(FINAL)))
    return _end_all(session, canceled, JobState.CANCELED, data={})


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
    error = ReferenceDeletedError(WITHDRAWN).body()
    running = leasing.in_lock_order(Job, and_(Job.state == JobState.PROCESSING, draws.exists()))
    return _end_all(session, running, JobState.FAILED, data=error, error=error)


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


# --- for the reconciler -------------------------------------------------------------------------------------------


def take_back_expired(session: Session, *, max_crashes: int, limit: int = 100) -> list[UUID]:
    """Return jobs whose lease has expired to the queue, or end them as `dead` after `max_crashes` crashes.

    A crash is a lease that expired during the model's work: see `mark_model_started` and `count_crashes`.
    Returns the ids of all these jobs.
    """
    lost = session.execute(
        select(Job.id, Job.attempt, Job.crashes, Job.model_started, Job.owner_id, Job.quota_day)
        .where(Job.state == JobState.PROCESSING, Job.lease_until < func.clock_timestamp())
        .order_by(Job.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    # Sorted as in `quotas.give_back`: every transaction locks the owners' usage in one order.
    for job in sorted(lost, key=lambda job: (job.owner_id, str(job.quota_day))):
        owned = _owned([Claim(job.id, job.attempt)])
        crashes = job.crashes + int(job.model_started)
        if crashes >= max_crashes:
            error = JobCrashedError(crashes=crashes).body()
            _end(session, owned, JobState.DEAD, data=error, error=error, crashes=crashes)
        else:
            _requeue(session, owned, data={"reason": "lease_expired", "crashes": crashes}, crashes=crashes)
    return [job.id for job in lost]


def end_expired(session: Session, *, limit: int = 1000) -> list[UUID]:
    """End queued jobs past their deadline as `expired`; return their ids."""
    overdue = select(Job.id).where(Job.state == JobState.QUEUED, Job.expires_at <= func.now())
    overdue = overdue.order_by(Job.expires_at).limit(limit).with_for_update(skip_locked=True)
    return _end_all(session, Job.id.in_(overdue.scalar_subquery()), JobState.EXPIRED, data={})


def fail_unserved(session: Session, model: str, *, limit: int) -> list[UUID]:
    """End queued jobs of a `model` that is gone as `failed`; return their ids. Jobs of paused bulks stay queued."""
    message = f"The settings do not name the model {model!r} any more, and no worker serves it."
    error = ModelNotFoundError(message, model=model).body()
    waiting = select(Job.id).where(Job.model == model, Job.state == JobState.QUEUED, _bulk_runs())
    waiting = waiting.limit(limit).with_for_update(skip_locked=True)
    return _end_all(session, Job.id.in_(waiting.scalar_subquery()), JobState.FAILED, data=error, error=error)


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


# --- conditions and statements ------------------------------------------------------------------------------------


def _owned(claims: Iterable[Claim]) -> ColumnElement[bool]:
    return leasing.owned(Job, ((claim.job_id, claim.attempt) for claim in claims), state=JobState.PROCESSING)


IDS: BindParameter[Any] = bindparam("ids", type_=ARRAY(Uuid()))


def _rows(claims: Collection[Claim], columns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of a statement with a `_rows_table`: a row per attempt, with its `columns`."""
    keys = ({"id": str(claim.job_id), "attempt": claim.attempt} for claim in claims)
    return {
        "ids": [claim.job_id for claim in claims],
        "rows": [key | values for key, values in zip(keys, columns, strict=True)],
    }


def _rows_table(**columns: TypeEngine[Any]) -> TableValuedAlias:
    """A table with a row per attempt: `id` of the job, `attempt`, and the columns that differ between attempts.

    All rows are one parameter. So the statement is built once: building one takes longer than running it.
    """
    typed: dict[str, TypeEngine[Any]] = {"id": Uuid(), "attempt": Integer(), **columns}
    table = func.jsonb_to_recordset(bindparam("rows", type_=JSONB)).table_valued(
        *itertools.starmap(column, typed.items())
    )
    return table.render_derived(name="changes", with_types=True)


def _owned_by_rows(rows: TableValuedAlias, *, wait: bool) -> ColumnElement[bool]:
    """The jobs that the attempts of a `_rows_table` own, each joined to its row."""
    processing = and_(Job.id == any_(IDS), Job.state == JobState.PROCESSING)
    return and_(leasing.in_lock_order(Job, processing, wait=wait), Job.id == rows.c.id, Job.attempt == rows.c.attempt)


def _claims(rows: Iterable[Any]) -> set[Claim]:
    return {Claim(row.id, row.attempt) for row in rows}


def _ids(rows: Iterable[Any]) -> list[UUID]:
    return [row.id for row in rows]


def _used_images(outputs: Sequence[StoredOutput]) -> set[UUID]:
    return {reference.image_id for stored in outputs for reference in stored.references}


def _not_expired() -> ColumnElement[bool]:
    return or_(Job.expires_at.is_(None), Job.expires_at > func.clock_timestamp())


def _bulk_runs() -> ColumnElement[bool]:
    """The job belongs to no bulk, or its bulk is running. `shared.db.dispatch` has the same condition in SQL."""
    return or_(Job.bulk_id.is_(None), exists().where(Bulk.id == Job.bulk_id, Bulk.state == BulkState.RUNNING))


def _end(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> bool:
    return bool(_end_all(session, condition, state, data=data, **values))


def _end_all(
    session: Session, condition: ColumnElement[bool], state: JobState, *, data: dict[str, Any], **values: Any
) -> list[UUID]:
    ended = _transition(session, condition, event=EventType(state.value), data=data, **_ended(state), **values)
    _count_ended(session, state, len(ended))
    if ended:
        quotas.give_back(session, ended)
    return ended


def _ended(state: JobState) -> dict[str, Any]:
    return {
        "state": state,
        "lease_until": None,
        "published_at": None,
        "published_lane": None,
        "finished_at": func.now(),
    }


def _count_ended(session: Session, state: JobState, ended: int) -> None:
    """Count jobs that have ended, after the commit: a group of changes that cannot be committed is applied again."""
    if ended:
        listen(session, "after_commit", lambda _: JOBS_FINISHED.labels(state.value).inc(ended), once=True)


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
    session: Session, condition: ColumnElement[bool], *, event: EventType, data: dict[str, Any], **values: Any
) -> list[UUID]:
    """Update the jobs that meet the condition and append an event to each; return their ids."""
    statement = _transition_statement(condition, event=event, data=literal(data, JSONB), **values)
    return _ids(_run(session, statement, {}, event=event))


def _transition_statement(
    condition: ColumnElement[bool],
    *,
    event: EventType,
    data: ColumnElement[Any],
    returning: Sequence[InstrumentedAttribute[Any]] = (),
    **values: Any,
) -> Select[Any]:
    """A statement that updates the jobs that meet the condition, and appends an event with `data` to each.

    The UPDATE counts `last_seq` up, so the events of a job are numbered without gaps. `_run` runs the statement.
    """
    read = dict.fromkeys([Job.id, Job.attempt, Job.owner_id, Job.last_seq, Job.webhook, *returning])
    moved = (
        update(Job)
        .where(condition)
        .values(**values, last_seq=Job.last_seq + 1)
        .returning(*read, data.label("event_data"))
        .cte("moved")
    )
    appended = insert_into(JobEvent).from_select(
        ["job_id", "seq", "type", "data"],
        select(moved.c.id, moved.c.last_seq, literal(event.value), moved.c.event_data),
    )
    return select(*(moved.c[each.key] for each in read)).add_cte(appended.cte("appended"))


def _run(session: Session, statement: Select[Any], values: dict[str, Any], *, event: EventType) -> Sequence[Row[Any]]:
    """Run a `_transition_statement`. Add a webhook delivery for each job whose webhook asks for the event.

    Returns a row for each job that it updated, with `id`, `attempt` and the columns of `returning`.
    """
    rows = session.execute(statement, values).all()
    for row in rows:
        if row.webhook is not None and event in row.webhook["events"]:
            webhooks.enqueue(session, row.id, row.last_seq, owner_id=row.owner_id, url=row.webhook["url"])
    return rows
