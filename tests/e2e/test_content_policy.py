"""A content policy with the CLIP that ships: what it blocks and flags, and where each decision is reported."""

import json
from collections.abc import Iterator

import pytest

from shared.imaging import read_record
from tests.e2e.conftest import Api
from tests.stack import RunningStack, wait_until


@pytest.fixture(scope="module")
def key(guarded_stack: RunningStack) -> str:
    return guarded_stack.new_key("policy", "generate")


@pytest.fixture
def api(guarded_stack: RunningStack, key: str) -> Iterator[Api]:
    with Api(guarded_stack.url, key) as api:
        yield api


def test_a_forbidden_prompt_fails_its_job_and_generates_nothing(api: Api) -> None:
    job = api.ended(api.submit(prompt="a man holding a pistol, oil on canvas")["id"])
    assert (job["state"], job["error"]["code"], job["outputs"]) == ("failed", "prompt_blocked", [])
    (decision,) = job["safety"]["decisions"]
    assert (decision["concept"], decision["stage"], decision["action"]) == ("weapon", "prompt", "block")
    assert decision["similarity"] >= decision["threshold"] == 0.75


def test_a_flagged_output_is_reported_in_its_job_its_events_and_its_file(api: Api) -> None:
    job = api.ended(api.submit(prompt="a green heart", seed=4)["id"])
    assert job["state"] == "succeeded"
    (decision,) = job["safety"]["decisions"]
    reported = (decision["concept"], decision["stage"], decision["action"], decision["index"])
    assert reported == ("image", "output", "flag", 0)
    (output,) = job["outputs"]
    record = read_record(api.http.get(f"{api.url}{output['content_url']}").content)
    assert record is not None
    assert [each["concept"] for each in record["safety"]["decisions"]] == ["image"]
    with api.http.stream("GET", f"/jobs/{job['id']}/events") as events:
        assert "moderated" in events.read().decode()


def test_only_the_forbidden_item_of_a_bulk_fails_and_the_manifest_reports_why(api: Api) -> None:
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
