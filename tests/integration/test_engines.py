"""Jobs whose images are drawn by an engine: retries as it asks for them, refusals, cancels, and what is recorded."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import jobs, spaces, workers
from shared.db.tables import Job, JobEvent, Output
from shared.settings import Settings, get_settings
from tests.factories import make_job
from tests.fake_engine import FakeEngine, error_answer
from tests.integration.conftest import API, AppFactory
from tests.stack import wait_until
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.engines.generator import OpenAIGenerator
from worker_service.models.worker_models import Models


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine().serving() as engine:
        yield engine


@pytest.fixture
def settings_with_engine(settings: Settings, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> Settings:
    remote = {
        "kind": "openai",
        "engine": {"urls": [engine.url], "model": "painter", "digest": "sha256:0123", "size_multiple": 8},
        "revision": "abc",
        "native_side": 64,
        "defaults": {"num_inference_steps": 4, "guidance_scale": 3.5},
    }
    monkeypatch.setenv("AFTERIMAGE_MODEL__GENERATORS", json.dumps({"cheap": {"kind": "fake"}, "remote": remote}))
    get_settings.cache_clear()
    return get_settings()


@pytest.fixture
def models(settings_with_engine: Settings, session: Session, clip: Clip) -> Iterator[Models]:
    """The models of a generate worker that has an engine behind it."""
    settings = settings_with_engine
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    model = OpenAIGenerator.load("remote", settings.model)
    model.warm_up()
    watchdog = Watchdog(settings.watchdog)
    models = Models.of(Embedder(clip, space, watchdog), model, settings.model.generators["remote"], watchdog)
    yield models
    models.close(5)


def new_job(session: Session, **parameters: Any) -> UUID:
    job = make_job(session, model="remote", width=64, height=64, **parameters)
    session.commit()
    return job.id


def run(job_id: UUID, models: Models, leases: JobLeases) -> Outcome:
    return run_job(job_id, models=models, leases=leases, settings=get_settings(), worker="test")


def seconds_until_due(session: Session, job_id: UUID) -> float:
    wait = session.scalar(select(Job.run_after - func.now()).where(Job.id == job_id))
    assert isinstance(wait, timedelta)
    return wait.total_seconds()


def test_a_busy_engine_sets_the_time_of_the_retry(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases
) -> None:
    job_id = new_job(session)
    engine.answer = lambda _: error_answer(429, Retry_After="50")
    assert run(job_id, models, leases) is Outcome.REQUEUED
    session.expire_all()
    assert 40 < seconds_until_due(session, job_id) <= 50
    job = session.get_one(Job, job_id)
    assert (job.state, job.transient_retries) == (JobState.QUEUED, 1)


def test_a_broken_engine_delays_a_job_and_fails_it_in_the_end(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases
) -> None:
    job_id = new_job(session)
    engine.answer = lambda _: error_answer(500)
    outcomes = []
    for _ in range(4):
        session.execute(text("update jobs set run_after = null"))
        session.commit()
        outcomes.append(run(job_id, models, leases))
    assert outcomes == [Outcome.REQUEUED] * 3 + [Outcome.FAILED]
    session.expire_all()
    error = session.get_one(Job, job_id).error
    assert error is not None
    assert error["code"] == "engine_unavailable"
    assert engine.url not in str(error)


def test_a_job_that_was_delayed_succeeds_once_the_engine_draws(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases
) -> None:
    job_id = new_job(session, seeds=[1, 2, 3])
    engine.answer = lambda drawing: error_answer(500) if int(drawing.fields["seed"]) == 3 else engine.draw(drawing)
    assert run(job_id, models, leases) is Outcome.REQUEUED
    engine.answer = engine.draw
    session.execute(text("update jobs set run_after = null"))
    session.commit()
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    assert session.scalar(select(func.count()).select_from(Output)) == 3


@pytest.mark.parametrize(
    ("code", "expected"), [("bad_prompt", "engine_refused"), ("content_policy_violation", "content_refused")]
)
def test_a_refused_job_fails_with_a_code(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases, code: str, expected: str
) -> None:
    job_id = new_job(session)
    engine.answer = lambda _: error_answer(400, code)
    assert run(job_id, models, leases) is Outcome.FAILED
    session.expire_all()
    error = session.get_one(Job, job_id).error
    assert error is not None
    assert (error["code"], error["context"]) == (expected, {"reason": code})


def test_a_canceled_job_closes_its_connection(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases
) -> None:
    job_id = new_job(session)
    engine.drawings.clear()
    engine.answer = engine.until_released
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, job_id, models, leases)
        wait_until(lambda: engine.drawings, timeout_s=20, what="the image in flight")
        assert jobs.cancel(session, job_id, owner_id=session.get_one(Job, job_id).owner_id)
        session.commit()
        assert running.result(10) is Outcome.CANCELED
    assert engine.closed.wait(5)


def test_images_of_several_jobs_are_drawn_at_the_same_time(
    session: Session, engine: FakeEngine, models: Models, leases: JobLeases
) -> None:
    ids = [new_job(session) for _ in range(4)]
    engine.seconds, engine.most_in_flight = 0.5, 0
    with ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda each: run(each, models, leases), ids))
    assert outcomes == [Outcome.SUCCEEDED] * 4
    assert engine.most_in_flight == 2


def test_equal_seeds_give_equal_images_and_the_record_names_the_engines_model(
    session: Session, models: Models, leases: JobLeases
) -> None:
    for _ in range(2):
        assert run(new_job(session, seeds=[5]), models, leases) is Outcome.SUCCEEDED
    first, second = session.scalars(select(Output))
    assert first.pixels_sha256 == second.pixels_sha256
    model = first.provenance["model"]
    assert model["pipeline"] == "openai:painter"
    assert model["source_revision"] == "abc"
    assert (model["weights_digest"], model["weights_digest_kind"]) == ("sha256:0123", "stated")


def test_an_image_without_steps_tells_no_progress_and_no_preview(
    session: Session, models: Models, leases: JobLeases
) -> None:
    job_id = new_job(session, preview_every=1)
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    types = set(session.scalars(select(JobEvent.type).where(JobEvent.job_id == job_id)))
    assert not {"preview", "progress"} & types


def test_the_list_of_models_tells_what_was_stated_and_measured(
    session: Session, settings_with_engine: Settings, models: Models, new_app: AppFactory
) -> None:
    workers.publish_capabilities(session, "remote", models.capabilities)
    session.commit()
    listed = new_app(settings_with_engine).test_client().get(f"{API}/models").get_json()["models"]
    (remote,) = [each for each in listed if each["name"] == "remote"]
    told = remote["capabilities"]
    assert told["modes"] == ["none", "caption"]
    assert told["images_at_once"] == 2
    assert told["weights_digest_kind"] == "stated"
    assert not told["reports_steps"]
    assert not told["repeating_changes_images"]
    assert not told["batching_changes_images"]
    assert remote["defaults"]["num_inference_steps"] == 4
