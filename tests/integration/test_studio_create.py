"""Studio's form `create`: the person's choices, pictures of the moment, and errors beside their fields."""

import io
import json
import re
import shlex
from collections.abc import Sequence
from html import unescape
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import workers
from shared.db.spaces import Space
from shared.db.tables import Image, Job
from shared.settings import get_settings
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_jobs import CAPABILITIES
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output
from tests.integration.test_studio import FRAGMENT, SAME_ORIGIN, checked_values, submitted


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


@pytest.fixture
def three(session: Session, space: Space) -> list[Image]:
    """Three images that the prompt "red" finds."""
    found = [
        make_image(session, vector=towards(a0=1, **{f"a{axis}": 0.6 * axis / 5}), caption=f"number {axis}")
        for axis in (3, 4, 5)
    ]
    session.commit()
    return found


def shown_form(client: Client, form: dict[str, Any] | None = None, **query: Any) -> dict[str, Any]:
    """The fields of the references for a prompt, as a browser sends them back."""
    answer = client.get("/references", query_string={**(form or {}), **query}, headers=FRAGMENT)
    assert answer.status_code == 200, answer.text
    fields: dict[str, Any] = dict(query)
    for name, value in re.findall(r'<input type="(?:hidden|range)" name="([^"]+)"[^>]*? value="([^"]*)"', answer.text):
        fields[name] = unescape(value)
    for name in ("use", "pin", "avoid_ids"):
        fields[name] = checked_values(answer, name)
    fields["page"] = answer.text
    return fields


def generated(client: Client, session: Session, form: dict[str, Any]) -> dict[str, Any]:
    answer = client.post("/", data={**form, "page": ""}, headers=SAME_ORIGIN)
    assert answer.status_code == 303, answer.text
    return submitted(session)


def everything_is_red(items: Sequence[Any]) -> Any:
    return towards(a0=1)[None].repeat(len(items), axis=0)


def pins(parameters: dict[str, Any]) -> dict[str, bool]:
    """By image: whether the record says that the person chose it."""
    return {each["image_id"]: each.get("pinned", True) for each in parameters["references"]}


def test_only_the_touched_references_are_recorded_as_pinned(
    client: Client, session: Session, three: list[Image]
) -> None:
    first, second, third = (str(image.id) for image in three)
    with embed_worker(make_space(session)):
        form = shown_form(client, prompt="red")
    assert set(form["use"]) == {first, second, third}
    assert pins(generated(client, session, form | {"use": [first, second]})) == {first: False, second: False}
    weighed = generated(client, session, form | {f"weight.{third}": "0.9"})
    assert pins(weighed) == {first: False, second: False, third: True}
    assert [each["weight"] for each in weighed["references"] if each["image_id"] == third] == [0.9]
    pinned = generated(client, session, form | {"pin": [second]})
    assert pins(pinned) == {second: True, first: False, third: False}


def test_choices_stay_when_the_prompt_changes_and_end_with_their_image(
    client: Client, session: Session, three: list[Image]
) -> None:
    dropped, weighed, _ = (str(image.id) for image in three)
    with embed_worker(make_space(session), everything_is_red):
        form = shown_form(client, prompt="red")
        form["use"].remove(dropped)
        form[f"weight.{weighed}"] = "0.9"
        for prompt in ("a red thing", "red things"):
            form = shown_form(client, form, prompt=prompt)
            assert (dropped in form["use"], form[f"weight.{weighed}"]) == (False, "0.9")
            assert "You dropped it." in form["page"]
            assert "has ended" not in form["page"]
        narrow = shown_form(client, form, prompt="red", filter='{"created_after": "2100-01-01T00:00:00Z"}')
    for image_id, choice in ((dropped, "dropped"), (weighed, "its weight")):
        assert re.search(
            rf"Your choice for <a href=\"/corpus/{image_id}\">[^<]+</a> \({choice}\) has ended", narrow["page"]
        )
    assert "has ended" not in shown_form(client, narrow, prompt="red")["page"], "it is said once"


def test_an_added_reference_stays_added(client: Client, session: Session, space: Space) -> None:
    near, far = make_image(session, vector=towards(a0=1)), make_image(session, vector=towards(a0=0.3, a1=1))
    session.commit()
    with embed_worker(space, everything_is_red):
        form = shown_form(client, prompt="red")
        assert form["use"] == [str(near.id)]
        again = shown_form(client, form | {"use": [str(near.id), str(far.id)]}, prompt="a red one")
    assert set(again["use"]) == {str(near.id), str(far.id)}
    assert "You added it." in again["page"]
    assert pins(generated(client, session, again)) == {str(near.id): False, str(far.id): True}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("prompt", " ", "Say in words what the picture should show."),
        ("num_images", "99", "less than or equal to 16"),
        ("collection", "nowhere", "collection"),
        ("model", "nothing", "model"),
        ("filter", "{", "JSON object"),
    ],
)
def test_an_error_stands_in_the_form_and_nothing_typed_is_lost(
    client: Client, session: Session, field: str, value: str, words: str
) -> None:
    form = {"prompt": "two\nlines", "negative_prompt": "a <pear>", "seed": "77", "avoid": "a plum"} | {field: value}
    answer = client.post("/", data=form, headers=SAME_ORIGIN)
    assert 400 <= answer.status_code < 500
    assert "<h1>Create an image</h1>" in answer.text
    assert words in answer.text
    for typed in ("a &lt;pear&gt;", 'value="77"', "a plum</textarea>"):
        assert typed in answer.text
    assert session.scalar(select(Job)) is None


def test_the_error_of_a_field_stands_beside_it(client: Client) -> None:
    page = client.post("/", data={"prompt": "x", "width": "5"}, headers=SAME_ORIGIN).text
    (beside,) = re.findall(r'name="width"[^>]*>\s*<span class="field-wrong"[^>]*>([^<]+)<', page)
    assert "16" in beside
    assert page.count(beside) == 1


def test_a_bad_upload_ends_on_its_form_with_everything_typed(client: Client, session: Session) -> None:
    form = {"file": (io.BytesIO(b"no image"), "x.png"), "caption": "a quince", "tags": "fruit"}
    answer = client.post("/corpus", data=form, headers=SAME_ORIGIN)
    assert answer.status_code == 415
    for kept in ("<h1>Corpus</h1>", 'value="a quince"', 'value="fruit"', '<details class="panel" open>', "wrong"):
        assert kept in answer.text, kept
    form = {"file": (io.BytesIO(picture()), "x.png"), "caption": "a quince", "collection": "team-b/nowhere"}
    answer = client.post("/corpus", data=form, headers=SAME_ORIGIN)
    assert (answer.status_code, 'value="team-b/nowhere"' in answer.text) == (422, True)
    assert session.scalar(select(Image)) is None


def test_bad_forms_of_collections_and_searches_keep_what_was_typed(client: Client, space: Space) -> None:
    made = client.post("/collections", data={"name": "Ä", "description": "good things"}, headers=SAME_ORIGIN)
    assert (made.status_code, 'value="good things"' in made.text) == (422, True)
    sent = {"query": "a quince", "negative": "a pear", "image": (io.BytesIO(b"no image"), "b.png")}
    with embed_worker(space, everything_is_red):
        found = client.post("/search", data=sent, headers=SAME_ORIGIN)
    assert (found.status_code, 'value="a quince"' in found.text, 'value="a pear"' in found.text) == (415, True, True)


def test_pictures_of_the_moment_are_references_beside_the_shown_ones(
    client: Client, session: Session, three: list[Image]
) -> None:
    output = make_output(session, 7)
    with embed_worker(make_space(session)):
        form = shown_form(client, prompt="red", pictures="2")
    most = get_settings().model.generators["cheap"].max_references
    assert len(form["use"]) == min(3, most - 2), "the pictures take the room of found references"
    file = (io.BytesIO(picture("blue")), "mine.png")
    sent = generated(client, session, form | {"reference_image": file, "from_output": str(output.id)})
    assert len(sent["reference_images"]) == 2
    assert set(pins(sent).values()) == {False}
    assert session.scalar(select(Image).where(Image.sha256 == output.sha256)) is None, "the corpus stays as it was"
    page = client.get("/", query_string={"from_output": str(output.id)}).text
    assert f'name="from_output" value="{output.id}" checked' in page


def test_a_picture_alone_is_a_reference_without_a_search(client: Client, session: Session) -> None:
    form = {"prompt": "red", "reference_image": (io.BytesIO(picture("blue")), "mine.png")}
    parameters = generated(client, session, form)
    assert (len(parameters["reference_images"]), parameters["references"], parameters["k"]) == (1, [], 0)
    broken = {"prompt": "red", "reference_image": (io.BytesIO(b"nothing"), "mine.png")}
    answer = client.post("/", data=broken, headers=SAME_ORIGIN)
    assert (answer.status_code, "<h1>Create an image</h1>" in answer.text) == (415, True)


def test_the_request_of_the_form_is_shown_for_programs(client: Client, session: Session) -> None:
    form: dict[str, Any] = {"prompt": 'it\'s "red"', "seed": "7", "width": "32"}
    page = client.post("/request", data=form, headers=SAME_ORIGIN).text
    curl, python, text = (unescape(each) for each in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL))
    request = json.loads(text)
    assert (request["prompt"], request["seed"], request["width"]) == ('it\'s "red"', 7, 32)
    words = shlex.split(curl.replace("\\\n", ""))
    assert json.loads(words[words.index("-d") + 1]) == request
    assert words[1].endswith(f"{API}/rag/generate")
    compile(python, "shown", "exec")
    assert client.post(f"{API}/rag/generate", json=request).status_code == 202
    assert submitted(session)["seeds"] == [7]
    form |= {"reference_image": (io.BytesIO(picture()), "mine.png")}
    page = client.post("/request", data=form, headers=SAME_ORIGIN).text
    assert "reference_image=@picture-1.png" in page
    wrong = client.post("/request", data={"prompt": " "}, headers=SAME_ORIGIN)
    assert (wrong.status_code, "Say in words" in wrong.text) == (422, True)


def test_the_links_of_an_output_repeat_its_seed_and_use_it_as_a_reference(client: Client, session: Session) -> None:
    output = make_output(session, 7)
    page = unescape(client.get(f"/gallery/{output.id}").text)
    links = dict(re.findall(r'<a class="button[^"]*" href="(/\?[^"]+)">([^<]+)<', page))
    by_name = {name: link for link, name in links.items()}
    assert "seed=7" in by_name["Again with this seed"]
    assert "seed=" not in by_name["Generate another"]
    assert f"from_output={output.id}" in by_name["Use as reference"]
    assert {"prompt=", f"from_output={output.id}"} <= set(
        re.findall(r"prompt=|from_output=[^&]+", by_name["More like this"])
    )


def test_placeholders_are_the_real_defaults_and_a_missing_ability_is_named(client: Client, session: Session) -> None:
    name = get_settings().model.default_generator
    workers.publish_capabilities(session, name, CAPABILITIES.model_copy(update={"supports_negative_prompt": False}))
    session.commit()
    page = client.get("/").text
    (model,) = client.get(f"{API}/models").json["models"]
    steps = model["defaults"]["num_inference_steps"]
    assert re.search(rf'name="num_inference_steps"[^>]* placeholder="{steps}"', page)
    assert f"Negative prompt (not for {name})" in page


def test_the_memory_is_searched_in_the_form_and_what_it_finds_is_pinned(
    client: Client, session: Session, three: list[Image]
) -> None:
    first, second, third = (str(image.id) for image in three)
    with embed_worker(make_space(session), everything_is_red):
        found = client.get("/memories", query_string={"find": "red", "pin": [second]}, headers=FRAGMENT)
        assert re.findall(r'name="pin" value="([^"]+)"', found.text) == [first, third], "a pinned one is left out"
        assert "<html" not in found.text
        page = client.get("/", query_string={"find": "red"}).text  # as a browser without script
        assert re.findall(r'name="pin" value="([^"]+)"', page) == [first, second, third]
        form = shown_form(client, prompt="red", pin=[third])
        assert pins(generated(client, session, form))[third] is True
        wrong = {"find": "red", "collection": "none"}
        assert client.get("/memories", query_string=wrong).status_code == 422
        assert "no collection" in client.get("/", query_string=wrong).text, "the form says it, and stays"
    assert 'name="pin"' not in client.get("/memories", headers=FRAGMENT).text


def test_loras_of_the_models_are_set_by_their_scale(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = get_settings().model.default_generator
    assert "LoRA" not in client.get("/").text, "no model has one"
    workers.publish_capabilities(session, name, CAPABILITIES.model_copy(update={"loras": ["ink", "wool"]}))
    session.commit()
    generator = get_settings().model.generators[name]
    monkeypatch.setitem(
        get_settings().model.generators, name, generator.model_copy(update={"loras": {"ink": None, "wool": None}})
    )
    page = client.get("/").text
    assert re.findall(r'name="lora\.(\w+)"', page) == ["ink", "wool"]
    form = {"prompt": "red", "similar_examples_count": "0", "lora.ink": "0.8", "lora.wool": " "}
    assert generated(client, session, form)["loras"] == {"ink": 0.8}
    ended = make_job(session, state=JobState.SUCCEEDED, loras={"ink": 0.8})
    session.commit()
    assert "lora.ink=0.8" in client.get(f"/jobs/{ended.id}").text, "a repeated job keeps it"
    again = client.get("/", query_string={"lora.ink": "0.8"}).text
    assert re.search(r'name="lora\.ink"[^>]* value="0\.8"', again)
    refused = client.post("/", data=form | {"lora.ink": "9"}, headers=SAME_ORIGIN)
    assert refused.status_code == 422
    assert 'class="field-wrong" id="wrong-loras"' in refused.text


def test_a_job_that_a_worker_holds_waits_for_the_model_with_its_place(client: Client, session: Session) -> None:
    held = []
    for text in ("one", "two", "three"):
        held.append(make_job(session, state=JobState.PROCESSING, prompt=text))
        session.commit()
    first, second, drawn = held
    for job in held:
        session.get_one(Job, job.id).model_started = job is drawn
    session.commit()
    page = client.get("/queue").text
    assert "<b>2</b> jobs waiting for the model" in page
    assert "<b>1</b> jobs drawing" in page
    assert "waiting for the model</b> · 1 ahead" in client.get(f"/jobs/{second.id}").text
    assert "ahead" not in client.get(f"/jobs/{first.id}").text
    assert ">drawing</b>" in client.get(f"/jobs/{drawn.id}").text


def test_times_are_machine_readable_and_have_a_zone(client: Client, session: Session) -> None:
    output = make_output(session, 7)
    for path in ("/gallery", f"/gallery/{output.id}", "/queue", "/"):
        page = client.get(path).text
        assert re.search(
            r'<time datetime="\d{4}-\d\d-\d\dT[^"]+(\+00:00|Z)"[^>]*>\d{4}-\d\d-\d\d \d\d:\d\d UTC</time>', page
        ), path
