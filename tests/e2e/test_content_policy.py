"""A stack under a content policy, on the models that ship: what it withholds, and that everybody is told."""

import json
from collections.abc import Iterator

import pytest

from shared.imaging import read_record
from tests.e2e.conftest import Api
from tests.stack import RunningStack, running_stack, wait_until

CONCEPTS = [
    {
        "name": "weapon",
        "texts": ["a pistol", "a gun"],
        "prompt": {"threshold": 0.75, "action": "block"},
        "output": {"threshold": 0.55, "action": "block"},
    },
    # Every image has that similarity, so that what follows is seen on each.
    {"name": "image", "texts": ["an image"], "output": {"threshold": -1, "action": "flag"}},
]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    environment = {"AFTERIMAGE_SAFETY__CONCEPTS": json.dumps(CONCEPTS)}
    with running_stack(tmp_path_factory.mktemp("guarded"), environment=environment) as stack:
        yield stack


@pytest.fixture
def api(guarded: RunningStack) -> Iterator[Api]:
    with Api(guarded.url) as api:
        yield api


def test_a_forbidden_prompt_ends_its_job_and_draws_nothing(api: Api) -> None:
    job = api.ended(api.submit(prompt="a man holding a pistol, oil on canvas")["id"])
    assert (job["state"], job["error"]["code"], job["outputs"]) == ("failed", "prompt_blocked", [])
    (decision,) = job["safety"]["decisions"]
    assert (decision["concept"], decision["stage"], decision["action"]) == ("weapon", "prompt", "block")
    assert decision["similarity"] >= decision["threshold"] == 0.75


def test_what_is_found_in_an_image_is_told_by_the_job_its_events_and_the_file_itself(api: Api) -> None:
    job = api.ended(api.submit(prompt="a green heart", seed=4)["id"])
    assert job["state"] == "succeeded"
    (decision,) = job["safety"]["decisions"]
    told = (decision["concept"], decision["stage"], decision["action"], decision["index"])
    assert told == ("image", "output", "flag", 0)
    (output,) = job["outputs"]
    record = read_record(api.http.get(f"{api.url}{output['content_url']}").content)
    assert record is not None
    assert [each["concept"] for each in record["safety"]["decisions"]] == ["image"]
    with api.http.stream("GET", f"/jobs/{job['id']}/events") as events:
        assert "moderated" in events.read().decode()


def test_of_a_bulk_only_the_forbidden_item_fails_and_the_manifest_says_why(api: Api) -> None:
    prompts = {
        "heart": "a green heart",
        "weapon": "a golden gun, trending on artstation, 8k, cinematic lighting",
        "apple": "a red apple",
    }
    lines = "".join(json.dumps({"prompt": prompt, "custom_id": name}) + "\n" for name, prompt in prompts.items())
    sent = api.http.post("/bulks", content=lines, headers={"Content-Type": "application/jsonl"}).raise_for_status()
    bulk = f"/bulks/{sent.json()['id']}"
    wait_until(lambda: api.http.get(bulk).json()["state"] == "completed", timeout_s=60, what="the bulk to end")
    manifest = api.http.get(f"{bulk}/manifest").raise_for_status().text.splitlines()
    ended = {line["custom_id"]: line for line in map(json.loads, manifest) if "custom_id" in line}
    assert {name: line["state"] for name, line in ended.items()} == {
        "heart": "succeeded",
        "weapon": "failed",
        "apple": "succeeded",
    }
    assert ended["weapon"]["error"]["code"] == "prompt_blocked"
    assert [each["concept"] for each in ended["weapon"]["safety"]["decisions"]] == ["weapon"]
