"""Rate limits of keys."""

import time
from collections.abc import Callable

import pytest
from sqlalchemy.orm import Session

from api_service.app import create_app
from ops.local.stack import LocalStack
from shared.settings import get_settings
from tests.integration.conftest import API, Client, a_key

Limited = Callable[..., Client]


@pytest.fixture
def limited(guarded: Client, monkeypatch: pytest.MonkeyPatch) -> Limited:
    """`limited(reads_per_minute=3)`: the API with keys and these limits."""

    def with_limits(**limits: object) -> Client:
        for name, value in limits.items():
            monkeypatch.setenv(f"AFTERIMAGE_LIMITS__{name.upper()}", str(value))
        get_settings.cache_clear()
        return create_app(get_settings()).test_client()

    return with_limits


def statuses(client: Client, key: dict[str, str], *, reads: int) -> list[int]:
    return [client.get(f"{API}/jobs", headers=key).status_code for _ in range(reads)]


def test_a_key_beyond_its_budget_is_told_when_to_come_back_and_another_key_is_not_harmed(
    limited: Limited, session: Session
) -> None:
    client, key, other = limited(reads_per_minute=3), a_key(session, "generate"), a_key(session, "generate")
    first = client.get(f"{API}/jobs", headers=key)
    assert (first.headers["RateLimit-Limit"], first.headers["RateLimit-Remaining"]) == ("3", "2")
    assert 1 <= int(first.headers["RateLimit-Reset"]) <= 60
    assert "Retry-After" not in first.headers
    assert statuses(client, key, reads=2) == [200, 200]
    refused = client.get(f"{API}/jobs", headers=key)
    assert (refused.status_code, refused.json["code"]) == (429, "rate_limited")
    assert refused.content_type == "application/problem+json"
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert statuses(client, other, reads=1) == [200], "though both belong to one owner"


def test_reads_and_writes_have_budgets_of_their_own_and_a_search_is_a_read(limited: Limited, session: Session) -> None:
    client, key = limited(reads_per_minute=2, writes_per_minute=1), a_key(session, "generate", "search")
    submitted = [client.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(2)]
    assert submitted == [202, 429]
    assert client.post(f"{API}/search", json={}, headers=key).status_code == 422
    assert client.get(f"{API}/models", headers=key).status_code == 200
    assert client.post(f"{API}/search", json={}, headers=key).status_code == 429


def test_what_needs_no_key_is_never_refused(limited: Limited) -> None:
    client = limited(reads_per_minute=1)
    for path in (f"{API}/health/live", "/health/live", "/metrics", f"{API}/openapi.json"):
        for _ in range(3):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "RateLimit-Limit" not in answer.headers


def test_all_processes_count_together(limited: Limited, session: Session) -> None:
    one, other, key = limited(reads_per_minute=3), limited(reads_per_minute=3), a_key(session, "generate")
    assert statuses(one, key, reads=2) + statuses(other, key, reads=2) == [200, 200, 200, 429]


def test_limits_are_off_by_setting_and_where_keys_are_off(
    limited: Limited, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = a_key(session, "generate")
    assert statuses(limited(reads_per_minute=1, enabled="false"), key, reads=3) == [200, 200, 200]
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "false")
    assert statuses(limited(reads_per_minute=1, enabled="true"), {}, reads=3) == [200, 200, 200]


def test_a_frozen_server_of_the_limits_delays_once_and_memory_counts_on(
    limited: Limited, session: Session, servers: LocalStack
) -> None:
    client, key = limited(reads_per_minute=3), a_key(session, "generate")
    servers.control.freeze("cache")
    try:
        asked = time.monotonic()
        assert statuses(client, key, reads=4) == [200, 200, 200, 429]
        assert time.monotonic() - asked < 5, "four requests"
    finally:
        servers.control.thaw("cache")


def test_limits_may_have_a_server_of_their_own(limited: Limited, session: Session) -> None:
    client, key = limited(reads_per_minute=2, url="redis://127.0.0.1:1/0"), a_key(session, "generate")
    assert statuses(client, key, reads=3) == [200, 200, 429], "it is away, the cache's is not"
    elsewhere = create_app(get_settings()).test_client()
    assert statuses(elsewhere, key, reads=1) == [200], "what memory counts is each process's own"
