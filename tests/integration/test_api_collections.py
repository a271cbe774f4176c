"""Collections over HTTP: who may do what, their defaults, their deletion, and keys that are limited to some of them."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.collections import CollectionDefaults
from shared.db import collections, images, keys, owners
from shared.db.collections import Principal
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import ApiKey, AuditEvent, Collection, CollectionGrant, Image
from shared.settings import Settings, get_settings
from tests.factories import SHARED_COLLECTION, make_image, make_space
from tests.integration.conftest import API, Client, a_key, picture
from tests.integration.test_api_images import upload
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_export_outputs import make_output
from tests.stack import wait_until
from worker_service.maintenance.housekeeping import ROWS_PER_DELETE, Housekeeping

SCOPES = ("generate", "search", "corpus:write")
SECRET = "a secret caption"


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


@dataclass
class Caller:
    """A client with the key of one owner."""

    client: Client
    key: dict[str, str]
    owner: str

    def call(self, method: str, path: str, **sent: Any) -> Any:
        return self.client.open(API + path, method=method, headers=self.key | sent.pop("headers", {}), **sent)

    def create(self, name: str, **body: Any) -> dict[str, Any]:
        answer = self.call("POST", "/collections", json={"name": name, **body})
        assert answer.status_code == 201, answer.text
        return dict(answer.json)

    def names(self) -> list[str]:
        answer = self.call("GET", "/collections?limit=100")
        assert answer.status_code == 200, answer.text
        return [each["name"] for each in answer.json["items"]]

    def upload(self, data: bytes, **fields: Any) -> Any:
        before = self.client.environ_base.get("HTTP_AUTHORIZATION")
        self.client.environ_base["HTTP_AUTHORIZATION"] = self.key["Authorization"]
        try:
            return upload(self.client, data, **fields)
        finally:
            self.client.environ_base.pop("HTTP_AUTHORIZATION")
            assert before is None


Callers = Callable[..., Caller]


@pytest.fixture
def caller(keyed_client: Client, session: Session) -> Callers:
    """`caller("team-a")`: a client with a new key of that owner; `only`: the collections to which it is limited."""

    def caller(owner: str, *scopes: str, only: list[str] | None = None) -> Caller:
        if only is None:
            return Caller(keyed_client, a_key(session, *(scopes or SCOPES), owner=owner), owner)
        owner_id = owners.ensure(session, owner)
        limited_to = [collections.get_by_name(session, name, principal=Principal(owner_id)).id for name in only]
        _, secret = keys.create(
            session, owner_id, name="limited", scopes=frozenset(scopes or SCOPES), collection_ids=limited_to
        )
        session.commit()
        return Caller(keyed_client, {"Authorization": f"Bearer {secret}"}, owner)

    return caller


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json["code"]


def add_image(session: Session, space: Space, owner: Caller, colour: str, collection: str, **fields: Any) -> UUID:
    """Upload a picture, and store its vector as an embed worker does."""
    answer = owner.upload(picture(colour), collection=collection, **fields)
    assert answer.status_code == 201, answer.text
    image = session.get_one(Image, UUID(answer.json["images"][0]["id"]))
    vector = towards(a0=1) if colour == "red" else towards(a1=1)
    images.store_embeddings(session, space, [ImageClaim.of(image)], vector[None], np.ones(1, np.float32))
    session.commit()
    return image.id


# --- the resource -------------------------------------------------------------------------------------------------


def test_a_collection_is_created_described_renamed_and_deleted(caller: Callers) -> None:
    mine = caller("team-a")
    defaults = {"min_similarity": 0.3, "k": 2, "mode": "hybrid"}
    created = mine.create("products", description="Pictures of products.", defaults=defaults)
    assert (created["name"], created["owner"], created["access"]) == ("products", "team-a", "owner")
    assert (created["description"], created["images"]) == ("Pictures of products.", 0)
    assert created["defaults"] == defaults
    assert mine.client.get(created["url"], headers=mine.key).json == created

    mine.upload(picture("red"), collection="products")
    path = f"/collections/{created['id']}"
    patched = mine.call("PATCH", path, json={"name": "goods", "description": None, "defaults": {"k": 3}}).json
    assert (patched["name"], patched["description"], patched["images"]) == ("goods", None, 1)
    assert patched["defaults"] == {"min_similarity": None, "k": 3, "mode": None}, "`defaults` replaces all of them"
    same = mine.call("PATCH", path, json={}).json
    assert same == patched, "fields that are left out stay"
    assert mine.call("GET", "/images?collection=products").json["errors"][0]["field"] == "query.collection"
    assert len(mine.call("GET", "/images?collection=goods").json["items"]) == 1

    assert mine.call("DELETE", path).status_code == 204
    assert code(mine.call("GET", path)) == (404, "not_found")
    assert code(mine.call("DELETE", path)) == (404, "not_found")
    assert mine.names() == ["shared"]
    again = mine.create("goods")
    assert (again["images"], again["defaults"]["k"]) == (0, None), (
        "the name is free, and nothing of the old one is left"
    )


def test_collections_are_listed_in_pages_newest_first_or_by_name(caller: Callers) -> None:
    mine = caller("team-a")
    for number in range(3):
        mine.create(f"c{number}")
    first = mine.call("GET", "/collections?limit=2").json
    rest = mine.call("GET", f"/collections?limit=2&cursor={first['next_cursor']}").json
    assert [each["name"] for each in first["items"] + rest["items"]] == ["c2", "c1", "c0", "shared"]
    assert rest["next_cursor"] is None
    shared = rest["items"][1]
    assert (shared["owner"], shared["access"]) == (None, "write")
    assert [each["name"] for each in mine.call("GET", "/collections?name=c1").json["items"]] == ["c1"]
    assert mine.call("GET", "/collections?name=unknown").json == {"items": [], "next_cursor": None}
    assert code(mine.call("GET", "/collections?name=A")) == (422, "validation_failed")


def test_an_upload_still_creates_a_collection_of_the_caller(caller: Callers) -> None:
    mine = caller("team-a")
    answer = mine.upload(picture("red"), collection="new")
    assert answer.json["images"][0]["collection"] == "new"
    assert set(mine.names()) == {"new", "shared"}
    own_full_name = mine.upload(picture("blue"), collection="team-a/new")
    assert own_full_name.json["images"][0]["collection"] == "new", "an own collection has one name in answers"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": "team-b/x"}, "body.name"),
        ({"name": "Ä"}, "body.name"),
        ({"name": "a" * 64}, "body.name"),
        ({}, "body.name"),
        ({"name": "x", "description": "x" * 2001}, "body.description"),
        ({"name": "x", "defaults": {"k": 17}}, "body.defaults.k"),
        ({"name": "x", "defaults": {"k": 0}}, "body.defaults.k"),
        ({"name": "x", "defaults": {"min_similarity": 1.5}}, "body.defaults.min_similarity"),
        ({"name": "x", "defaults": {"mode": "telepathy"}}, "body.defaults.mode"),
        ({"name": "x", "shared": True}, "body.shared"),
    ],
)
def test_a_bad_collection_is_refused_with_the_field(caller: Callers, body: dict[str, Any], field: str) -> None:
    answer = caller("team-a").call("POST", "/collections", json=body)
    assert code(answer) == (422, "validation_failed")
    assert [problem["field"] for problem in answer.json["errors"]] == [field]


def test_a_name_belongs_to_one_collection_of_an_owner(caller: Callers) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    first, other = mine.create("products"), mine.create("other")
    assert code(mine.call("POST", "/collections", json={"name": "products"})) == (409, "collection_exists")
    renamed = mine.call("PATCH", f"/collections/{other['id']}", json={"name": "products"})
    assert code(renamed) == (409, "collection_exists")
    same = mine.call("PATCH", f"/collections/{first['id']}", json={"name": "products"})
    assert same.status_code == 200, "its own name is no conflict"
    assert code(mine.call("POST", "/collections", json={"name": "shared"})) == (409, "collection_exists")
    assert theirs.create("products")["id"] != first["id"]


def test_of_creations_of_one_name_at_once_one_succeeds(caller: Callers) -> None:
    mine = caller("team-a")

    def create(_: int) -> int:
        return int(
            mine.client.application.test_client()
            .post(f"{API}/collections", json={"name": "products"}, headers=mine.key)
            .status_code
        )

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(create, range(4))) == [201, 409, 409, 409]


def test_an_owner_has_a_limited_number_of_collections(
    caller: Callers, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    monkeypatch.setenv("AFTERIMAGE_LIMITS__COLLECTIONS", "2")
    get_settings.cache_clear()
    mine = caller("team-a")
    first, _ = mine.create("one"), mine.create("two")
    refused = mine.call("POST", "/collections", json={"name": "three"})
    assert code(refused) == (409, "collection_limit")
    assert refused.json["context"] == {"maximum": 2}
    assert code(mine.upload(picture("red"), collection="three")) == (409, "collection_limit")
    assert mine.upload(picture("red"), collection="two").status_code == 201
    caller("team-b").create("three")
    assert mine.call("DELETE", f"/collections/{first['id']}").status_code == 204
    mine.create("three")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "", {"name": "mine-now"}),
        ("DELETE", "", None),
        ("GET", "/grants", None),
        ("PUT", "/grants/team-b", {"access": "read"}),
        ("DELETE", "/grants/team-b", None),
    ],
)
def test_no_owner_can_change_the_collection_of_all(
    caller: Callers, session: Session, method: str, path: str, body: dict[str, Any] | None
) -> None:
    caller("team-b")
    for owner in ("team-a", "system"):  # its row names an owner, but it belongs to all
        answer = caller(owner).call(method, f"/collections/{SHARED_COLLECTION}{path}", json=body)
        assert code(answer) == (409, "shared_collection")
    session.expire_all()
    row = session.get_one(Collection, SHARED_COLLECTION)
    assert (row.name, row.deleted_at) == ("shared", None)


# --- sharing ------------------------------------------------------------------------------------------------------


@dataclass
class Scene:
    """An own collection with an image, and an output of another owner that it may add to a collection."""

    collection: str
    image: str
    output: str


Call = Callable[[Caller, Scene, str], Any]
"""Sends one request. The last argument is the name of the collection in the caller's requests."""

READ: dict[str, Call] = {
    "get": lambda by, scene, name: by.call("GET", f"/collections/{scene.collection}"),
    "list images": lambda by, scene, name: by.call("GET", f"/images?collection={name}"),
    "get image": lambda by, scene, name: by.call("GET", f"/images/{scene.image}"),
    "content": lambda by, scene, name: by.call("GET", f"/images/{scene.image}/content"),
    "thumbnail": lambda by, scene, name: by.call("GET", f"/images/{scene.image}/thumbnail"),
    "search": lambda by, scene, name: by.call("POST", "/search", json={"query": "red", "filter": {"collection": name}}),
    "search by image": lambda by, scene, name: by.call("POST", "/search", json={"image_id": scene.image}),
    "plan": lambda by, scene, name: by.call("GET", f"/rag/search?prompt=red&collection={name}"),
    "generate": lambda by, scene, name: by.call(
        "POST", "/rag/generate", json={"prompt": "red", "filter": {"collection": name}}
    ),
    "concept": lambda by, scene, name: by.call(
        "POST", "/rag/generate", json={"prompt": "red", "concepts": [{"text": "red", "filter": {"collection": name}}]}
    ),
    "pin": lambda by, scene, name: by.call(
        "POST", "/rag/generate", json={"prompt": "red", "reference_ids": [scene.image]}
    ),
    "bulk": lambda by, scene, name: by.call(
        "POST",
        "/bulks",
        data=json.dumps({"prompt": "red", "reference_ids": [scene.image]}) + "\n",
        content_type="application/jsonl",
    ),
    "bulk with a filter": lambda by, scene, name: by.call(
        "POST",
        "/bulks",
        data=json.dumps({"prompt": "red", "filter": {"collection": name}}) + "\n",
        content_type="application/jsonl",
    ),
}
WRITE: dict[str, Call] = {
    "upload": lambda by, scene, name: by.upload(picture("blue"), collection=name),
    "change image": lambda by, scene, name: by.call("PATCH", f"/images/{scene.image}", json={"tags": ["new"]}),
    "remember": lambda by, scene, name: by.call(
        "POST", f"/generations/{scene.output}/remember", json={"collection": name}
    ),
    "delete image": lambda by, scene, name: by.call("DELETE", f"/images/{scene.image}"),
}
OWN: dict[str, Call] = {
    "grants": lambda by, scene, name: by.call("GET", f"/collections/{scene.collection}/grants"),
    "share": lambda by, scene, name: by.call(
        "PUT", f"/collections/{scene.collection}/grants/team-d", json={"access": "write"}
    ),
    "unshare": lambda by, scene, name: by.call("DELETE", f"/collections/{scene.collection}/grants/team-d"),
    "change": lambda by, scene, name: by.call("PATCH", f"/collections/{scene.collection}", json={"description": "x"}),
    "delete": lambda by, scene, name: by.call("DELETE", f"/collections/{scene.collection}"),
}
ALL = {**READ, **WRITE, **OWN}


@pytest.fixture
def scene(session: Session, space: Space, caller: Callers) -> Scene:
    """The collection `team-a/products` with one image. `team-d` is an owner without any access."""
    mine = caller("team-a")
    caller("team-d")
    collection = mine.create("products", description=SECRET)
    image = add_image(session, space, mine, "red", "products", caption=SECRET)
    output = make_output(session, 7, owner="team-b")
    session.commit()
    return Scene(collection["id"], str(image), str(output.id))


def call_all(
    calls: dict[str, Call], by: Caller, scene: Scene, name: str, space: Space
) -> dict[str, tuple[int, str, str]]:
    """Status, code and text of the answer to each call."""
    answers = {}
    with embed_worker(space):
        for call, send in calls.items():
            answer = send(by, scene, name)
            problem = answer.json["code"] if answer.status_code >= 400 else ""
            answers[call] = (answer.status_code, problem, answer.text if answer.is_json else "")
    return answers


def statuses(answers: dict[str, tuple[int, str, str]]) -> dict[str, tuple[int, str]]:
    return {call: answer[:2] for call, answer in answers.items()}


def allowed(answers: dict[str, tuple[int, str, str]]) -> bool:
    return all(status < 300 for status, _, _ in answers.values())


def test_a_collection_is_hidden_from_other_owners_in_every_operation(
    caller: Callers, scene: Scene, space: Space, session: Session
) -> None:
    theirs = caller("team-b")
    for name in ("products", "team-a/products", "system/products"):
        calls = {call: send for call, send in ALL.items() if name != "products" or call not in ("upload", "remember")}
        answers = call_all(calls, theirs, scene, name, space)
        assert {status for status, _, _ in answers.values()} <= {404, 422}, statuses(answers)
        assert not [call for call, (_, _, text) in answers.items() if SECRET in text]
        unknown = call_all(calls, theirs, Scene(str(uuid4()), str(uuid4()), scene.output), f"{name}x", space)
        assert statuses(answers) == statuses(unknown), "the same answers as for what does not exist"
    assert theirs.names() == ["shared"]
    session.expire_all()
    assert session.get_one(Image, UUID(scene.image)).tags == []
    assert session.get_one(Collection, UUID(scene.collection)).description == SECRET


def test_a_collection_shared_to_read_can_be_used_and_not_changed(
    caller: Callers, scene: Scene, space: Space, session: Session
) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    shared = mine.call("PUT", f"/collections/{scene.collection}/grants/team-b", json={"access": "read"})
    assert (shared.status_code, shared.json["owner"], shared.json["access"]) == (200, "team-b", "read")
    assert set(theirs.names()) == {"shared", "team-a/products"}
    view = theirs.call("GET", f"/collections/{scene.collection}").json
    assert (view["owner"], view["access"], view["images"]) == ("team-a", "read", 1)
    assert theirs.call("GET", f"/images/{scene.image}").json["collection"] == "team-a/products"

    answers = call_all(READ, theirs, scene, "team-a/products", space)
    assert allowed(answers), statuses(answers)
    for call in ("list images", "search", "plan"):
        assert scene.image in answers[call][2], call
    refused = call_all(WRITE | OWN, theirs, scene, "team-a/products", space)
    assert set(statuses(refused).values()) == {(403, "collection_access")}, statuses(refused)
    plain = theirs.call("GET", "/images?collection=products")
    assert plain.status_code == 422, "a plain name is a collection of the caller"

    third = call_all(READ, caller("team-c"), scene, "team-a/products", space)
    assert not any(status < 300 for status, _, _ in third.values())


def test_a_collection_shared_to_write_can_be_filled_and_not_given_away(
    caller: Callers, scene: Scene, space: Space, session: Session
) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    mine.call("PUT", f"/collections/{scene.collection}/grants/team-b", json={"access": "read"})
    mine.call("PUT", f"/collections/{scene.collection}/grants/team-b", json={"access": "write"})
    grants = mine.call("GET", f"/collections/{scene.collection}/grants").json["items"]
    assert [(each["owner"], each["access"]) for each in grants] == [("team-b", "write")], "changed, not added"

    refused = call_all(OWN, theirs, scene, "team-a/products", space)
    assert set(statuses(refused).values()) == {(403, "collection_access")}, statuses(refused)
    answers = call_all(READ | WRITE, theirs, scene, "team-a/products", space)
    assert allowed(answers), statuses(answers)
    assert '"collection":"team-a/products"' in answers["upload"][2]
    session.expire_all()
    there = session.scalars(select(Image.collection_id)).all()
    assert set(there) == {UUID(scene.collection)}, "both new images went into the shared collection"
    assert len(there) == 2
    own = theirs.upload(picture("green"), collection="products")
    assert own.json["images"][0]["collection"] == "products", "a plain name creates a collection of the caller"
    assert code(theirs.upload(picture("green"), collection="team-a/other")) == (422, "validation_failed")


def test_a_grant_that_is_taken_away_ends_at_once(caller: Callers, scene: Scene, space: Space, session: Session) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    grant = f"/collections/{scene.collection}/grants/team-b"
    mine.call("PUT", grant, json={"access": "write"})
    with embed_worker(space):
        cached = READ["search"](theirs, scene, "team-a/products")
        assert scene.image in cached.text
    assert mine.call("DELETE", grant).status_code == 204
    assert code(mine.call("DELETE", grant)) == (404, "not_found")
    answers = call_all(ALL, theirs, scene, "team-a/products", space)
    assert {status for status, _, _ in answers.values()} <= {404, 422}, statuses(answers)
    assert theirs.names() == ["shared"]
    actions = session.scalars(select(AuditEvent.action).where(AuditEvent.subject_id == scene.collection)).all()
    assert sorted(actions) == ["collection.shared", "collection.unshared"]


def test_a_retry_checks_the_access_again(caller: Callers, scene: Scene, space: Space, session: Session) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    grant = f"/collections/{scene.collection}/grants/team-b"
    mine.call("PUT", grant, json={"access": "read"})
    filtered = READ["generate"](theirs, scene, "team-a/products").json["id"]
    pinned = READ["pin"](theirs, scene, "team-a/products").json["id"]
    for job in (filtered, pinned):
        assert theirs.call("POST", f"/jobs/{job}/cancel").status_code == 200
        assert theirs.call("POST", f"/jobs/{job}/retry").status_code == 202
    mine.call("DELETE", grant)
    assert code(theirs.call("POST", f"/jobs/{filtered}/retry")) == (404, "collection_unavailable")
    assert code(theirs.call("POST", f"/jobs/{pinned}/retry")) == (422, "reference_unavailable")


@pytest.mark.parametrize(
    ("owner", "body", "answer"),
    [
        ("unknown", {"access": "read"}, (404, "not_found")),
        ("team-a", {"access": "read"}, (422, "validation_failed")),
        ("team-b", {"access": "owner"}, (422, "validation_failed")),
        ("team-b", {}, (422, "validation_failed")),
        ("Team B", {"access": "read"}, (422, "validation_failed")),
    ],
)
def test_a_bad_grant_is_refused(
    caller: Callers, session: Session, owner: str, body: dict[str, Any], answer: tuple[int, str]
) -> None:
    mine = caller("team-a")
    caller("team-b")
    collection = mine.create("products")
    assert code(mine.call("PUT", f"/collections/{collection['id']}/grants/{owner}", json=body)) == answer
    assert session.scalar(select(func.count()).select_from(CollectionGrant)) == 0


def test_grants_are_listed_in_pages(caller: Callers) -> None:
    mine = caller("team-a")
    collection = f"/collections/{mine.create('products')['id']}/grants"
    for number in range(3):
        caller(f"other-{number}")
        mine.call("PUT", f"{collection}/other-{number}", json={"access": "read"})
    first = mine.call("GET", f"{collection}?limit=2").json
    rest = mine.call("GET", f"{collection}?limit=2&cursor={first['next_cursor']}").json
    assert [each["owner"] for each in first["items"] + rest["items"]] == ["other-2", "other-1", "other-0"]
    assert rest["next_cursor"] is None


def test_two_owners_collections_of_one_name_are_never_mixed_up(caller: Callers, session: Session, space: Space) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    first = mine.create("products")
    mine.call("PUT", f"/collections/{first['id']}/grants/team-b", json={"access": "write"})
    theirs.create("products")
    in_mine = add_image(session, space, mine, "red", "products")
    in_theirs = add_image(session, space, theirs, "red", "products")
    for name, image in {"products": in_theirs, "team-b/products": in_theirs, "team-a/products": in_mine}.items():
        with embed_worker(space):
            found = READ["search"](theirs, Scene("", "", ""), name).json["results"]
        assert [each["image_id"] for each in found] == [str(image)], name


# --- defaults -----------------------------------------------------------------------------------------------------


def test_changed_defaults_are_stored_without_those_that_are_not_set(caller: Callers, session: Session) -> None:
    mine = caller("team-a")
    mine.create("products", defaults={"min_similarity": 0.4})
    row = collections.get_by_name(session, "products", principal=Principal(owners.ensure(session, "team-a")))
    assert row.defaults == {"min_similarity": 0.4}
    assert collections.defaults_of(row) == CollectionDefaults(min_similarity=0.4)
    version = row.version
    mine.call("PATCH", f"/collections/{row.id}", json={"defaults": {"mode": "text"}})
    session.expire_all()
    assert row.defaults == {"mode": "text"}
    assert row.version == version + 1, "cached searches are not used any more"


def test_defaults_hold_where_the_request_sets_nothing(caller: Callers, session: Session, space: Space) -> None:
    mine = caller("team-a")
    mine.create("products", defaults={"min_similarity": 0.3, "k": 2, "mode": "text"})
    mine.create("plain")
    image = add_image(session, space, mine, "red", "products", caption="a scarlet thing")

    def resolved(**body: Any) -> tuple[Any, ...]:
        sent = {"prompt": "red", "dry_run": True, "filter": {"collection": "products"}, **body}
        parameters = mine.call("POST", "/rag/generate", json=sent).json["parameters"]
        return parameters["min_similarity"], parameters["k"], parameters.get("search_mode")

    assert resolved() == (0.3, 2, "text")
    assert resolved(min_similarity=0.9, similar_examples_count=1) == (0.9, 1, "text")
    assert resolved(filter={"collection": "plain"})[0] != 0.3
    with embed_worker(space):
        planned = mine.call("GET", "/rag/search?prompt=red&collection=products").json
        assert planned["min_similarity"] == 0.3
        assert mine.call("GET", "/rag/search?prompt=red&collection=products&min_similarity=0.7").json[
            "min_similarity"
        ] == pytest.approx(0.7)
        by_text = {"query": "red", "filter": {"collection": "products"}}
        assert mine.call("POST", "/search", json=by_text).json["results"] == [], "its caption has other words"
        by_vector = mine.call("POST", "/search", json={**by_text, "mode": "vector"}).json["results"]
        assert [each["image_id"] for each in by_vector] == [str(image)]


# --- limited keys -------------------------------------------------------------------------------------------------


def test_a_limited_key_uses_its_collections_only(caller: Callers, scene: Scene, space: Space, session: Session) -> None:
    mine = caller("team-a")
    mine.create("public")
    add_image(session, space, mine, "red", "public")
    make_image(session, vector=towards(a0=1), caption="in the collection of all")
    session.commit()
    limited = caller("team-a", only=["public"])
    assert limited.names() == ["public"]
    view = limited.call("GET", "/collections?name=public").json["items"][0]
    assert (view["access"], view["images"]) == ("write", 1), "it never acts as the owner of a collection"

    calls = {call: send for call, send in ALL.items() if call != "remember"}
    for name in ("products", "team-a/products"):
        answers = call_all(calls, limited, scene, name, space)
        assert {status for status, _, _ in answers.values()} <= {404, 422}, statuses(answers)
        assert not [call for call, (_, _, text) in answers.items() if SECRET in text]
    assert code(limited.call("GET", f"/collections/{SHARED_COLLECTION}")) == (404, "not_found")
    assert code(limited.call("POST", "/search", json={"query": "red"})) == (422, "validation_failed")
    assert code(limited.upload(picture("blue"))) == (422, "validation_failed"), "the default is `shared`"
    assert code(limited.upload(picture("blue"), collection="new")) == (422, "validation_failed")
    assert code(limited.call("POST", "/collections", json={"name": "new"})) == (403, "forbidden")

    public = Scene(view["id"], limited.call("GET", "/images?collection=public").json["items"][0]["id"], "")
    # These two leave the filter of the request at `shared`.
    reads = {call: send for call, send in READ.items() if call not in ("search by image", "concept")}
    answers = call_all(reads, limited, public, "public", space)
    assert allowed(answers), statuses(answers)
    in_public = {"filter": {"collection": "public"}}
    assert limited.call("POST", "/search", json={"image_id": public.image, **in_public}).status_code == 200
    concepts = [{"text": "red", **in_public}]
    planned = limited.call("POST", "/rag/generate", json={"prompt": "red", "concepts": concepts, **in_public})
    assert planned.status_code == 202, planned.text
    hidden = [{"text": "red", "filter": {"collection": "products"}}]
    refused_concept = limited.call("POST", "/rag/generate", json={"prompt": "red", "concepts": hidden, **in_public})
    assert refused_concept.json["errors"][0]["field"] == "body.concepts.0.filter.collection"
    assert limited.upload(picture("blue"), collection="public").status_code == 201
    refused = call_all(OWN, limited, public, "public", space)
    assert set(statuses(refused).values()) == {(403, "collection_access")}, statuses(refused)
    assert mine.call("GET", f"/images/{scene.image}").status_code == 200, "another key of the owner has no limit"


def test_a_limited_key_does_not_retry_a_job_about_other_collections(
    caller: Callers, scene: Scene, space: Space
) -> None:
    mine = caller("team-a")
    mine.create("public")
    limited = caller("team-a", only=["public"])
    jobs = [READ[call](mine, scene, "products").json["id"] for call in ("generate", "pin", "concept")]
    for job, problem in zip(
        jobs, ["collection_unavailable", "reference_unavailable", "collection_unavailable"], strict=True
    ):
        assert mine.call("POST", f"/jobs/{job}/cancel").status_code == 200
        assert limited.call("POST", f"/jobs/{job}/retry").json["code"] == problem
        assert mine.call("POST", f"/jobs/{job}/retry").status_code == 202


def test_the_limit_of_a_key_survives_rotation_and_a_rename_but_not_the_collection(
    caller: Callers, session: Session
) -> None:
    mine = caller("team-a")
    collection = mine.create("public")
    limited = caller("team-a", only=["public"])
    mine.call("PATCH", f"/collections/{collection['id']}", json={"name": "renamed"})
    assert limited.names() == ["renamed"]
    key = session.scalars(select(ApiKey).where(ApiKey.name == "limited")).one()
    _, secret = keys.rotate(session, key.id, overlap_s=100)
    session.commit()
    rotated = Caller(mine.client, {"Authorization": f"Bearer {secret}"}, "team-a")
    assert rotated.names() == ["renamed"]
    mine.call("DELETE", f"/collections/{collection['id']}")
    mine.create("renamed")
    for by in (limited, rotated):
        assert by.names() == [], "a new collection of the same name is another collection"


def test_an_operator_limits_a_key_over_http(caller: Callers, session: Session) -> None:
    operator, mine, theirs = caller("ops", "admin"), caller("team-a"), caller("team-b")
    mine.create("public")
    other = theirs.create("logos")
    owner_id = owners.ensure(session, "team-a")
    body: dict[str, Any] = {"name": "shop", "scopes": ["search"], "collections": ["public", "shared", "team-b/logos"]}
    path = f"/admin/owners/{owner_id}/keys"
    unknown = operator.call("POST", path, json=body)
    assert code(unknown) == (422, "validation_failed")
    assert unknown.json["errors"][0]["field"] == "body.collections"
    theirs.call("PUT", f"/collections/{other['id']}/grants/team-a", json={"access": "read"})
    made = operator.call("POST", path, json=body)
    assert made.status_code == 201, made.text
    assert made.json["key"]["collections"] == ["public", "shared", "team-b/logos"]
    shop = Caller(mine.client, {"Authorization": f"Bearer {made.json['secret']}"}, "team-a")
    assert set(shop.names()) == {"public", "shared", "team-b/logos"}
    theirs.call("DELETE", f"/collections/{other['id']}/grants/team-a")
    assert set(shop.names()) == {"public", "shared"}, "a limit gives no access"
    exclusive = operator.call("POST", path, json={**body, "scopes": ["admin"], "collections": ["public"]})
    assert exclusive.json["errors"][0] | {"message": ""} == {
        "field": "body.collections",
        "code": "exclusive",
        "message": "",
    }
    assert code(operator.call("POST", path, json={**body, "collections": []})) == (422, "validation_failed")
    listed = operator.call("GET", f"/admin/keys?owner_id={owner_id}").json["items"]
    assert {each["name"]: each["collections"] for each in listed}["test"] is None


# --- deletion -----------------------------------------------------------------------------------------------------


def test_a_deleted_collection_is_hidden_at_once_and_pinned_images_count_as_deleted(
    caller: Callers, scene: Scene, space: Space, session: Session
) -> None:
    mine, theirs = caller("team-a"), caller("team-b")
    mine.call("PUT", f"/collections/{scene.collection}/grants/team-b", json={"access": "write"})
    with embed_worker(space):
        assert scene.image in READ["search"](mine, scene, "products").text, "the answer is in the cache now"
    assert mine.call("DELETE", f"/collections/{scene.collection}").status_code == 204
    for by, name in ((mine, "products"), (theirs, "team-a/products")):
        calls = {call: send for call, send in ALL.items() if call not in ("upload", "remember") or "/" in name}
        answers = call_all(calls, by, scene, name, space)
        assert {status for status, _, _ in answers.values()} <= {404, 422}, statuses(answers)
        assert by.names() == ["shared"]
    session.expire_all()
    assert session.get(Image, UUID(scene.image)) is not None, "its images are deleted later"
    again = mine.create("products")
    assert (again["images"], again["id"] != scene.collection) == (0, True)
    with embed_worker(space):
        assert READ["search"](mine, scene, "products").json["results"] == []


def test_the_images_of_a_deleted_collection_go_in_steps_that_survive_a_kill(
    caller: Callers, scene: Scene, session: Session, space: Space, settings: Settings
) -> None:
    mine = caller("team-a")
    collection_id, kept = UUID(scene.collection), make_image(session, caption="of another collection")
    row = session.get_one(Image, UUID(scene.image))
    columns = ("blob_key", "thumbnail_key", "format", "width", "height", "size_bytes", "perceptual_hash")
    copied = {name: getattr(row, name) for name in columns}
    many = ROWS_PER_DELETE + 100
    for number in range(many):
        session.add(Image(id=uuid4(), collection_id=collection_id, sha256=f"{number:064d}", **copied))
    last = make_image(session, vector=towards(a0=1), collection_id=collection_id)
    session.commit()
    assert mine.call("GET", f"/collections/{collection_id}").json["images"] == many + 2
    assert mine.call("DELETE", f"/collections/{collection_id}").status_code == 204

    # A lock on the vector of the last image stops the second step in the middle of its transaction.
    vectors = space.table
    session.execute(select(vectors.c.image_id).where(vectors.c.image_id == last.id).with_for_update())
    with reconciler() as first:
        # The statement keeps the transaction: the server ends one that is idle for some seconds.
        wait_until(
            lambda: session.scalar(select(1)) == 1 and count_images(collection_id) < many,
            timeout_s=60,
            what="the first step",
        )
        first.kill()
        first.wait()
    assert count_images(collection_id) == many + 2 - ROWS_PER_DELETE
    session.rollback()
    with reconciler():
        wait_until(lambda: not collection_exists(collection_id), timeout_s=60, what="the end of the deletion")
    assert count_images(collection_id) == 0
    session.expire_all()
    assert session.scalar(select(func.count()).select_from(vectors)) == 0
    assert session.get(Image, kept.id) is not None


def test_a_deleted_collection_stays_while_one_of_its_images_is_in_use(
    caller: Callers, scene: Scene, session: Session, settings: Settings
) -> None:
    other = make_image(session, collection_id=UUID(scene.collection))
    session.commit()
    caller("team-a").call("DELETE", f"/collections/{scene.collection}")
    housekeeping = Housekeeping(settings, threading.Event())
    session.execute(select(Image.id).where(Image.id == other.id).with_for_update())
    housekeeping.delete_collections()
    assert count_images(UUID(scene.collection)) == 1
    assert collection_exists(UUID(scene.collection))
    session.rollback()
    housekeeping.delete_collections()
    assert not collection_exists(UUID(scene.collection))


@contextmanager
def reconciler() -> Iterator["subprocess.Popen[bytes]"]:
    """`python -m worker_service reconciler`, with the settings of this test."""
    process = subprocess.Popen([sys.executable, "-m", "worker_service", "reconciler"], cwd=REPOSITORY)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def count_images(collection_id: UUID) -> int:
    with session_scope() as session:
        statement = select(func.count()).select_from(Image).where(Image.collection_id == collection_id)
        return session.scalar(statement) or 0


def collection_exists(collection_id: UUID) -> bool:
    with session_scope() as session:
        return session.get(Collection, collection_id) is not None
