"""Studio's pages as a browser without scripts uses them. `tests/browser` tests them with scripts."""

import io
import re
from typing import Any
from uuid import UUID, uuid4

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from api_service.app import create_app
from api_service.services import jobs
from shared.contracts.collections import GrantedAccess
from shared.contracts.jobs import Change, JobWarning, Replay, ReplayVerdict
from shared.db import collections, images, owners, workers
from shared.db.spaces import Space
from shared.db.tables import ApiKey, Image, Job, OutputReference, Owner
from shared.settings import Settings, get_settings
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client, a_key, picture
from tests.integration.test_api_jobs import CAPABILITIES
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output

SAME_ORIGIN = {"Origin": "http://localhost"}
FRAGMENT = {"X-Fragment": "1"}
PAGES = ("/", "/gallery", "/corpus", "/collections", "/search", "/queue", "/bulks")


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


def checked_values(answer: Any, field: str) -> list[str]:
    """The values of the page's checked checkboxes with this name."""
    found = re.findall(rf'<input type="checkbox" name="{field}" value="([^"]*)" checked', answer.text)
    return list(found)


def submitted(session: Session) -> dict[str, Any]:
    session.expire_all()
    job = session.scalars(select(Job).order_by(Job.created_at.desc())).first()
    assert job is not None
    return dict(job.parameters)


@pytest.mark.parametrize("path", PAGES)
def test_every_page_is_served_on_an_empty_service(client: Client, path: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.mimetype) == (200, "text/html")
    assert "<h1>" in answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|\sstyle=", answer.text), (
        "the page's own policy would block it"
    )


def test_files_of_the_pages_are_served_and_a_known_etag_gets_304(client: Client) -> None:
    for address in re.findall(r'(?:src|href)="(/studio/[^"]+)"', client.get("/").text):
        with client.get(address) as answer:
            assert answer.status_code == 200
        with client.get(address, headers={"If-None-Match": answer.headers["ETag"]}) as known:
            assert known.status_code == 304


def test_a_prompt_shows_its_references_and_the_reasons(client: Client, session: Session, space: Space) -> None:
    near = make_image(session, vector=towards(a0=1), caption="a <b>red</b> apple")
    far = make_image(session, vector=towards(a0=0.3, a1=1), caption="a pear")
    session.commit()
    with embed_worker(space):
        answer = client.get("/", query_string={"prompt": "something red"})
    assert checked_values(answer, "use") == [str(near.id)]
    assert str(far.id) in answer.text
    assert "reaches 0.42" in answer.text
    assert "is below 0.42" in answer.text
    assert "a &lt;b&gt;red&lt;/b&gt; apple" in answer.text, "text from users is escaped"
    part = client.get("/references", query_string={"prompt": "something red"}, headers=FRAGMENT)
    assert checked_values(part, "use") == [str(near.id)]
    assert "<html" not in part.text


def test_an_unchanged_plan_is_left_to_the_search_of_the_job(client: Client, session: Session, space: Space) -> None:
    for shift in (0.0, 0.6):
        make_image(session, vector=towards(a0=1, a3=shift))
    session.commit()
    with embed_worker(space):
        shown = client.get("/references", query_string={"prompt": "red"}, headers=FRAGMENT)
    fields = re.findall(r'name="([^"]+)"[^>]*? value="([^"]*)"', shown.text)
    form = {"prompt": "red", **{name: value for name, value in fields if name not in ("use", "pin")}}
    form["use"] = checked_values(shown, "use")
    assert len(form["use"]) == 2
    client.post("/", data=form, headers=SAME_ORIGIN)
    assert (submitted(session)["mode"], submitted(session)["references"]) == ("auto", [])
    form[f"weight.{form['use'][0]}"] = "0.9"
    client.post("/", data=form, headers=SAME_ORIGIN)
    assert [each["weight"] for each in submitted(session)["references"]] == [0.9, pytest.approx(0.2, abs=0.1)]


def test_a_form_that_is_sent_twice_creates_one_job(client: Client, session: Session, space: Space) -> None:
    once = re.findall(r'name="once" value="(\w+)"', client.get("/").text)
    form = {"prompt": "red", "once": once}
    first, again = (client.post("/", data=form, headers=SAME_ORIGIN).location for _ in range(2))
    assert again == first
    changed = client.post("/", data={**form, "prompt": "blue"}, headers=SAME_ORIGIN).location
    other_page = client.post("/", data={**form, "once": "another\0page"}, headers=SAME_ORIGIN).location
    assert len({first, changed, other_page}) == 3
    assert re.findall(r'name="once" value="(\w+)"', client.get("/").text) != once


def test_the_chosen_references_are_used_exactly(client: Client, session: Session, space: Space) -> None:
    first, second = (make_image(session, vector=towards(a0=1, a3=shift)) for shift in (0.0, 0.5))
    session.commit()
    planned = {"planned": f"{second.id}=0.25", f"weight.{second.id}": "0.25"}
    form = {"prompt": "red", "use": [str(second.id)], "pin": [str(first.id)], **planned}
    answer = client.post("/", data=form, headers=SAME_ORIGIN)
    assert answer.status_code == 303
    assert answer.location.startswith("/jobs/")
    assert [(each["image_id"], each["weight"]) for each in submitted(session)["references"]] == [
        (str(first.id), None),
        (str(second.id), 0.25),
    ]
    page = client.get(answer.location)
    assert "queued" in page.text
    client.post("/", data={"prompt": "red", **planned}, headers=SAME_ORIGIN)
    assert submitted(session)["mode"] == "none", "no box was checked"
    client.post("/", data={"prompt": "red", "num_images": "2", "seed": "", "width": ""}, headers=SAME_ORIGIN)
    assert submitted(session)["mode"] == "auto", "no plan was shown"
    assert len(submitted(session)["seeds"]) == 2


def test_line_breaks_of_a_prompt_are_normalised(client: Client, session: Session) -> None:
    assert client.post("/", data={"prompt": "a red\r\napple"}, headers=SAME_ORIGIN).status_code == 303
    assert submitted(session)["prompt"] == "a red\napple"


def test_a_plan_without_references_is_left_to_the_search_of_the_job(client: Client, session: Session) -> None:
    client.post("/", data={"prompt": "red", "planned": "", "mode": "caption"}, headers=SAME_ORIGIN)
    assert submitted(session)["mode"] == "caption"


def test_pinned_references_take_the_slots_of_found_ones(client: Client, session: Session, space: Space) -> None:
    most = get_settings().model.generators["cheap"].max_references
    pinned = make_image(session, vector=towards(a1=1))
    for shift in range(most):
        make_image(session, vector=towards(a0=1, **{f"a{shift + 3}": 0.6}))
    session.commit()
    asked = {"prompt": "red", "pin": str(pinned.id), "similar_examples_count": str(most)}
    with embed_worker(space):
        shown = client.get("/references", query_string=asked, headers=FRAGMENT)
    assert len(checked_values(shown, "use")) == most
    assert shown.text.count("no room beside the pinned references") == 1
    form = {"prompt": "red", "pin": [str(pinned.id)], "use": checked_values(shown, "use")}
    assert client.post("/", data=form, headers=SAME_ORIGIN).status_code == 303


def test_things_and_images_to_avoid_are_no_references_and_stay_in_the_form(
    client: Client, session: Session, space: Space
) -> None:
    red, dark, mixed = (make_image(session, vector=towards(a0=1, **more)) for more in ({}, {"a3": 0.5}, {"a2": 1.1}))
    session.commit()
    plain = {"prompt": "red", "similar_examples_count": "3"}
    asked = {**plain, "avoid": "blue\r\n\r\n", "avoid_ids": str(red.id)}
    with embed_worker(space):
        before = client.get("/references", query_string=plain, headers=FRAGMENT)
        shown = client.get("/references", query_string=asked, headers=FRAGMENT)
        page = client.get("/", query_string=asked)
    assert set(checked_values(before, "use")) == {str(red.id), str(dark.id), str(mixed.id)}
    for answer in (shown, page):
        assert checked_values(answer, "use") == [str(dark.id)]
        assert checked_values(answer, "avoid_ids") == [str(red.id)]
        assert "which the request avoids" in answer.text
    assert re.search(r'name="avoid"[^>]*>blue\s*</textarea>', page.text)

    client.post("/", data=asked, headers=SAME_ORIGIN)
    assert (submitted(session)["avoid"], submitted(session)["avoid_ids"]) == (["blue"], [str(red.id)])
    client.post("/", data={**asked, "pin": [str(mixed.id)]}, headers=SAME_ORIGIN)
    assert [each["image_id"] for each in submitted(session)["references"]] == [str(mixed.id)], "the choice counts"


def test_an_invalid_weight_is_reported_once(client: Client) -> None:
    image_id = str(uuid4())
    answer = client.post("/", data={"prompt": "x", "use": image_id, f"weight.{image_id}": "heavy"}, headers=SAME_ORIGIN)
    assert answer.status_code == 422
    assert re.findall(r'<p data-field="weight">([^<]*)</p>', answer.text) == [
        "weight: Input should be a valid number, unable to parse string as a number"
    ]


def test_an_unknown_path_gets_an_html_page_in_a_browser(client: Client) -> None:
    html = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for path in ("/nothing", "/corpus/nope"):
        answer = client.get(path, headers=html)
        assert (answer.status_code, answer.mimetype) == (404, "text/html")
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert client.get(path).mimetype == "application/problem+json"
    assert client.get(f"{API}/nothing", headers=html).mimetype == "application/problem+json"


def test_a_pinned_reference_stays_when_the_prompt_changes(client: Client, session: Session, space: Space) -> None:
    pinned = make_image(session, vector=towards(a1=1), caption="a green thing")
    make_image(session, vector=towards(a0=1))
    session.commit()
    asked = {"prompt": "red", "pin": [str(pinned.id), str(uuid4()), "nonsense"]}
    with embed_worker(space):
        answer = client.get("/references", query_string=asked, headers=FRAGMENT)
    assert checked_values(answer, "pin") == [str(pinned.id)]
    assert len(checked_values(answer, "use")) == 2


def test_an_error_in_the_form_is_shown_and_queues_nothing(client: Client, session: Session) -> None:
    answer = client.post("/", data={"prompt": "x", "num_images": "99"}, headers=SAME_ORIGIN | FRAGMENT)
    assert answer.status_code == 422
    assert "Images: Input should be less than or equal to 16" in answer.text
    assert "<html" not in answer.text
    answer = client.get("/jobs/00000000-0000-4000-8000-000000000000")
    assert (answer.status_code, answer.mimetype) == (404, "text/html")
    assert answer.headers["X-Request-ID"] in answer.text
    assert session.scalar(select(Job)) is None


def test_a_missing_embed_worker_is_reported_in_place_of_the_references(client: Client, session: Session) -> None:
    answer = client.get("/references", query_string={"prompt": "red"}, headers=FRAGMENT)
    assert answer.status_code == 503
    assert "No embed worker has started yet" in answer.text
    assert answer.headers["Retry-After"]
    pinned = make_image(session)
    session.commit()
    answer = client.get("/", query_string={"prompt": "red", "pin": str(pinned.id)})
    assert answer.status_code == 200
    assert "No embed worker has started yet" in answer.text
    assert checked_values(answer, "pin") == [str(pinned.id)]
    assert client.post("/", data={"prompt": "red"}, headers=SAME_ORIGIN).status_code == 303, (
        "the job runs when a worker has started"
    )


def test_a_job_is_canceled_retried_and_deleted(client: Client, session: Session) -> None:
    job = make_job(session)
    session.commit()
    assert 'data-events="' in client.get(f"/jobs/{job.id}").text
    assert client.post(f"/jobs/{job.id}/cancel", headers=SAME_ORIGIN).status_code == 303
    canceled = client.get(f"/jobs/{job.id}")
    assert "canceled" in canceled.text
    assert 'data-events="' not in canceled.text
    again = client.post(f"/jobs/{job.id}/retry", headers=SAME_ORIGIN)
    assert str(job.id) in client.get(again.location).text
    assert client.post(f"/jobs/{job.id}/delete", headers=SAME_ORIGIN).location == "/queue"
    assert client.get(f"/jobs/{job.id}").status_code == 404


def test_former_addresses_of_the_corpus_lead_to_the_current_ones(client: Client) -> None:
    answer = client.get("/memory?collection=mine")
    assert (answer.status_code, answer.location) == (308, "/corpus?collection=mine")
    assert client.post(f"/memory/{uuid4()}/forget", headers=SAME_ORIGIN, follow_redirects=True).status_code == 404


def test_modes_that_a_model_cannot_work_in_are_marked(client: Client, session: Session) -> None:
    name = get_settings().model.default_generator
    page = client.get("/").text
    assert "not for" not in page, "nothing is known before a worker has loaded the model"
    known = CAPABILITIES.model_copy(update={"modes": ["none", "img2img"]})
    workers.publish_capabilities(session, name, known)
    session.commit()
    page = client.get("/", query_string={"mode": "caption"}).text
    assert '<option value="img2img" >starting from the first reference</option>' in page
    assert f'<option value="caption" selected>by the captions of the references (not for {name})</option>' in page
    assert f'<option value="reference" disabled>with the references in view (not for {name})</option>' in page


def test_an_output_is_shown_with_its_references(client: Client, session: Session) -> None:
    output = make_output(session, 7)
    session.commit()
    for path in ("/gallery", f"/gallery/{output.id}", f"/jobs/{output.job_id}", "/queue"):
        assert f"/gallery/{output.id}" in client.get(path).text or path.endswith(str(output.id))
    page = client.get(f"/gallery/{output.id}")
    assert f"/corpus/{output.provenance['references'][0]['image_id']}" in page.text
    assert output.sha256 in page.text
    parameters = output.provenance["parameters"]
    facts = f"{parameters['width']} x {parameters['height']}, {parameters['num_inference_steps']} steps"
    assert f"{facts}, guidance {parameters['guidance_scale']}" in page.text
    assert "apfel „7“" in page.text.split("<pre")[1]
    assert client.get(page.text.split('figure class="large"><img src="')[1].split('"')[0]).status_code == 200
    assert client.post(f"/gallery/{output.id}/delete", headers=SAME_ORIGIN).status_code == 303
    assert client.get(f"/gallery/{output.id}").status_code == 404


def test_the_differences_from_the_request_are_shown(client: Client, session: Session) -> None:
    output = make_output(session, 7)
    unread = JobWarning(code="prompt_cut", detail="The end is not read.", context={"unread": "a pear & a plum"})
    warnings = [unread.model_dump(mode="json")]
    output.provenance = {**output.provenance, "warnings": warnings}
    session.get_one(Job, output.job_id).resolution = {"mode": "none", "reason": "asked", "warnings": warnings}
    session.commit()
    page = client.get(f"/gallery/{output.id}").text
    assert "The end is not read." in page
    assert "<q>a pear &amp; a plum</q>" in page
    assert "The end is not read." in client.get(f"/jobs/{output.job_id}").text


def test_an_output_is_remembered_and_its_image_is_shown(client: Client, session: Session) -> None:
    output = make_output(session, 7)
    assert f'action="/gallery/{output.id}/remember"' in client.get(f"/gallery/{output.id}").text
    answer = client.post(f"/gallery/{output.id}/remember", headers=SAME_ORIGIN)
    (image,) = session.scalars(select(Image))
    assert (answer.status_code, answer.location) == (303, f"/corpus/{image.id}")
    assert output.sha256 in client.get(answer.location).text


def test_an_output_is_replayed(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1))
    output = make_output(session, 7)
    session.execute(update(OutputReference).values(image_id=image.id, weight=0.25))
    session.commit()
    assert ">Replay</button>" in client.get(f"/gallery/{output.id}").text
    answer = client.post(f"/gallery/{output.id}/replay", headers=SAME_ORIGIN)
    assert answer.status_code == 303
    assert f"/gallery/{output.id}" in client.get(answer.location).text
    parameters = submitted(session)
    assert (parameters["seeds"], parameters["k"]) == ([output.seed], 0)
    assert parameters["references"] == [{"image_id": str(image.id), "weight": 0.25, "pinned": False}]

    change = Change(what="versions.torch", was="1", now="2")
    output.replay = Replay(
        of=output.id, verdict=ReplayVerdict.DIFFERENT, max_difference=99, psnr_db=12.25, changed=[change]
    ).model_dump(mode="json")
    session.commit()
    page = client.get(f"/gallery/{output.id}").text
    assert "<b>different</b>: up to 99 of 255 levels, 12.2 dB\n" in page
    assert "versions.torch" in page
    assert "their difference" in page

    images.remove(session, image)
    session.commit()
    assert client.post(f"/gallery/{output.id}/replay", headers=SAME_ORIGIN).status_code == 422


def test_images_are_added_found_shown_and_deleted(client: Client, session: Session, space: Space) -> None:
    form = {"file": (io.BytesIO(picture("red")), "red.png"), "caption": "", "tags": "fruit, red", "collection": "mine"}
    answer = client.post("/corpus", data=form, headers=SAME_ORIGIN)
    assert answer.location == "/corpus?collection=mine"
    image = session.scalars(select(Image)).one()
    assert (image.caption, image.tags) == (None, ["fruit", "red"])
    assert f"/corpus/{image.id}" in client.get(answer.location).text
    assert f"/corpus/{image.id}" not in client.get("/corpus", query_string={"collection": "mine", "tag": "blue"}).text
    assert "fruit" in client.get(f"/corpus/{image.id}").text
    assert client.post(f"/corpus/{image.id}/delete", headers=SAME_ORIGIN).status_code == 303
    assert client.get(f"/corpus/{image.id}").status_code == 404
    broken = {"file": (io.BytesIO(b"no image"), "x.png")}
    assert client.post("/corpus", data=broken, headers=SAME_ORIGIN).status_code == 415


def test_searching_by_text_by_a_file_and_by_an_image_of_the_corpus(
    client: Client, session: Session, space: Space
) -> None:
    red, blue = (make_image(session, vector=towards(**{f"a{axis}": 1.0})) for axis in (0, 2))
    session.commit()

    def first(answer: Any) -> UUID:
        return UUID(re.findall(r'<a href="/corpus/([0-9a-f-]{36})"><img', answer.text)[0])

    with embed_worker(space):
        assert first(client.get("/search", query_string={"query": "red", "threshold": ""})) == red.id
        sent = {"image": (io.BytesIO(picture("blue")), "b.png"), "query": ""}
        assert first(client.post("/search", data=sent, headers=SAME_ORIGIN)) == blue.id
    assert first(client.get("/search", query_string={"image_id": str(blue.id), "k": "1"})) == blue.id
    empty = {"image": (io.BytesIO(b""), ""), "query": " "}
    assert "Write words" in client.post("/search", data=empty, headers=SAME_ORIGIN).text


def test_the_search_page_says_what_found_an_image(client: Client, session: Session, space: Space) -> None:
    make_image(session, vector=towards(a0=1), caption="a red apple")
    make_image(session, vector=towards(a1=1), caption="a green apple")
    session.commit()
    by_words = client.get("/search", query_string={"query": "reds", "mode": "text"}).text
    assert "found by its caption or tags" in by_words
    assert "its look" not in by_words
    assert '<option value="text" selected>' in by_words
    assert "<meter" not in by_words, "this mode has no similarities"
    with embed_worker(space):
        both = client.get("/search", query_string={"query": "red"}).text
        assert "found by its look and its caption or tags" in both
        without = client.post("/search", data={"query": "red", "negative": "green apple"}, headers=SAME_ORIGIN).text
        assert 'value="green apple"' in without
        assert without.index("a red apple") < without.index("a green apple")
        refused = client.post("/search", data={"query": "red", "negative": "red"}, headers=SAME_ORIGIN)
    assert refused.status_code == 422
    assert "It leaves nothing of the rest of the query." in refused.text


def test_long_lists_have_pages(client: Client, session: Session) -> None:
    for _ in range(25):
        make_job(session, prompt="one of many")
    session.commit()
    first = client.get("/queue", query_string={"state": "queued"})
    (older,) = re.findall(r'<p class="more"><a class="button" href="([^"]+)"', first.text)
    assert "state=queued" in older
    second = client.get("/queue" + older.replace("&amp;", "&"))
    assert (first.text.count("one of many</a>"), second.text.count("one of many</a>")) == (20, 5)


# --- collections --------------------------------------------------------------------------------------------------


def test_a_collection_is_created_described_shared_and_deleted_by_forms(client: Client, session: Session) -> None:
    owners.ensure(session, "team-b")
    session.commit()
    made = client.post("/collections", data={"name": "products", "description": ""})
    page = client.get(made.location)
    assert page.status_code == 200
    assert "<dd>owner</dd>" in page.text
    changed = client.post(
        made.location,
        data={"name": "goods", "description": "<b>Goods</b>", "min_similarity": "0.3", "k": "2", "mode": "text"},
    )
    assert changed.location == made.location
    assert client.get(f"{API}/collections?name=goods").json["items"][0]["defaults"] == {
        "min_similarity": 0.3,
        "k": 2,
        "mode": "text",
    }
    page = client.get(made.location)
    assert "&lt;b&gt;Goods&lt;/b&gt;" in page.text
    assert '<option value="text" selected>captions and tags</option>' in page.text
    assert client.post(f"{made.location}/share", data={"owner": "team-b", "access": "write"}).status_code == 303
    assert "team-b" in client.get(made.location).text
    unknown = client.post(f"{made.location}/share", data={"owner": "team-c", "access": "write"})
    assert (unknown.status_code, "There is no such owner." in unknown.text) == (404, True)
    assert client.post(f"{made.location}/unshare/team-b").status_code == 303
    assert "No other owner." in client.get(made.location).text
    emptied = client.post(made.location, data={"name": "goods", "min_similarity": "", "k": "", "mode": ""})
    assert emptied.status_code == 303
    assert set(client.get(f"{API}/collections?name=goods").json["items"][0]["defaults"].values()) == {None}
    bad = client.post(made.location, data={"name": "Ä"})
    assert (bad.status_code, "wrong" in bad.text) == (422, True)
    assert client.post(f"{made.location}/delete").location == "/collections"
    listed = client.get("/collections").text
    assert "goods" not in listed
    assert ">shared</a>" in listed


def test_a_collection_of_another_owner_is_shown_without_forms(browser: FlaskClient, session: Session) -> None:
    theirs = collections.create(session, "logos", owner_id=owners.ensure(session, "team-b"), most=None)
    collections.share(session, theirs, owner_id=owners.ensure(session, "team"), access=GrantedAccess.READ)
    session.commit()
    sign_in(browser, session, "search", "corpus:write", "generate")
    assert ">team-b/logos</a>" in browser.get("/collections").text
    page = browser.get(f"/collections/{theirs.id}").text
    assert "<dd>read</dd>" in page
    assert "collection=team-b/logos" in page
    assert 'method="post"' not in page.split("<main")[1]
    assert browser.get("/corpus?collection=team-b/logos").status_code == 200


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(keyed_client: FlaskClient) -> FlaskClient:
    return keyed_client


def sign_in(browser: FlaskClient, session: Session, *scopes: str) -> Any:
    secret = a_key(session, *scopes)["Authorization"].split()[1]
    return browser.post("/sign-in", data={"key": f" {secret} "}, headers=SAME_ORIGIN)


def test_with_keys_every_page_redirects_to_sign_in(browser: FlaskClient) -> None:
    studio_rules = [rule for rule in browser.application.url_map.iter_rules() if rule.endpoint.startswith("studio")]
    rules = [rule for rule in studio_rules if not rule.alias]  # an alias redirects to its page
    assert len(rules) == 47
    open_to_all = set()
    for rule in rules:
        address = re.sub(r"<uuid:\w+>", str(uuid4()), rule.rule)
        for method in {"GET", "POST"}.intersection(rule.methods or ()):
            answer = browser.open(address, method=method, headers=SAME_ORIGIN)
            if answer.location != "/sign-in":
                open_to_all.add((method, rule.rule))
            else:
                assert browser.open(address, method=method, headers=SAME_ORIGIN | FRAGMENT).status_code in (303, 401)
    assert open_to_all == {("GET", "/sign-in"), ("POST", "/sign-in"), ("GET", "/studio/<path:filename>")}
    assert browser.post("/sign-in", data={"key": "aft_wrong"}, headers=SAME_ORIGIN).status_code == 401
    assert browser.get_cookie("afterimage_key") is None


def test_a_key_allows_the_pages_until_sign_out_or_its_revocation(browser: FlaskClient, session: Session) -> None:
    answer = sign_in(browser, session, "generate", "search")
    assert answer.location == "/"
    (cookie,) = answer.headers.getlist("Set-Cookie")
    assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
    assert not {"Max-Age", "Expires"} & {part.partition("=")[0] for part in cookie.split("; ")}
    over_tls = sign_in_over_tls(browser, session)
    assert over_tls.startswith("__Host-afterimage_key=")
    assert "Secure" in over_tls
    assert browser.get("/").status_code == 200
    assert browser.get(f"{API}/jobs").status_code == 200, "the pages show images of the API"
    browser.post("/sign-out", headers=SAME_ORIGIN)
    assert browser.get("/").status_code == 303
    sign_in(browser, session, "generate", "search")
    session.execute(text("update api_keys set revoked_at = now()"))
    session.commit()
    assert browser.get("/").status_code == 303


def sign_in_over_tls(browser: FlaskClient, session: Session) -> str:
    secret = a_key(session, "generate")["Authorization"].split()[1]
    behind_proxies = {"Origin": "https://localhost", "X-Forwarded-Proto": "https, http"}
    return str(browser.post("/sign-in", data={"key": secret}, headers=behind_proxies).headers["Set-Cookie"])


@pytest.mark.parametrize(
    ("scopes", "queued", "whose"),
    [
        (["generate", "search"], 1, "These numbers count only your own jobs and collections"),
        (["generate", "search", "admin"], 3, "These numbers count the jobs and images of all owners"),
    ],
)
def test_the_queue_says_what_its_numbers_count(
    browser: FlaskClient, session: Session, scopes: list[str], queued: int, whose: str
) -> None:
    sign_in(browser, session, *scopes)
    mine = session.scalars(select(ApiKey.owner_id)).one()
    for owner in (session.get_one(Owner, mine).name, "one", "another"):
        make_job(session, owner=owner)
    session.commit()
    page = browser.get("/queue").text
    assert f"<b>{queued}</b> jobs queued" in page
    assert whose in page


def test_pages_have_the_scopes_of_their_key(browser: FlaskClient, session: Session) -> None:
    sign_in(browser, session, "search")
    assert browser.get("/corpus").status_code == 200
    for path in ("/", "/gallery", "/queue"):
        answer = browser.get(path)
        assert answer.status_code == 403, path
        assert "lacks the scope" in answer.text
    file = {"file": (io.BytesIO(picture()), "a.png")}
    assert browser.post("/corpus", data=file, headers=SAME_ORIGIN).status_code == 403
    assert session.scalar(select(Image)) is None


def test_a_key_without_the_scope_search_sees_nothing_of_the_corpus(browser: FlaskClient, session: Session) -> None:
    image = make_image(session, caption="not for this key")
    session.commit()
    assert sign_in(browser, session, "search").location == "/corpus"
    assert "not for this key" in browser.get("/corpus").text
    sign_in(browser, session, "generate")
    answer = browser.get("/", query_string={"prompt": "red", "pin": str(image.id)})
    assert answer.status_code == 200
    assert "cannot read the corpus" in answer.text
    assert "not for this key" not in answer.text
    assert browser.get("/references", query_string={"prompt": "red"}).status_code == 403


@pytest.mark.parametrize(
    "origin", [{}, {"Origin": "null"}, {"Origin": "https://elsewhere.example"}, {"Origin": "ftp://localhost"}]
)
@pytest.mark.parametrize("path", ["/", f"{API}/generate"])
def test_a_cookie_does_not_authorize_requests_of_other_origins(
    browser: FlaskClient, session: Session, origin: dict[str, str], path: str
) -> None:
    sign_in(browser, session, "generate", "search")
    answer = browser.post(path, data={"prompt": "x"}, headers=origin)
    assert answer.status_code == 403
    for way in ("/sign-in", "/sign-out"):
        assert browser.post(way, data={"key": "aft_x"}, headers=origin).status_code == 403
    assert session.scalar(select(Job)) is None
    assert browser.post("/", data={"prompt": "x"}, headers=SAME_ORIGIN).status_code == 303


def test_a_key_in_the_header_takes_precedence_over_the_cookie(browser: FlaskClient, session: Session) -> None:
    sign_in(browser, session, "generate")
    assert browser.get(f"{API}/jobs", headers={"Authorization": "Bearer aft_wrong"}).status_code == 401
    assert browser.get(f"{API}/jobs", headers={"Authorization": "Basic x"}).status_code == 401


def test_studio_can_be_disabled(settings: Settings) -> None:
    closed = settings.model_copy(update={"security": settings.security.model_copy(update={"studio_enabled": False})})
    client = create_app(closed).test_client()
    assert [client.get(path).status_code for path in ("/", "/sign-in", "/studio/studio.js")] == [404] * 3


def test_internal_errors_and_rate_limits_are_shown_as_pages(
    keyed_client: FlaskClient, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_LIMITS__READS_PER_MINUTE", "2")
    get_settings.cache_clear()
    browser = create_app(get_settings()).test_client()
    sign_in(browser, session, "generate")
    monkeypatch.setattr(jobs, "list_page", lambda *_, **__: 1 / 0)
    for path, status in (("/queue", 500), ("/gallery", 200), ("/gallery", 429)):
        answer = browser.get(path)
        assert (answer.status_code, answer.mimetype) == (status, "text/html")
        assert not re.search("ZeroDivision|Traceback", answer.text)
    assert int(answer.headers["Retry-After"]) > 0
