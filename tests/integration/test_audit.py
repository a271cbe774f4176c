"""The audit: every act of its list leaves one row, in the transaction of the act, and no row ever changes."""

import json
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from shared.contracts.admin import AuditAction
from shared.contracts.jobs import JobState
from shared.db import audit, spaces
from shared.db.audit import OPERATOR
from shared.db.tables import AuditEvent, Owner
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client, a_key
from tests.integration.test_admin import run
from tests.integration.test_api_search import towards
from tests.integration.test_export_outputs import make_output

ADMIN = f"{API}/admin"


@pytest.fixture
def key(session: Session) -> dict[str, str]:
    return a_key(session, "generate", "search", "corpus:write", "admin", owner="mine") | {"X-Request-ID": "asked-1"}


def rows(session: Session) -> list[AuditEvent]:
    session.rollback()
    return list(session.scalars(select(AuditEvent).order_by(AuditEvent.created_at)))


def actions(session: Session) -> list[str]:
    return [row.action for row in rows(session)]


def test_a_deletion_says_who_did_what_when_and_in_which_request(
    keyed_client: Client, session: Session, key: dict[str, str]
) -> None:
    image = make_image(session)
    session.commit()
    assert keyed_client.delete(f"{API}/images/{image.id}", headers=key).status_code == 204
    (row,) = rows(session)
    owner_id = session.scalars(select(Owner.id).where(Owner.name == "mine")).one()
    assert (row.action, row.subject_kind, row.subject_id) == ("image.deleted", "image", str(image.id))
    assert (row.actor, row.owner_id, row.request_id) == ("caller", owner_id, "asked-1")
    assert row.key_prefix is not None
    assert f"Bearer {row.key_prefix}" == key["Authorization"][: len(f"Bearer {row.key_prefix}")]
    assert row.details == {"collection_id": str(image.collection_id)}


def test_deletions_and_withdrawals_are_recorded(keyed_client: Client, session: Session, key: dict[str, str]) -> None:
    image, output = make_image(session), make_output(session, 7, owner="mine")
    job = make_job(session, state=JobState.CANCELED, owner="mine")
    session.commit()

    def delete(path: str, **query: str) -> None:
        assert keyed_client.delete(API + path, query_string=query, headers=key).status_code in (200, 204)

    delete(f"/generations/{output.id}")
    delete(f"/jobs/{job.id}")
    delete(f"/images/{image.id}", cascade="withdraw", reason="asked for")
    recorded = rows(session)
    assert [row.action for row in recorded] == ["output.deleted", "job.deleted", "image.withdrawn"]
    assert [row.subject_id for row in recorded] == [str(output.id), str(job.id), str(image.id)]
    assert recorded[0].details == {"job_id": str(output.job_id)}
    assert recorded[2].details["reason"] == "asked for"
    assert recorded[2].details["image_ids"] == [str(image.id)]


def test_changes_of_owners_and_keys_are_recorded_without_secrets(
    keyed_client: Client, session: Session, key: dict[str, str]
) -> None:
    def call(method: str, path: str, **body: Any) -> Any:
        answer = keyed_client.open(ADMIN + path, method=method, json=body or None, headers=key)
        assert answer.status_code in (200, 201), answer.text
        return answer.json

    owner_id = call("POST", "/owners", name="team")["id"]
    call("POST", "/owners", name="team")
    call("PATCH", f"/owners/{owner_id}", daily_images=5, disabled=True)
    made = call("POST", f"/owners/{owner_id}/keys", name="laptop", scopes=["generate"])
    call("PATCH", f"/keys/{made['key']['id']}", expires_at="2030-01-01T00:00:00Z")
    rotated = call("POST", f"/keys/{made['key']['id']}/rotate", overlap_s=60)
    call("POST", f"/keys/{rotated['key']['id']}/revoke")
    secret = keyed_client.post(f"{API}/webhooks/secret/rotate", headers=key).json["secret"]
    recorded = rows(session)
    assert [row.action for row in recorded] == [
        *("owner.created", "owner.changed", "key.created", "key.changed", "key.rotated", "key.revoked"),
        "webhook_secret.rotated",
    ], "an owner that exists is not created again"
    assert recorded[1].details == {"daily_images": 5, "disabled": True}
    assert recorded[4].details["replaces"] == made["key"]["id"]
    listed = keyed_client.get(f"{ADMIN}/audit", headers=key).text
    for hidden in (made["secret"], rotated["secret"], secret, key["Authorization"].removeprefix("Bearer ")):
        assert hidden not in listed


def test_a_refused_act_leaves_no_row(keyed_client: Client, session: Session, key: dict[str, str]) -> None:
    running = make_job(session, state=JobState.PROCESSING, owner="mine")
    session.commit()
    assert keyed_client.delete(f"{API}/jobs/{running.id}", headers=key).status_code == 409
    assert keyed_client.delete(f"{API}/images/{uuid4()}", headers=key).status_code == 404
    audit.record(session, OPERATOR, action=AuditAction.IMAGE_DELETED, subject=uuid4())
    session.flush()
    assert rows(session) == [], "it is part of a transaction that was rolled back"


@pytest.mark.parametrize(
    "statement", ["update audit_events set action = 'x'", "delete from audit_events", "truncate audit_events"]
)
def test_the_database_refuses_to_change_a_row(session: Session, statement: str) -> None:
    audit.record(session, OPERATOR, action=AuditAction.IMAGE_DELETED, subject=uuid4())
    session.commit()
    with pytest.raises(DBAPIError, match="never changed or deleted"):
        session.execute(text(statement))
    session.rollback()
    assert actions(session) == ["image.deleted"]


def test_the_list_has_pages_and_filters(keyed_client: Client, session: Session, key: dict[str, str]) -> None:
    subjects = [uuid4() for _ in range(3)]
    for subject in subjects:
        audit.record(session, OPERATOR, action=AuditAction.IMAGE_DELETED, subject=subject)
        session.commit()
    audit.record(session, OPERATOR, action=AuditAction.SPACE_ACTIVATED, subject="digest")
    session.commit()

    def listed(**query: Any) -> list[str]:
        answer = keyed_client.get(f"{ADMIN}/audit", query_string=query, headers=key)
        assert answer.status_code == 200, answer.text
        return [item["subject_id"] for item in answer.json["items"]]

    assert listed() == ["digest", *map(str, reversed(subjects))]
    first = keyed_client.get(f"{ADMIN}/audit?limit=3", headers=key).json
    assert listed(limit=3, cursor=first["next_cursor"]) == [str(subjects[0])]
    assert listed(action="space.activated") == ["digest"]
    assert listed(subject_id=str(subjects[1])) == [str(subjects[1])]
    middle = rows(session)[1].created_at.isoformat()
    assert listed(created_after=middle) == ["digest", str(subjects[2]), str(subjects[1])]
    assert listed(created_before=middle) == [str(subjects[0])]


@pytest.mark.parametrize("query", [{"action": "image.painted"}, {"created_after": "1"}, {"limit": "101"}])
def test_a_wrong_filter_is_refused(keyed_client: Client, key: dict[str, str], query: dict[str, str]) -> None:
    answer = keyed_client.get(f"{ADMIN}/audit", query_string=query, headers=key)
    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")


def test_only_the_scope_admin_reads_the_audit(keyed_client: Client, session: Session) -> None:
    others = a_key(session, "generate", "search", "corpus:write")
    assert keyed_client.get(f"{ADMIN}/audit", headers=others).status_code == 403


def test_the_commands_of_an_operator_are_recorded_and_printed_as_json_lines(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "create-owner", "team")
    run(monkeypatch, "create-key", "team", "--name", "laptop")
    key_id, secret = capsys.readouterr().out.splitlines()[1:]
    run(monkeypatch, "rotate-key", key_id)
    run(monkeypatch, "revoke-key", key_id)
    make_image(session, vector=towards(a0=1))
    make_space(session, dim=8)
    session.commit()
    active = spaces.find_active(session)
    assert active is not None
    session.rollback()
    run(monkeypatch, "activate-space", active.digest, "--force")
    capsys.readouterr()
    run(monkeypatch, "audit", "--json")
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines()]
    assert [line["action"] for line in lines] == [
        *("owner.created", "key.created", "key.rotated", "key.revoked"),
        "space.activated",
    ]
    assert {(line["actor"], line["owner_id"], line["request_id"]) for line in lines} == {("operator", None, None)}
    assert UUID(lines[1]["subject_id"]) == UUID(key_id)
    assert secret not in printed
    run(monkeypatch, "audit", "--action", "key.revoked", "--subject", key_id)
    shown = capsys.readouterr().out
    assert f"key.revoked {key_id}" in shown
    assert "rotated" not in shown


def test_an_audit_of_many_rows_is_printed_whole(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scripts.admin.audit_log.ROWS_PER_PAGE", 3)
    for number in range(10):
        audit.record(session, OPERATOR, action=AuditAction.SPACE_ADDED, subject=str(number))
        session.commit()
    run(monkeypatch, "audit", "--json")
    printed = [json.loads(line)["subject_id"] for line in capsys.readouterr().out.splitlines()]
    assert printed == [str(number) for number in range(10)]
