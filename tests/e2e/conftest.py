"""A client for stacks, and a stack behind API keys and a content policy."""

import io
import json
import ssl
from collections.abc import Iterator
from typing import Any, Self

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import TEST_ENVIRONMENT
from tests.stack import RunningStack, running_stack, wait_until

BATCH_S = {"quick": 0.3, "slow": 3.0}
"""Seconds per batch of each generator of the guarded stack."""
BATCH_IMAGES = 4
CONCEPTS = [
    {
        "name": "weapon",
        "texts": ["a pistol", "a gun"],
        "prompt": {"threshold": 0.75, "action": "block"},
        "output": {"threshold": 0.55, "action": "block"},
    },
    # Every image reaches this threshold, so each output is flagged.
    {"name": "image", "texts": ["an image"], "output": {"threshold": -1, "action": "flag"}},
]


@pytest.fixture(scope="session")
def guarded_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """A stack with API keys, a content policy and one worker for each generator. Its tests need no embed worker."""
    generators = {
        name: {"kind": "fake", "cost_ms": seconds * 1000, "max_batch_size": BATCH_IMAGES}
        for name, seconds in BATCH_S.items()
    }
    environment = TEST_ENVIRONMENT | {
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps(generators),
        "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "quick",
        "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
        "AFTERIMAGE_SAFETY__CONCEPTS": json.dumps(CONCEPTS),
        "AFTERIMAGE_JOBS__SHUTDOWN_GRACE_S": "1",
    }
    folder = tmp_path_factory.mktemp("guarded")
    with running_stack(folder, environment=environment, options=("--embed", "0")) as stack:
        yield stack


class Api:
    """A client of the HTTP API of a stack."""

    def __init__(self, url: str, key: str | None = None, *, verify: ssl.SSLContext | bool = True) -> None:
        self.url = url
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=f"{url}/api/v1", headers=headers, verify=verify, timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def submit(self, **request: Any) -> dict[str, Any]:
        answer = self.http.post("/rag/generate", json={"prompt": "a red apple", **request})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def job(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/jobs/{job_id}").raise_for_status().json())

    def ended(self, job_id: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """Wait until the job has ended, and return it."""
        wait_until(
            lambda: self.http.get(f"/jobs/{job_id}", params={"wait": 5}).json().get("finished_at"),
            timeout_s=timeout_s,
            what=f"job {job_id} to end",
        )
        return self.job(job_id)

    def upload(self, file: bytes, name: str = "image.png", **fields: Any) -> dict[str, Any]:
        answer = self.http.post("/upload", files={"file": (name, file)}, data=fields)
        assert answer.is_success, answer.text
        return dict(answer.json()["images"][0])

    def searchable(self, image_id: str, *, timeout_s: float = 30) -> None:
        wait_until(
            lambda: self.http.get(f"/images/{image_id}").json()["state"] == "ready",
            timeout_s=timeout_s,
            what=f"image {image_id} to be searchable",
        )

    def pixels(self, job: dict[str, Any], index: int = 0) -> np.ndarray:
        """uint8 (height, width, 3)."""
        data = httpx.get(self.url + job["outputs"][index]["content_url"]).raise_for_status().content
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def disc(colour: str, *, background: str = "white", radius: int = 40) -> bytes:
    """A PNG of a coloured disc. Each test uses its own colours, because equal uploads become one image."""
    image = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(image).ellipse((64 - radius, 64 - radius, 64 + radius, 64 + radius), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
