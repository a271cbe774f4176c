"""API keys: every operation needs a key, and a key allows only the operations of its scopes."""

import io
import re
from uuid import UUID

import pytest
from flask.testing import FlaskClient
from sqlalchemy import select, text
from sqlalchemy.orm import Session

from scripts.admin.__main__ import main as admin
from shared.db.tables import ApiKey
from tests.factories import make_job
from tests.integration.conftest import API, a_key, picture


def operations(client: FlaskClient) -> list[tuple[str, str, str]]:
    paths = client.get(f"{API}/openapi.json").get_json()["paths"]
    return [(method, path, op["operationId"]) for path, ops in paths.items() for method, op in ops.items()]


def test_every_operation_except_the_probes_needs_a_key(keyed_client: FlaskClient) -> None:
    some_id = "00000000-0000-4000-8000-00000000abcd"
    open_to_all = set()
    for method, path, name in operations(keyed_client):
        path = re.sub(r"\{\w+\}", some_id, path)
        answer = keyed_client.open(path, method=method.upper())
        if answer.status_code != 401:
            open_to_all.add(name)
        else:
            assert answer.get_json()["code"] == "authentication_required"
            assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert open_to_all == {"getHealth", "getLiveness", "getReadiness"}


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer ", "Bearer aft_wrong", "Basic YTpi", "aft_x"])
def test_an_invalid_key_is_refused(keyed_client: FlaskClient, header: str) -> None:
    assert keyed_client.get(f"{API}/jobs", headers={"Authorization": header}).status_code == 401


@pytest.mark.parametrize(
    "ending",
    [
        "update api_keys set revoked_at = now()",
        "update api_keys set expires_at = now()",
        "update owners set disabled_at = now() where name = 'team'",
    ],
)
def test_a_revoked_or_expired_key_and_a_key_of_a_disabled_owner_are_refused(
    keyed_client: FlaskClient, session: Session, ending: str
) -> None:
    key = a_key(session, "generate")
    assert keyed_client.get(f"{API}/jobs", headers=key).status_code == 200
    session.execute(text(ending))
    session.commit()
    assert keyed_client.get(f"{API}/jobs", headers=key).status_code == 401


def test_each_request_is_logged_with_its_owner_and_key(
    keyed_client: FlaskClient, session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    key = a_key(session, "generate")
    row = session.scalars(select(ApiKey)).one()
    with caplog.at_level("INFO"):
        keyed_client.get(f"{API}/jobs", headers=key).close()
        keyed_client.get("/health/live").close()
    known, open_to_all = (vars(record) for record in caplog.records if record.message == "request")
    assert (known["owner_id"], known["key_id"]) == (str(row.owner_id), str(row.id))
    assert "owner_id" not in open_to_all


def test_a_scope_allows_only_its_own_operations(keyed_client: FlaskClient, session: Session) -> None:
    generate, search = a_key(session, "generate"), a_key(session, "search")
    write = a_key(session, "corpus:write")

    def upload(key: dict[str, str]) -> int:
        form = {"file": (io.BytesIO(picture()), "a.png")}
        return keyed_client.post(f"{API}/upload", data=form, headers=key).status_code

    assert keyed_client.post(f"{API}/generate", json={"prompt": "a cat"}, headers=generate).status_code == 202
    assert keyed_client.get(f"{API}/images", headers=search).status_code == 200
    assert upload(write) == 201
    refused = keyed_client.post(f"{API}/generate", json={"prompt": "a cat"}, headers=search)
    assert (refused.status_code, refused.get_json()["code"]) == (403, "forbidden")
    assert keyed_client.get(f"{API}/images", headers=generate).status_code == 403
    assert upload(search) == 403
    assert keyed_client.get(f"{API}/models", headers=search).status_code == 200


def test_owners_do_not_see_each_others_jobs(keyed_client: FlaskClient, session: Session) -> None:
    mine, theirs = a_key(session, "generate", owner="mine"), a_key(session, "generate", owner="theirs")
    job = make_job(session, owner="mine")
    session.commit()
    assert keyed_client.get(f"{API}/jobs/{job.id}", headers=mine).status_code == 200
    for method, path in (("get", ""), ("post", "/cancel"), ("post", "/retry"), ("delete", ""), ("get", "/events")):
        answer = keyed_client.open(f"{API}/jobs/{job.id}{path}", method=method.upper(), headers=theirs)
        assert answer.status_code == 404
    assert keyed_client.get(f"{API}/jobs", headers=theirs).get_json()["items"] == []


def test_an_operator_creates_lists_rotates_and_revokes_keys(
    keyed_client: FlaskClient, session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["admin", *arguments])
        admin()
        return capsys.readouterr().out

    def status(secret: str) -> int:
        return keyed_client.get(f"{API}/jobs", headers={"Authorization": f"Bearer {secret}"}).status_code

    run("create-owner", "team")
    key_id, secret = run("create-key", "team", "--name", "laptop", "--scopes", "generate").split()
    assert status(secret) == 200
    listed = run("list-keys")
    assert key_id[:8] in listed
    assert secret not in listed
    new_id, new_secret = run("rotate-key", key_id, "--overlap-s", "0").split()
    assert [status(secret), status(new_secret)] == [401, 200]
    run("revoke-key", new_id)
    assert status(new_secret) == 401
    assert run("rotate-webhook-secret", "team").startswith("whsec_")
    stored = session.scalars(select(ApiKey.secret_sha256).where(ApiKey.id == UUID(new_id))).one()
    assert new_secret.encode() not in stored
