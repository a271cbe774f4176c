"""One try at one job: the claim, what is written while it holds, and how it ends."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar
from uuid import UUID

from pydantic import ValidationError
from sqlalchemy.orm import Session
from structlog.contextvars import bound_contextvars

from shared.contracts.generation import GenerationParameters
from shared.contracts.jobs import JobState
from shared.contracts.safety import SafetyDecision, SafetyRecord
from shared.db import jobs
from shared.db.jobs import Output
from shared.db.session import session_scope
from shared.db.tables import Job
from shared.errors import TRANSIENT, BaseAppException, ImageGenerationError, JobTimeoutError, JobUnreadableError
from shared.messaging import queue
from shared.messaging.coalesce import feed_bell
from shared.messaging.job_updates import PreviewStream, publish_changed
from shared.metrics import observe_duration, time_operation
from shared.settings import JobSettings
from worker_service.jobs.leases import Held, Leases
from worker_service.models.interface import Interrupted, Onlooker

Owned = TypeVar("Owned")

logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REQUEUED = "requeued"  # after a passing fault
    NOT_OURS = "not_ours"  # finished, owned by another worker, not due, or gone
    EXPIRED = "expired"  # its model work did not begin within `expires_in_s`
    LOST = "lost"  # canceled or taken over while it ran; what it made was discarded


class LostError(Exception):
    """The attempt no longer owns its job."""


class Attempt:
    """What the story may read of its job and write to it."""

    def __init__(self, job: Job, held: Held, settings: JobSettings) -> None:
        self.id = job.id
        self.owner_id = job.owner_id
        self.lane = job.lane if job.published_lane is None else job.published_lane
        self.crashes = job.crashes
        self.replay_of = job.replay_of
        self.number = held.claim.attempt
        self.check_in = held.check_in
        self.held_up = held.held_up
        self.outcome = Outcome.LOST
        self.safety: SafetyRecord | None = None
        """What a content policy has decided so far; none: there is none."""
        self._job = job
        self._held = held
        self._settings = settings
        self._timings: dict[str, float] = {}
        self._timeout_s = job.timeout_s
        held.images = job.images
        self.waited_s = (job.started_at - job.created_at).total_seconds() if job.started_at else 0.0
        self._timings["wait"] = self.waited_s

    @cached_property
    def parameters(self) -> GenerationParameters:
        """Read on first use, inside the story, where every failure becomes the attempt's end.

        Raises:
            JobUnreadableError: another release wrote them, with what this one does not know.
        """
        try:
            return GenerationParameters.model_validate(self._job.parameters)
        except ValidationError as error:
            raise JobUnreadableError from error

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage of the story and log it."""
        started = time.monotonic()
        with time_operation("job_stage", stage=name):
            yield
        self._timings[name] = time.monotonic() - started
        logger.info("job_stage", extra={"stage": name, "seconds": round(self._timings[name], 4)})

    def moderated(self, policy: str, found: Sequence[SafetyDecision]) -> None:
        """Note that a content policy has judged, and tell what it has found, if anything."""
        known = [] if self.safety is None else self.safety.decisions
        self.safety = SafetyRecord(policy=policy, decisions=[*known, *found])
        if found:
            record = self.safety.model_dump(mode="json")
            news = SafetyRecord(policy=policy, decisions=list(found)).model_dump(mode="json")
            self._write(lambda session: jobs.moderated(session, self._held.claim, news, safety=record))
            publish_changed(self.id)

    def resolved(self, resolution: dict[str, Any]) -> None:
        """Tell what will be drawn from, and why."""
        safety = None if self.safety is None else self.safety.model_dump(mode="json")
        self._write(lambda session: jobs.resolved(session, self._held.claim, resolution, safety=safety))
        publish_changed(self.id)

    def model_starts(self) -> None:
        """The wait is over, the clock of `timeout_s` runs, and from here on a lost lease counts as a crash.

        Called by the model's thread when the first image's turn has come, and not earlier: a job that only waits in
        line has no part in what the jobs ahead of it do to the process.
        """
        with session_scope() as session:
            in_time = jobs.model_started(session, self._held.claim)
            if not in_time and jobs.expire(session, self._held.claim):
                self.outcome = Outcome.EXPIRED
        if not in_time:
            raise LostError
        self._held.deadline = time.monotonic() + self._timeout_s

    def degraded(self, memory_savers: Sequence[Sequence[str]]) -> None:
        """Tell of images that fitted in memory only by ways that change pixels. memory_savers: of each image."""
        by_image = {str(index): list(savers) for index, savers in enumerate(memory_savers) if savers}
        if by_image:
            self._write(lambda session: jobs.degraded(session, self._held.claim, {"memory_savers": by_image}))
            publish_changed(self.id)

    def onlooker(self, index: int) -> Onlooker | None:
        """Who is shown image `index` while it is drawn; nobody when the job did not ask for previews."""
        every = self.parameters.preview_every
        return None if every is None else PreviewStream(self.id, index, every=every)

    def finish(self, outputs: Sequence[Output]) -> None:
        """Publish the outputs with the end of the job, if the attempt still owns it."""
        self._write(lambda session: jobs.finish(session, self._held.claim, outputs, timings=self._timings))
        self.outcome = Outcome.SUCCEEDED

    def fail(self, error: BaseAppException) -> None:
        self._write(lambda session: jobs.fail(session, self._held.claim, error))
        self.outcome = Outcome.FAILED

    def retry_later(self, error: BaseAppException) -> None:
        delay_s, most = self._settings.transient_retry_delay_s, self._settings.max_transient_retries
        state = self._write(
            lambda session: jobs.retry_later(session, self._held.claim, error, delay_s=delay_s, most=most)
        )
        self.outcome = Outcome.FAILED if state is JobState.FAILED else Outcome.REQUEUED

    def _write(self, change: Callable[[Session], Owned]) -> Owned:
        """What `change` returns, which is false when the attempt has lost its job."""
        with session_scope() as session:
            owned = change(session)
        if not owned:
            raise LostError
        return owned

    @property
    def timed_out(self) -> bool:
        return self._held.timed_out and not self._held.lost


@contextmanager
def claimed(job_id: UUID, *, leases: Leases, settings: JobSettings, worker: str) -> Iterator[Attempt | None]:
    """Own a job for the length of the block; None when there is nothing to do.

    Every end of the block is an end of the attempt: a failure is recorded on the job, a passing fault sends it back
    to the queue, and an attempt that lost its job leaves no trace.
    """
    with session_scope() as session:
        taken = jobs.claim(session, job_id, worker=worker, lease_s=settings.lease_s)
    if taken is None:
        yield None
        return
    claim, job = taken
    attempt = Attempt(job, held := leases.hold(claim), settings)
    if attempt.number == 1:
        observe_duration("job_wait", attempt.waited_s, {"model": job.model})
    started = time.monotonic()
    publish_changed(job_id)
    with bound_contextvars(job_id=str(job_id), attempt=claim.attempt):
        try:
            with _recorded(attempt):
                yield attempt
        except LostError:
            logger.info("job_lost")
        finally:
            leases.release(held)
            observe_duration("job", time.monotonic() - started, {"model": job.model})
            logger.info("job_ended", extra={"outcome": attempt.outcome.value})
            publish_changed(job_id)
            feed_bell(job.model).pull()
            if job.webhook is not None:
                queue.ring_for_webhooks()


@contextmanager
def _recorded(attempt: Attempt) -> Iterator[None]:
    """Turn whatever ends the story early into the job's recorded end."""
    try:
        yield
    except LostError:
        raise
    except Interrupted:
        # Otherwise the job was canceled or taken over, and its row already says so.
        if attempt.timed_out:
            attempt.fail(JobTimeoutError())
    except TRANSIENT as error:
        logger.warning("job_fault", extra={"cause": error.code}, exc_info=True)
        attempt.retry_later(error)
    except BaseAppException as error:
        logger.warning("job_failed", extra={"cause": error.code, "detail": error.message})
        attempt.fail(error)
    except Exception:
        # The cause is for operators: it may hold paths and memory addresses.
        logger.exception("job_failed")
        attempt.fail(ImageGenerationError("The model failed unexpectedly; the operator's log has the cause."))
