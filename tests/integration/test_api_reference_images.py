"""Pictures that a request brings as references of its own job."""

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image as Picture
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from shared import blob_sweeper
from shared.contracts.generation import RagGenerateRequest
from shared.db import reference_images, workers
from shared.db.blobs import list_unneeded
from shared.db.session import session_scope
from shared.db.tables import BlobClaim, Image, Job, Output, OutputReference, ReferenceImage
from shared.settings import Settings
from shared.storage import get_blobs
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client, a_key, picture
from tests.integration.test_api_jobs import CAPABILITIES, code
from tests.integration.test_api_search import towards
from tests.integration.test_export_outputs import make_output
from tests.stack import wait_until

KEY = {"Idempotency-Key": "order-17"}


def sent(data: bytes, **fields: Any) -> dict[str, Any]:
    return {"data": base64.b64encode(data).decode(), **fields}


def submit(client: Client, *images: dict[str, Any], headers: dict[str, str] | None = None, **request: Any) -> Any:
    body = {"prompt": "a red apple", "reference_images": list(images), **request}
    return client.post(f"{API}/rag/generate", json=body, headers=headers)


def submit_form(client: Client, *files: bytes, name: str = "reference_image", **request: Any) -> Any:
    form = {"request": json.dumps({"prompt": "a red apple", **request})}
    data = {**form, name: [(io.BytesIO(file), "a.png") for file in files]}
    return client.post(f"{API}/rag/generate", data=data, content_type="multipart/form-data")


def accepted(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    return dict(answer.json)


def count(session: Session, table: Any) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(table)) or 0


def stored() -> set[str]:
    return {info.key for info in get_blobs().list("") if info.key != blob_sweeper.OWNER_KEY}


def test_a_job_has_the_pictures_of_its_request_and_the_corpus_does_not(client: Client, session: Session) -> None:
    files = [picture("teal", size=(300, 200)), picture("gold", kind="JPEG")]
    job = accepted(submit(client, sent(files[0], weight=2, caption="a sea"), sent(files[1])))
    digests = [hashlib.sha256(file).hexdigest() for file in files]
    assert job["parameters"]["reference_images"] == [
        {"sha256": digests[0], "weight": 2, "caption": "a sea"},
        {"sha256": digests[1], "weight": None, "caption": None},
    ]
    assert (job["parameters"]["k"], job["parameters"]["references"]) == (0, []), "nothing is searched"
    shown = client.get(job["url"]).json["reference_images"]
    assert shown == job["reference_images"]
    first = shown[0]
    assert (first["sha256"], first["weight"], first["caption"]) == (digests[0], 2, "a sea")
    assert (first["width"], first["height"], first["format"]) == (300, 200, "png")
    assert [each["format"] for each in shown] == ["png", "jpeg"]

    content = client.get(first["content_url"])
    assert content.content_type == "image/png"
    assert Picture.open(io.BytesIO(content.data)).getpixel((0, 0)) == (0, 128, 128)
    thumbnail = client.get(first["thumbnail_url"])
    assert thumbnail.content_type == "image/webp"
    assert max(Picture.open(io.BytesIO(thumbnail.data)).size) <= 256
    assert client.get(first["content_url"], headers={"If-None-Match": content.headers["ETag"]}).status_code == 304
    assert client.get(f"{API}/jobs").json["items"][0]["reference_images"] == shown

    assert (count(session, Image), count(session, ReferenceImage), count(session, BlobClaim)) == (0, 2, 0)
    assert client.get(f"{API}/images").json["items"] == []


def test_a_form_sends_the_pictures_as_files(client: Client) -> None:
    files = picture("teal"), picture("gold")
    by_json = accepted(submit(client, sent(files[0], weight=3), sent(files[1])))
    by_form = accepted(submit_form(client, *files, reference_images=[{"weight": 3}, {}]))
    assert by_form["parameters"]["reference_images"] == by_json["parameters"]["reference_images"]
    undescribed = accepted(submit_form(client, *files))
    assert [each["weight"] for each in undescribed["parameters"]["reference_images"]] == [None, None]


@pytest.mark.parametrize(
    ("request_part", "field"),
    [
        ("{", None),
        ('{"prompt": "a", "filter": ' + '{"tags": ' * 300 + "1" + "}" * 301, None),
        ('{"prompt": "a", "reference_images": [{"data": ""}]}', "body.reference_images.0.data"),
        ("[1]", "form.request"),
        ('{"prompt": "a", "reference_images": [{}, {}, {}]}', "form.reference_image"),
        ('{"prompt": "a", "reference_images": {"weight": 1}}', "body.reference_images"),
        ('{"prompt": "a", "reference_images": [{"weight": "heavy"}]}', "body.reference_images.0.weight"),
        ('{"prompt": ""}', "body.prompt"),
        (None, "form.request"),
    ],
)
def test_a_wrong_form_is_refused_by_its_field(client: Client, request_part: str | None, field: str | None) -> None:
    form = {} if request_part is None else {"request": request_part}
    data = {**form, "reference_image": [(io.BytesIO(picture()), "a.png")]}
    answer = client.post(f"{API}/rag/generate", data=data, content_type="multipart/form-data")
    if field is None:
        assert code(answer) == (400, "malformed_body")
    else:
        assert code(answer) == (422, "validation_failed")
        assert [error["field"] for error in answer.json["errors"]] == [field]
    assert code(submit_form(client, picture(), name="file")) == (422, "validation_failed")


def test_pictures_are_used_beside_pinned_images(client: Client, session: Session) -> None:
    image = make_image(session, vector=towards(a0=1))
    session.commit()
    job = accepted(submit(client, sent(picture()), reference_ids=[str(image.id)]))
    assert [each["image_id"] for each in job["parameters"]["references"]] == [str(image.id)]
    assert len(job["reference_images"]) == 1


def test_a_dry_run_shows_the_digests_and_stores_nothing(client: Client, session: Session) -> None:
    answer = submit(client, sent(picture()), dry_run=True)
    assert answer.status_code == 200
    assert answer.json["parameters"]["reference_images"][0]["sha256"] == hashlib.sha256(picture()).hexdigest()
    assert (stored(), count(session, BlobClaim)) == (set(), 0)
    assert code(submit(client, sent(b"no picture"), dry_run=True)) == (415, "unsupported_image_type")


def test_requests_without_pictures_are_recorded_as_before(client: Client) -> None:
    assert "reference_images" not in RagGenerateRequest(prompt="a red apple").model_dump(), (
        "the fingerprint is the same"
    )
    job = accepted(client.post(f"{API}/rag/generate", json={"prompt": "a red apple"}))
    assert "reference_images" not in job["parameters"], "so that a worker of the previous release can read them"
    assert job["reference_images"] == []


@pytest.mark.parametrize(
    ("data", "refusal"),
    [
        (b"no picture", (415, "unsupported_image_type")),
        (picture()[:60], (422, "invalid_image")),
        (b"", (422, "invalid_image")),
        (b"\x89PNG\r\n\x1a\n" + bytes(17 * 2**20), (413, "image_too_large")),
    ],
)
def test_a_picture_that_cannot_be_read_is_refused_by_its_field(
    client: Client, session: Session, data: bytes, refusal: tuple[int, str]
) -> None:
    answer = submit(client, sent(picture()), sent(data))
    assert code(answer) == refusal
    assert [(error["field"], error["code"]) for error in answer.json["errors"]] == [
        ("body.reference_images.1.data", refusal[1])
    ]
    assert (stored(), count(session, Job), count(session, BlobClaim)) == (set(), 0, 0)


def test_text_that_is_not_base64_is_refused_by_its_field(client: Client) -> None:
    answer = submit(client, {"data": "n@t base64"})
    assert code(answer) == (422, "validation_failed")
    assert [(error["field"], error["code"]) for error in answer.json["errors"]] == [
        ("body.reference_images.0.data", "base64")
    ]


def test_too_many_pictures_are_refused_before_they_are_decoded(client: Client, session: Session) -> None:
    image = make_image(session, vector=towards(a0=1))
    session.commit()
    refused = submit(client, *[sent(b"no picture")] * 4, reference_ids=[str(image.id)])
    assert code(refused) == (422, "parameter_not_supported")
    assert (refused.json["context"]["parameter"], refused.json["context"]["maximum"]) == ("reference_images", 4)
    beyond = submit(client, *[sent(picture())] * 17)
    assert code(beyond) == (422, "validation_failed")
    assert [error["field"] for error in beyond.json["errors"]] == ["body.reference_images"]
    loaded = CAPABILITIES.model_copy(update={"max_references": 1})
    workers.publish_capabilities(session, "cheap", loaded)
    session.commit()
    refused = submit(client, *[sent(b"no picture")] * 2)
    assert (refused.json["context"]["parameter"], refused.json["context"]["maximum"]) == ("reference_images", 1)
    unknown_model = submit(client, sent(b"no picture"), model="there-is-none")
    assert code(unknown_model) == (422, "model_not_found")


def test_a_key_belongs_to_a_request_with_its_pictures(client: Client, session: Session) -> None:
    first = accepted(submit(client, sent(picture("teal")), headers=KEY))
    again = submit(client, sent(picture("teal")), headers=KEY)
    assert (again.json["id"], again.headers["Idempotent-Replayed"]) == (first["id"], "true")
    client.application.extensions["decoder"] = None
    undecoded = submit(client, sent(picture("teal")), headers=KEY)
    assert undecoded.json == first, "a repeated request is not decoded"
    assert code(submit(client, sent(picture("gold")), headers=KEY)) == (422, "idempotency_key_reused")
    assert (count(session, Job), count(session, ReferenceImage), count(session, BlobClaim)) == (1, 1, 0)


def test_a_retry_uses_the_pictures_again_also_when_the_first_job_is_deleted(client: Client, session: Session) -> None:
    first = accepted(submit(client, sent(picture("teal"), weight=2), sent(picture("gold"))))
    client.post(f"{first['url']}/cancel")
    again = accepted(client.post(f"{first['url']}/retry"))
    assert again["parameters"] == first["parameters"]
    assert [each["sha256"] for each in again["reference_images"]] == [
        each["sha256"] for each in first["reference_images"]
    ]
    assert client.delete(first["url"]).status_code == 204
    assert client.get(first["reference_images"][0]["content_url"]).status_code == 404
    assert client.get(again["reference_images"][0]["content_url"]).status_code == 200


def test_a_job_whose_pictures_are_being_copied_is_deleted_after_the_copy(
    client: Client, session: Session, background: ThreadPoolExecutor
) -> None:
    job = accepted(submit(client, sent(picture())))
    client.post(f"{job['url']}/cancel")
    other = make_job(session)
    reference_images.copy(session, reference_images.lock_by_job(session, UUID(job["id"])), job_id=other.id)
    session.flush()
    deleted = background.submit(client.delete, job["url"])
    wait_until(a_delete_waits, timeout_s=20, what="the delete to wait")
    with session_scope() as beside:
        assert set(list_unneeded(beside, sorted(stored()))) == set()
    session.commit()
    assert deleted.result(20).status_code == 204
    with session_scope() as beside:
        assert set(list_unneeded(beside, sorted(stored()))) == set(), "the copy names the blobs"


def test_a_retry_of_a_job_that_is_being_deleted_is_refused(
    client: Client, session: Session, background: ThreadPoolExecutor
) -> None:
    job = accepted(submit(client, sent(picture())))
    client.post(f"{job['url']}/cancel")
    session.delete(session.get_one(Job, UUID(job["id"])))
    session.flush()
    retried = background.submit(client.post, f"{job['url']}/retry")
    wait_until(a_statement_waits, timeout_s=20, what="the retry to wait")
    session.commit()
    assert code(retried.result(20)) == (404, "not_found")
    assert count(session, Job) == 0


def a_delete_waits() -> bool:
    return a_statement_waits("DELETE%")


def a_statement_waits(pattern: str = "%") -> bool:
    waiting = text("select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like :pattern")
    with session_scope() as session:  # one transaction sees one state of this view
        return bool(session.scalar(waiting, {"pattern": pattern}) == 1)


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_concurrent_submits_retries_deletes_and_sweeps_leave_no_row_without_its_blobs(
    client: Client, session: Session, background: ThreadPoolExecutor
) -> None:
    done = threading.Event()
    removed = []

    def sweep_on() -> None:
        while not done.is_set():
            removed.append(blob_sweeper.sweep(get_blobs(), older_than_s=0).blobs)

    def submit_and_delete(rounds: Iterable[int]) -> set[int]:
        statuses = set()
        for _ in rounds:
            answer = submit(client, sent(picture("teal")))
            statuses.add(answer.status_code)
            if answer.status_code == 202:
                client.post(f"{answer.json['url']}/cancel")
                again = accepted(client.post(f"{answer.json['url']}/retry"))
                client.delete(answer.json["url"])
                assert client.get(again["reference_images"][0]["content_url"]).status_code == 200
                client.post(f"{again['url']}/cancel")
                client.delete(again["url"])
        return statuses

    sweeping = background.submit(sweep_on)
    try:
        both = [background.submit(submit_and_delete, range(15)) for _ in range(2)]
        statuses = {status for each in both for status in each.result(120)}
        deadline = time.monotonic() + 60
        while not any(removed) and time.monotonic() < deadline:
            statuses |= submit_and_delete(range(1))
    finally:
        done.set()
    sweeping.result(20)
    assert any(removed)
    # A grace of 0 s ends claims at once, so some submits get 503.
    assert 202 in statuses <= {202, 503}


def test_concurrent_requests_with_one_key_make_one_job(
    client: Client, session: Session, background: ThreadPoolExecutor
) -> None:
    answers = list(background.map(lambda _: submit(client, sent(picture()), headers=KEY), range(4)))
    assert len({accepted(answer)["id"] for answer in answers}) == 1
    assert (count(session, Job), count(session, ReferenceImage), count(session, BlobClaim)) == (1, 1, 0)


def drawn_from(session: Session, job_id: str) -> Output:
    """Give the job an output that used its only picture."""
    output = make_output(session, 7)
    picture_row = session.scalars(select(ReferenceImage).where(ReferenceImage.job_id == UUID(job_id))).one()
    parameters = session.get_one(Job, UUID(job_id)).parameters
    provenance = {**output.provenance, "parameters": parameters}
    session.execute(update(Output).where(Output.id == output.id).values(job_id=job_id, provenance=provenance))
    session.execute(
        update(OutputReference)
        .where(OutputReference.generation_id == output.id)
        .values(image_id=picture_row.id, sha256=picture_row.sha256, weight=1.0, kind="request")
    )
    session.commit()
    return output


def test_a_replay_uses_the_pictures_of_the_job(client: Client, session: Session) -> None:
    job = accepted(submit(client, sent(picture("teal"), caption="an apple")))
    output = drawn_from(session, job["id"])
    (shown,) = client.get(f"{API}/generations/{output.id}").json["references"]
    assert (shown["kind"], shown["image_id"]) == ("request", job["reference_images"][0]["id"])

    page = client.get(f"/gallery/{output.id}").text
    assert job["reference_images"][0]["thumbnail_url"] in page
    assert "100 %, sent" in page

    again = accepted(client.post(f"{API}/generations/{output.id}/replay"))
    assert (again["kind"], again["parameters"]["references"]) == ("rag_generate", [])
    (used,) = again["parameters"]["reference_images"]
    assert used == {"sha256": job["reference_images"][0]["sha256"], "weight": 1.0, "caption": "an apple"}
    assert client.get(again["reference_images"][0]["content_url"]).status_code == 200

    session.execute(update(OutputReference).values(image_id=(gone := uuid4())))
    session.commit()
    refused = client.post(f"{API}/generations/{output.id}/replay")
    assert code(refused) == (422, "reference_unavailable")
    assert refused.json["context"]["image_ids"] == [str(gone)]


def test_pictures_are_swept_when_no_job_has_them(client: Client, session: Session, settings: Settings) -> None:
    first, second = (accepted(submit(client, sent(picture("teal")))) for _ in range(2))
    assert len(stored()) == 2, "equal pictures share their blobs"
    for job in (first, second):
        blob_sweeper.sweep(get_blobs(), older_than_s=0)
        assert client.get(job["reference_images"][0]["content_url"]).status_code == 200
        client.post(f"{job['url']}/cancel")
        assert client.delete(job["url"]).status_code == 204
    assert len(stored()) == 2
    blob_sweeper.sweep(get_blobs(), older_than_s=0)
    assert stored() == set()
    assert count(session, ReferenceImage) == 0


def test_an_image_of_the_corpus_does_not_keep_a_picture_and_the_reverse(client: Client) -> None:
    file = picture("teal")
    job = accepted(submit(client, sent(file)))
    upload = {"file": (io.BytesIO(file), "a.png")}
    image = client.post(f"{API}/upload", data=upload, content_type="multipart/form-data").json["images"][0]
    assert len(stored()) == 4
    client.post(f"{job['url']}/cancel")
    client.delete(job["url"])
    blob_sweeper.sweep(get_blobs(), older_than_s=0)
    assert {key.partition("/")[0] for key in stored()} == {"images", "thumbnails"}
    assert client.get(image["content_url"]).status_code == 200


def test_only_the_owner_of_the_job_reads_its_pictures(keyed_client: Client, session: Session) -> None:
    own = a_key(session, "generate")
    job = accepted(submit(keyed_client, sent(picture()), headers=own))
    address = job["reference_images"][0]["content_url"]
    assert keyed_client.get(address, headers=own).status_code == 200
    assert code(keyed_client.get(address, headers=a_key(session, "generate", owner="others"))) == (404, "not_found")
    assert code(keyed_client.get(address, headers=a_key(session, "search"))) == (403, "forbidden")


def test_a_line_of_a_bulk_takes_no_pictures(client: Client) -> None:
    line = json.dumps({"prompt": "a", "reference_images": [sent(picture())]})
    answer = client.post(f"{API}/bulks", data=line, content_type="application/jsonl")
    assert code(answer) == (422, "bulk_invalid")
    assert "reference_images" in answer.text


def test_pixels_of_a_picture_are_those_of_an_upload(client: Client) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    Picture.fromarray(noise).save(file, "PNG")
    job = accepted(submit(client, sent(file.getvalue())))
    content = client.get(job["reference_images"][0]["content_url"]).data
    assert np.array_equal(np.asarray(Picture.open(io.BytesIO(content))), noise)
