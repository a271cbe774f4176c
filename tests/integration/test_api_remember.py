"""Outputs that become images of the corpus: `POST /generations/{id}/remember`."""

import io
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image as Picture
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.tables import BlobClaim, Image, Output
from shared.messaging import queue
from shared.settings import Settings
from shared.storage import get_blobs
from tests.factories import make_image
from tests.integration.conftest import API, Client, a_key, messages
from tests.integration.test_api_jobs import code
from tests.integration.test_export_outputs import make_output
from tests.stack import wait_until


@pytest.fixture
def output(session: Session) -> Output:
    return make_output(session, 7)


def remember(client: Client, output_id: object, headers: dict[str, str] | None = None, **body: Any) -> Any:
    return client.post(f"{API}/generations/{output_id}/remember", json=body, headers=headers)


def count(session: Session, table: Any) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(table)) or 0


def test_an_output_becomes_an_image_of_the_corpus_as_an_upload_does(
    client: Client, session: Session, output: Output, settings: Settings
) -> None:
    answer = remember(client, output.id, caption="an apple", tags=["fruit", "red"], collection="own")
    assert answer.status_code == 201, answer.text
    image = answer.json
    assert client.get(image["url"]).json == image
    assert (image["caption"], image["tags"], image["collection"]) == ("an apple", ["fruit", "red"], "own")
    assert (image["sha256"], image["state"], image["format"]) == (output.sha256, "pending", "png")
    assert image["attributes"] == {"generation_id": str(output.id)}
    wait_until(lambda: len(messages(queue.EMBED_IMAGES_QUEUE)) == 1, timeout_s=10, what="the notification")

    drawn = np.asarray(Picture.open(io.BytesIO(get_blobs().get(output.blob_key))))
    content = client.get(image["content_url"]).data
    assert np.array_equal(np.asarray(Picture.open(io.BytesIO(content))), drawn)
    assert b"apfel" not in content, "the record with the prompt stays private"
    assert count(session, BlobClaim) == 0


def test_an_output_is_remembered_without_a_body(client: Client, output: Output) -> None:
    answer = client.post(f"{API}/generations/{output.id}/remember")
    assert answer.status_code == 201, answer.text
    assert (answer.json["collection"], answer.json["caption"], answer.json["tags"]) == ("shared", None, [])
    # A body is still read strictly, also one without a Content-Type.
    assert client.post(f"{API}/generations/{output.id}/remember", data=b'{"caption": "x"}').status_code == 415
    assert remember(client, output.id, colour="red").status_code == 422


def test_an_output_is_remembered_once_in_each_collection(client: Client, session: Session, output: Output) -> None:
    first = remember(client, output.id, caption="one")
    again = remember(client, output.id, caption="two")
    assert (first.status_code, again.status_code) == (201, 200)
    assert (again.json["id"], again.json["caption"], again.json["collection"]) == (first.json["id"], "one", "shared")
    assert remember(client, output.id, collection="own").status_code == 201
    assert count(session, Image) == 2


def test_a_repeated_request_gets_the_first_answer(client: Client, session: Session, output: Output) -> None:
    key = {"Idempotency-Key": "k"}
    first = remember(client, output.id, key, caption="an apple")
    client.delete(first.json["url"])
    client.delete(f"{API}/generations/{output.id}")
    client.application.extensions["decoder"] = None  # a repeated request is not decoded
    again = remember(client, output.id, key, caption="an apple")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json == first.json
    assert ("Idempotent-Replayed" in first.headers, again.headers["Idempotent-Replayed"]) == (False, "true")
    assert count(session, Image) == 0, "nothing is stored again"
    assert code(remember(client, output.id, key, caption="a pear")) == (422, "idempotency_key_reused")


def test_only_an_output_of_the_caller_can_be_remembered(client: Client, session: Session) -> None:
    deleted = make_output(session, 3)
    assert client.delete(f"{API}/generations/{deleted.id}").status_code == 204
    for output_id in (uuid4(), deleted.id, make_output(session, 9, owner="somebody").id, make_image(session).id):
        assert code(remember(client, output_id)) == (404, "not_found")
    assert count(session, Image) == 0


def test_an_output_whose_file_is_gone_is_not_found(client: Client, session: Session, output: Output) -> None:
    get_blobs().delete(output.blob_key)
    assert code(remember(client, output.id)) == (404, "not_found")
    assert count(session, Image) == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"collection": "Not A Name"}, "body.collection"),
        ({"tags": [""]}, "body.tags.0"),
        ({"caption": "a" * 2001}, "body.caption"),
        ({"attributes": {}}, "body.attributes"),
    ],
)
def test_a_wrong_description_is_refused_by_its_field(
    client: Client, output: Output, body: dict[str, Any], field: str
) -> None:
    answer = remember(client, output.id, **body)
    assert code(answer) == (422, "validation_failed")
    assert [error["field"] for error in answer.json["errors"]] == [field]


def test_a_key_needs_the_scopes_of_the_output_and_of_an_upload(keyed_client: Client, session: Session) -> None:
    output = make_output(session, 5, owner="team")
    for scopes in (("generate",), ("corpus:write",), ("generate", "search")):
        assert code(remember(keyed_client, output.id, a_key(session, *scopes))) == (403, "forbidden")
    assert remember(keyed_client, output.id, a_key(session, "generate", "corpus:write")).status_code == 201
    other = a_key(session, "generate", "corpus:write", owner="others")
    assert code(remember(keyed_client, output.id, other)) == (404, "not_found")
