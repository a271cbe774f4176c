"""References of the moment, and outputs that are remembered, on the models that ship."""

import base64
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from ops.local.stack import REPOSITORY
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack, clean_environment


@pytest.fixture
def api(starter_stack: RunningStack) -> Iterator[Api]:
    with Api(starter_stack.url) as api:
        yield api


def sweep(stack: RunningStack) -> None:
    """Delete unneeded blobs of any age, as an operator does."""
    command = [sys.executable, "-m", "scripts.admin", "sweep", "--older-than-s", "0"]
    subprocess.run(command, cwd=REPOSITORY, env={**clean_environment(), **stack.environment()}, check=True, timeout=60)


def stored_references(stack: RunningStack) -> set[str]:
    """The names of the stored pictures of requests."""
    folder = Path(stack.environment()["AFTERIMAGE_STORAGE__URL"].removeprefix("file://")) / "references"
    return {name for _, _, names in os.walk(folder) for name in names}


def test_a_picture_of_a_request_is_used_replayed_and_swept_with_its_jobs(api: Api, starter_stack: RunningStack) -> None:
    file = disc("darkviolet", background="lemonchiffon")
    picture = {"data": base64.b64encode(file).decode(), "caption": "a violet disc"}
    asked = {"prompt": "a disc", "seed": 12, "mode": "reference"}
    job = api.ended(api.submit(**asked, reference_images=[picture])["id"])
    assert job["state"] == "succeeded", job["error"]
    (output,) = job["outputs"]
    (used,) = output["references"]
    (own,) = job["reference_images"]
    assert (used["kind"], used["image_id"], used["sha256"]) == ("request", own["id"], own["sha256"])
    assert output["provenance"]["mode"] == "reference"

    other = base64.b64encode(disc("darkgreen", background="black")).decode()
    differently = api.ended(api.submit(**asked, reference_images=[{"data": other}])["id"])
    assert np.abs(api.pixels(job).astype(int) - api.pixels(differently)).max() > 50, "the picture decides"
    by_image = api.http.post("/search", files={"image": file}, data={"k": "100"}).raise_for_status().json()
    assert own["sha256"] not in {result["sha256"] for result in by_image["results"]}, "the corpus does not have it"

    replay = api.http.post(f"/generations/{output['id']}/replay").raise_for_status().json()
    again = api.ended(replay["id"])
    (repeated,) = again["outputs"]
    assert (repeated["replay"]["verdict"], repeated["replay"]["changed"]) == ("identical", [])
    assert repeated["references"][0]["sha256"] == own["sha256"]

    kept = {name for name in stored_references(starter_stack) if name.startswith(own["sha256"])}
    assert len(kept) == 2, "the picture and its thumbnail, once for both jobs"
    assert api.http.delete(f"/jobs/{job['id']}").status_code == 204
    sweep(starter_stack)
    assert kept <= stored_references(starter_stack), "the replay still needs it"
    assert httpx.get(api.url + again["reference_images"][0]["content_url"]).is_success
    assert api.http.delete(f"/jobs/{again['id']}").status_code == 204
    sweep(starter_stack)
    assert not kept & stored_references(starter_stack)


def test_a_picture_of_a_request_is_drawn(api: Api) -> None:
    form = {"request": '{"prompt": "a disc", "seed": 5, "min_similarity": 1}'}
    file = disc("teal", background="white", radius=55)
    answer = api.http.post("/rag/generate", data=form, files={"reference_image": ("disc.png", file)})
    assert answer.status_code == 202, answer.text
    job = api.ended(answer.json()["id"])
    assert job["state"] == "succeeded", job["error"]
    pixels = api.pixels(job).astype(int)
    height, width, _ = pixels.shape
    corner, centre = pixels[2, 2], pixels[height // 2, width // 2]
    assert corner.min() > 200, "white, as in the picture"
    assert centre[0] < 100 < centre[1], "teal, as in the picture"


def test_a_remembered_output_is_found_within_two_seconds_and_drawn_from(api: Api) -> None:
    job = api.ended(api.submit(prompt="an orange heart", mode="none", seed=77)["id"])
    (output,) = job["outputs"]
    content = httpx.get(api.url + output["content_url"]).raise_for_status().content

    body = {"caption": "an orange heart of the service", "tags": ["drawn"]}
    answer = api.http.post(f"/generations/{output['id']}/remember", json=body)
    remembered = time.monotonic()
    assert answer.status_code == 201, answer.text
    image = answer.json()
    api.searchable(image["id"])
    found = api.http.post("/search", files={"image": content}, data={"k": "1"}).raise_for_status().json()
    assert time.monotonic() - remembered < 2
    assert found["results"][0]["image_id"] == image["id"]
    assert image["attributes"] == {"generation_id": output["id"]}

    drawn = api.ended(api.submit(prompt="a heart", reference_ids=[image["id"]], seed=3)["id"])
    assert drawn["state"] == "succeeded", drawn["error"]
    assert [each["image_id"] for each in drawn["outputs"][0]["references"]] == [image["id"]]
    assert api.http.delete(f"/generations/{output['id']}").status_code == 204
    assert api.http.get(f"/images/{image['id']}/content").is_success, "the memory outlives the output"
    assert api.http.delete(f"/images/{image['id']}").status_code == 204
