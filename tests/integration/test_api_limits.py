"""Rate limits of keys, quotas of owners."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from api_service.app import create_app
from ops.local.stack import LocalStack
from shared.db import jobs
from shared.db.session import bound_waits
from shared.db.tables import Job, Owner
from shared.errors import ImageGenerationError
from shared.settings import Settings, get_settings
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
    client, key = limited(reads_per_minute=2, writes_per_minute=2), a_key(session, "generate", "search")
    submitted = [client.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(3)]
    assert submitted == [202, 202, 429]
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


# --- quotas -------------------------------------------------------------------------------------------------------


@pytest.fixture
def rationed(settings: Settings, client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """The API with a quota of six images a day."""
    monkeypatch.setenv("AFTERIMAGE_LIMITS__DAILY_IMAGES", "6")
    get_settings.cache_clear()
    return client


def submit(client: Client, images: int) -> Any:
    return client.post(f"{API}/generate", json={"prompt": "x", "num_images": images})


def used(client: Client) -> tuple[int, int | None]:
    usage = client.get(f"{API}/usage").json
    return usage["images"], usage["daily_images"]


def test_beyond_its_quota_an_owner_is_told_to_come_back_tomorrow(rationed: Client, session: Session) -> None:
    assert [submit(rationed, 4).status_code, submit(rationed, 2).status_code] == [202, 202]
    refused = submit(rationed, 1)
    assert (refused.status_code, refused.json["code"]) == (429, "quota_exceeded")
    assert refused.json["context"] == {"quota": 6, "used": 6, "asked": 1}
    now = datetime.now(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    assert int(refused.headers["Retry-After"]) == pytest.approx((midnight - now).total_seconds(), abs=5)
    assert used(rationed) == (6, 6)
    assert datetime.fromisoformat(rationed.get(f"{API}/usage").json["resets_at"]) == midnight
    # Another day is another quota.
    session.execute(text("update image_usage set day = day - 1"))
    session.commit()
    assert submit(rationed, 1).status_code == 202


def test_more_images_than_a_whole_day_has_are_refused_and_not_counted(rationed: Client, session: Session) -> None:
    assert submit(rationed, 7).status_code == 429
    assert used(rationed) == (0, 6)
    assert session.scalar(select(func.count()).select_from(Job)) == 0


@pytest.mark.parametrize("ending", ["canceled", "failed", "expired", "dead", "succeeded"])
def test_images_that_were_never_drawn_are_given_back_once(rationed: Client, session: Session, ending: str) -> None:
    job_id = UUID(submit(rationed, 5).json["id"])
    if ending == "canceled":
        for _ in range(2):
            rationed.post(f"{API}/jobs/{job_id}/cancel")
    elif ending == "expired":
        session.execute(update(Job).values(expires_at=func.now()))
        jobs.end_expired(session)
    else:
        taken = jobs.claim(session, job_id, worker="w", lease_s=30)
        assert taken is not None
        if ending == "failed":
            jobs.fail(session, taken[0], ImageGenerationError())
        elif ending == "succeeded":
            jobs.finish(session, taken[0], [], timings={})
        else:
            session.execute(update(Job).values(lease_until=func.now(), model_started=True))
            jobs.take_back_expired(session, max_crashes=1)
    session.commit()
    assert rationed.get(f"{API}/jobs/{job_id}").json["state"] == ending
    assert used(rationed) == (5 if ending == "succeeded" else 0, 6)
    assert rationed.delete(f"{API}/jobs/{job_id}").status_code == 204
    assert used(rationed)[0] == (5 if ending == "succeeded" else 0), "deleting a job is no way around the quota"


def test_a_quota_is_not_exceeded_however_many_ask_at_once(rationed: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__MAX_OVERFLOW", "20")
    monkeypatch.setenv("AFTERIMAGE_DATABASE__POOL_TIMEOUT_S", "60")
    get_settings.cache_clear()
    bound_waits(60)  # they wait for each other, on a machine that may be busy
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: submit(rationed.application.test_client(), 1).status_code, range(20)))
    assert Counter(answers) == {202: 6, 429: 14}
    assert used(rationed) == (6, 6)


def test_an_owner_may_have_a_quota_of_its_own_and_replays_and_dry_runs_are_free(
    rationed: Client, session: Session
) -> None:
    for own, expected in [(1, 429), (0, 202)]:
        session.execute(update(Owner).where(Owner.name == "local").values(daily_images=own))
        session.commit()
        assert submit(rationed, 7).status_code == expected
    assert used(rationed) == (7, None), "0 is no quota at all"
    for _ in range(2):
        rationed.post(f"{API}/generate", json={"prompt": "x"}, headers={"Idempotency-Key": "once"})
    rationed.post(f"{API}/generate", json={"prompt": "x", "dry_run": True})
    assert used(rationed) == (8, None)
