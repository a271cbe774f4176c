"""Studio's lists: the gallery with its filters and selection, the live queue, and bulks."""

import hashlib
import io
import re
import zipfile
from html import unescape
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import attempts
from shared.db.attempts import StoredOutput
from shared.db.tables import Bulk, Image, Job, Output
from shared.storage import get_blobs
from tests import one_attempt
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output
from tests.integration.test_studio import FRAGMENT, SAME_ORIGIN

OTHERS = {"prompt": "a green pear", "model": "other", "mode": "caption"}


def make_other_output(session: Session) -> Output:
    """An output of another prompt, model and mode than those of `make_output`."""
    output = make_output(session, 9)
    record = output.provenance
    output.provenance = {
        **record,
        "parameters": {**record["parameters"], "prompt": OTHERS["prompt"]},
        "model": {**record["model"], "name": OTHERS["model"]},
        "mode": OTHERS["mode"],
    }
    session.commit()
    return output


def shown(client: Client, **query: Any) -> list[str]:
    answer = client.get("/gallery", query_string=query)
    assert answer.status_code == 200, answer.text
    return re.findall(r'name="selected" value="([^"]+)"', answer.text)


def test_the_gallery_is_searched_and_filtered(client: Client, session: Session) -> None:
    apple, pear = make_output(session, 7), make_other_output(session)
    assert shown(client) == [str(pear.id), str(apple.id)]
    for query in (
        {"words": "PEAR green"},
        {"model": OTHERS["model"]},
        {"mode": OTHERS["mode"]},
        {"job_id": str(pear.job_id)},
        {"created_after": apple.created_at.isoformat()},
    ):
        assert shown(client, **query) == [str(pear.id)], query
    assert shown(client, words="pe%r") == [], "a word is not a pattern"
    assert shown(client, created_before=pear.created_at.isoformat()) == [str(apple.id)]
    nothing = client.get("/gallery", query_string={"words": "quince"}).text
    assert "No image matches." in nothing
    assert 'value="quince"' in nothing
    found = client.get(f"{API}/generations", query_string={"words": "pear", "mode": "caption"}).json["items"]
    assert [each["id"] for each in found] == [str(pear.id)]
    assert client.get(f"{API}/generations", query_string={"mode": "nothing"}).status_code == 422


def test_a_favourite_is_marked_filtered_and_unmarked(client: Client, session: Session) -> None:
    chosen, other = make_output(session, 7), make_other_output(session)
    path = f"/gallery/{chosen.id}/favourite"
    answer = client.post(f"{path}?words=apfel", data={"favourite": "true"}, headers=SAME_ORIGIN)
    assert answer.location == "/gallery?words=apfel", "the list stays filtered"
    assert shown(client, favourite="true") == [str(chosen.id)]
    assert shown(client, favourite="false") == [str(other.id)]
    address = f"{API}/generations/{chosen.id}"
    assert client.get(address).json["favourite"] is True
    part = client.post(path, data={"favourite": "false"}, headers=SAME_ORIGIN | FRAGMENT).text
    assert 'aria-pressed="false"' in part
    assert "<html" not in part
    assert shown(client, favourite="true") == []
    changed = client.patch(address, json={"favourite": True}).json
    assert (changed["favourite"], changed["provenance"]) == (True, client.get(address).json["provenance"])
    for wrong in ({}, {"favourite": None}, {"favourite": True, "seed": 3}):
        assert client.patch(address, json=wrong).status_code == 422, wrong
    assert client.post(path, data={"favourite": "perhaps"}, headers=SAME_ORIGIN).status_code == 422
    assert client.patch(f"{API}/generations/{uuid4()}", json={"favourite": True}).status_code == 404


def test_selected_images_become_favourites_and_memories(client: Client, session: Session) -> None:
    files = [picture("red"), picture("blue")]
    outputs = [make_output(session, number) for number in (1, 2, 3)]
    for output, file in zip(outputs, files, strict=False):
        get_blobs().put(output.blob_key, file, media_type="image/png")
    chosen = [str(each.id) for each in outputs[:2]]
    answer = client.post("/gallery/favourite", data={"selected": [*chosen, str(uuid4())]}, headers=SAME_ORIGIN)
    assert answer.location == "/gallery"
    assert set(shown(client, favourite="true")) == set(chosen)
    assert client.post("/gallery/remember", data={"selected": chosen}, headers=SAME_ORIGIN).location == "/corpus"
    session.rollback()
    remembered = session.scalars(select(Image.attributes)).all()
    assert {each["generation_id"] for each in remembered} == set(chosen)
    too_many = [str(uuid4()) for _ in range(49)]
    assert client.post("/gallery/remember", data={"selected": too_many}, headers=SAME_ORIGIN).status_code == 422


def test_an_image_is_found_by_its_file_and_a_remembered_one_by_its_look(client: Client, session: Session) -> None:
    exact, remembered, stranger = (make_output(session, number) for number in (1, 2, 3))
    file = picture("red")
    exact.sha256 = hashlib.sha256(file).hexdigest()
    space = make_space(session)
    make_image(session, vector=towards(a0=1), sha256=remembered.sha256)
    make_image(session, vector=towards(a0=1, a1=0.2))
    session.commit()
    with embed_worker(space, lambda items: towards(a0=1)[None].repeat(len(items), axis=0)):
        answer = client.post("/gallery/like", data={"image": (io.BytesIO(file), "a.png")}, headers=SAME_ORIGIN)
    found = re.findall(r'name="selected" value="([^"]+)"', answer.text)
    assert found == [str(exact.id), str(remembered.id)], "the file itself comes first"
    assert str(stranger.id) not in answer.text
    for wrong, words in (({}, "Choose a picture."), ({"image": (io.BytesIO(b"no image"), "a.png")}, "image")):
        refused = client.post("/gallery/like", data=wrong, headers=SAME_ORIGIN)
        assert refused.status_code in (415, 422)
        assert words in unescape(refused.text)
        assert "Search by a picture" in refused.text, "the form is still there"


def test_two_images_are_compared_with_what_differs(client: Client, session: Session) -> None:
    apple, pear = make_output(session, 7), make_other_output(session)
    page = client.get("/gallery/compare", query_string={"selected": [str(apple.id), str(pear.id)]}).text
    rows = dict(re.findall(r'<th scope="row">([^<]+)</th><td>[^<]*</td><td>([^<]*)</td>', page))
    assert (rows["prompt"], rows["seed"], rows["model"]) == (OTHERS["prompt"], str(pear.seed), OTHERS["model"])
    assert "steps" not in rows, "equal values are left out"
    same = client.get("/gallery/compare", query_string={"selected": [str(apple.id)] * 2}).text
    assert "Both were drawn from the same values." in same
    assert client.get("/gallery/compare").headers["Location"].endswith("/gallery"), "nothing is selected"
    for wrong in ([str(apple.id)], [str(apple.id), "nothing"]):
        assert client.get("/gallery/compare", query_string={"selected": wrong}).status_code == 422
    gone = client.get("/gallery/compare", query_string={"selected": [str(apple.id), str(uuid4())]})
    assert gone.status_code == 404


def test_the_gallery_says_which_image_its_outputs_used(client: Client, session: Session) -> None:
    image = make_image(session, caption="a small apple")
    session.commit()
    page = client.get("/gallery", query_string={"reference_id": str(image.id)}).text
    assert "a small apple" in page
    assert f'name="reference_id" value="{image.id}"' in page, "a further search keeps it"


def test_filters_stay_in_the_link_to_older_images(client: Client, session: Session) -> None:
    for number in range(50):
        make_output(session, number)
    first = client.get("/gallery", query_string={"words": "apfel"}).text
    (older,) = re.findall(r'data-more><a class="button" href="([^"]+)"', first)
    assert "words=apfel" in older
    rest = client.get(unescape(older), headers=FRAGMENT).text
    assert (first.count('name="selected"'), rest.count('name="selected"')) == (48, 2)
    assert "<html" not in rest
    assert "<form" not in rest


def test_the_images_of_a_job_are_in_the_order_of_their_seeds(client: Client, session: Session) -> None:
    job = make_job(session, state=JobState.PROCESSING, seeds=[1, 2, 3, 4])
    sample = make_output(session, 1)
    columns = {
        column.name: getattr(sample, column.name)
        for column in Output.__table__.columns
        if column.name not in ("id", "job_id", "index", "seed", "created_at", "blob_key", "thumbnail_key")
    }
    outputs = [
        Output(
            **columns,
            id=uuid4(),
            job_id=job.id,
            index=index,
            seed=index + 1,
            blob_key=f"a{index}",
            thumbnail_key=f"b{index}",
        )
        for index in (2, 0, 3, 1)
    ]
    claim = attempts.Claim(job.id, job.attempt)
    assert one_attempt.finish(
        session, claim, [StoredOutput(output=each, references=[]) for each in outputs], timings={}
    )
    session.commit()
    for path in ("/gallery", f"/jobs/{job.id}"):
        seeds = re.findall(r", seed (\d)\"", client.get(path).text)
        assert seeds[-4:] == ["1", "2", "3", "4"] or seeds[:4] == ["1", "2", "3", "4"], path


def test_selected_images_are_downloaded_as_one_zip_and_deleted(client: Client, session: Session) -> None:
    outputs = [make_output(session, number) for number in (1, 2, 3)]
    chosen = [str(each.id) for each in outputs[:2]]
    with client.post("/gallery/download", data={"selected": chosen}, headers=SAME_ORIGIN) as answer:
        assert (answer.status_code, answer.mimetype) == (200, "application/zip")
        data = answer.data
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == 2
        assert all(re.fullmatch(r"\d{4}-\d\d-\d\d-[12]-[0-9a-f]{8}\.png", name) for name in archive.namelist())
        file = client.get(f"{API}/generations/{chosen[0]}/content").data
        assert file in [archive.read(name) for name in archive.namelist()]
    assert client.post("/gallery/delete", data={"selected": chosen}, headers=SAME_ORIGIN).location == "/gallery"
    assert list(session.scalars(select(Output.id))) == [outputs[2].id]
    for wrong in ({}, {"selected": "nothing"}):
        assert client.post("/gallery/download", data=wrong, headers=SAME_ORIGIN).status_code == 422


def test_the_queue_is_live_and_has_its_actions_in_the_row(client: Client, session: Session) -> None:
    job = make_job(session, prompt="a first one")
    session.commit()
    with client.get("/queue/events", buffered=False) as stream:
        assert stream.mimetype == "text/event-stream"
        events = iter(stream.response)
        assert b"still here" in next(events)
        answer = client.post(f"/jobs/{job.id}/cancel", data={"from": "queue"}, headers=SAME_ORIGIN)
        assert answer.location == "/queue"
        assert b"event: changed" in next(events)
    page = client.get("/queue").text
    assert 'data-live="/queue/events"' in page
    assert f'action="/jobs/{job.id}/retry"' in page
    retried = client.post(f"/jobs/{job.id}/retry", data={"from": "queue"}, headers=SAME_ORIGIN)
    assert retried.location == "/queue"
    assert client.get("/queue").text.count("a first one</a>") == 2


TABLE = 'prompt,seed,width,num_images\na fox,7,32,\n"a bear, asleep",,,2\n'


def sent(client: Client, table: str, **fields: str) -> Any:
    form = {"table": (io.BytesIO(table.encode()), "prompts.csv"), **fields}
    return client.post("/bulks", data=form, headers=SAME_ORIGIN)


def test_a_bulk_is_started_from_a_table_followed_and_paused(client: Client, session: Session) -> None:
    answer = sent(client, TABLE, name="animals")
    assert answer.status_code == 303, answer.text
    page = client.get(answer.location).text
    assert "<h1>animals</h1>" in page
    assert "0 of 2 ended" in page
    bulk_id = answer.location.rpartition("/")[2]
    items = client.get(f"{API}/bulks/{bulk_id}/items").json["items"]
    assert [each["prompt"] for each in items] == ["a fox", "a bear, asleep"]
    for action, state in (("pause", "paused"), ("resume", "running"), ("cancel", "canceled")):
        assert client.post(f"{answer.location}/{action}", headers=SAME_ORIGIN).location == answer.location
        assert f">{state}</b>" in client.get(answer.location).text, action
    assert "animals</a>" in client.get("/bulks").text
    assert client.post(f"{answer.location}/explode", headers=SAME_ORIGIN).status_code == 404


def test_prompts_make_a_bulk_and_a_form_that_is_sent_twice_makes_one(client: Client, session: Session) -> None:
    (once,) = re.findall(r'name="once" value="(\w+)"', client.get("/bulks").text)
    form = {"prompts": "a fox\r\n\r\na bear\r\n", "once": once}
    places = {client.post("/bulks", data=form, headers=SAME_ORIGIN).location for _ in range(2)}
    assert len(places) == 1
    assert session.scalars(select(Bulk.total)).all() == [2]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "Choose a CSV file"),
        ("text\na fox\n", "one of them `prompt`"),
        ("prompt\na fox,7\n", "more cells"),
        ('prompt\n"a fox\n', "not a CSV file"),
    ],
)
def test_a_wrong_table_is_refused_beside_its_field(client: Client, session: Session, table: str, words: str) -> None:
    answer = sent(client, table, name="animals")
    assert (answer.status_code, words in unescape(answer.text)) == (422, True), answer.text
    assert 'value="animals"' in answer.text
    assert session.scalar(select(Job)) is None


def test_wrong_lines_of_a_bulk_are_listed(client: Client) -> None:
    table = "prompt,width\na fox,wide\na bear,32\n"
    refused = sent(client, table)
    assert refused.status_code == 422
    page = client.get(sent(client, table, on_invalid="skip").location).text
    assert "<b>1</b> wrong line" in page
    assert "line 2" in page
    assert "width" in page
