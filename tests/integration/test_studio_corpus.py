"""Studio's pages of the corpus and the queue as a browser without scripts uses them, and forms without a database."""

import io
import re
from datetime import UTC, datetime, timedelta
from html import unescape
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from api_service.services import queue
from shared.contracts.jobs import Lane
from shared.db import attempts, jobs, workers
from shared.db.tables import Image, Job
from shared.errors import DatabaseConnectionError
from shared.settings import get_settings
from tests import one_attempt
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import Client, picture
from tests.integration.test_api_search import towards
from tests.integration.test_studio import FRAGMENT, SAME_ORIGIN


def files(*sent: tuple[str, bytes]) -> list[tuple[io.BytesIO, str]]:
    return [(io.BytesIO(data), name) for name, data in sent]


def test_of_several_files_a_bad_one_says_why_and_the_others_are_added(client: Client, session: Session) -> None:
    sent = files(("red.png", picture("red")), ("notes.png", b"no image"), ("blue.png", picture("blue")))
    form = {"file": sent, "tags": "fruit", "collection": "mine"}
    answer = client.post("/corpus", data=form, headers=SAME_ORIGIN)
    assert answer.status_code == 200
    assert re.findall(r'data-outcome="(\w+)"', answer.text) == ["created", "skipped", "created"]
    assert "2 of 3 files are in the corpus" in answer.text
    (bad,) = re.findall(r'data-outcome="skipped">(.*?)</li>', answer.text, re.DOTALL)
    assert "notes.png" in bad
    assert "not an image" in bad.lower() or "image" in bad.partition("not added")[2]
    assert [each.filename for each in session.scalars(select(Image).order_by(Image.filename))] == [
        "blue.png",
        "red.png",
    ]
    again = client.post("/corpus", data={**form, "file": files(("red.png", picture("red")))}, headers=SAME_ORIGIN)
    assert again.location == "/corpus?collection=mine"


def test_a_script_gets_the_outcome_of_its_one_file(client: Client, session: Session) -> None:
    for name, data, outcome in (
        ("red.png", picture("red"), "created"),
        ("red.png", picture("red"), "existing"),
        ("x.png", b"no image", "skipped"),
    ):
        form = {"file": files((name, data))}
        answer = client.post("/corpus", data=form, headers=SAME_ORIGIN | FRAGMENT)
        assert answer.status_code == 200
        assert re.findall(r'data-outcome="(\w+)"', answer.text) == [outcome]
        assert "<html" not in answer.text


def test_a_description_is_edited_and_an_empty_field_is_emptied(client: Client, session: Session) -> None:
    image = make_image(session, caption="a pear", tags=["a, b", "fruit"], licence="CC0")
    session.commit()
    page = unescape(client.get(f"/corpus/{image.id}").text)
    assert '["a, b","fruit"]' in page, "a comma in a tag must survive the form"
    form = {"caption": "a ripe pear", "tags": '["a, b"]', "licence": ""}
    answer = client.post(f"/corpus/{image.id}", data=form, headers=SAME_ORIGIN)
    assert (answer.status_code, answer.location) == (303, f"/corpus/{image.id}")
    session.refresh(image)
    assert (image.caption, image.tags, image.licence) == ("a ripe pear", ["a, b"], None)
    part = client.post(f"/corpus/{image.id}", data={"caption": "a plum"}, headers=SAME_ORIGIN | FRAGMENT)
    assert part.status_code == 200
    assert f'data-image="{image.id}"' in part.text
    session.refresh(image)
    assert (image.caption, image.tags) == ("a plum", ["a, b"]), "a field that the form has not stays"


def test_a_wrong_description_keeps_what_was_typed_beside_its_message(client: Client, session: Session) -> None:
    image = make_image(session, caption="a pear")
    session.commit()
    form = {"caption": "a <plum>", "licence": "x" * 101}
    answer = client.post(f"/corpus/{image.id}", data=form, headers=SAME_ORIGIN)
    assert answer.status_code == 422
    assert "a &lt;plum&gt;</textarea>" in answer.text
    assert 'id="wrong-licence"' in answer.text
    session.refresh(image)
    assert image.caption == "a pear"


def test_tags_and_licence_of_selected_images_are_changed_together(client: Client, session: Session) -> None:
    one = make_image(session, tags=["old", "kept"], licence="CC0")
    two = make_image(session, tags=["new"])
    other = make_image(session, tags=["old"])
    session.commit()
    selected = [str(one.id), str(two.id), str(uuid4())]
    form = {"selected": selected, "add_tags": "new, fruit", "remove_tags": "old"}
    answer = client.post("/corpus/selected?tag=old&endpoint=x", data=form, headers=SAME_ORIGIN)
    assert (answer.status_code, answer.location) == (303, "/corpus?tag=old")
    session.expire_all()
    assert [image.tags for image in (one, two, other)] == [["kept", "new", "fruit"], ["new", "fruit"], ["old"]]
    assert one.licence == "CC0"
    client.post("/corpus/selected", data={"selected": selected, "licence": "MIT"}, headers=SAME_ORIGIN)
    session.expire_all()
    assert ([one.licence, two.licence], two.tags) == (["MIT", "MIT"], ["new", "fruit"])


def test_a_change_of_selected_images_says_what_it_lacks(client: Client, session: Session) -> None:
    image = make_image(session)
    session.commit()
    for form, words in (
        ({"add_tags": "x"}, "Select 1 to"),
        ({"selected": str(image.id)}, "Write a tag or a licence"),
        ({"selected": "nothing", "add_tags": "x"}, "Must be the id"),
    ):
        answer = client.post("/corpus/selected", data=form, headers=SAME_ORIGIN)
        assert (answer.status_code, words in answer.text) == (422, True), words
    assert re.search(
        rf'value="{image.id}" checked',
        client.post(
            "/corpus/selected", data=form | {"selected": str(image.id), "add_tags": "x" * 500}, headers=SAME_ORIGIN
        ).text,
    )


def test_selected_images_are_deleted(client: Client, session: Session) -> None:
    gone, kept = make_image(session), make_image(session)
    session.commit()
    answer = client.post("/corpus/selected/delete", data={"selected": str(gone.id)}, headers=SAME_ORIGIN)
    assert answer.status_code == 303
    assert client.get(f"/corpus/{gone.id}").status_code == 404
    assert client.get(f"/corpus/{kept.id}").status_code == 200


def test_the_page_of_an_image_shows_its_near_duplicates(client: Client, session: Session) -> None:
    make_space(session)
    image = make_image(session, vector=towards(a0=1), caption="the image itself")
    near = make_image(session, vector=towards(a0=1, a1=0.05), caption="nearly the same")
    far = make_image(session, vector=towards(a0=1, a1=1), caption="another thing")
    session.commit()
    assert get_settings().retrieval.duplicate_similarity > 0.9
    page = client.get(f"/corpus/{image.id}").text
    assert "<h2>Near-duplicates</h2>" in page
    assert f"/corpus/{near.id}" in page
    assert f"/corpus/{far.id}" not in page
    assert "<h2>Near-duplicates</h2>" not in client.get(f"/corpus/{far.id}").text


def test_the_queue_shows_lanes_places_and_what_a_worker_holds(client: Client, session: Session) -> None:
    for number, lane in enumerate((Lane.NORMAL, Lane.LOW, Lane.LOW)):
        make_job(session, prompt=f"waits {number}", lane=lane)
    assert one_attempt.claim(session, make_job(session).id, worker="generate-1@host", lease_s=30)
    workers.heartbeat(session, "generate-1@host", kind="generate", model="cheap", state="ready")
    session.commit()
    page = client.get("/queue").text
    assert re.search(r"<b>1</b> normal,\s*<b>2</b> low", page)
    assert re.search(r"generate-1@host <span[^>]*>generate · cheap · ready · holds 1 job<", page)
    assert sorted(re.findall(r"queued</b> · (\d) ahead", page)) == ["1", "2"], "the job of the lane `normal` is first"


def test_viewers_of_the_same_queue_share_one_read(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_job(session)
    session.commit()
    monkeypatch.setattr(queue, "LOOK_TTL_S", 600)
    reads = 0
    read_page = jobs.list_page

    def count_read(*args: Any, **named: Any) -> Any:
        nonlocal reads
        reads += 1
        return read_page(*args, **named)

    monkeypatch.setattr(jobs, "list_page", count_read)
    streams = [client.get("/queue/events", buffered=False) for _ in range(4)]
    for stream in streams:
        assert b"still here" in next(iter(stream.response))
        stream.close()
    assert reads == 1


def test_a_dead_job_tells_its_story(client: Client, session: Session) -> None:
    job = make_job(session)
    for _ in range(2):
        assert one_attempt.claim(session, job.id, worker="generate@host", lease_s=30)
        session.execute(update(Job).values(model_started=True, lease_until=datetime.now(UTC) - timedelta(seconds=9)))
        assert attempts.take_back_expired(session, max_crashes=2) == [job.id]
        session.execute(update(Job).values(run_after=None))
    session.commit()
    assert f"/jobs/{job.id}#story" in client.get("/queue").text
    page = client.get(f"/jobs/{job.id}").text
    story = page[page.index('id="story" open') :]
    assert re.search(r"requeued</b>.*crashes</code>: 1.*started</b>.*dead</b>", story, re.DOTALL)


def test_a_form_that_is_sent_without_a_database_keeps_everything_typed(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise DatabaseConnectionError

    monkeypatch.setattr("api_service.services.generation.rag_generate", away)
    form = {"prompt": "a red <apple>\r\nand a pear", "seed": "77", "pin": [str(uuid4()), str(uuid4())], "once": "k"}
    answer = client.post("/", data=form, headers=SAME_ORIGIN)
    assert answer.status_code == 503
    assert "Nothing that you typed is lost" in answer.text
    again = [
        (name, unescape(value))
        for name, value in re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', answer.text)
    ]
    pins = [("pin", each) for each in form["pin"]]
    assert again == [("prompt", form["prompt"]), ("seed", "77"), *pins, ("once", "k")]
    assert "a red &lt;apple&gt;" in answer.text[answer.text.index("<dl") :]
    with_files = {"prompt": "x", "reference_image": files(("a.png", picture()))}
    assert 'type="file" name="reference_image"' in client.post("/", data=with_files, headers=SAME_ORIGIN).text
    monkeypatch.undo()
    assert client.post("/", data=dict(again[:2]), headers=SAME_ORIGIN).status_code == 303


def test_a_form_of_another_page_and_a_secret_are_not_shown_again(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise DatabaseConnectionError

    monkeypatch.setattr("api_service.services.generation.rag_generate", away)
    monkeypatch.setattr("shared.db.keys.find_valid", away)
    assert "smuggled" not in client.post("/", data={"prompt": "smuggled"}).text
    refused = client.post("/sign-in", data={"key": "aft_secret"}, headers=SAME_ORIGIN)
    assert (refused.status_code, "aft_secret" in refused.text) == (503, False)
