"""Two owners: a request for an object of another owner gets the same answer as one for an unknown id."""

import re
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from shared.contracts.collections import GrantedAccess
from shared.contracts.generation import Webhook
from shared.db import collections, jobs, keys, owners
from shared.db.tables import ReferenceImage, WebhookDelivery
from tests.factories import make_image, make_job, make_output_row
from tests.integration.conftest import API, Client, a_key

OTHER = "an-owner-with-a-grant"
ALL_BUT_ADMIN = [scope for scope in keys.SCOPES if scope != "admin"]
SENT: dict[str, dict[str, Any]] = {
    "changeImage": {"json": {"caption": "theirs now"}},
    "changeGeneration": {"json": {"favourite": True}},
    "changeCollection": {"json": {"name": "theirs-now"}},
    "shareCollection": {"json": {"access": "write"}},
    "completeBulk": {"json": {"lines": 1}},
    "appendBulkLines": {
        "data": b'{"prompt": "one more"}\n',
        "content_type": "application/jsonl",
        "query_string": {"from_line": 1},
    },
}
"""Data to send to operations that need more than the id in their path."""


@pytest.fixture
def mine(keyed_client: Client, session: Session) -> dict[str, str]:
    """The id of one object of each kind that an owner can have, by the name of its path parameter."""
    key = a_key(session, *ALL_BUT_ADMIN, owner="mine")
    job = make_job(session, owner="mine", webhook=Webhook(url="https://receiver.example/hook"))
    ended = make_job(session, owner="mine", webhook=Webhook(url="https://receiver.example/hook"))
    jobs.cancel(session, ended.id, owner_id=ended.owner_id)
    collection = collections.ensure(session, "private", owner_id=job.owner_id)
    collections.share(session, collection, owner_id=owners.ensure(session, OTHER), access=GrantedAccess.READ)
    image = make_image(session, vector=[1.0] + [0.0] * 15, collection_id=collection.id, caption="a secret")
    output = make_output_row(ended.id, ended.owner_id, provenance={"prompt": "a secret"})
    picture = _picture(ended.id)
    session.add_all([output, picture])
    session.flush()
    delivery = session.scalars(select(WebhookDelivery.id).where(WebhookDelivery.job_id == ended.id)).one()
    session.commit()
    bulk = keyed_client.post(
        f"{API}/bulks?complete=false",
        data=b'{"prompt": "a secret"}\n',
        content_type="application/jsonl",
        headers=key,
    )
    assert bulk.status_code == 202, bulk.text
    return {
        "job_id": str(job.id),
        "image_id": str(image.id),
        "collection_id": str(collection.id),
        "owner": OTHER,
        "generation_id": str(output.id),
        "reference_id": str(picture.id),
        "delivery_id": str(delivery),
        "bulk_id": bulk.json["id"],
        "owner_id": str(job.owner_id),
        "key_id": str(uuid4()),
    }


def test_no_operation_shows_or_changes_objects_of_another_owner(
    keyed_client: Client, session: Session, mine: dict[str, str]
) -> None:
    theirs = a_key(session, *ALL_BUT_ADMIN, owner="theirs")
    before = _owned_rows(session)
    paths = keyed_client.get(f"{API}/openapi.json").json["paths"]
    called = 0
    for path, methods in paths.items():
        for method, operation in methods.items():
            name = operation["operationId"]
            named = re.findall(r"\{(\w+)\}", path)
            if not named and method != "get":
                continue  # it creates something; another test covers its references
            filled = re.sub(r"\{(\w+)\}", lambda match: mine[match[1]], path)
            with keyed_client.open(filled, method=method.upper(), headers=theirs, **SENT.get(name, {})) as answer:
                if path.startswith(f"{API}/admin"):
                    assert answer.status_code == 403, name
                elif name == "listGenerationsOfImage":  # it does not check that the image exists
                    assert answer.json["items"] == []
                elif named:
                    assert (answer.status_code, answer.json["code"]) == (404, "not_found"), name
                else:
                    found = [key for key, value in mine.items() if value in answer.text]
                    assert found == [], name
                    assert "secret" not in answer.text, name
            called += 1
    assert called >= 40
    assert _owned_rows(session) == before


def test_a_request_cannot_refer_to_objects_of_another_owner(
    keyed_client: Client, session: Session, mine: dict[str, str]
) -> None:
    theirs = a_key(session, *ALL_BUT_ADMIN, owner="theirs")

    def refused(method: str, path: str, **sent: Any) -> None:
        answer = keyed_client.open(API + path, method=method, headers=theirs, **sent)
        assert answer.status_code in (404, 422), answer.text
        assert "secret" not in answer.text

    refused("POST", "/rag/generate", json={"prompt": "x", "reference_ids": [mine["image_id"]]})
    refused("POST", "/rag/generate", json={"prompt": "x", "filter": {"collection": "private"}})
    refused("POST", "/search", json={"image_id": mine["image_id"]})
    refused("POST", "/search", json={"query": "x", "filter": {"collection": "private"}})
    for name in ("private", "mine/private"):
        refused("GET", "/images", query_string={"collection": name})
    refused("POST", "/search", json={"query": "x", "filter": {"collection": "mine/private"}})
    listed = keyed_client.get(f"{API}/webhooks/deliveries", query_string={"job_id": mine["job_id"]}, headers=theirs)
    assert listed.json["items"] == []


def test_each_of_two_owners_may_use_the_same_names_and_keys(keyed_client: Client, session: Session) -> None:
    answers = []
    for owner in ("one", "other"):
        key = a_key(session, "generate", owner=owner) | {"Idempotency-Key": "order-1"}
        answers.append(keyed_client.post(f"{API}/generate", json={"prompt": owner}, headers=key))
    assert [answer.status_code for answer in answers] == [202, 202]
    assert answers[0].json["id"] != answers[1].json["id"]


def _picture(job_id: UUID) -> ReferenceImage:
    return ReferenceImage(
        id=uuid4(),
        job_id=job_id,
        position=0,
        format="png",
        blob_key="references/x.png",
        thumbnail_key="references/x.webp",
        width=32,
        height=32,
        size_bytes=10,
        sha256="0" * 64,
    )


def _owned_rows(session: Session) -> dict[str, list[str]]:
    """Every row that belongs to an owner."""
    session.rollback()
    tables = (
        "collections",
        "collection_grants",
        "jobs",
        "job_events",
        "images",
        "generations",
        "bulks",
        "bulk_items",
        "webhook_deliveries",
        "owners",
    )
    rows = {name: list(session.scalars(text(f"select t::text from {name} t order by 1"))) for name in tables}
    assert all(rows.values()), "no table is empty"
    return rows
