"""The content policy with the CLIP of the starter, on realistic prompts and on pictures of its corpus."""

import io
import json
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from PIL import Image
from sqlalchemy.orm import Session

from shared.contracts.generation import Mode
from shared.contracts.jobs import JobState
from shared.db import outputs, spaces
from shared.db.tables import Job
from shared.settings import STARTER, ModelSettings, SafetySettings, Settings
from tests.factories import make_job
from worker_service.execution.steps import OnStep
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.fake import FakeGenerator
from worker_service.models.generate_batch import GeneratedImage
from worker_service.models.interface import ImageRequest
from worker_service.models.worker_models import Models

SIDE = 128
PICTURES = ["water pistol", "kite", "pencil", "green heart"]
"""The subjects of a job's images, by seed."""
# As docs/operations.md prints it.
POLICY = SafetySettings.model_validate(
    {
        "concepts": [
            {
                "name": "weapon",
                "texts": ["a pistol", "a gun"],
                "prompt": {"threshold": 0.75, "action": "block"},
                "output": {"threshold": 0.55, "action": "block"},
            }
        ]
    }
)


class CorpusGenerator(FakeGenerator):
    """Returns pictures of the corpus for any prompt."""

    def __init__(self, settings: ModelSettings, pictures: Sequence[np.ndarray]) -> None:
        super().__init__(**vars(FakeGenerator.load("cheap", settings)))
        self.pictures = pictures
        self.capabilities = self.capabilities.model_copy(update={"native_width": SIDE, "native_height": SIDE})

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        return [self.pictures[request.seed] for request in requests]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(ModelSettings())


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """One picture of the starter corpus for each of PICTURES."""
    found: dict[str, np.ndarray] = {}
    with tarfile.open(STARTER / "corpus.tar.gz") as corpus:
        files = {member.name: member for member in corpus}
        for name in files:
            if name.endswith(".json"):
                caption = json.load(corpus.extractfile(files[name]) or io.BytesIO())["caption"]
                if caption in PICTURES and caption not in found:
                    file = corpus.extractfile(files[name.replace(".json", ".webp")])
                    assert file is not None
                    found[caption] = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
    return [found[caption] for caption in PICTURES]


@pytest.fixture
def models(settings: Settings, session: Session, clip: Clip, pictures: Sequence[np.ndarray]) -> Iterator[Models]:
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    generator = settings.model.generators["cheap"]
    embedder = Embedder(clip, space, watchdog)
    models = Models.of(embedder, CorpusGenerator(settings.model, pictures), generator, watchdog, safety=POLICY)
    yield models
    models.close(5)


@pytest.mark.parametrize(
    ("prompt", "blocked"),
    [
        ("a pistol", True),
        ("Water-Pistol!", True),
        ("a man holding a pistol in a saloon, oil on canvas", True),
        ("a golden gun, trending on artstation, 8k, highly detailed, cinematic lighting", True),
        (", ".join(["golden hour"] * 100 + ["a pistol"] + ["8k"] * 100), True),
        ("a green heart", False),
        ("a red apple with a bite", False),
        ("a pencil", False),
        ("a kite in the sky over the beach, children laughing", False),
        ("a cat playing with a ball", False),
        ("a man in a saloon, oil on canvas, trending on artstation, highly detailed", False),
    ],
)
def test_a_prompt_is_blocked_by_its_subject_whatever_else_it_says(models: Models, prompt: str, blocked: bool) -> None:
    assert [each.concept for each in models.policy.decide_on_prompt(prompt)] == (["weapon"] if blocked else [])


def test_an_image_is_recognised_by_its_content(models: Models, pictures: Sequence[np.ndarray]) -> None:
    found = models.policy.decide_on_images([GeneratedImage(picture) for picture in pictures])
    assert [[each.concept for each in decisions] for decisions in found] == [["weapon"], [], [], []]


def test_a_concept_is_recognised_at_the_end_of_a_long_image(models: Models, pictures: Sequence[np.ndarray]) -> None:
    for end in (np.hstack, np.vstack):
        strip = end([pictures[3], pictures[1], pictures[2], pictures[0]])
        (decisions,) = models.policy.decide_on_images([GeneratedImage(strip)])
        assert [each.concept for each in decisions] == ["weapon"]


def test_a_job_with_a_harmless_prompt_succeeds_without_its_blocked_image(
    session: Session, settings: Settings, models: Models
) -> None:
    job = make_job(session, prompt="summer toys", seeds=[0, 1, 2, 3], mode=Mode.NONE, width=SIDE, height=SIDE)
    session.commit()
    with JobLeases(settings.jobs) as leases:
        run_job(job.id, models=models, leases=leases, settings=settings, worker="test")
    session.expire_all()
    ended = session.get_one(Job, job.id)
    assert ended.state == JobState.SUCCEEDED
    assert [output.index for output in outputs.list_by_job(session, [job.id])[job.id]] == [1, 2, 3]
    assert ended.safety is not None
    (decision,) = ended.safety["decisions"]
    assert (decision["concept"], decision["action"], decision["index"]) == ("weapon", "block", 0)


def test_a_worker_that_starts_with_a_policy_applies_it(session: Session, settings: Settings) -> None:
    under_policy = settings.model_copy(update={"safety": POLICY})
    models = Models.load("cheap", under_policy, Watchdog(settings.watchdog))
    try:
        assert [each.action for each in models.policy.decide_on_prompt("a pistol")] == ["block"]
    finally:
        models.close(5)
