"""The reconciler fails the jobs of a model that no settings name and no worker serves, but not during an upgrade."""

from datetime import timedelta

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import workers
from shared.db.tables import Bulk, BulkItem, Job, Worker
from shared.settings import JobSettings, Settings
from tests.factories import make_job
from tests.integration.conftest import API, Client
from tests.integration.test_bulks import accepted, bulk_of, counts_of, prompts
from tests.stack import wait_until
from worker_service.maintenance.reconciler import Reconciler

GONE = "gone"
WORKER = "generate.another-1@host"
LIMIT_S = 0.3


def reconciler(limit_s: float = LIMIT_S) -> Reconciler:
    return Reconciler(JobSettings(unserved_after_s=limit_s))


def states(session: Session) -> list[str]:
    session.rollback()
    return list(session.scalars(select(Job.state).order_by(Job.model)))


def tick_until_failed(repairing: Reconciler, session: Session, *, jobs: int = 1) -> None:
    def failed() -> bool:
        repairing.tick()
        return states(session).count(JobState.FAILED) == jobs

    wait_until(failed, timeout_s=20, what="the jobs to fail")


def remove_model(session: Session) -> None:
    """Let every job and bulk name a model that the settings no longer name."""
    session.execute(update(Bulk).values(models=[GONE]))
    session.execute(update(BulkItem).values(model=GONE))
    session.execute(update(Job).values(model=GONE))
    session.commit()


def counted() -> float:
    return REGISTRY.get_sample_value("jobs_unserved_total") or 0.0


def test_a_job_whose_model_is_gone_fails_with_the_reason(
    client: Client, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    job = client.post(f"{API}/generate", json={"prompt": "a cat"}).json
    remove_model(session)
    repairing, before = reconciler(), counted()
    repairing.tick()
    assert states(session) == ["queued"], "the reconciler has only just started"
    tick_until_failed(repairing, session)
    answer = client.get(f"{API}/jobs/{job['id']}").json
    assert answer["error"]["code"] == "model_not_found"
    assert GONE in answer["error"]["detail"]
    assert counted() == before + 1
    (logged,) = [record for record in caplog.records if record.msg == "model_unserved"]
    assert (logged.__dict__["model"], logged.__dict__["jobs"]) == (GONE, 1)


def test_a_bulk_whose_model_is_gone_ends_with_every_item_failed(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(100))
    remove_model(session)
    repairing = reconciler()
    tick_until_failed(repairing, session, jobs=100)
    assert counts_of(client, bulk["id"]) == {"failed": 100}, "with the items that had no job yet"
    repairing.tick()
    assert bulk_of(client, bulk["id"])["state"] == "completed"


def test_jobs_of_a_paused_bulk_wait(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(2))
    client.post(f"{API}/bulks/{bulk['id']}/pause")
    remove_model(session)
    make_job(session, model=GONE)
    session.commit()
    tick_until_failed(reconciler(), session)
    assert states(session).count(JobState.QUEUED) == 2


@pytest.mark.parametrize("state", ["ready", "loading"])
def test_a_job_waits_whose_model_only_a_worker_of_another_release_knows(
    settings: Settings, session: Session, state: str
) -> None:
    make_job(session, model="another")
    make_job(session, model=GONE)
    workers.heartbeat(session, WORKER, kind="generate", model="another", state=state)
    if state == "loading":  # it sends one heartbeat, then downloads for long
        session.execute(update(Worker).values(heartbeat_at=func.now() - timedelta(minutes=10)))
    session.commit()
    repairing = reconciler()
    tick_until_failed(repairing, session)
    assert states(session) == [JobState.QUEUED, JobState.FAILED]
    workers.remove(session, WORKER)
    session.commit()
    repairing.tick()
    assert states(session) == [JobState.QUEUED, JobState.FAILED], "its worker may be starting again"
    tick_until_failed(repairing, session, jobs=2)


def test_jobs_of_a_model_that_the_settings_name_wait_for_its_workers(settings: Settings, session: Session) -> None:
    make_job(session, model="cheap")
    make_job(session, model=GONE)
    session.commit()
    tick_until_failed(reconciler(), session)
    assert states(session) == [JobState.QUEUED, JobState.FAILED]


def test_no_job_fails_when_the_limit_is_0(settings: Settings, session: Session) -> None:
    make_job(session, model=GONE)
    session.commit()
    repairing = reconciler(0)
    repairing.tick()
    repairing.tick()
    assert states(session) == [JobState.QUEUED]
