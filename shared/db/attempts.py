"""Attempts at jobs: every write of a worker that runs a job.

A write names its attempt, so that only the attempt that owns the job can store a result. When a write returns False, or
leaves a claim out, the job was canceled, has ended, or another attempt owns it. The caller then discards its results.

A function for several attempts decides on each of them alone. With `wait=False` it leaves out the jobs that another
transaction has locked, as if their attempts did not own them: see `leasing.in_lock_order`.

A running job has a lease, which its worker renews. When the worker stops, the lease expires, and `take_back_expired`
returns the job to the queue.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    BindParameter,
    ColumnElement,
    Double,
    Integer,
    Select,
    TableValuedAlias,
    Update,
    Uuid,
    and_,
    any_,
    bindparam,
    column,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from shared.contracts.jobs import EventType, JobState
from shared.db import leasing, quotas, transitions, withdrawals
from shared.db.tables import Job, Output, OutputReference
from shared.errors import BaseAppException, JobCrashedError, ReferenceDeletedError

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
    trace_context: dict[str, str] | None
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


#
# A function for several attempts decides on each of them alone. With `wait=False` it leaves out the jobs that another
# transaction has locked, as if their attempts did not own them: see `leasing.in_lock_order`.


def claim_all(
    session: Session, job_ids: Collection[UUID], *, worker: str, lease_s: float, wait: bool = True
) -> dict[UUID, tuple[Claim, ClaimedJob]]:
    """Claim queued jobs for `lease_s` seconds, by id.

    A job is left out when it is owned, ended, expired, unknown or not due yet, or when its bulk does not run. A lease
    that is lost from here on counts as a crash, until `record_resolutions`. A job that crashed before is an exception:
    it waits until it runs isolated, and `count_crashes` begins then.
    """
    values = {"ids": list(job_ids), "worker": worker, "started": {"worker": worker}, "lease_s": lease_s}
    taken = transitions.run(session, _claim_statement(wait=wait), values, event=EventType.STARTED)
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
        transitions.bulk_runs(),
    )
    return transitions.build(
        leasing.in_lock_order(Job, claimable, wait=wait),
        event=EventType.STARTED,
        data=bindparam("started", type_=JSONB),
        returning=[getattr(Job, name) for name in CLAIMED_COLUMNS],
        state=JobState.PROCESSING,
        attempt=Job.attempt + 1,
        worker=bindparam("worker"),
        model_started=Job.crashes == 0,
        lease_until=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, bindparam("lease_s", type_=Double)),
        started_at=func.coalesce(Job.started_at, func.now()),
        safety=None,
        error=None,
        run_after=None,
    )


def renew(session: Session, claims: Iterable[Claim], *, lease_s: float) -> set[UUID]:
    """Extend the leases of these attempts to `lease_s` from now; return the ids of the jobs they still own."""
    owned = leasing.in_lock_order(Job, _owned(claims))
    statement = update(Job).where(owned).values(lease_until=leasing.from_now(lease_s)).returning(Job.id)
    return set(session.scalars(statement.execution_options(synchronize_session=False)))


def still_owned(session: Session, claims: Iterable[Claim]) -> set[UUID]:
    """The ids of the jobs that these attempts still own. The others were canceled, taken over or handed back."""
    return set(session.scalars(select(Job.id).where(_owned(claims))))


def record_resolutions(session: Session, resolutions: Sequence[Resolution], *, wait: bool = True) -> set[Claim]:
    """Record modes and references, with the reasons, and the content policy's decisions; return what was recorded.

    A lease that is lost from here on counts as no crash, because the job only waits for the model.
    """
    values = _rows(
        [each.claim for each in resolutions],
        [{"resolution": each.resolution, "safety": each.safety} for each in resolutions],
    )
    return _claims(transitions.run(session, _resolution_statement(wait=wait), values, event=EventType.RESOLVED))


@cache
def _resolution_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(resolution=JSONB(), safety=JSONB())
    return transitions.build(
        _owned_by_rows(rows, wait=wait),
        event=EventType.RESOLVED,
        data=rows.c.resolution,
        resolution=rows.c.resolution,
        safety=rows.c.safety,
        model_started=False,
    )


def record_moderation(session: Session, claim: Claim, data: dict[str, Any], *, safety: dict[str, Any]) -> bool:
    """Append an event with a policy's latest decision. safety: all of its decisions about the job so far."""
    return bool(transitions.apply(session, _owned([claim]), event=EventType.MODERATED, data=data, safety=safety))


def record_degradation(session: Session, claim: Claim, data: dict[str, Any]) -> bool:
    """Append an event: the attempt saved memory in a way that changes pixels, because otherwise it would not fit."""
    return bool(transitions.apply(session, _owned([claim]), event=EventType.DEGRADED, data=data))


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


def count_crashes(session: Session, claim: Claim) -> bool:
    """Let a lease that is lost from here on count as a crash; False when the attempt does not own the job."""
    return bool(session.scalars(update(Job).where(_owned([claim])).values(model_started=True).returning(Job.id)).all())


def expire(session: Session, claim: Claim) -> bool:
    """End the job as `expired`; False when its deadline has not passed or the attempt does not own it."""
    return transitions.end(session, and_(_owned([claim]), ~_not_expired()), JobState.EXPIRED, data={})


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
    ended = _claims(transitions.run(session, _success_statement(wait=wait), values, event=EventType.SUCCEEDED))
    transitions.count_ended(session, JobState.SUCCEEDED, len(ended))
    stored = [stored for success in allowed if success.claim in ended for stored in success.outputs]
    session.add_all(each.output for each in stored)
    session.flush()  # references need their output's row
    session.add_all(reference for each in stored for reference in each.references)
    return ended


@cache
def _success_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(outputs=JSONB(), timings=JSONB())
    return transitions.build(
        _owned_by_rows(rows, wait=wait),
        event=EventType.SUCCEEDED,
        data=rows.c.outputs,
        timings=rows.c.timings,
        **transitions.end_values(JobState.SUCCEEDED),
    )


def fail_all(session: Session, failures: Sequence[Failure], *, wait: bool = True) -> set[Claim]:
    """End jobs as `failed`, with the errors as the reasons; return the claims whose jobs have ended so."""
    values = _rows([each.claim for each in failures], [{"error": each.error.body()} for each in failures])
    ended = transitions.run(session, _failure_statement(wait=wait), values, event=EventType.FAILED)
    transitions.count_ended(session, JobState.FAILED, len(ended))
    if ended:
        quotas.give_back(session, transitions.ids_of(ended))
    return _claims(ended)


@cache
def _failure_statement(*, wait: bool) -> Select[Any]:
    rows = _rows_table(error=JSONB())
    return transitions.build(
        _owned_by_rows(rows, wait=wait),
        event=EventType.FAILED,
        data=rows.c.error,
        error=rows.c.error,
        **transitions.end_values(JobState.FAILED),
    )


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
        return JobState.FAILED if fail_all(session, [Failure(claim, error)]) else None
    requeued = transitions.requeue(
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
        return len(transitions.requeue(session, owned, data={"reason": reason}))
    return len(
        transitions.requeue(
            session, owned, data={"reason": reason, "wait_s": wait_s}, run_after=leasing.from_now(wait_s)
        )
    )


def take_back_expired(session: Session, *, max_crashes: int, limit: int = 100) -> list[UUID]:
    """Return jobs whose lease has expired to the queue, or end them as `dead` after `max_crashes` crashes.

    A crash is a lease that expired while crashes were counted: see `claim_all`, `mark_model_started`.
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
            transitions.end(session, owned, JobState.DEAD, data=error, error=error, crashes=crashes)
        else:
            transitions.requeue(session, owned, data={"reason": "lease_expired", "crashes": crashes}, crashes=crashes)
    return [job.id for job in lost]


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


def _used_images(outputs: Sequence[StoredOutput]) -> set[UUID]:
    return {reference.image_id for stored in outputs for reference in stored.references}


def _not_expired() -> ColumnElement[bool]:
    return or_(Job.expires_at.is_(None), Job.expires_at > func.clock_timestamp())
