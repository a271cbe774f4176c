"""How many statements and commits frequent requests send to the database. A bound that is exceeded needs a reason."""

from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api_service.services.job_waits import JobWait, job_reader
from shared.contracts.jobs import JobState
from shared.db.attempts import Claim
from shared.db.session import get_engine
from shared.messaging.job_updates import LOOK_AGAIN_S, close_subscriber, publish_job_update
from shared.settings import Settings
from tests import one_attempt
from tests.factories import make_job, make_space
from tests.integration.conftest import API, Client, a_key, sent_statements
from tests.stack import wait_until
from worker_service.jobs.leases import JobLeases


@pytest.fixture
def key(session: Session) -> dict[str, str]:
    make_space(session)
    return a_key(session, "generate", "search", owner="local")


def cost(client: Client, method: str, path: str, **request: Any) -> tuple[int, int]:
    """Statements and commits of a request, after an equal one has filled what the process keeps for a moment."""
    for _ in range(2):
        with sent_statements(get_engine()) as sent:
            answer = client.open(f"{API}{path}", method=method, **request)
        assert answer.status_code in (200, 202), answer.text
    commits = sent.count("COMMIT")
    return len(sent) - commits, commits


def test_a_submit_sends_three_statements_and_commits_once(keyed_client: Client, key: dict[str, str]) -> None:
    assert cost(keyed_client, "POST", "/generate", json={"prompt": "an apple"}, headers=key) == (3, 1)


def test_a_submit_with_references_also_reads_its_collection(keyed_client: Client, key: dict[str, str]) -> None:
    assert cost(keyed_client, "POST", "/rag/generate", json={"prompt": "an apple"}, headers=key) == (4, 1)


def test_an_idempotency_key_costs_two_statements_more(keyed_client: Client, key: dict[str, str]) -> None:
    keyed_client.post(f"{API}/generate", json={"prompt": "an apple"}, headers=key)
    with sent_statements(get_engine()) as sent:
        keyed_client.post(f"{API}/generate", json={"prompt": "an apple"}, headers={**key, "Idempotency-Key": "1"})
    assert (len(sent) - sent.count("COMMIT"), sent.count("COMMIT")) == (5, 1)


@pytest.mark.parametrize(("state", "statements"), [(JobState.QUEUED, 3), (JobState.PROCESSING, 2)])
def test_a_poll_reads_only_what_its_state_needs(
    keyed_client: Client, key: dict[str, str], session: Session, state: JobState, statements: int
) -> None:
    job = make_job(session, state=state)
    session.commit()
    assert cost(keyed_client, "GET", f"/jobs/{job.id}", headers=key) == (statements, 1)


def test_jobs_that_end_together_are_read_together(settings: Settings, session: Session) -> None:
    waiting = [make_job(session, state=JobState.PROCESSING) for _ in range(30)]
    session.commit()
    with ExitStack() as stack:
        stack.callback(close_subscriber)
        waits = [JobWait(job.id, after=None) for job in waiting]
        for wait in waits:
            stack.enter_context(job_reader().waiting(wait))
        for job in waiting:
            assert one_attempt.finish(session, Claim(job.id, job.attempt), [], timings={})
        session.commit()
        with sent_statements(get_engine(), all_threads=True) as sent:
            for job in waiting:
                publish_job_update(job.id)
            results = [wait.result.result(20) for wait in waits]
    assert [view and view.state for view in results] == [JobState.SUCCEEDED] * len(waiting)
    assert len(sent) < len(waiting), "four statements and a commit per read, and a few reads"


def test_a_wait_looks_at_its_job_again_when_no_message_arrives(
    settings: Settings, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOOK_AGAIN_S, True, 0.1)
    job = make_job(session, state=JobState.PROCESSING)
    session.commit()
    wait = JobWait(job.id, after=None)
    with job_reader().waiting(wait):
        assert one_attempt.finish(session, Claim(job.id, job.attempt), [], timings={})
        session.commit()
        ended = wait.result.result(20)
    close_subscriber()
    assert ended is not None
    assert ended.state is JobState.SUCCEEDED


def test_a_worker_looks_for_cancels_with_one_read_and_no_transaction(settings: Settings, session: Session) -> None:
    job = make_job(session, state=JobState.PROCESSING)
    session.commit()
    with sent_statements(get_engine(), all_threads=True) as sent, JobLeases(settings.jobs) as leases:
        lease = leases.hold(Claim(job.id, job.attempt))
        wait_until(lambda: len(sent) > 5, timeout_s=20, what="some looks")
    assert not lease.lost
    assert sent.count("COMMIT") == 1, "the first of them renewed the lease"
