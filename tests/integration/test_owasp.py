"""The OWASP API Security Top 10 (2023), row by row, over HTTP with two owners and keys of different scopes.

https://owasp.org/API-Security/editions/2023/en/0x11-t10/. Every row applies. Each test here was seen to fail without
its guard. Other files test each guard in detail:

- owners: `test_api_owners`
- keys: `test_api_keys`, `test_api_admin`
- limits: `test_api_limits`
- uploads: `test_api_requests`
- targets of webhooks: `tests/unit/test_ssrf`
- browsers: `test_api_browsers`
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy.orm import Session

from api_service.app import create_app
from shared.contracts.jobs import JobState
from shared.db import keys
from shared.db.tables import ApiKey, Job
from shared.settings import get_settings
from tests.integration.conftest import API, Client, Receiver, a_key, picture
from tests.integration.test_api_images import upload
from worker_service.maintenance.deliver_webhooks import deliver_due

Key = dict[str, str]
SCOPE_OF_TAG = {
    "generation": "generate",
    "bulks": "generate",
    "jobs": "generate",
    "outputs": "generate",
    "reference images": "generate",
    "webhooks": "generate",
    "search": "search",
    "admin": "admin",
}
"""The scope that each group of operations needs, written down independently."""
CORPUS_TAGS = ("images", "collections")
"""Here the scope depends on the method."""


def new_job(client: Client, key: Key, **request: Any) -> str:
    answer = client.post(f"{API}/generate", json={"prompt": "a secret", **request}, headers=key)
    assert answer.status_code == 202, answer.text
    return str(answer.json["id"])


def refused(answer: Any, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json["code"] == code


def operations(client: Client) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path with a random id, and description of each documented operation."""
    for path, methods in client.get(f"{API}/openapi.json").json["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), re.sub(r"\{\w+\}", str(uuid4()), path), operation


def test_api1_broken_object_level_authorization(keyed_client: Client, session: Session) -> None:
    """A caller with the id of another owner's object cannot read, change or delete it."""
    mine, theirs = a_key(session, "generate", owner="mine"), a_key(session, "generate", owner="theirs")
    job = f"{API}/jobs/{new_job(keyed_client, mine)}"
    for method, path in [("GET", job), ("GET", f"{job}/events"), ("POST", f"{job}/cancel"), ("DELETE", job)]:
        refused(keyed_client.open(path, method=method, headers=theirs), 404, "not_found")
    assert keyed_client.get(job, headers=mine).json["state"] == "queued"


def test_api2_broken_authentication(keyed_client: Client, session: Session) -> None:
    """A key is valid only unchanged, as a bearer token, until it ends. The database does not contain it."""
    key = a_key(session, "generate")
    secret = key["Authorization"].removeprefix("Bearer ")
    assert keyed_client.get(f"{API}/jobs", headers=key).status_code == 200
    for header in (f"Bearer {secret[:-1]}", f"Bearer {secret.swapcase()}", f"Basic {secret}", secret, "Bearer "):
        refused(keyed_client.get(f"{API}/jobs", headers={"Authorization": header}), 401, "authentication_required")
    refused(keyed_client.get(f"{API}/jobs?api_key={secret}"), 401, "authentication_required")
    row = session.query(ApiKey).one()
    assert secret not in str(vars(row))

    admin = a_key(session, "admin", owner="operators")
    assert keyed_client.post(f"{API}/admin/keys/{row.id}/revoke", headers=admin).status_code == 200
    refused(keyed_client.get(f"{API}/jobs", headers=key), 401, "authentication_required")


def test_api3_broken_object_property_level_authorization(keyed_client: Client, session: Session) -> None:
    """Clients cannot set internal fields, and answers do not show them."""
    key = a_key(session, "generate", "search", "corpus:write")
    for field, value in {"owner_id": str(uuid4()), "state": "succeeded", "id": str(uuid4()), "attempt": 0}.items():
        refused(
            keyed_client.post(f"{API}/generate", json={"prompt": "x", field: value}, headers=key),
            422,
            "validation_failed",
        )
    keyed_client.environ_base["HTTP_AUTHORIZATION"] = key["Authorization"]
    image = upload(keyed_client, picture()).json["images"][0]
    for field, value in {"state": "ready", "collection": "private", "sha256": "0" * 64, "blob_key": "x"}.items():
        refused(keyed_client.patch(image["url"], json={field: value}), 422, "validation_failed")
    job = keyed_client.get(
        f"{API}/jobs/{new_job(keyed_client, key, webhook={'url': 'https://receiver.example/s3cret'})}"
    )
    for answer in (
        job,
        keyed_client.get(image["url"]),
        keyed_client.get(f"{API}/images"),
        keyed_client.get(f"{API}/jobs"),
    ):
        assert not re.search(r"owner_id|blob_key|whsec|secret_sha256|s3cret", answer.text)
    listed = keyed_client.get(f"{API}/admin/keys", headers=a_key(session, "admin", owner="operators"))
    assert not re.search(r"secret|sha256", listed.text)


def test_api4_unrestricted_resource_consumption(
    keyed_client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost of a request and the rate of a key are limited. Other keys are not affected."""
    key, other = a_key(session, "generate", "search", "corpus:write"), a_key(session, "generate", owner="other")
    for field, most in {"num_images": 16, "width": 2048, "num_inference_steps": 150, "timeout_s": 86_400}.items():
        answer = keyed_client.post(f"{API}/generate", json={"prompt": "x", field: most + 1}, headers=key)
        assert [error["field"] for error in answer.json["errors"]] == [f"body.{field}"]
    refused(keyed_client.get(f"{API}/jobs?limit=101", headers=key), 422, "validation_failed")
    too_much = b"{" + bytes(get_settings().api.max_body_bytes)
    answer = keyed_client.post(f"{API}/generate", data=too_much, content_type="application/json", headers=key)
    refused(answer, 413, "body_too_large")

    monkeypatch.setenv("AFTERIMAGE_LIMITS__WRITES_PER_MINUTE", "2")
    get_settings.cache_clear()
    limited = create_app(get_settings()).test_client()
    statuses = [limited.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(3)]
    assert statuses == [202, 202, 429]
    assert limited.post(f"{API}/generate", json={"prompt": "x"}, headers=other).status_code == 202


def test_api5_broken_function_level_authorization(keyed_client: Client, session: Session) -> None:
    """For every operation: a key with all scopes except the one that the operation needs cannot call it."""
    key_without = {scope: a_key(session, *(other for other in keys.SCOPES if other != scope)) for scope in keys.SCOPES}
    without_scope = set()
    for method, path, operation in operations(keyed_client):
        (tag,) = operation["tags"]
        scope = ("search" if method == "GET" else "corpus:write") if tag in CORPUS_TAGS else SCOPE_OF_TAG.get(tag)
        if scope is None:
            without_scope.add(operation["operationId"])
        else:
            refused(keyed_client.open(path, method=method, headers=key_without[scope]), 403, "forbidden")
    assert without_scope == {"getHealth", "getLiveness", "getReadiness", "listModels", "getStats", "getUsage"}


def test_api6_unrestricted_access_to_sensitive_business_flows(
    keyed_client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sensitive flow is generating images: the quota of an owner covers all its keys and all operations."""
    monkeypatch.setenv("AFTERIMAGE_LIMITS__DAILY_IMAGES", "3")
    get_settings.cache_clear()
    first, second = a_key(session, "generate"), a_key(session, "generate")
    new_job(keyed_client, first, num_images=2)
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"json": {"prompt": "x", "num_images": 2}}),
        ("/rag/generate", {"json": {"prompt": "x", "num_images": 2}}),
        ("/bulks", {"data": b'{"prompt": "x"}\n{"prompt": "y"}\n', "content_type": "application/jsonl"}),
    ]
    for path, sent in requests:
        refused(keyed_client.post(API + path, headers=second, **sent), 429, "quota_exceeded")
    new_job(keyed_client, second, num_images=1)
    new_job(keyed_client, a_key(session, "generate", owner="other"), num_images=2)


@pytest.mark.parametrize(
    "url",
    [
        "http://receiver.example/",
        "https://127.0.0.1/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[::ffff:10.0.0.1]/",
        "https://user@receiver.example/",
        "file:///etc/passwd",
    ],
)
def test_api7_server_side_request_forgery(keyed_client: Client, session: Session, url: str) -> None:
    """The URL of a webhook is the only address from a user that this service calls."""
    key = a_key(session, "generate")
    for path in ("/generate", "/rag/generate"):
        answer = keyed_client.post(API + path, json={"prompt": "x", "webhook": {"url": url}}, headers=key)
        refused(answer, 422, "forbidden_target")
    lines = f'{{"bulk": {{"webhook": {{"url": "{url}"}}}}}}\n{{"prompt": "x"}}\n'.encode()
    answer = keyed_client.post(f"{API}/bulks", data=lines, content_type="application/jsonl", headers=key)
    refused(answer, 422, "forbidden_target")


def test_api7_a_host_name_of_a_private_address_is_not_called(
    keyed_client: Client, session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEBHOOKS__ALLOW_HTTP", "true")
    get_settings.cache_clear()
    key = a_key(session, "generate")
    job_id = new_job(keyed_client, key, webhook={"url": receiver.url})  # http://localhost
    keyed_client.post(f"{API}/jobs/{job_id}/cancel", headers=key)
    deliver_due(get_settings().webhooks, stopping=lambda: False)
    (delivery,) = keyed_client.get(f"{API}/webhooks/deliveries", headers=key).json["items"]
    assert (delivery["attempts"], delivery["state"]) == (1, "pending")
    assert receiver.got == []


def test_api8_security_misconfiguration(keyed_client: Client, session: Session) -> None:
    """Answers carry security headers, allow no other origin to read them, and show no details of an error."""

    def crash() -> None:
        raise RuntimeError("postgresql://user:password@host")

    keyed_client.application.view_functions["document"] = crash
    elsewhere = {"Origin": "https://elsewhere.example"}
    answers = [
        keyed_client.get(f"{API}/openapi.json", headers=elsewhere),
        keyed_client.get(f"{API}/jobs", headers=elsewhere),
        keyed_client.get("/nothing", headers=elsewhere),
        keyed_client.open(f"{API}/jobs", method="TRACE", headers=elsewhere),
        keyed_client.get(f"{API}/jobs", headers=elsewhere | a_key(session, "generate")),
    ]
    assert [answer.status_code for answer in answers] == [500, 401, 404, 405, 200]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert not re.search(r"password|Traceback|RuntimeError|site-packages", answer.text)


def test_api9_improper_inventory_management(keyed_client: Client) -> None:
    """One version of the API is served and completely documented. All other paths are listed here.

    Studio's pages are not part of the API. `test_studio` tests which keys may open them.
    """
    documented = {
        (method.upper(), re.sub(r"\{(\w+)\}", r"<\1>", path))
        for path, methods in keyed_client.get(f"{API}/openapi.json").json["paths"].items()
        for method in methods
    }
    served = {
        (method, rule.rule)
        for rule in keyed_client.application.url_map.iter_rules()
        if not rule.endpoint.startswith("studio")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    other_paths = {f"{API}/openapi.json", "/metrics", "/health", "/health/live", "/health/ready", "/docs"}
    swagger = {path for _, path in served if path.startswith("/docs/")}  # files of Swagger UI
    assert served - documented == {("GET", path) for path in other_paths | swagger}
    assert documented <= served
    assert all(path.startswith(f"{API}/") for _, path in documented)


def test_api10_unsafe_consumption_of_apis(
    keyed_client: Client, session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service reads only answers of webhook receivers: the status, and a delay, which it limits to a day.

    Models come from the source that the operator sets: `tests/unit/test_diffusion_loading`.
    """
    for name in ("ALLOW_HTTP", "ALLOW_PRIVATE"):
        monkeypatch.setenv(f"AFTERIMAGE_WEBHOOKS__{name}", "true")
    get_settings.cache_clear()
    key = a_key(session, "generate")
    moved = {"Location": f"{receiver.url}/elsewhere", "Retry-After": "9" * 400, "X-Note": "<script>"}
    receiver.answers = [(307, moved)]
    job_id = new_job(keyed_client, key, webhook={"url": receiver.url})
    keyed_client.post(f"{API}/jobs/{job_id}/cancel", headers=key)
    deliver_due(get_settings().webhooks, stopping=lambda: False)
    assert len(receiver.got) == 1, "a redirect is not followed"
    answer = keyed_client.get(f"{API}/webhooks/deliveries", headers=key)
    (delivery,) = answer.json["items"]
    assert (delivery["state"], delivery["last_status"]) == ("pending", 307)
    assert datetime.fromisoformat(delivery["due_at"]) < datetime.now(UTC) + timedelta(days=1, minutes=1)
    assert "script" not in answer.text
    assert session.get_one(Job, UUID(job_id)).state == JobState.CANCELED
