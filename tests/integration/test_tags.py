"""Tags and other texts that filters compare: commas in them, and the two ways in which Unicode writes `é`."""

import json
import unicodedata
from typing import Any
from uuid import UUID

import httpx
import pytest
from flask import Flask
from sqlalchemy import text
from sqlalchemy.orm import Session

from afterimage_client import Afterimage, ImageFile, RagSearchQuery, UploadFields
from shared.db.spaces import Space
from shared.settings import Settings
from tests.factories import make_image, make_space
from tests.integration.conftest import API, AppFactory, Client, picture
from tests.integration.test_api_images import uploaded
from tests.integration.test_api_search import embed_worker, found, search, towards

ONE, TWO = (unicodedata.normalize(form, "Café") for form in ("NFC", "NFD"))


@pytest.fixture
def app(settings: Settings, new_app: AppFactory) -> Flask:
    return new_app(settings)


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


@pytest.mark.parametrize(("stored", "asked"), [(ONE, TWO), (TWO, ONE)])
def test_both_forms_of_a_letter_are_the_same_tag(client: Client, stored: str, asked: str) -> None:
    described: dict[str, Any] = {"licence": stored, "source": stored}
    image = uploaded(client, picture(), tags=stored, attributes=json.dumps({stored: stored}), **described)
    assert (image["tags"], image["attributes"], image["source"]) == ([ONE], {ONE: ONE}, ONE)
    for query in ({"tag": asked}, {"licence": asked}, {"source": asked}):
        assert [each["id"] for each in client.get(f"{API}/images", query_string=query).json["items"]] == [image["id"]]
    changed = client.patch(image["url"], json={"tags": [stored, "b"], "attributes": {"a": stored}}).json
    assert (changed["tags"], changed["attributes"]) == ([ONE, "b"], {"a": ONE})


def test_a_filter_finds_both_forms_of_a_letter(client: Client, session: Session, space: Space) -> None:
    image = make_image(session, vector=towards(a0=1), tags=[ONE], source=ONE, attributes={ONE: ONE})
    session.commit()
    with embed_worker(space):
        for where in ({"tags": [TWO]}, {"source": TWO}, {"attributes": {TWO: TWO}}):
            assert found(search(client, query="red", filter=where)) == [image.id]
        answer = client.get(f"{API}/rag/search", query_string={"prompt": "red", "tags": TWO}).json
    assert [each["image_id"] for each in answer["references"]] == [str(image.id)]


def test_a_comma_in_the_tags_of_a_query_separates_them_as_in_an_upload(
    client: Client, session: Session, space: Space
) -> None:
    both = make_image(session, vector=towards(a0=1), tags=["a", "b", "c, d"])
    make_image(session, vector=towards(a0=1, a1=0.5), tags=["a"])
    session.commit()
    with embed_worker(space):
        for tags in ("a, b", ["a", "b"], "a,b,", json.dumps(["c, d"]), ["a", json.dumps(["c, d"])]):
            answer = client.get(f"{API}/rag/search", query_string={"prompt": "red", "tags": tags}).json
            assert [each["image_id"] for each in answer["references"]] == [str(both.id)], tags


def test_an_upload_may_send_tags_with_commas_as_json(client: Client) -> None:
    sent = ['["Paris, France", "a"]', "b, c", "[draft]", "[1]"]
    assert uploaded(client, picture(), tags=sent)["tags"] == ["Paris, France", "a", "b", "c", "[draft]", "[1]"]


def test_the_client_keeps_commas_in_tags(app: Flask, session: Session, space: Space) -> None:
    tags = ["Paris, France", "[draft]", '["x"]', "plain"]
    with Afterimage("http://localhost", transport=httpx.WSGITransport(app)) as service, embed_worker(space):
        (image,) = service.images.upload([ImageFile("a.png", picture())], UploadFields(tags=tags)).images
        assert image.tags == tags
        assert [each.id for each in service.images.list(tag=tags[0])] == [image.id]
        session.execute(text("update images set state = 'ready'"))
        vector = str(towards(a0=1).tolist())
        session.execute(
            text(f"insert into vectors_{space.id} (image_id, embedding, norm) values (:id, :vector, 1)"),
            {"id": image.id, "vector": vector},
        )
        session.commit()
        planned = service.references(RagSearchQuery(prompt="red", tags=tags)).references
        assert [each.image_id for each in planned] == [UUID(str(image.id))]


def test_a_repeated_tag_is_kept_once_and_counts_for_the_limit(client: Client) -> None:
    image = uploaded(client, picture(), tags="a,b,a")
    assert image["tags"] == ["a", "b"]
    changed = client.patch(f"{API}/images/{image['id']}", json={"tags": ["b", "c", "b"]})
    assert changed.json["tags"] == ["b", "c"]
    refused = client.get(f"{API}/rag/search", query_string={"prompt": "a cat", "tags": ["b"] * 17})
    assert (refused.status_code, refused.json["code"]) == (422, "validation_failed")
