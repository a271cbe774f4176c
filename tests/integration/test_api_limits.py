"""Rate limits of keys, quotas of owners."""

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from limits.errors import StorageError
from limits.strategies import FixedWindowRateLimiter
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from api_service.app import create_app
from ops.local.stack import LocalStack
from shared.db import attempts, jobs
from shared.db.session import bound_waits
from shared.db.tables import Job, Owner
from shared.errors import ImageGenerationError
from shared.settings import Settings, get_settings
from tests import one_attempt
from tests.integration.conftest import API, Client, a_key

Limited = Callable[..., Client]


@pytest.fixture
def limited(keyed_client: Client, monkeypatch: pytest.MonkeyPatch) -> Limited:
    """`limited(reads_per_minute=3)`: the API with keys and these limits."""

    def with_limits(**limits: object) -> Client:
        for name, value in limits.items():
            monkeypatch.setenv(f"AFTERIMAGE_LIMITS__{name.upper()}", str(value))
        get_settings.cache_clear()
        return create_app(get_settings()).test_client()

    return with_limits


def statuses(client: Client, key: dict[str, str], *, reads: int) -> list[int]:
    return [client.get(f"{API}/jobs", headers=key).status_code for _ in range(reads)]


def test_a_key_over_its_rate_limit_gets_retry_after_and_other_keys_still_work(
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
    assert statuses(client, other, reads=1) == [200], "also if both keys belong to one owner"


def test_reads_and_writes_have_separate_limits_and_a_search_is_a_read(limited: Limited, session: Session) -> None:
    client, key = limited(reads_per_minute=2, writes_per_minute=2), a_key(session, "generate", "search")
    submitted = [client.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(3)]
    assert submitted == [202, 202, 429]
    assert client.post(f"{API}/search", json={}, headers=key).status_code == 422
    assert client.get(f"{API}/models", headers=key).status_code == 200
    assert client.post(f"{API}/search", json={}, headers=key).status_code == 429


def test_requests_that_need_no_key_are_never_rate_limited(limited: Limited) -> None:
    client = limited(reads_per_minute=1)
    for path in (f"{API}/health/live", "/health/live", "/metrics", f"{API}/openapi.json"):
        for _ in range(3):
            answer = client.get(path)
            assert answer.status_code == 200
            assert "RateLimit-Limit" not in answer.headers


def test_all_processes_share_their_counts(limited: Limited, session: Session) -> None:
    first, second, key = limited(reads_per_minute=3), limited(reads_per_minute=3), a_key(session, "generate")
    assert statuses(first, key, reads=2) + statuses(second, key, reads=2) == [200, 200, 200, 429]


def test_limits_are_off_by_setting_and_where_keys_are_off(
    limited: Limited, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = a_key(session, "generate")
    assert statuses(limited(reads_per_minute=1, enabled="false"), key, reads=3) == [200, 200, 200]
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "false")
    assert statuses(limited(reads_per_minute=1, enabled="true"), {}, reads=3) == [200, 200, 200]


def test_a_frozen_redis_of_the_limits_delays_once_and_then_memory_counts(
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


def test_a_burst_while_the_redis_of_the_limits_is_frozen_is_answered(
    limited: Limited, session: Session, servers: LocalStack
) -> None:
    client, key = limited(reads_per_minute=1000), a_key(session, "generate")
    servers.control.freeze("cache")
    try:
        with ThreadPoolExecutor(10) as threads:
            answers = threads.map(
                lambda _: client.application.test_client().get(f"{API}/usage", headers=key).status_code, range(10)
            )
            assert set(answers) == {200}
        assert statuses(client, key, reads=1) == [200]
    finally:
        servers.control.thaw("cache")


def test_a_request_over_its_limit_is_refused_if_redis_fails_after_counting_it(
    limited: Limited, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageError(ConnectionError())

    client, key = limited(reads_per_minute=1), a_key(session, "generate")
    monkeypatch.setattr(FixedWindowRateLimiter, "get_window_stats", fail)
    assert client.get(f"{API}/jobs", headers=key).status_code == 200
    refused = client.get(f"{API}/jobs", headers=key)
    assert (refused.status_code, refused.json["code"]) == (429, "rate_limited")
    assert refused.headers["Retry-After"] == "60"


def test_limits_may_use_a_redis_of_their_own(limited: Limited, session: Session) -> None:
    client, key = limited(reads_per_minute=2, url="redis://127.0.0.1:1/0"), a_key(session, "generate")
    assert statuses(client, key, reads=3) == [200, 200, 429], "this Redis is down, the cache's is not"
    other_process = create_app(get_settings()).test_client()
    assert statuses(other_process, key, reads=1) == [200], "each process has its own counts in memory"


# --- quotas -------------------------------------------------------------------------------------------------------


@pytest.fixture
def quota_client(settings: Settings, client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of the API with a quota of six images a day."""
    monkeypatch.setenv("AFTERIMAGE_LIMITS__DAILY_IMAGES", "6")
    get_settings.cache_clear()
    return client


def submit(client: Client, images: int) -> Any:
    return client.post(f"{API}/generate", json={"prompt": "x", "num_images": images})


def used(client: Client) -> tuple[int, int | None]:
    usage = client.get(f"{API}/usage").json
    return usage["images"], usage["daily_images"]


def test_an_owner_over_its_quota_gets_retry_after_until_midnight(quota_client: Client, session: Session) -> None:
    assert [submit(quota_client, 4).status_code, submit(quota_client, 2).status_code] == [202, 202]
    refused = submit(quota_client, 1)
    assert (refused.status_code, refused.json["code"]) == (429, "quota_exceeded")
    assert refused.json["context"] == {"quota": 6, "used": 6, "asked": 1}
    now = datetime.now(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    assert int(refused.headers["Retry-After"]) == pytest.approx((midnight - now).total_seconds(), abs=5)
    assert used(quota_client) == (6, 6)
    assert datetime.fromisoformat(quota_client.get(f"{API}/usage").json["resets_at"]) == midnight
    # The next day has a new quota.
    session.execute(text("update image_usage set day = day - 1"))
    session.commit()
    assert submit(quota_client, 1).status_code == 202


def test_a_request_over_the_quota_of_a_whole_day_is_refused_and_not_counted(
    quota_client: Client, session: Session
) -> None:
    assert submit(quota_client, 7).status_code == 429
    assert used(quota_client) == (0, 6)
    assert session.scalar(select(func.count()).select_from(Job)) == 0


@pytest.mark.parametrize("ending", ["canceled", "failed", "expired", "dead", "succeeded"])
def test_images_that_were_not_generated_are_refunded_once(quota_client: Client, session: Session, ending: str) -> None:
    job_id = UUID(submit(quota_client, 5).json["id"])
    if ending == "canceled":
        for _ in range(2):
            quota_client.post(f"{API}/jobs/{job_id}/cancel")
    elif ending == "expired":
        session.execute(update(Job).values(expires_at=func.now()))
        jobs.end_expired(session)
    else:
        taken = one_attempt.claim(session, job_id, worker="w", lease_s=30)
        assert taken is not None
        if ending == "failed":
            one_attempt.fail(session, taken[0], ImageGenerationError())
        elif ending == "succeeded":
            one_attempt.finish(session, taken[0], [], timings={})
        else:
            session.execute(update(Job).values(lease_until=func.now(), model_started=True))
            attempts.take_back_expired(session, max_crashes=1)
    session.commit()
    assert quota_client.get(f"{API}/jobs/{job_id}").json["state"] == ending
    assert used(quota_client) == (5 if ending == "succeeded" else 0, 6)
    assert quota_client.delete(f"{API}/jobs/{job_id}").status_code == 204
    assert used(quota_client)[0] == (5 if ending == "succeeded" else 0), "deleting a job refunds nothing"


def test_concurrent_requests_do_not_exceed_a_quota(quota_client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__MAX_OVERFLOW", "20")
    monkeypatch.setenv("AFTERIMAGE_DATABASE__POOL_TIMEOUT_S", "60")
    get_settings.cache_clear()
    bound_waits(60)  # the requests wait for each other, and the machine may be busy
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: submit(quota_client.application.test_client(), 1).status_code, range(20)))
    assert Counter(answers) == {202: 6, 429: 14}
    assert used(quota_client) == (6, 6)


def test_an_owner_may_have_its_own_quota_and_replays_and_dry_runs_are_free(
    quota_client: Client, session: Session
) -> None:
    for own, expected in [(1, 429), (0, 202)]:
        session.execute(update(Owner).where(Owner.name == "local").values(daily_images=own))
        session.commit()
        assert submit(quota_client, 7).status_code == expected
    assert used(quota_client) == (7, None), "0 means unlimited"
    for _ in range(2):
        quota_client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Idempotency-Key": "once"})
    quota_client.post(f"{API}/generate", json={"prompt": "x", "dry_run": True})
    assert used(quota_client) == (8, None)
