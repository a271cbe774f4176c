"""A plan of the real search is drawn as it was shown, and its output is verified from the file alone."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ops.local.stack import REPOSITORY
from tests.e2e.conftest import Api, disc
from tests.stack import RunningStack


@pytest.fixture
def api(starter_stack: RunningStack) -> Iterator[Api]:
    api = Api(starter_stack.url)
    yield api
    api.http.close()


def test_a_shown_plan_is_drawn_and_the_file_verifies_alone(api: Api, tmp_path: Path) -> None:
    prompt = "a purple disc"
    query: dict[str, str | float] = {"prompt": prompt, "collection": "plans", "min_similarity": 0.1}

    def upload(colour: str) -> str:
        image = api.upload(disc(colour), caption=f"a {colour} disc", collection="plans")
        api.searchable(image["id"])
        return str(image["id"])

    first = [upload("purple"), upload("orange")]
    shown = api.http.get("/rag/search", params=query).raise_for_status().json()
    used = {each["image_id"]: each["weight"] for each in shown["references"] if each["used"]}
    assert used.keys() == set(first)
    later = {upload("green"), upload("dodgerblue")}
    searched = api.http.get("/rag/search", params=query).raise_for_status().json()
    assert later & {each["image_id"] for each in searched["references"] if each["used"]}

    job = api.ended(api.submit(prompt=prompt, plan=shown["plan"], seed=4)["id"])
    assert job["state"] == "succeeded", job
    assert job["parameters"]["planned_at"]
    (output,) = job["outputs"]
    assert {each["image_id"]: each["weight"] for each in output["references"]} == pytest.approx(used)

    file = tmp_path / "output.png"
    file.write_bytes(httpx.get(api.url + output["content_url"]).content)
    verified = subprocess.run(
        [sys.executable, "-m", "scripts.verify_image", "--json", str(file)],
        cwd=REPOSITORY,
        env={},
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stderr
    finding = json.loads(verified.stdout)
    assert (finding["verdict"], finding["made_by"]["prompt"]) == ("intact", "a purple disc")
    assert [each["image_id"] for each in finding["made_by"]["references"]] == [
        each["image_id"] for each in output["references"]
    ]

    api.http.delete(f"/images/{first[1]}").raise_for_status()
    refused = api.http.post("/rag/generate", json={"prompt": prompt, "plan": shown["plan"]})
    assert (refused.status_code, refused.json()["code"]) == (422, "plan_outdated")
