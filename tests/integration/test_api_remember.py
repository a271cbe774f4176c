"""Outputs that become images of the corpus: `POST /generations/{id}/remember`."""

import io
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image as Picture
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.contracts.collections import GrantedAccess
from shared.db import collections, images, owners
from shared.db.tables import BlobClaim, Collection, DerivedImage, Image, Output
from shared.messaging import queue
from shared.settings import Settings
from shared.storage import get_blobs
from tests.factories import make_image
from tests.integration.conftest import API, Client, a_key, messages, waiting
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


# --- deletes at the same time -------------------------------------------------------------------------------------


def test_an_output_that_is_being_deleted_cannot_be_remembered(client: Client, session: Session, output: Output) -> None:
    output_id = output.id
    session.delete(output)
    session.flush()
    with waiting(lambda: remember(client, output_id)) as answer:
        session.commit()
        assert code(answer.result(10)) == (404, "not_found")
    assert count(session, Image) == 0


def test_an_output_is_not_deleted_before_the_image_made_of_it_names_its_sources(
    client: Client, session: Session, output: Output
) -> None:
    url = f"{API}/generations/{output.id}"
    session.scalars(select(Collection).with_for_update()).one()
    with (
        waiting(lambda: remember(client, output.id)) as remembered,
        waiting(lambda: client.application.test_client().delete(url), count=2) as deleted,
    ):
        session.commit()
        assert (remembered.result(10).status_code, deleted.result(10).status_code) == (201, 204)
    assert [count(session, table) for table in (Image, DerivedImage, Output)] == [1, 1, 0]


def test_an_output_whose_image_is_being_deleted_becomes_a_new_image(
    client: Client, session: Session, output: Output
) -> None:
    first = remember(client, output.id).json["id"]
    images.remove(session, session.get_one(Image, UUID(first)))
    with waiting(lambda: remember(client, output.id)) as answer:
        session.commit()
        again = answer.result(10)
    assert again.status_code == 201
    assert client.get(again.json["url"]).json["id"] != first


def test_an_output_is_not_added_to_a_collection_that_is_being_deleted(keyed_client: Client, session: Session) -> None:
    output = make_output(session, 5, owner="team")
    own = collections.ensure(session, "own", owner_id=output.owner_id)
    foreign = collections.ensure(session, "pictures", owner_id=owners.ensure(session, "others"))
    collections.share(session, foreign, owner_id=output.owner_id, access=GrantedAccess.WRITE)
    key = a_key(session, "generate", "corpus:write", "search")
    for row, name, expected in ((own, "own", 201), (foreign, "others/pictures", 422)):
        collections.mark_deleted(session, row)
        session.flush()
        with waiting(partial(remember, keyed_client, output.id, key, collection=name)) as answer:
            session.commit()
            again = answer.result(10)
        assert again.status_code == expected, again.text
        if expected == 201:
            assert keyed_client.get(again.json["url"], headers=key).json["collection"] == "own", "a new one"
    assert count(session, Image) == 1
