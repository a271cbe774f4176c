"""The whole service with an engine behind its worker: a pipeline of diffusers, in a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import numpy as np
import pytest

from ops.local.layout import free_port
from ops.local.stack import REPOSITORY
from shared.contracts.generation import SentReferenceImage
from tests.e2e.conftest import Api, disc
from tests.fake_engine import image_in
from tests.stack import RunningStack, running_stack, wait_until

LOAD_S = 240


@dataclass
class EngineProcess:
    """The engine, which a test may kill and start again on its port."""

    port: int = field(default_factory=lambda: free_port(excluding=set()))

    def __post_init__(self) -> None:
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.pipeline_engine", str(self.port)], cwd=REPOSITORY
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/models", timeout=1).is_success
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    engine = EngineProcess()
    yield engine
    engine.kill()


@pytest.fixture(scope="module")
def engine_stack(tmp_path_factory: pytest.TempPathFactory, engine: EngineProcess) -> Iterator[RunningStack]:
    """A stack whose only generator has the engine behind it. Its worker waits until the engine answers."""
    remote = {
        "kind": "openai",
        "engine": {
            "urls": [engine.url],
            "model": "starter",
            "modes": ["none", "reference"],
            "timeout_s": LOAD_S,
        },
        "native_side": 128,
        "any_size": False,
        "reference_side": 128,
        "defaults": {"num_inference_steps": 14, "guidance_scale": 1.0},
    }
    environment = {
        "AFTERIMAGE_ENVIRONMENT": "test",
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"remote": remote}),
        "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "remote",
    }
    folder = tmp_path_factory.mktemp("engine")
    with running_stack(folder, environment=environment, options=("--embed", "0")) as stack:
        yield stack


@pytest.fixture
def api(engine_stack: RunningStack) -> Iterator[Api]:
    with Api(engine_stack.url) as api:
        yield api


def test_a_seed_gives_the_picture_of_the_engine_alone_each_time(api: Api, engine: EngineProcess) -> None:
    request = {"prompt": "a red apple", "seed": 3, "mode": "none"}
    first, second = (api.ended(api.submit(**request)["id"], timeout_s=LOAD_S) for _ in range(2))
    assert first["state"] == second["state"] == "succeeded", (first, second)
    body = {"prompt": "a red apple", "seed": 3, "size": "128x128", "num_inference_steps": 14, "guidance_scale": 1.0}
    alone = httpx.post(f"{engine.url}/images/generations", json=body, timeout=60).raise_for_status()
    expected = image_in(alone.json())
    assert (api.pixels(first) == expected).all()
    assert (api.pixels(second) == expected).all()


def test_the_pictures_of_a_job_reach_the_engine(api: Api) -> None:
    request = {"prompt": "a teal disc", "seed": 3}
    picture = SentReferenceImage.of(disc("teal", background="gold")).model_dump(mode="json")
    job = api.ended(api.submit(**request, reference_images=[picture])["id"], timeout_s=LOAD_S)
    assert job["state"] == "succeeded", job
    plain = api.ended(api.submit(**request, mode="none")["id"], timeout_s=LOAD_S)
    output = api.http.get(f"/generations/{job['outputs'][0]['id']}").json()
    assert output["provenance"]["mode"] == "reference"
    assert output["provenance"]["reference_call"]["shape"] == "images/edits"
    assert np.abs(api.pixels(job).astype(int) - api.pixels(plain).astype(int)).max() > 30


def test_a_job_survives_the_engine(api: Api, engine: EngineProcess) -> None:
    """The engine is killed while it draws. The worker leaves the jobs in their queue until it is back."""
    job_ids = [api.submit(prompt="a blue cup", seed=seed, num_images=8, mode="none")["id"] for seed in (1, 100)]
    wait_until(lambda: api.job(job_ids[0])["state"] == "processing", timeout_s=LOAD_S, what="the first job to run")
    engine.kill()
    wait_until(lambda: api.job(job_ids[0])["state"] == "queued", timeout_s=LOAD_S, what="the job to be queued again")
    engine.start()
    for job_id in job_ids:
        job = api.ended(job_id, timeout_s=LOAD_S)
        assert job["state"] == "succeeded", job
        assert len(job["outputs"]) == 8
