"""A client for stacks, and the stack with the models that ship."""

import io
from collections.abc import Iterator
from typing import Any, Self

import httpx
import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.stack import RunningStack, running_stack, wait_until


@pytest.fixture(scope="session")
def starter_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The stack exactly as `make up` runs it."""
    with running_stack(tmp_path_factory.mktemp("starter"), environment={}) as stack:
        yield stack


class Api:
    """The product through its public surface."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=30)

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
        """The job once it has ended."""
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
    """A PNG of a coloured disc: something that no other test uploads with the same colours."""
    image = Image.new("RGB", (128, 128), background)
    ImageDraw.Draw(image).ellipse((64 - radius, 64 - radius, 64 + radius, 64 + radius), fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
