"""Owners and keys over HTTP, with the operations that `scripts.admin` has on the operator's machine."""

import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from shared.contracts.admin import Scope
from shared.db import keys
from shared.db.tables import ApiKey, Owner
from tests.integration.conftest import API, Client, a_key

ADMIN = f"{API}/admin"


@pytest.fixture
def operator(keyed_client: Client, session: Session) -> Client:
    """A client whose key has the scope `admin` and no other."""
    keyed_client.environ_base["HTTP_AUTHORIZATION"] = a_key(session, "admin", owner="operators")["Authorization"]
    return keyed_client


def create_owner(operator: Client, name: str = "team") -> str:
    answer = operator.post(f"{ADMIN}/owners", json={"name": name})
    assert answer.status_code == 200
    return str(answer.json["id"])


def create_key(operator: Client, owner_id: str, **body: Any) -> tuple[str, dict[str, str]]:
    body = {"name": "laptop", "scopes": ["generate"], **body}
    answer = operator.post(f"{ADMIN}/owners/{owner_id}/keys", json=body)
    assert answer.status_code == 201, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    return answer.json["key"]["id"], {"Authorization": f"Bearer {answer.json['secret']}"}


def status(client: Client, key: dict[str, str]) -> int:
    return int(client.get(f"{API}/jobs", headers=key).status_code)


def test_a_key_is_created_shown_once_listed_and_revoked(operator: Client, session: Session) -> None:
    owner_id = create_owner(operator)
    assert create_owner(operator) == owner_id, "an owner of that name is not created again"
    key_id, key = create_key(operator, owner_id)
    assert status(operator, key) == 200
    listed = operator.get(f"{ADMIN}/keys", query_string={"owner_id": owner_id})
    assert [item["id"] for item in listed.json["items"]] == [key_id]
    secret = key["Authorization"].removeprefix("Bearer ")
    assert secret not in listed.text
    assert secret.startswith(listed.json["items"][0]["begins_with"])
    assert secret.encode() not in session.get_one(ApiKey, UUID(key_id)).secret_sha256
    revoked = operator.post(f"{ADMIN}/keys/{key_id}/revoke")
    assert revoked.json["revoked_at"] is not None
    assert status(operator, key) == 401


def test_a_rotated_key_sees_the_same_jobs_and_both_keys_work_during_the_overlap(operator: Client) -> None:
    key_id, old = create_key(operator, create_owner(operator))
    job = operator.post(f"{API}/generate", json={"prompt": "x"}, headers=old).json
    answer = operator.post(f"{ADMIN}/keys/{key_id}/rotate", json={"overlap_s": 3600})
    assert answer.status_code == 201
    new = {"Authorization": f"Bearer {answer.json['secret']}"}
    assert answer.json["key"]["scopes"] == ["generate"]
    assert operator.get(job["url"], headers=new).json["id"] == job["id"]
    assert status(operator, old) == 200
    operator.post(f"{ADMIN}/keys/{answer.json['key']['id']}/rotate", json={"overlap_s": 0})
    assert status(operator, new) == 401


def test_a_revoked_key_cannot_be_rotated(operator: Client) -> None:
    key_id, _ = create_key(operator, create_owner(operator))
    operator.post(f"{ADMIN}/keys/{key_id}/revoke")
    answer = operator.post(f"{ADMIN}/keys/{key_id}/rotate", json={})
    assert (answer.status_code, answer.json["code"]) == (404, "not_found")


def test_the_expiry_of_a_key_is_set_when_it_is_created_and_changed_later(operator: Client) -> None:
    owner_id = create_owner(operator)
    key_id, key = create_key(operator, owner_id, expires_in_s=3600)
    assert status(operator, key) == 200
    past = (datetime.now(UTC) - timedelta(seconds=5)).isoformat()
    assert operator.patch(f"{ADMIN}/keys/{key_id}", json={"expires_at": past}).status_code == 200
    assert status(operator, key) == 401
    assert operator.patch(f"{ADMIN}/keys/{key_id}", json={"expires_at": None}).json["expires_at"] is None
    assert status(operator, key) == 200


def test_a_disabled_owner_has_no_valid_key_until_it_is_enabled_again(operator: Client) -> None:
    owner_id = create_owner(operator)
    _, key = create_key(operator, owner_id)
    assert operator.patch(f"{ADMIN}/owners/{owner_id}", json={"disabled": True}).json["disabled_at"] is not None
    assert status(operator, key) == 401
    operator.patch(f"{ADMIN}/owners/{owner_id}", json={"disabled": False})
    assert status(operator, key) == 200


def test_an_owners_quota_is_set_and_fields_that_are_not_sent_stay(operator: Client) -> None:
    owner_id = create_owner(operator)
    _, key = create_key(operator, owner_id)
    operator.patch(f"{ADMIN}/owners/{owner_id}", json={"daily_images": 1})
    operator.patch(f"{ADMIN}/owners/{owner_id}", json={})
    assert operator.get(f"{ADMIN}/owners/{owner_id}").json["daily_images"] == 1
    assert operator.get(f"{API}/usage", headers=key).json["daily_images"] == 1
    submitted = [operator.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(2)]
    assert submitted == [202, 429]


def test_owners_are_listed_page_by_page(operator: Client, session: Session) -> None:
    for number in range(3):
        create_owner(operator, f"team-{number}")
    names, cursor = [], None
    while True:
        page = operator.get(f"{ADMIN}/owners", query_string={"limit": 2} | ({"cursor": cursor} if cursor else {})).json
        names += [item["name"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names[:3] == ["team-2", "team-1", "team-0"]
    assert len(names) == session.query(Owner).count()


@pytest.mark.parametrize("scope", [scope for scope in keys.SCOPES if scope != "admin"])
def test_no_other_scope_allows_the_admin_operations(keyed_client: Client, session: Session, scope: str) -> None:
    key, some_id = a_key(session, scope), uuid4()
    for method, path in [
        ("GET", "/owners"),
        ("POST", "/owners"),
        ("GET", f"/owners/{some_id}"),
        ("PATCH", f"/owners/{some_id}"),
        ("POST", f"/owners/{some_id}/keys"),
        ("GET", "/keys"),
        ("PATCH", f"/keys/{some_id}"),
        ("POST", f"/keys/{some_id}/rotate"),
        ("POST", f"/keys/{some_id}/revoke"),
    ]:
        answer = keyed_client.open(ADMIN + path, method=method, json={}, headers=key)
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden")


def test_an_admin_key_does_not_act_for_an_owner(operator: Client) -> None:
    assert operator.post(f"{API}/generate", json={"prompt": "x"}).status_code == 403
    assert operator.get(f"{API}/images").status_code == 403


@pytest.mark.parametrize(
    "body",
    [{"scopes": ["everything"]}, {"scopes": []}, {"name": ""}, {"name": "a\nb\x00"}, {"expires_in_s": 0}, {"more": 1}],
)
def test_an_invalid_key_request_creates_no_key(operator: Client, body: dict[str, Any]) -> None:
    owner_id = create_owner(operator)
    answer = operator.post(
        f"{ADMIN}/owners/{owner_id}/keys", json={"name": "laptop", "scopes": [Scope.GENERATE], **body}
    )
    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")
    assert operator.get(f"{ADMIN}/keys", query_string={"owner_id": owner_id}).json["items"] == []


def test_unknown_owners_and_keys_are_not_found(operator: Client) -> None:
    some_id = uuid4()
    for method, path, body in [
        ("GET", f"/owners/{some_id}", None),
        ("PATCH", f"/owners/{some_id}", {"disabled": True}),
        ("POST", f"/owners/{some_id}/keys", {"name": "x", "scopes": ["search"]}),
        ("PATCH", f"/keys/{some_id}", {"expires_at": None}),
        ("POST", f"/keys/{some_id}/rotate", {}),
        ("POST", f"/keys/{some_id}/revoke", None),
    ]:
        assert operator.open(ADMIN + path, method=method, json=body).status_code == 404, path


def test_changes_are_logged_with_the_key_that_made_them_and_without_secrets(
    operator: Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="api_service.services.admin"):
        key_id, key = create_key(operator, create_owner(operator))
        operator.post(f"{ADMIN}/keys/{key_id}/revoke")
    logged = [record for record in caplog.records if record.name == "api_service.services.admin"]
    assert [record.msg for record in logged] == ["owner_made", "key_made", "key_revoked"]
    assert all(vars(record)["by_key_id"] is not None for record in logged)
    secret = key["Authorization"].removeprefix("Bearer ")
    assert not any(secret in str(vars(record)) for record in logged)
