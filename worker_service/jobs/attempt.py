"""One attempt at a job: the claim, the records that the attempt writes while it owns the job, and the end.

Crash isolation: any job that a model or a decoder works on can be the cause when its worker process crashes. The
reconciler therefore counts a crash for each of them, and from then on they are isolated. Each image of an isolated job
runs in a batch of its own, and a process works on one isolated job at a time (`Models.crash_isolation_lock`). So
another job shares at most one crash with a job that always crashes its worker. Normally only the latter reaches
`jobs.max_crashes` and ends `dead`. Another job reaches it only through several different causes.

A crash is a lease that expired before `record_resolution` or after `mark_model_started`. It counts whatever ended the
worker: a job, SIGKILL, the watchdog or the loss of the machine. While a job waits for the model, or an isolated job for
its turn, nothing is counted.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import Any, TypeVar
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from shared import tracing
from shared.contracts.generation import GenerationParameters
from shared.contracts.jobs import JobState
from shared.contracts.safety import SafetyDecision, SafetyRecord
from shared.db import attempts, jobs
from shared.db.attempts import Claim, ClaimedJob, Failure, Resolution, StoredOutput, Success
from shared.db.session import session_scope
from shared.errors import (
    BaseAppException,
    DatabaseError,
    EngineUnavailableError,
    ImageGenerationError,
    JobTimeoutError,
    JobUnreadableError,
)
from shared.messaging import queue
from shared.messaging.coalesce import dispatch_soon
from shared.messaging.job_updates import PreviewStream, publish_job_update
from shared.metrics import JOB_DURATION, JOB_STAGE, JOB_WAIT, observe_duration, time_operation
from shared.settings import JobSettings
from worker_service.execution.batcher import Submission
from worker_service.execution.steps import CallStopped
from worker_service.jobs.group_commit import Change, GroupCommit, get_group_commit
from worker_service.jobs.leases import JobLease, JobLeases
from worker_service.jobs.retry_policy import TEMPORARY_ERRORS, retry_delay_s
from worker_service.models.interface import PreviewListener

Owned = TypeVar("Owned")

logger = logging.getLogger(__name__)

SPACE_CHANGE_S = 2.0
"""Seconds after which a job that met a switch of the embedding space may be claimed again."""


class Outcome(StrEnum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REQUEUED = "requeued"  # after a temporary error
    SKIPPED = "skipped"  # ended, expired, deleted, not due, owned by another worker, or its bulk is not running
    EXPIRED = "expired"  # its model work did not start within `expires_in_s`
    CANCELED = "canceled"  # while it ran; its images were discarded
    LOST = "lost"  # taken over, handed back or deleted while it ran; its images were discarded


class SpaceInactiveError(Exception):
    """This worker's CLIP is not that of the active embedding space, so another worker has to run the job."""


class LeaseLostError(Exception):
    """The attempt no longer owns its job."""


class Attempt:
    """One attempt at a job. `run_job` reads the job's fields from it and makes all writes by its methods.

    Every method that writes raises `LeaseLostError` when the attempt no longer owns the job.
    """

    def __init__(self, job: ClaimedJob, lease: JobLease, settings: JobSettings, group_commit: GroupCommit) -> None:
        self.job_id = job.id
        self.owner_id = job.owner_id
        self.lane = job.lane if job.published_lane is None else job.published_lane
        self.isolated = job.crashes > 0
        """A worker crashed during this job's model work: see "Crash isolation" in the module's docstring."""
        self.replay_of = job.replay_of
        self.number = lease.claim.attempt
        self.outcome = Outcome.LOST
        self.error_code: str | None = None
        """Code of the error that ended the attempt."""
        self.safety: SafetyRecord | None = None
        """Decisions of the content policy so far; None without a policy."""
        self._job = job
        self._lease = lease
        self._settings = settings
        self._group_commit = group_commit
        self._timings: dict[str, float] = {}
        self._timeout_s = job.timeout_s
        lease.images = job.images
        self.waited_s = (job.started_at - job.created_at).total_seconds()
        self._timings["wait"] = self.waited_s

    @cached_property
    def parameters(self) -> GenerationParameters:
        """The job's parameters. Parsed on first use, inside the story, so that an error ends the attempt.

        Raises:
            JobUnreadableError: another release wrote parameters that this release does not know.
        """
        try:
            return GenerationParameters.model_validate(self._job.parameters)
        except ValidationError as error:
            raise JobUnreadableError from error

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure and log the duration of the block, as stage `name` of the story."""
        started = time.monotonic()
        with time_operation(JOB_STAGE, stage=name), tracing.span(name):
            yield
        self._timings[name] = time.monotonic() - started
        logger.info("job_stage", extra={"stage": name, "seconds": round(self._timings[name], 4)})

    def record_moderation(self, policy_digest: str, decisions: Sequence[SafetyDecision]) -> None:
        """Record decisions of the content policy, and append the event `moderated` if there are decisions."""
        earlier = [] if self.safety is None else self.safety.decisions
        self.safety = SafetyRecord(policy=policy_digest, decisions=[*earlier, *decisions])
        if decisions:
            record = self.safety.model_dump(mode="json")
            event = SafetyRecord(policy=policy_digest, decisions=list(decisions)).model_dump(mode="json")
            self._write(lambda session: attempts.record_moderation(session, self.claim, event, safety=record))
            publish_job_update(self.job_id)

    def record_resolution(self, resolution: dict[str, Any]) -> None:
        """Append the event `resolved`: which references are used, in which mode, and why. The job now only waits."""
        safety = None if self.safety is None else self.safety.model_dump(mode="json")
        self._commit(Resolution(self.claim, resolution, safety))
        publish_job_update(self.job_id)

    def mark_model_started(self) -> None:
        """Start the time limit `timeout_s`. From here on, a lease that expires counts as a crash of this job.

        The model's thread calls it right before the first image runs, not earlier. A job that only waits must not be
        blamed when another job crashes the process.

        Raises:
            LeaseLostError: the job expired while it waited, or the attempt no longer owns it.
        """
        with session_scope() as session:
            in_time = attempts.mark_model_started(session, self.claim)
            if not in_time and attempts.expire(session, self.claim):
                self.outcome = Outcome.EXPIRED
        if not in_time:
            raise LeaseLostError
        self.start_time_limit()

    def start_time_limit(self) -> None:
        self._lease.deadline = time.monotonic() + self._timeout_s

    @contextmanager
    def counting_crashes(self, lock: AbstractContextManager[Any]) -> Iterator[None]:
        """Count a crash of the worker inside the block against this job. lock: `Models.crash_isolation_lock`.

        The block is work before `mark_model_started`: the embedding of the prompt, the decoding of references. The
        claim has begun to count for a job that is not isolated. `record_resolution`, the block's last write, ends it.
        """
        with lock if self.isolated else nullcontext():
            if self.isolated:
                self._write(lambda session: attempts.count_crashes(session, self.claim))
            yield

    def record_degradation(self, memory_savers: Sequence[Sequence[str]]) -> None:
        """Append the event `degraded` if an image used memory savers, which change pixels. memory_savers: by image."""
        by_image = {str(index): list(savers) for index, savers in enumerate(memory_savers) if savers}
        if by_image:
            data = {"memory_savers": by_image}
            self._write(lambda session: attempts.record_degradation(session, self.claim, data))
            publish_job_update(self.job_id)

    def submission(self) -> Submission:
        """How this attempt's images queue for the model."""
        return AttemptSubmission(
            attempt=self,
            lane=self.lane,
            owner=self.owner_id,
            isolated=self.isolated,
            job=str(self.job_id),
            check_in=self._lease.check_in,
            on_start=self.mark_model_started,
            start_together=mark_models_started,
            add_delay=self._lease.add_delay,
        )

    def preview_listener(self, index: int) -> PreviewListener | None:
        """Receiver of the previews of image `index`; None when the request asked for none."""
        every = self.parameters.preview_every
        return None if every is None else PreviewStream(self.job_id, index, every=every)

    def finish(self, outputs: Sequence[StoredOutput]) -> None:
        """Publish the outputs and end the job `succeeded`, in one transaction."""
        self._commit(Success(self.claim, outputs, self._timings))
        self.outcome = Outcome.SUCCEEDED

    def fail(self, error: BaseAppException) -> None:
        """End the job `failed`."""
        self._commit(Failure(self.claim, error))
        self.outcome, self.error_code = Outcome.FAILED, error.code

    def retry_later(self, error: BaseAppException) -> None:
        """Return the job to the queue after a temporary error; end it `failed` after `max_transient_retries`."""
        told_s = float(error.retry_after_s or 0) if isinstance(error, EngineUnavailableError) else 0.0
        delay_s = partial(retry_delay_s, settings=self._settings, told_s=told_s)
        state = self._write(lambda session: attempts.retry_later(session, self.claim, error, delay_s=delay_s))
        self.outcome = Outcome.FAILED if state is JobState.FAILED else Outcome.REQUEUED
        self.error_code = error.code

    def hand_over(self) -> None:
        """Return the job to the queue for a worker whose CLIP is that of the active embedding space.

        It counts as no retry. Within `SPACE_CHANGE_S`, this worker stops reading the queue, so it gets the job only
        once per switch of the space.
        """
        self._write(
            lambda session: attempts.hand_back(
                session, [self.claim], reason="embedding_space_inactive", wait_s=SPACE_CHANGE_S
            )
        )
        self.outcome = Outcome.REQUEUED

    def _commit(self, change: Change) -> None:
        """Make a frequent change, together with those of other attempts.

        Raises:
            LeaseLostError: the attempt no longer owns its job.
        """
        if not self._group_commit.write(change):
            raise LeaseLostError

    def _write(self, change: Callable[[Session], Owned]) -> Owned:
        """Run a rare change in a transaction of its own and return its result.

        Raises:
            LeaseLostError: the result is falsy, which means that the attempt no longer owns its job.
        """
        with session_scope() as session:
            owned = change(session)
        if not owned:
            raise LeaseLostError
        return owned

    @property
    def claim(self) -> Claim:
        return self._lease.claim

    @property
    def timed_out(self) -> bool:
        """Whether the attempt ran longer than the job's `timeout_s` and still owns the job."""
        return self._lease.timed_out and not self._lease.lost


@dataclass(eq=False, kw_only=True)
class AttemptSubmission(Submission):
    """The images of an attempt, while they wait for the model."""

    attempt: Attempt


def mark_models_started(submissions: Sequence[AttemptSubmission]) -> list[AttemptSubmission]:
    """`Attempt.mark_model_started` for a batch, in one statement. Returns the submissions that have started.

    The others have to call it themselves. They are locked or lost, have expired, or the database has failed.
    """
    by_claim = {submission.attempt.claim: submission for submission in submissions}
    try:
        with session_scope() as session:
            claims = attempts.mark_models_started(session, by_claim, wait=False)
    except DatabaseError:
        return []
    started = [by_claim[claim] for claim in claims]
    for submission in started:
        submission.attempt.start_time_limit()
    return started


@contextmanager
def claimed(job_id: UUID, *, leases: JobLeases, settings: JobSettings, worker: str) -> Iterator[Attempt | None]:
    """Claim a job and own it for the length of the block; None when the job cannot be claimed.

    The end of the block ends the attempt. A temporary error returns the job to the queue, and any other error fails
    the job. An attempt that lost its job changes nothing.

    Raises:
        DatabaseError: the claim failed, or the end of the attempt could not be recorded.
    """
    group_commit = get_group_commit(worker, settings.lease_s)
    claiming_ns = time.time_ns()
    if (taken := group_commit.claim(job_id)) is None:
        yield None
        return
    claim, job = taken
    attempt = Attempt(job, lease := leases.hold(claim), settings, group_commit)
    if attempt.number == 1:
        observe_duration(JOB_WAIT, attempt.waited_s, {"model": job.model})
    started = time.monotonic()
    ids = {**tracing.ids(job.trace_context), "job_id": str(job_id), "attempt": claim.attempt}
    with bound_contextvars(**ids), _job_span(attempt, job, start_ns=claiming_ns):
        with tracing.span("claim", start_ns=claiming_ns):
            publish_job_update(job_id)
        try:
            with suppress(LeaseLostError), _recording_errors(attempt):
                yield attempt
            if attempt.outcome is Outcome.LOST and _is_canceled(job_id):
                attempt.outcome = Outcome.CANCELED
        finally:
            leases.release(lease)
            observe_duration(JOB_DURATION, time.monotonic() - started, {"model": job.model})
            code = {} if attempt.error_code is None else {"code": attempt.error_code}
            logger.info("job_ended", extra={"outcome": attempt.outcome.value} | code)
            tracing.annotate({"outcome": attempt.outcome.value, "error.type": attempt.error_code})
            publish_job_update(job_id)
            dispatch_soon(job.model)
            if job.webhook is not None:
                queue.notify_webhook_workers()


def _job_span(attempt: Attempt, job: ClaimedJob, *, start_ns: int) -> AbstractContextManager[None]:
    attributes = {"model": job.model, "lane": attempt.lane, "images": job.images, "wait_s": attempt.waited_s}
    return tracing.span("job", attributes, kind="consumer", within=job.trace_context, root=True, start_ns=start_ns)


def _is_canceled(job_id: UUID) -> bool:
    with session_scope() as session:
        return jobs.find_state(session, job_id) == JobState.CANCELED


@contextmanager
def _recording_errors(attempt: Attempt) -> Iterator[None]:
    """Record on the job the exception that ends the block early."""
    try:
        yield
    except LeaseLostError:
        raise
    except CallStopped:
        # Without a timeout, the job was canceled, taken over or handed back, and its row already says so.
        if attempt.timed_out:
            attempt.fail(JobTimeoutError())
    except SpaceInactiveError:
        logger.info("job_handed_over")
        attempt.hand_over()
    except TEMPORARY_ERRORS as error:
        logger.warning("job_fault", extra={"cause": error.code}, exc_info=True)
        attempt.retry_later(error)
    except BaseAppException as error:
        logger.warning("job_failed", extra={"cause": error.code, "detail": error.message})
        attempt.fail(error)
    except Exception:
        # Only the log has the cause: it may contain paths and memory addresses.
        logger.exception("job_failed")
        attempt.fail(ImageGenerationError("The model failed unexpectedly; the operator's log has the cause."))
