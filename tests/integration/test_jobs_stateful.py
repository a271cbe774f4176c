"""The job table under random interleavings of two workers, a user and the reconciler, on real Postgres.

The test updates a simple model of the expected rows in parallel. After every step, table and model must agree.
"""

from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import attempts, jobs
from shared.db.attempts import Claim, StoredOutput
from shared.db.dispatch import mark_next_published
from shared.db.tables import Job, Output
from shared.errors import ImageGenerationError, StorageError
from tests import one_attempt
from tests.factories import make_job, make_output_row

MAX_CRASHES = 3
MAX_RETRIES = 2


def _delay_s(retries: int) -> float | None:
    return 60 if retries < MAX_RETRIES else None


WINDOW = 2


@dataclass
class Expected:
    """The expected state of one job."""

    owner_id: UUID
    state: JobState = JobState.QUEUED
    attempt: int = 0
    crashes: int = 0
    retries: int = 0
    in_model: bool = False
    lease_over: bool = False
    events: int = 1
    outputs_of: int | None = None
    waiting_until_due: bool = False

    def owned_by(self, claim: Claim) -> bool:
        return self.state is JobState.PROCESSING and self.attempt == claim.attempt

    def moves(self, state: JobState) -> None:
        self.state = state
        self.events += 1
        self.lease_over = False


class JobTable(RuleBasedStateMachine):
    """Each rule is an event that may happen. A claim stays in the bundle after its end, like that of a late worker."""

    ids = Bundle("ids")
    claims = Bundle("claims")

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.expected: dict[UUID, Expected] = {}

    def teardown(self) -> None:
        self.session.rollback()

    @initialize(target=ids)
    def first_job(self) -> UUID:
        return self._submit()

    @rule(target=ids)
    def submit(self) -> UUID:
        return self._submit()

    def _submit(self) -> UUID:
        job = make_job(self.session)
        self.expected[job.id] = Expected(owner_id=job.owner_id)
        return job.id

    @rule()
    def dispatch(self) -> None:
        in_broker = self.session.scalar(
            select(func.count()).where(Job.state == JobState.QUEUED, Job.published_at.is_not(None))
        )
        published = mark_next_published(self.session, "cheap", window=WINDOW, starvation_timeout_s=1e6)
        assert (in_broker or 0) + len(published) <= WINDOW
        for each in published:
            assert self.expected[each.job_id].state is JobState.QUEUED
            assert not self.expected[each.job_id].waiting_until_due

    @rule(target=claims, job_id=ids, worker=st.sampled_from(["w1", "w2"]))
    def deliver(self, job_id: UUID, worker: str) -> Claim:
        """A message arrives, for the first time or again."""
        expected = self.expected[job_id]
        taken = one_attempt.claim(self.session, job_id, worker=worker, lease_s=30)
        claimable = expected.state is JobState.QUEUED and not expected.waiting_until_due
        assert (taken is not None) == claimable
        if taken is None:
            return Claim(job_id, -1)  # a claim of no attempt, with which no call may succeed
        expected.moves(JobState.PROCESSING)
        expected.attempt += 1
        expected.in_model = False
        assert taken[0] == Claim(job_id, expected.attempt)
        return taken[0]

    @rule(claim=claims)
    def heartbeat(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        renewed = attempts.renew(self.session, [claim], lease_s=30)
        assert renewed == ({claim.job_id} if expected.owned_by(claim) else set())
        assert attempts.still_owned(self.session, [claim]) == renewed
        if renewed:
            expected.lease_over = False

    @rule(claim=claims)
    def start_model(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        assert attempts.mark_model_started(self.session, claim) == expected.owned_by(claim)
        expected.in_model |= expected.owned_by(claim)

    @rule(claim=claims)
    def finish(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        generation = self._generation(claim)
        done = one_attempt.finish(self.session, claim, [StoredOutput(generation, [])], timings={})
        assert done == expected.owned_by(claim)
        if done:
            expected.moves(JobState.SUCCEEDED)
            expected.outputs_of = claim.attempt

    @rule(claim=claims)
    def fail(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        failed = one_attempt.fail(self.session, claim, ImageGenerationError())
        assert failed == expected.owned_by(claim)
        if failed:
            expected.moves(JobState.FAILED)

    @rule(claim=claims)
    def meet_a_temporary_error(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        changed = bool(attempts.retry_later(self.session, claim, StorageError(), delay_s=_delay_s))
        assert changed == expected.owned_by(claim)
        if changed and expected.retries == MAX_RETRIES:
            expected.moves(JobState.FAILED)
        elif changed:
            expected.moves(JobState.QUEUED)
            expected.retries += 1
            expected.waiting_until_due = True

    @rule(job_id=ids)
    def become_due(self, job_id: UUID) -> None:
        self.session.execute(update(Job).where(Job.id == job_id).values(run_after=func.now()))
        self.expected[job_id].waiting_until_due = False

    @rule(claim=claims)
    def hand_back(self, claim: Claim) -> None:
        expected = self.expected[claim.job_id]
        assert attempts.hand_back(self.session, [claim]) == int(expected.owned_by(claim))
        if expected.owned_by(claim):
            expected.moves(JobState.QUEUED)

    @rule(job_id=ids)
    def cancel(self, job_id: UUID) -> None:
        expected = self.expected[job_id]
        canceled = jobs.cancel(self.session, job_id, owner_id=expected.owner_id)
        assert canceled == (not expected.state.is_final)
        if canceled:
            expected.moves(JobState.CANCELED)

    @rule(job_id=ids)
    def lose_contact(self, job_id: UUID) -> None:
        past = func.clock_timestamp() - timedelta(seconds=1)
        lapsed = update(Job).where(Job.id == job_id, Job.state == JobState.PROCESSING).values(lease_until=past)
        self.session.execute(lapsed)
        self.expected[job_id].lease_over = self.expected[job_id].state is JobState.PROCESSING

    @rule()
    def reconcile(self) -> None:
        over = {job_id for job_id, expected in self.expected.items() if expected.lease_over}
        assert set(attempts.take_back_expired(self.session, max_crashes=MAX_CRASHES)) == over
        for job_id in over:
            expected = self.expected[job_id]
            expected.crashes += expected.in_model
            expected.moves(JobState.DEAD if expected.crashes >= MAX_CRASHES else JobState.QUEUED)

    @invariant()
    def table_and_model_agree(self) -> None:
        self.session.expire_all()
        for job_id, expected in self.expected.items():
            job = self.session.get_one(Job, job_id)
            assert (job.state, job.attempt, job.crashes) == (expected.state, expected.attempt, expected.crashes)
            assert (job.finished_at is not None) == expected.state.is_final
            events = jobs.list_events(self.session, job_id, after=0)
            assert [event.seq for event in events] == list(range(1, expected.events + 1))
            made = self.session.scalars(select(Output.blob_key).where(Output.job_id == job_id)).all()
            assert made == ([] if expected.outputs_of is None else [f"attempt {expected.outputs_of}"])

    def _generation(self, claim: Claim) -> Output:
        owner_id = self.expected[claim.job_id].owner_id
        return make_output_row(claim.job_id, owner_id, blob_key=f"attempt {claim.attempt}")


@pytest.mark.hypothesis  # `make test-all` selects by it
def test_the_guarantees_hold_under_any_interleaving(session: Session) -> None:
    class OnThisDatabase(JobTable):
        def __init__(self) -> None:
            super().__init__(session)

    run_state_machine_as_test(
        OnThisDatabase, settings=settings(derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    )
