"""Jobs under a content policy, with a real database, blob store and CLIP. The image model takes milliseconds."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contracts.generation import Mode
from shared.contracts.jobs import JobState
from shared.db import jobs, outputs, spaces
from shared.db.tables import Job, Output
from shared.imaging import read_record
from shared.metrics import SAFETY_DECISIONS
from shared.settings import ModelSettings, SafetySettings, Settings, get_settings
from shared.storage import get_blobs
from tests.factories import make_job
from tests.integration.conftest import API, Client
from worker_service.execution.steps import OnStep
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.fake import FakeGenerator
from worker_service.models.interface import ImageRequest
from worker_service.models.worker_models import Models

SEEDS = [1, 2, 3]
SIDE = 64
ModelsWith = Callable[..., Models]


class RecordingGenerator(FakeGenerator):
    """The fake generator. It also records requests and images, and may have a checker that rejects some seeds."""

    def __init__(self, settings: ModelSettings, *, unsafe_seeds: Sequence[int] | None = None) -> None:
        super().__init__(**vars(FakeGenerator.load("cheap", settings)))
        self.asked: list[ImageRequest] = []
        self.generated: list[np.ndarray] = []
        self.unsafe_seeds = unsafe_seeds
        self.capabilities = self.capabilities.model_copy(update={"native_width": SIDE, "native_height": SIDE})

    @property
    def has_safety_checker(self) -> bool:
        return self.unsafe_seeds is not None

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.asked = [*self.asked, *requests]
        images = super().generate(requests, on_step)
        self.generated = [*self.generated, *images]
        return images

    def detect_unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        latest = self.asked[-len(images) :]
        return [self.unsafe_seeds is not None and request.seed in self.unsafe_seeds for request in latest]


@pytest.fixture
def models_with(settings: Settings, session: Session, clip: Clip) -> Iterator[ModelsWith]:
    """`models_with(concept, ...)`: loaded models with a policy of these concepts."""
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    built: list[Models] = []

    def build(*concepts: dict[str, Any], unsafe_seeds: Sequence[int] | None = None, checker: str = "block") -> Models:
        generator = settings.model.generators["cheap"].model_copy(update={"safety_checker": checker})
        model = RecordingGenerator(settings.model, unsafe_seeds=unsafe_seeds)
        safety = SafetySettings.model_validate({"concepts": concepts})
        built.append(Models.of(Embedder(clip, space, watchdog), model, generator, watchdog, safety=safety))
        return built[-1]

    yield build
    for models in built:
        models.close(5)


def generator_of(models: Models) -> RecordingGenerator:
    assert isinstance(models.image_model, RecordingGenerator)
    return models.image_model


def concept(name: str = "thing", **rules: Any) -> dict[str, Any]:
    return {"name": name, "texts": ["a thing"], **rules}


def always(action: str) -> dict[str, Any]:
    return {"threshold": -1, "action": action}


def never(action: str) -> dict[str, Any]:
    return {"threshold": 1, "action": action}


def run(session: Session, models: Models, leases: JobLeases, **parameters: Any) -> Job:
    """Run a job of three images and return it."""
    job = make_job(session, **{"seeds": SEEDS, "mode": Mode.NONE, "width": SIDE, "height": SIDE, **parameters})
    session.commit()
    run_job(job.id, models=models, leases=leases, settings=get_settings(), worker="test")
    session.expire_all()
    return session.get_one(Job, job.id)


def outputs_of(session: Session, job: Job) -> list[Output]:
    return outputs.list_by_job(session, [job.id])[job.id]


def events_of(session: Session, job: Job) -> list[tuple[str, dict[str, Any]]]:
    return [(event.type, event.data) for event in jobs.list_events(session, job.id, after=0)]


def files_of(job_id: UUID) -> set[str]:
    return {blob.key for blob in get_blobs().list(f"outputs/{job_id}/")}


def decisions(job: Job) -> list[tuple[str, str, str, int | None]]:
    assert job.safety is not None
    return [(each["concept"], each["stage"], each["action"], each["index"]) for each in job.safety["decisions"]]


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_blocked_prompt_fails_its_job_with_a_code_before_generation(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    models = models_with(concept("weapon", prompt=always("block")), concept("rude", prompt=always("flag")))
    job = run(session, models, leases)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["context"]) == ("prompt_blocked", {"concepts": ["weapon"]})
    assert decisions(job) == [("weapon", "prompt", "block", None), ("rude", "prompt", "flag", None)]
    assert [event for event, _ in events_of(session, job)] == ["queued", "started", "moderated", "failed"]
    assert generator_of(models).asked == []


def test_a_flagged_prompt_is_generated_and_recorded_in_job_event_output_and_file(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    counter = SAFETY_DECISIONS.labels("weapon", "prompt", "flag")
    before = counter._value.get()
    job = run(session, models_with(concept("weapon", prompt=always("flag"))), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("weapon", "prompt", "flag", None)]
    assert ("moderated", job.safety) in events_of(session, job)
    for output in outputs_of(session, job):
        assert output.provenance["safety"] == job.safety
        assert read_record(get_blobs().get(output.blob_key)) == output.provenance
    assert counter._value.get() == before + 1


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_flagged_output_is_stored_unchanged_and_records_the_decision(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    models = models_with(concept(output=always("flag")))
    job = run(session, models, leases)
    assert decisions(job) == [("thing", "output", "flag", index) for index in range(3)]
    for output, generated in zip(outputs_of(session, job), generator_of(models).generated, strict=True):
        assert [each["index"] for each in output.provenance["safety"]["decisions"]] == [output.index], "only its own"
        assert (pixels(output.blob_key) == generated).all()


def test_a_blurred_output_is_stored_only_blurred(session: Session, models_with: ModelsWith, leases: JobLeases) -> None:
    models = models_with(concept(output=always("blur")))
    job = run(session, models, leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("thing", "output", "blur", index) for index in range(3)]
    for output, generated in zip(outputs_of(session, job), generator_of(models).generated, strict=True):
        edges = sharpest_edge(generated)
        assert edges > 60, "blocks of colour have edges"
        assert sharpest_edge(pixels(output.blob_key)) < edges / 2
        assert sharpest_edge(pixels(output.thumbnail_key)) < edges / 2
    assert len(files_of(job.id)) == 6


def test_a_blocked_output_is_not_stored_and_the_others_are(
    session: Session, models_with: ModelsWith, leases: JobLeases, clip: Clip
) -> None:
    similarities = similarity_to_the_concept(session, models_with, leases, clip)
    second, first = sorted(similarities)[-2:]
    middle, blocked = (first + second) / 2, similarities.index(first)
    job = run(session, models_with(concept(output={"threshold": middle, "action": "block"})), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("thing", "output", "block", blocked)]
    left = [index for index in range(3) if index != blocked]
    assert [(output.index, output.seed) for output in outputs_of(session, job)] == [(i, SEEDS[i]) for i in left]
    assert job.safety is not None
    assert job.safety["decisions"][0]["similarity"] == pytest.approx(first, abs=1e-4)
    assert not any(f"/{blocked}." in key or key.endswith(f"/{blocked}") for key in files_of(job.id))
    assert len(files_of(job.id)) == 4
    assert outputs_of(session, job)[0].provenance["safety"]["decisions"] == []


def similarity_to_the_concept(session: Session, models_with: ModelsWith, leases: JobLeases, clip: Clip) -> list[float]:
    models = models_with()
    run(session, models, leases)
    text = clip.encode_text(["a thing"])[0]
    generated = clip.encode_image([Image.fromarray(image) for image in models.image_model.generated])  # type: ignore[attr-defined]
    return [float(vector @ text / np.linalg.norm(vector) / np.linalg.norm(text)) for vector in generated]


def test_a_job_whose_images_are_all_blocked_fails_with_a_code_and_leaves_no_file(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    job = run(session, models_with(concept(output=always("block"))), leases)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["context"]) == ("output_blocked", {"concepts": ["thing"]})
    assert decisions(job) == [("thing", "output", "block", index) for index in range(3)]
    assert session.scalars(select(Output)).all() == []
    assert files_of(job.id) == set()


def test_the_strictest_action_wins(session: Session, models_with: ModelsWith, leases: JobLeases) -> None:
    concepts = [concept(name, output=always(name)) for name in ("flag", "block", "blur")]
    assert run(session, models_with(*concepts), leases).state == JobState.FAILED
    models = models_with(concepts[0], concepts[2])
    job = run(session, models, leases, seeds=[1])
    assert (pixels(outputs_of(session, job)[0].blob_key) != generator_of(models).generated[0]).any()


# --- the checker of the model -------------------------------------------------------------------------------------


def test_an_image_that_the_models_own_checker_rejects_is_blocked_and_recorded(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    job = run(session, models_with(unsafe_seeds=[2]), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("safety_checker", "output", "block", 1)]
    assert [output.index for output in outputs_of(session, job)] == [0, 2]


@pytest.mark.parametrize(("checker", "indexes"), [("flag", [0, 1, 2]), ("blur", [0, 1, 2]), ("block", [])])
def test_the_action_of_the_checker_is_a_setting(
    session: Session, models_with: ModelsWith, leases: JobLeases, checker: str, indexes: list[int]
) -> None:
    job = run(session, models_with(unsafe_seeds=SEEDS, checker=checker), leases)
    assert [output.index for output in outputs_of(session, job)] == indexes
    assert (job.error or {}).get("code") == (None if indexes else "output_blocked")
    assert decisions(job) == [("safety_checker", "output", checker, index) for index in range(3)]


# --- policies -----------------------------------------------------------------------------------------------------


def test_without_a_policy_nothing_is_embedded_checked_or_recorded(
    session: Session, models_with: ModelsWith, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models_with()

    def refuse(*_: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr(models.embedder, "embed", refuse)
    job = run(session, models, leases)
    assert job.state == JobState.SUCCEEDED
    assert job.safety is None
    assert all("safety" not in output.provenance for output in outputs_of(session, job))
    assert "moderate" not in job.timings


def test_an_output_that_a_policy_allows_records_the_policy(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    models = models_with(concept(prompt=never("block"), output=never("block")))
    job = run(session, models, leases)
    passed = {"policy": models.policy.digest, "decisions": []}
    assert job.safety == passed
    assert [output.provenance["safety"] for output in outputs_of(session, job)] == [passed] * 3
    assert "moderated" not in [event for event, _ in events_of(session, job)]


@pytest.mark.parametrize(("action", "shown"), [("flag", True), ("blur", False), ("block", False)])
def test_a_policy_that_can_withhold_images_turns_previews_off(
    session: Session, models_with: ModelsWith, leases: JobLeases, action: str, shown: bool
) -> None:
    models = models_with(concept(output=never(action)))
    assert run(session, models, leases, preview_every=1).state == JobState.SUCCEEDED
    listeners = [request.preview_listener for request in generator_of(models).asked]
    assert [listener is not None for listener in listeners] == [shown] * 3


def test_a_retried_job_is_checked_against_the_current_policy(
    session: Session, models_with: ModelsWith, leases: JobLeases
) -> None:
    blocked = run(session, models_with(concept(output=always("block"))), leases)
    again = jobs.insert_retry(session, blocked)
    session.commit()
    assert again.safety is None
    for action, state in (("block", JobState.FAILED), ("flag", JobState.SUCCEEDED)):
        again = jobs.insert_retry(session, blocked)
        session.commit()
        models = models_with(concept(output=always(action)))
        assert run_job(again.id, models=models, leases=leases, settings=get_settings(), worker="test") is (
            Outcome.FAILED if state is JobState.FAILED else Outcome.SUCCEEDED
        )
        session.expire_all()
        assert session.get_one(Job, again.id).state == state


# --- the API ------------------------------------------------------------------------------------------------------


def test_the_api_shows_the_decisions_and_no_request_turns_the_policy_off(
    session: Session, models_with: ModelsWith, leases: JobLeases, client: Client
) -> None:
    models = models_with(concept("weapon", prompt=always("flag"), output=always("blur")))
    job = run(session, models, leases)
    view = client.get(f"{API}/jobs/{job.id}").json
    assert view["safety"]["policy"] == models.policy.digest
    assert [each["stage"] for each in view["safety"]["decisions"]] == ["prompt", "output", "output", "output"]
    output = client.get(f"{API}/generations/{view['outputs'][2]['id']}").json
    prompt, own = output["safety"]["decisions"]
    assert (prompt["stage"], prompt["index"]) == ("prompt", None)
    assert (own["concept"], own["action"], own["index"], own["threshold"]) == ("weapon", "blur", 2, -1)
    assert client.get(f"{API}/jobs/{job.id}/events").text.count("event: moderated") == 2
    for field in ("safety", "policy", "safety_checker"):
        refused = client.post(f"{API}/generate", json={"prompt": "a red apple", field: "off"})
        assert refused.status_code == 422


def test_models_are_listed_with_the_policy_of_their_outputs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.get(f"{API}/models").json["policy"] is None
    monkeypatch.setenv(
        "AFTERIMAGE_SAFETY__CONCEPTS", '[{"name": "fire", "texts": ["x"], "output": {"threshold": 0.3}}]'
    )
    get_settings.cache_clear()
    expected = {"concepts": [{"name": "fire", "prompt": None, "output": "flag"}]}
    assert client.get(f"{API}/models").json["policy"] == expected


def pixels(key: str) -> np.ndarray:
    """int, shape (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(get_blobs().get(key))).convert("RGB")).astype(int)


def sharpest_edge(image: np.ndarray) -> int:
    """The largest difference between neighbouring pixels."""
    return max(int(np.abs(np.diff(image.astype(int), axis=axis)).max()) for axis in (0, 1))
