"""Studio's links and forms that repeat a job, an output or a search keep everything that it was made with."""

import re
from html import unescape
from html.parser import HTMLParser
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import collections, owners
from shared.db.spaces import Space
from shared.db.tables import Job, OutputReference
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import Client
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output
from tests.integration.test_studio import SAME_ORIGIN, checked_values, submitted

WHERE = {
    "collection": "mine",
    "tags": ["red, round"],
    "source": "me",
    "licence": "CC0",
    "attributes": {"a": "b"},
    "created_after": "2026-01-01T00:00:00Z",
}


class _Form(HTMLParser):
    """The fields of the form `create`, as a browser sends them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fields: dict[str, list[str]] = {}
        self._name = self._first = self._text = ""
        self.feed(page.split('id="create"')[1].split("</form>")[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag in ("select", "textarea"):
            self._name, self._first, self._text = given["name"] or "", "", ""
        elif tag == "option":
            self._text, self._selected, self._value = "", "selected" in given, given.get("value")
        elif tag == "input" and (given.get("type") != "checkbox" or "checked" in given):
            self.fields.setdefault(given["name"] or "", []).append(given.get("value") or "")

    def handle_data(self, data: str) -> None:
        self._text += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "option":
            value = self._text.strip() if self._value is None else self._value
            self._first = self._first or value
            if self._selected:
                self.fields[self._name] = [value]
        elif tag == "select":
            self.fields.setdefault(self._name, [self._first])
        elif tag == "textarea":
            self.fields[self._name] = [self._text]


def again(client: Client, page: str) -> Any:
    """Follow the page's link to the form `create`, send the form unchanged, and return the page of the form."""
    words = "Change and generate again|Generate another"
    (link,) = re.findall(rf'<a class="button[^"]*" href="(/\?[^"]+)">(?:{words})<', client.get(page).text)
    form = client.get(unescape(link))
    assert form.status_code == 200, form.text
    answer = client.post("/", data=_Form(form.text).fields, headers=SAME_ORIGIN)
    assert answer.status_code == 303, answer.text
    return form


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    collections.ensure(session, "mine", owner_id=owners.ensure(session, "local"))
    session.commit()
    return space


def without_seeds(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in ("seeds", "preview_every")}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"k": 3, "min_similarity": 0.125, "filter": WHERE, "seeds": [1, 2, 3]},
        {"k": 0, "mode": "none"},
        {"k": 0},
        {"guidance_scale": 7.25, "ip_adapter_scale": 0.77, "strength": 0.33, "num_inference_steps": 3},
        {"format": "webp", "quality": 71, "negative_prompt": "a pear", "prompt": "two\nlines"},
    ],
)
def test_a_job_is_generated_again_as_it_was(
    client: Client, session: Session, space: Space, given: dict[str, Any]
) -> None:
    job = make_job(session, state=JobState.SUCCEEDED, **given)
    session.commit()
    before = dict(job.parameters)
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        again(client, f"/jobs/{job.id}")
    after = submitted(session)
    assert session.scalars(select(Job.id).order_by(Job.created_at.desc())).first() != job.id
    assert without_seeds(after) == without_seeds(before)
    assert len(after["seeds"]) == len(before["seeds"])


@pytest.mark.parametrize("weights", [[0.125, 3.0], [None, None]])
def test_pinned_references_are_used_again_with_their_weights_and_no_others(
    client: Client, session: Session, space: Space, weights: list[float | None]
) -> None:
    chosen = [make_image(session, vector=towards(a1=1, a2=shift)) for shift in (0.0, 0.9)]
    make_image(session, vector=towards(a0=1))
    pinned = [{"image_id": str(image.id), "weight": weight} for image, weight in zip(chosen, weights, strict=True)]
    job = make_job(session, state=JobState.SUCCEEDED, references=pinned, k=0)
    session.commit()
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        form = again(client, f"/jobs/{job.id}")
    assert checked_values(form, "use") == [each["image_id"] for each in pinned]
    used = submitted(session)["references"]
    assert [each["image_id"] for each in used] == [each["image_id"] for each in pinned]
    shares = [(each["weight"] or 1) / sum(other["weight"] or 1 for other in used) for each in used]
    assert shares == pytest.approx([(each or 1) / sum(other or 1 for other in weights) for each in weights])


def test_things_and_images_to_avoid_are_avoided_again(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1))
    avoided: dict[str, Any] = {"avoid": ["a pear", "a bowl of plums"], "avoid_ids": [image.id]}
    job = make_job(session, state=JobState.SUCCEEDED, **avoided)
    session.commit()
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        form = again(client, f"/jobs/{job.id}")
    assert checked_values(form, "avoid_ids") == [str(image.id)]
    assert [submitted(session)[name] for name in avoided] == [["a pear", "a bowl of plums"], [str(image.id)]]


def test_an_output_is_generated_again_with_its_references_and_settings(
    client: Client, session: Session, space: Space
) -> None:
    image = make_image(session, vector=towards(a0=1))
    output = make_output(session, 7)
    session.execute(update(OutputReference).values(image_id=image.id, weight=0.25))
    session.commit()
    before = output.provenance["parameters"]
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        again(client, f"/gallery/{output.id}")
    after = submitted(session)
    assert after["references"] == [{"image_id": str(image.id), "weight": 0.25}]
    assert len(after["seeds"]) == 1
    for name in ("prompt", "model", "width", "guidance_scale", "num_inference_steps", "min_similarity"):
        assert after[name] == before[name], name


def test_a_job_with_pictures_of_its_request_is_changed_into_a_search_and_the_form_says_so(
    client: Client, session: Session, space: Space
) -> None:
    make_image(session, vector=towards(a0=1))
    pictures = [{"sha256": "ab" * 32, "weight": None, "caption": None}]
    job = make_job(session, state=JobState.SUCCEEDED, reference_images=pictures, k=0)
    other = make_job(session, state=JobState.SUCCEEDED, k=0)
    session.commit()
    note = "does not keep the pictures"
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        assert note not in again(client, f"/jobs/{other.id}").text
        assert note in again(client, f"/jobs/{job.id}").text
    assert submitted(session)["k"] > 0


@pytest.mark.parametrize("weight", [0.0, 5e-324])
def test_an_output_is_generated_again_with_the_smallest_weight_of_a_reference(
    client: Client, session: Session, space: Space, weight: float
) -> None:
    image = make_image(session, vector=towards(a0=1))
    output = make_output(session, 7)
    session.execute(update(OutputReference).values(image_id=image.id, weight=weight))
    session.commit()
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        again(client, f"/gallery/{output.id}")
    (used,) = submitted(session)["references"]
    assert 0 < used["weight"] < 1e-300


def test_the_filter_of_the_form_is_that_of_the_shown_references(client: Client, session: Session, space: Space) -> None:
    tagged = make_image(session, vector=towards(a0=1), tags=["x"])
    make_image(session, vector=towards(a0=1, a3=0.9))
    session.commit()
    with embed_worker(space):
        shown = client.get("/references", query_string={"prompt": "red", "filter": '{"tags": ["x"]}'})
    assert checked_values(shown, "use") == [str(tagged.id)]
    for wrong in ("[1]", "{", '{"tags": 1}', '{"colour": "red"}', '"x"'):
        answer = client.post("/", data={"prompt": "red", "filter": wrong}, headers=SAME_ORIGIN)
        assert (answer.status_code, "filter" in answer.text) == (422, True), wrong


def test_links_from_an_image_keep_its_collection(client: Client, session: Session, space: Space) -> None:
    mine = collections.ensure(session, "mine", owner_id=owners.ensure(session, "local"))
    image = make_image(session, vector=towards(a0=1), collection_id=mine.id, tags=["fruit"], caption="an apple")
    session.commit()
    for page in (f"/corpus/{image.id}", "/corpus?collection=mine"):
        (link,) = re.findall(r'<a class="tag" href="([^"]+)"', client.get(page).text)
        assert f"/corpus/{image.id}" in client.get(unescape(link)).text, page
    found = client.get("/search", query_string={"image_id": str(image.id), "collection": "mine"}).text
    for page in (client.get(f"/corpus/{image.id}").text, found):
        (link,) = re.findall(r'href="(/\?[^"]*pin=[^"]+)"', page)
        assert "collection=mine" in link


def test_a_retry_that_is_sent_twice_makes_one_job(client: Client, session: Session) -> None:
    job = make_job(session, state=JobState.CANCELED)
    session.commit()
    page = client.get(f"/jobs/{job.id}").text
    (once,) = re.findall(r'/retry"[^>]*><input type="hidden" name="once" value="(\w+)"', page)
    places = [
        client.post(f"/jobs/{job.id}/retry", data={"once": sent}, headers=SAME_ORIGIN).location
        for sent in (once, once, "other\0one")
    ]
    assert places[0] == places[1] != places[2]
    assert session.scalar(select(func.count()).where(Job.retry_of == job.id)) == 2


def test_a_replay_that_is_sent_twice_makes_one_job(client: Client, session: Session, space: Space) -> None:
    output = make_output(session, 7)
    image = make_image(session, vector=towards(a0=1))
    session.execute(update(OutputReference).values(image_id=image.id, weight=0.25))
    session.commit()
    page = client.get(f"/gallery/{output.id}").text
    (once,) = re.findall(r'/replay"[^>]*><input type="hidden" name="once" value="(\w+)"', page)
    places = {
        client.post(f"/gallery/{output.id}/replay", data={"once": sent}, headers=SAME_ORIGIN).location
        for sent in (once, once, "other\0one")
    }
    assert len(places) == 2
    assert {UUID(place.rpartition("/")[2]) for place in places} <= set(session.scalars(select(Job.id)))
