"""The corpus over HTTP: upload, list, show, change and delete images."""

import hashlib
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from PIL import Image as Picture
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import collections, owners, spaces
from shared.db.images import find_vector
from shared.db.tables import Collection, Image, Job, Output, OutputReference
from shared.messaging import queue
from shared.settings import Settings
from tests.factories import SHARED_COLLECTION, make_image, make_job, make_output_row
from tests.integration.conftest import API, Client, messages, picture
from tests.stack import wait_until

VECTOR = [1.0] + [0.0] * 15


def upload(client: Client, *files: bytes, name: str = "image.png", **fields: Any) -> Any:
    sent = [(io.BytesIO(data), name) for data in files]
    return client.post(f"{API}/upload", data={"file": sent, **fields}, content_type="multipart/form-data")


def uploaded(client: Client, data: bytes, **fields: Any) -> dict[str, Any]:
    answer = upload(client, data, **fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json["images"][0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_uploaded_image_is_returned_with_its_description(client: Client, kind: str) -> None:
    data = picture("teal", size=(300, 200), kind=kind)
    image = uploaded(
        client,
        data,
        name="holiday photo.bin",
        caption="123",
        tags="sea, sky,sea,",
        licence="CC0",
        source="me",
        attributes='{"camera": "x100"}',
    )
    assert image["caption"] == "123", "a number in a form stays text"
    assert image["tags"] == ["sea", "sky"]
    assert (image["licence"], image["source"], image["attributes"]) == ("CC0", "me", {"camera": "x100"})
    assert (image["format"], image["width"], image["height"]) == (kind.lower(), 300, 200)
    assert image["sha256"] == hashlib.sha256(data).hexdigest()
    assert (image["state"], image["collection"]) == ("pending", "shared")
    assert client.get(image["url"]).json == image

    content = client.get(image["content_url"])
    assert content.content_type == f"image/{kind.lower()}"
    assert f'filename="holiday photo.{kind.lower()}"' in content.headers["Content-Disposition"]
    assert len(content.data) == image["size_bytes"] == content.content_length
    assert Picture.open(io.BytesIO(content.data)).size == (300, 200)
    thumbnail = client.get(image["thumbnail_url"])
    assert thumbnail.content_type == "image/webp"
    assert max(Picture.open(io.BytesIO(thumbnail.data)).size) <= 256


def test_image_files_are_immutable_and_a_known_etag_gets_304(client: Client) -> None:
    image = uploaded(client, picture())
    for url in (image["content_url"], image["thumbnail_url"]):
        first = client.get(url)
        assert "immutable" in first.headers["Cache-Control"]
        again = client.get(url, headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.data) == (304, b"")
        weakened = client.get(url, headers={"If-None-Match": f"W/{first.headers['ETag']}"})
        assert weakened.status_code == 304, "a proxy that compresses weakens a tag"
        assert again.headers["ETag"] == first.headers["ETag"]
        assert client.get(url, headers={"If-None-Match": '"another"'}).status_code == 200
        head = client.head(url)
        assert (head.status_code, head.data) == (200, b"")
    etags = {client.get(image[name]).headers["ETag"] for name in ("content_url", "thumbnail_url")}
    assert len(etags) == 2
    assert not any(etag.startswith("W/") for etag in etags)


def test_all_files_of_one_upload_are_stored_and_the_embed_workers_are_notified(
    client: Client, settings: Settings
) -> None:
    answer = upload(client, *(picture(colour) for colour in ("red", "green", "blue")), tags=["a", "b"])
    assert (answer.status_code, answer.json["created"], answer.json["existing"]) == (201, 3, 0)
    assert {tuple(image["tags"]) for image in answer.json["images"]} == {("a", "b")}
    wait_until(lambda: len(messages(queue.EMBED_IMAGES_QUEUE)) == 1, timeout_s=10, what="the notification")


def test_invalid_files_can_be_skipped_and_each_file_keeps_its_own_description(client: Client, session: Session) -> None:
    each = [{"caption": "a red one", "tags": ["own"]}, {"caption": "lost"}, {}, {"caption": "again"}]
    files = (picture("red"), b"no image", picture("green"), picture("red"))
    answer = upload(client, *files, on_invalid="skip", each=json.dumps(each), caption="for all", tags="common")
    assert (answer.status_code, answer.json["created"], answer.json["existing"]) == (201, 2, 1)
    red, green, again = answer.json["images"]
    assert (red["caption"], red["tags"]) == ("a red one", ["own"])
    assert (green["caption"], green["tags"]) == ("for all", ["common"])
    assert again["id"] == red["id"]
    outcomes = [(file["outcome"], file["image_id"], file["code"]) for file in answer.json["files"]]
    assert outcomes == [
        ("created", red["id"], None),
        ("skipped", None, "unsupported_image_type"),
        ("created", green["id"], None),
        ("existing", red["id"], None),
    ]
    nothing = upload(client, b"no image", picture()[:50], on_invalid="skip")
    assert (nothing.status_code, nothing.json["images"], nothing.json["created"]) == (200, [], 0)
    assert [file["code"] for file in nothing.json["files"]] == ["unsupported_image_type", "invalid_image"]
    refused = upload(client, picture("blue"), b"no image", each="[{}, {}]")
    assert (refused.status_code, refused.json["code"]) == (415, "unsupported_image_type")
    assert session.scalar(select(func.count()).select_from(Image)) == 2, "a refused upload stores nothing"


@pytest.mark.parametrize(
    "each", ["[{}]", "{}", "[{}, {}, {}]", "no json", '[{"collection": "mine"}, {}]', '[{"tags": "a"}, {}]', "[1, {}]"]
)
def test_descriptions_of_single_files_must_match_the_files(client: Client, each: str) -> None:
    answer = upload(client, picture("red"), picture("green"), each=each)
    assert answer.status_code == 422
    assert answer.json["errors"][0]["field"].startswith("form.each")


def test_an_upload_of_existing_content_returns_the_existing_image(client: Client) -> None:
    first = uploaded(client, picture(), caption="first")
    again = upload(client, picture(), caption="second")
    assert (again.status_code, again.json["created"], again.json["existing"]) == (200, 0, 1)
    assert again.json["images"] == [first]
    twice = upload(client, picture("blue"), picture("blue")).json
    assert (twice["created"], twice["existing"]) == (1, 1)
    assert twice["images"][0] == twice["images"][1]


def test_two_uploads_of_the_same_files_in_another_order_do_not_deadlock(client: Client, session: Session) -> None:
    files = sorted([picture("red"), picture("blue")], key=lambda data: hashlib.sha256(data).hexdigest())
    first, second = (hashlib.sha256(data).hexdigest() for data in files)
    make_image(session, sha256=first)
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(upload, client, *reversed(files))
        wait_until(
            lambda: _waits_for_a_lock(session), timeout_s=20, what="the upload to wait for the other transaction"
        )
        make_image(session, sha256=second)
        session.commit()
        assert answer.result().status_code == 200
    assert [image["sha256"] for image in answer.result().json["images"]] == [second, first], "in the order sent"


def _waits_for_a_lock(session: Session) -> bool:
    # Not pg_stat_activity: a transaction reads it once and then sees the same rows.
    waiting = text("SELECT count(*) FROM pg_locks WHERE NOT granted")
    return bool(session.scalar(waiting))


def test_a_collection_is_created_at_first_use_and_has_its_own_copy_of_an_image(client: Client) -> None:
    shared = uploaded(client, picture())
    own = uploaded(client, picture(), collection="holidays")
    assert (own["collection"], own["sha256"]) == ("holidays", shared["sha256"])
    assert own["id"] != shared["id"]
    listed = client.get(f"{API}/images", query_string={"collection": "holidays"}).json["items"]
    assert [image["id"] for image in listed] == [own["id"]]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("../../etc/passwd.png", "passwd.png"),
        ("pictures/cat.png", "cat.png"),
        ("für Zoë ✓.png", "für Zoë ✓.png"),
        ("..", None),
        ("x" * 300 + ".png", "x" * 196 + ".png"),
    ],
)
def test_a_file_name_is_reduced_to_its_safe_last_part(client: Client, sent: str, kept: str | None) -> None:
    image = uploaded(client, picture(), name=sent)
    assert image["filename"] == kept
    content = client.get(image["content_url"])
    assert content.status_code == 200
    assert "\n" not in content.headers["Content-Disposition"]


def test_images_are_listed_newest_first_by_page_and_filter(client: Client) -> None:
    made = [uploaded(client, picture(colour), tags=colour, licence="CC0") for colour in ("red", "green", "blue")]
    ids = [image["id"] for image in made][::-1]
    first = client.get(f"{API}/images?limit=2").json
    second = client.get(f"{API}/images", query_string={"limit": 2, "cursor": first["next_cursor"]}).json
    assert [image["id"] for image in first["items"] + second["items"]] == ids
    assert second["next_cursor"] is None
    assert [image["id"] for image in client.get(f"{API}/images?tag=green").json["items"]] == [ids[1]]
    assert len(client.get(f"{API}/images?licence=CC0&state=pending").json["items"]) == 3
    assert client.get(f"{API}/images?licence=MIT").json["items"] == []


def test_a_change_touches_only_the_fields_it_names(client: Client, session: Session) -> None:
    image = uploaded(client, picture(), caption="before", tags="a", source="me")
    version = session.get_one(Collection, SHARED_COLLECTION).version
    changed = client.patch(image["url"], json={"caption": "after", "tags": ["b", "c"], "source": None}).json
    assert changed == {**image, "caption": "after", "tags": ["b", "c"], "source": None}
    assert client.patch(image["url"], json={"tags": None, "attributes": None}).json["tags"] == []
    assert client.patch(image["url"], json={}).json["caption"] == "after"
    session.rollback()
    assert session.get_one(Collection, SHARED_COLLECTION).version > version, (
        "the change must invalidate cached searches"
    )


def test_a_delete_removes_image_and_vector_at_once_and_leaves_bytes_to_the_sweeper(
    client: Client, session: Session, settings: Settings
) -> None:
    image = uploaded(client, picture())
    row = make_image(session, vector=VECTOR)
    space = spaces.find_active(session)
    assert space is not None
    session.commit()
    for deleted in (image["id"], str(row.id)):
        assert client.delete(f"{API}/images/{deleted}").status_code == 204
        for route in ("", "/content", "/thumbnail"):
            assert client.get(f"{API}/images/{deleted}{route}").status_code == 404
        assert client.delete(f"{API}/images/{deleted}").status_code == 404
    session.rollback()
    assert find_vector(session, space, row.id) is None
    blobs = Path(settings.storage.url.removeprefix("file://"))
    assert list(blobs.rglob(f"{image['sha256']}*"))


@pytest.mark.parametrize("method", ["PATCH", "DELETE"])
def test_a_change_of_an_image_that_another_request_deletes_finds_none(
    client: Client, session: Session, method: str
) -> None:
    image = make_image(session)
    session.commit()
    with _deleted_meanwhile(session, Image, image.id) as executor:
        answer = executor.submit(client.open, f"{API}/images/{image.id}", method=method, json={"caption": "new"})
    assert (answer.result().status_code, answer.result().json["code"]) == (404, "not_found")


def test_an_upload_of_a_failed_image_that_another_request_deletes_stores_it_again(
    client: Client, session: Session
) -> None:
    old = uploaded(client, picture())["id"]
    session.execute(update(Image).values(state="failed", error_code="embedding_failed"))
    session.commit()
    with _deleted_meanwhile(session, Image, UUID(old)) as executor:
        answer = executor.submit(upload, client, picture())
    assert answer.result().status_code == 201, answer.result().text
    assert answer.result().json["images"][0]["id"] != old


def test_an_output_or_job_that_two_requests_delete_is_deleted_once(client: Client, session: Session) -> None:
    output_id = _output(session, reference=uuid4())
    job_id = make_job(session, state=JobState.CANCELED).id
    session.commit()
    for table, row_id, url in ((Output, output_id, "generations"), (Job, job_id, "jobs")):
        with _deleted_meanwhile(session, table, row_id) as executor:
            answer = executor.submit(client.delete, f"{API}/{url}/{row_id}")
        assert (answer.result().status_code, answer.result().json["code"]) == (404, "not_found")


@contextmanager
def _deleted_meanwhile(session: Session, table: Any, row_id: UUID) -> Iterator[ThreadPoolExecutor]:
    """Delete the row when the request that the block starts waits for its lock."""
    session.execute(select(table.id).where(table.id == row_id).with_for_update())
    with ThreadPoolExecutor(1) as executor:
        yield executor
        wait_until(lambda: _waits_for_a_lock(session), timeout_s=20, what="the request to wait for the lock")
        session.execute(delete(table).where(table.id == row_id))
        session.commit()


def test_an_image_of_another_owner_is_not_found(client: Client, session: Session) -> None:
    theirs = collections.ensure(session, "theirs", owner_id=owners.ensure(session, "other"))
    image = make_image(session, collection_id=theirs.id)
    session.commit()
    for method, route in [("GET", ""), ("PATCH", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/thumbnail")]:
        answer = client.open(f"{API}/images/{image.id}{route}", method=method, json={})
        assert answer.status_code == 404, (method, route)
    assert client.get(f"{API}/images", query_string={"collection": "theirs"}).status_code == 422
    session.rollback()
    assert session.get(Image, image.id) is not None


def test_the_content_of_an_image_whose_bytes_are_lost_is_a_404(client: Client, session: Session) -> None:
    image = make_image(session)
    session.commit()
    answer = client.get(f"{API}/images/{image.id}/content")
    assert (answer.status_code, answer.json["code"]) == (404, "not_found")


def test_outputs_that_used_an_image_are_listed_even_after_its_deletion(client: Client, session: Session) -> None:
    image = make_image(session)
    outputs = [_output(session, reference=image.id), _output(session, reference=uuid4())]
    session.commit()
    for _ in range(2):
        listed = client.get(f"{API}/images/{image.id}/generations").json["items"]
        assert [output["id"] for output in listed] == [str(outputs[0])]
        assert listed[0]["references"][0]["image_id"] == str(image.id)
        client.delete(f"{API}/images/{image.id}")


def _output(session: Session, *, reference: UUID, owner: str = "local") -> UUID:
    job = make_job(session, owner=owner, state=JobState.SUCCEEDED)
    generation = make_output_row(job.id, job.owner_id, provenance={"prompt": "a red apple"})
    session.add(generation)
    session.flush()
    session.add(
        OutputReference(
            generation_id=generation.id,
            position=0,
            image_id=reference,
            sha256="1" * 64,
            similarity=0.5,
            weight=1.0,
            pinned=False,
        )
    )
    session.flush()
    return generation.id


# --- outputs ------------------------------------------------------------------------------------------------------


def test_outputs_are_listed_shown_and_deleted_only_by_their_owner(client: Client, session: Session) -> None:
    mine = [_output(session, reference=uuid4()) for _ in range(3)]
    theirs = _output(session, reference=uuid4(), owner="other")
    session.commit()
    page = client.get(f"{API}/generations?limit=2").json
    rest = client.get(f"{API}/generations", query_string={"cursor": page["next_cursor"]}).json
    assert {item["id"] for item in page["items"] + rest["items"]} == {str(output) for output in mine}
    shown = client.get(f"{API}/generations/{mine[0]}").json
    assert shown["provenance"] == {"prompt": "a red apple"}
    assert client.get(f"{API}/jobs/{shown['job_id']}").json["outputs"] == [shown]
    for route in ("", "/content", "/thumbnail"):
        assert client.get(f"{API}/generations/{theirs}{route}").status_code == 404
    assert client.delete(f"{API}/generations/{theirs}").status_code == 404
    assert client.delete(f"{API}/generations/{mine[0]}").status_code == 204
    assert client.get(f"{API}/generations/{mine[0]}").status_code == 404
    assert client.get(f"{API}/jobs/{shown['job_id']}").json["outputs"] == []


def test_the_file_of_an_output_is_served_as_stored(client: Client, session: Session) -> None:
    from shared.storage import get_blobs

    output = _output(session, reference=uuid4())
    session.commit()
    row = session.get_one(Output, output)
    get_blobs().put(row.blob_key, b"0123456789", media_type="image/png")
    get_blobs().put(row.thumbnail_key, b"small", media_type="image/webp")
    content = client.get(f"{API}/generations/{output}/content")
    assert (content.data, content.content_type, content.headers["ETag"]) == (
        b"0123456789",
        "image/png",
        '"' + "0" * 64 + '"',
    )
    assert client.get(f"{API}/generations/{output}/thumbnail").data == b"small"


def test_the_description_of_a_file_is_merged_with_what_people_changed(client: Client) -> None:
    image = uploaded(client, picture(), caption="a cat", tags=["cat", "old"])
    assert image["file_description"]["tags"] == ["cat", "old"]
    client.patch(image["url"], json={"tags": ["cat", "old", "mine"], "caption": "my cat"})
    said = {"caption": "a black cat", "tags": ["cat", "new"]}
    for _ in range(2):
        changed = client.patch(image["url"], json={"file_description": said}).json
        assert (changed["caption"], changed["tags"]) == ("my cat", ["cat", "mine", "new"])
        assert changed["file_description"]["caption"] == "a black cat"
    both = client.patch(image["url"], json={"file_description": said, "caption": "x"})
    assert both.status_code == 422
