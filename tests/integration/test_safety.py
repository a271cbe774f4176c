"""Jobs under a content policy, told with a real database, blob store and CLIP; the image model costs milliseconds."""

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
from shared.db.tables import Generation, Job
from shared.imaging import read_record
from shared.metrics import SAFETY_DECISIONS
from shared.settings import ModelSettings, SafetySettings, Settings, get_settings
from shared.storage import get_blobs
from tests.factories import make_job
from tests.integration.conftest import API, Client
from tests.small_pipelines import save_clip
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs import run as generation
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import Leases
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.fake import CheapGenerator
from worker_service.models.interface import ImageRequest, OnStep
from worker_service.models.loaded import Models

SEEDS = [1, 2, 3]
SIDE = 64
Under = Callable[..., Models]


class Watched(CheapGenerator):
    """The cheap generator, which remembers what it drew, and may have a checker that objects to these seeds."""

    def __init__(self, settings: ModelSettings, *, unsafe_seeds: Sequence[int] | None = None) -> None:
        super().__init__(**vars(CheapGenerator.load("cheap", settings)))
        self.asked: list[ImageRequest] = []
        self.drawn: list[np.ndarray] = []
        self.unsafe_seeds = unsafe_seeds
        self.capabilities = self.capabilities.model_copy(update={"native_width": SIDE, "native_height": SIDE})

    @property
    def has_safety_checker(self) -> bool:
        return self.unsafe_seeds is not None

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.asked = [*self.asked, *requests]
        images = super().generate(requests, on_step)
        self.drawn = [*self.drawn, *images]
        return images

    def unsafe(self, images: Sequence[np.ndarray]) -> list[bool]:
        latest = self.asked[-len(images) :]
        return [self.unsafe_seeds is not None and request.seed in self.unsafe_seeds for request in latest]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return Clip.load(ModelSettings.model_validate({"clip": {"model": f"local-dir:{folder}"}}))


@pytest.fixture
def under(settings: Settings, session: Session, clip: Clip) -> Iterator[Under]:
    """`under(concept, ...)`: loaded models with that policy."""
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    built: list[Models] = []

    def build(*concepts: dict[str, Any], unsafe_seeds: Sequence[int] | None = None, checker: str = "block") -> Models:
        generator = settings.model.generators["cheap"].model_copy(update={"safety_checker": checker})
        model = Watched(settings.model, unsafe_seeds=unsafe_seeds)
        safety = SafetySettings.model_validate({"concepts": concepts})
        built.append(Models.of(Embedder(clip, space, watchdog), model, generator, watchdog, safety=safety))
        return built[-1]

    yield build
    for models in built:
        models.close(5)


@pytest.fixture
def leases(settings: Settings) -> Iterator[Leases]:
    with Leases(settings.jobs) as leases:
        yield leases


def watched(models: Models) -> Watched:
    assert isinstance(models.image_model, Watched)
    return models.image_model


def concept(name: str = "thing", **rules: Any) -> dict[str, Any]:
    return {"name": name, "texts": ["a thing"], **rules}


def always(action: str) -> dict[str, Any]:
    return {"threshold": -1, "action": action}


def never(action: str) -> dict[str, Any]:
    return {"threshold": 1, "action": action}


def run(session: Session, models: Models, leases: Leases, **parameters: Any) -> Job:
    """A job of three images that has run."""
    job = make_job(session, **{"seeds": SEEDS, "mode": Mode.NONE, "width": SIDE, "height": SIDE, **parameters})
    session.commit()
    generation.run(job.id, models=models, leases=leases, settings=get_settings(), worker="test")
    session.expire_all()
    return session.get_one(Job, job.id)


def made(session: Session, job: Job) -> list[Generation]:
    return outputs.of_jobs(session, [job.id])[job.id]


def story(session: Session, job: Job) -> list[tuple[str, dict[str, Any]]]:
    return [(event.type, event.data) for event in jobs.events(session, job.id, after=0)]


def files_of(job_id: UUID) -> set[str]:
    return {blob.key for blob in get_blobs().list(f"outputs/{job_id}/")}


def decisions(job: Job) -> list[tuple[str, str, str, int | None]]:
    assert job.safety is not None
    return [(each["concept"], each["stage"], each["action"], each["index"]) for each in job.safety["decisions"]]


# --- prompts ------------------------------------------------------------------------------------------------------


def test_a_blocked_prompt_fails_its_job_with_a_code_before_anything_is_drawn(
    session: Session, under: Under, leases: Leases
) -> None:
    models = under(concept("weapon", prompt=always("block")), concept("rude", prompt=always("flag")))
    job = run(session, models, leases)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["context"]) == ("prompt_blocked", {"concepts": ["weapon"]})
    assert decisions(job) == [("weapon", "prompt", "block", None), ("rude", "prompt", "flag", None)]
    assert [told for told, _ in story(session, job)] == ["queued", "started", "moderated", "failed"]
    assert watched(models).asked == []


def test_a_flagged_prompt_is_drawn_and_told_in_job_story_record_and_file(
    session: Session, under: Under, leases: Leases
) -> None:
    counter = SAFETY_DECISIONS.labels("weapon", "prompt", "flag")
    before = counter._value.get()
    job = run(session, under(concept("weapon", prompt=always("flag"))), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("weapon", "prompt", "flag", None)]
    assert ("moderated", job.safety) in story(session, job)
    for output in made(session, job):
        assert output.provenance["safety"] == job.safety
        assert read_record(get_blobs().get(output.blob_key)) == output.provenance
    assert counter._value.get() == before + 1


# --- outputs ------------------------------------------------------------------------------------------------------


def test_a_flagged_output_is_stored_as_it_was_drawn_and_says_so(session: Session, under: Under, leases: Leases) -> None:
    models = under(concept(output=always("flag")))
    job = run(session, models, leases)
    assert decisions(job) == [("thing", "output", "flag", index) for index in range(3)]
    for output, drawn in zip(made(session, job), watched(models).drawn, strict=True):
        assert [each["index"] for each in output.provenance["safety"]["decisions"]] == [output.index], "only its own"
        assert (pixels(output.blob_key) == drawn).all()


def test_of_a_blurred_output_nothing_is_stored_but_the_blur(session: Session, under: Under, leases: Leases) -> None:
    models = under(concept(output=always("blur")))
    job = run(session, models, leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("thing", "output", "blur", index) for index in range(3)]
    for output, drawn in zip(made(session, job), watched(models).drawn, strict=True):
        edges = sharpest(drawn)
        assert edges > 60, "blocks of colour have edges"
        assert sharpest(pixels(output.blob_key)) < edges / 2
        assert sharpest(pixels(output.thumbnail_key)) < edges / 2
    assert len(files_of(job.id)) == 6


def test_a_blocked_output_is_not_stored_and_the_others_are(
    session: Session, under: Under, leases: Leases, clip: Clip
) -> None:
    similarities = similarity_to_the_concept(session, under, leases, clip)
    second, first = sorted(similarities)[-2:]
    middle, blocked = (first + second) / 2, similarities.index(first)
    job = run(session, under(concept(output={"threshold": middle, "action": "block"})), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("thing", "output", "block", blocked)]
    left = [index for index in range(3) if index != blocked]
    assert [(output.index, output.seed) for output in made(session, job)] == [(i, SEEDS[i]) for i in left]
    assert job.safety is not None
    assert job.safety["decisions"][0]["similarity"] == pytest.approx(first, abs=1e-4)
    assert not any(f"/{blocked}." in key or key.endswith(f"/{blocked}") for key in files_of(job.id))
    assert len(files_of(job.id)) == 4
    assert made(session, job)[0].provenance["safety"]["decisions"] == []


def similarity_to_the_concept(session: Session, under: Under, leases: Leases, clip: Clip) -> list[float]:
    models = under()
    run(session, models, leases)
    text = clip.encode_text(["a thing"])[0]
    drawn = clip.encode_image([Image.fromarray(image) for image in models.image_model.drawn])  # type: ignore[attr-defined]
    return [float(vector @ text / np.linalg.norm(vector) / np.linalg.norm(text)) for vector in drawn]


def test_a_job_whose_images_are_all_blocked_fails_with_a_code_and_leaves_no_file(
    session: Session, under: Under, leases: Leases
) -> None:
    job = run(session, under(concept(output=always("block"))), leases)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["context"]) == ("output_blocked", {"concepts": ["thing"]})
    assert decisions(job) == [("thing", "output", "block", index) for index in range(3)]
    assert session.scalars(select(Generation)).all() == []
    assert files_of(job.id) == set()


def test_the_strictest_action_wins(session: Session, under: Under, leases: Leases) -> None:
    concepts = [concept(name, output=always(name)) for name in ("flag", "block", "blur")]
    assert run(session, under(*concepts), leases).state == JobState.FAILED
    models = under(concepts[0], concepts[2])
    job = run(session, models, leases, seeds=[1])
    assert (pixels(made(session, job)[0].blob_key) != watched(models).drawn[0]).any()


# --- the checker of the model --------------------------------------------------------------------------------------


def test_what_the_models_own_checker_objects_to_is_blocked_and_recorded(
    session: Session, under: Under, leases: Leases
) -> None:
    job = run(session, under(unsafe_seeds=[2]), leases)
    assert job.state == JobState.SUCCEEDED
    assert decisions(job) == [("safety_checker", "output", "block", 1)]
    assert [output.index for output in made(session, job)] == [0, 2]


@pytest.mark.parametrize(("checker", "indexes"), [("flag", [0, 1, 2]), ("blur", [0, 1, 2]), ("block", [])])
def test_the_action_of_the_checker_is_a_setting(
    session: Session, under: Under, leases: Leases, checker: str, indexes: list[int]
) -> None:
    job = run(session, under(unsafe_seeds=SEEDS, checker=checker), leases)
    assert [output.index for output in made(session, job)] == indexes
    assert (job.error or {}).get("code") == (None if indexes else "output_blocked")
    assert decisions(job) == [("safety_checker", "output", checker, index) for index in range(3)]


# --- whether there is a policy ---------------------------------------------------------------------------------------


def test_without_a_policy_nothing_is_embedded_judged_or_recorded(
    session: Session, under: Under, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = under()

    def refuse(*_: object) -> None:
        raise AssertionError("embedded")

    monkeypatch.setattr(models.embedder, "embed", refuse)
    job = run(session, models, leases)
    assert job.state == JobState.SUCCEEDED
    assert job.safety is None
    assert all("safety" not in output.provenance for output in made(session, job))
    assert "moderate" not in job.timings


def test_what_passes_a_policy_says_which_one_it_has_passed(session: Session, under: Under, leases: Leases) -> None:
    models = under(concept(prompt=never("block"), output=never("block")))
    job = run(session, models, leases)
    passed = {"policy": models.policy.digest, "decisions": []}
    assert job.safety == passed
    assert [output.provenance["safety"] for output in made(session, job)] == [passed] * 3
    assert "moderated" not in [told for told, _ in story(session, job)]


@pytest.mark.parametrize(("action", "shown"), [("flag", True), ("blur", False), ("block", False)])
def test_a_policy_that_can_withhold_images_lets_nobody_see_them_being_drawn(
    session: Session, under: Under, leases: Leases, action: str, shown: bool
) -> None:
    models = under(concept(output=never(action)))
    assert run(session, models, leases, preview_every=1).state == JobState.SUCCEEDED
    onlookers = [request.onlooker for request in watched(models).asked]
    assert [onlooker is not None for onlooker in onlookers] == [shown] * 3


def test_a_retried_job_is_judged_again_by_the_policy_of_then(session: Session, under: Under, leases: Leases) -> None:
    blocked = run(session, under(concept(output=always("block"))), leases)
    again = jobs.insert_retry(session, blocked)
    session.commit()
    assert again.safety is None
    for action, state in (("block", JobState.FAILED), ("flag", JobState.SUCCEEDED)):
        again = jobs.insert_retry(session, blocked)
        session.commit()
        models = under(concept(output=always(action)))
        assert generation.run(again.id, models=models, leases=leases, settings=get_settings(), worker="test") is (
            Outcome.FAILED if state is JobState.FAILED else Outcome.SUCCEEDED
        )
        session.expire_all()
        assert session.get_one(Job, again.id).state == state


# --- what the API tells ----------------------------------------------------------------------------------------------


def test_the_api_tells_of_the_decisions_and_no_request_turns_the_policy_off(
    session: Session, under: Under, leases: Leases, client: Client
) -> None:
    models = under(concept("weapon", prompt=always("flag"), output=always("blur")))
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


def test_the_models_are_listed_with_the_policy_their_outputs_are_under(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def sharpest(image: np.ndarray) -> int:
    """The largest step from a pixel to the next one."""
    return max(int(np.abs(np.diff(image.astype(int), axis=axis)).max()) for axis in (0, 1))
