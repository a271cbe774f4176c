"""The bytes of a stored image never change, also when another release encodes the same upload to other bytes."""

import io
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from shared import blob_sweeper
from shared.db.tables import Image
from shared.settings import Settings
from shared.storage import get_blobs
from tests.integration.conftest import AppFactory, Client, picture
from tests.integration.test_api_images import upload, uploaded
from tests.other_encoder import OtherEncoder


@pytest.fixture
def other_release(settings: Settings, new_app: AppFactory) -> Any:
    app = new_app(settings)
    decoder = app.extensions["decoder"] = OtherEncoder(settings.api)
    yield app.test_client()
    decoder.close()


def test_the_same_upload_through_another_release_changes_no_stored_image(client: Client, other_release: Client) -> None:
    first = uploaded(client, picture())
    urls = first["content_url"], first["thumbnail_url"]
    before = [client.get(url) for url in urls]

    again = upload(other_release, picture())
    assert again.json["images"] == [first]
    copy = uploaded(other_release, picture(), collection="copies")
    assert upload(client, picture(), collection="copies").json["images"] == [copy]

    for url, old in zip(urls, before, strict=True):
        new = client.get(url)
        assert (new.data, new.headers["ETag"]) == (old.data, old.headers["ETag"])
        assert new.content_length == len(new.data)
    content = client.get(copy["content_url"])
    assert content.data != before[0].data
    assert content.content_length == copy["size_bytes"] == len(content.data)
    assert content.headers["ETag"] != before[0].headers["ETag"]


def test_the_sweeper_keeps_the_blobs_of_both_releases_and_deletes_the_unused(
    client: Client, other_release: Client, session: Session
) -> None:
    uploaded(client, picture())
    upload(other_release, picture())  # an existing image: these bytes have no row
    uploaded(other_release, picture(), collection="copies")
    upload(other_release, picture("blue"))
    upload(client, picture("blue"))
    blob_sweeper.sweep(get_blobs(), older_than_s=0)
    session.rollback()
    named = {key for row in session.execute(select(Image.blob_key, Image.thumbnail_key)) for key in row}
    assert {info.key for info in get_blobs().list("") if info.key != blob_sweeper.OWNER_KEY} == named
    assert len(named) == 6


def test_a_failed_image_that_is_uploaded_again_names_the_new_bytes(
    client: Client, other_release: Client, session: Session
) -> None:
    first = uploaded(client, picture())
    session.execute(update(Image).values(state="failed", error_code="embedding_failed"))
    session.commit()
    again = upload(other_release, picture()).json["images"][0]
    assert (again["id"], again["state"]) == (first["id"], "pending")
    content = client.get(again["content_url"])
    assert content.content_length == again["size_bytes"] == len(content.data)
    assert again["size_bytes"] != first["size_bytes"]


def test_an_invalid_file_among_many_is_named(client: Client) -> None:
    form = {"file": [(io.BytesIO(picture()), "good.png"), (io.BytesIO(picture()[:60]), "bad.png")]}
    answer = client.post("/api/v1/upload", data=form, content_type="multipart/form-data")
    assert (answer.status_code, answer.json["code"]) == (422, "invalid_image")
    assert answer.json["detail"].startswith("File 2 (bad.png): ")
    assert answer.json["context"] == {"file": "bad.png", "index": 1}
