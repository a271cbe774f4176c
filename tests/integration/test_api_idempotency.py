"""Idempotency-Key: repeated and concurrent requests with one key create one job."""

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from flask.testing import FlaskClient
from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from shared.db.tables import Job
from tests.integration.conftest import API, Server

REQUEST = {"prompt": "a red apple", "num_images": 2}
KEY = {"Idempotency-Key": "order-17"}


def count_jobs(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Job)) or 0


def test_fifty_concurrent_requests_create_one_job_and_get_one_answer(server: Server, session: Session) -> None:
    def send(_: int) -> tuple[int, str, str]:
        answer = httpx.post(f"{server.url}{API}/generate", json=REQUEST, headers=KEY, timeout=30)
        return answer.status_code, answer.headers["Location"], answer.json()["id"]

    with ThreadPoolExecutor(50) as pool:
        answers = set(pool.map(send, range(50)))
    assert len(answers) == 1
    assert {answer[0] for answer in answers} == {202}
    assert count_jobs(session) == 1


def test_a_repeated_request_is_marked_as_replayed_even_if_written_differently(
    client: FlaskClient, session: Session
) -> None:
    first = client.post(f"{API}/generate", json=REQUEST, headers=KEY)
    again = client.post(f"{API}/generate", json={**REQUEST, "format": "png"}, headers=KEY)
    assert "Idempotent-Replayed" not in first.headers
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.get_json()["parameters"] == first.get_json()["parameters"], "the same random seeds"
    assert count_jobs(session) == 1


def test_the_answer_is_kept_when_the_job_is_gone(client: FlaskClient, session: Session) -> None:
    first = client.post(f"{API}/generate", json=REQUEST, headers=KEY).get_json()
    client.post(f"{API}/jobs/{first['id']}/cancel")
    assert client.delete(f"{API}/jobs/{first['id']}").status_code == 204
    again = client.post(f"{API}/generate", json=REQUEST, headers=KEY | {"Prefer": "wait=1"})
    assert (again.status_code, again.get_json()["id"]) == (202, first["id"])
    assert count_jobs(session) == 0


@pytest.mark.parametrize("change", ['{"invented_later": 1}', '{"prompt": null}'])
def test_an_answer_that_another_release_stored_is_shown(client: FlaskClient, session: Session, change: str) -> None:
    first = client.post(f"{API}/generate", json=REQUEST, headers=KEY).get_json()
    session.execute(text("update idempotency_keys set answer = answer || cast(:change as jsonb)"), {"change": change})
    session.commit()
    again = client.post(f"{API}/generate", json=REQUEST, headers=KEY)
    assert (again.status_code, again.get_json()["id"]) == (202, first["id"])
    assert again.get_json()["prompt"] == REQUEST["prompt"]


def test_the_same_key_with_another_request_is_refused(client: FlaskClient, session: Session) -> None:
    client.post(f"{API}/generate", json=REQUEST, headers=KEY)
    refused = client.post(f"{API}/generate", json={**REQUEST, "seed": 1}, headers=KEY)
    assert (refused.status_code, refused.get_json()["code"]) == (422, "idempotency_key_reused")
    assert count_jobs(session) == 1


def test_a_key_belongs_to_its_route(client: FlaskClient, session: Session) -> None:
    for route in ("generate", "rag/generate"):
        assert client.post(f"{API}/{route}", json=REQUEST, headers=KEY).status_code == 202
    assert count_jobs(session) == 2


def test_an_error_is_not_stored_under_the_key(client: FlaskClient, session: Session) -> None:
    refused = client.post(f"{API}/generate", json={**REQUEST, "model": "unknown"}, headers=KEY)
    assert refused.status_code == 422
    assert client.post(f"{API}/generate", json=REQUEST, headers=KEY).status_code == 202
    assert count_jobs(session) == 1


def test_a_dry_run_uses_up_no_key(client: FlaskClient, session: Session) -> None:
    assert client.post(f"{API}/generate", json={**REQUEST, "dry_run": True}, headers=KEY).status_code == 200
    assert client.post(f"{API}/generate", json=REQUEST, headers=KEY).status_code == 202
    assert count_jobs(session) == 1


def test_a_key_expires_after_a_day(client: FlaskClient, session: Session) -> None:
    first = client.post(f"{API}/generate", json=REQUEST, headers=KEY).get_json()
    session.execute(text("update idempotency_keys set created_at = now() - interval '25 hours'"))
    session.commit()
    again = client.post(f"{API}/generate", json=REQUEST, headers=KEY)
    assert again.get_json()["id"] != first["id"]


@pytest.mark.parametrize("key", ["", "with space", "é", "x" * 256])
def test_an_invalid_key_is_refused(client: FlaskClient, session: Session, key: str) -> None:
    refused = client.post(f"{API}/generate", json=REQUEST, headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.get_json()["code"]) == (422, "validation_failed")
    assert count_jobs(session) == 0
