"""The OWASP API Security Top 10 (2023), row by row, as two owners and keys of different scopes meet it over HTTP.

https://owasp.org/API-Security/editions/2023/en/0x11-t10/. Every row applies. Each test here was seen to fail with its
guard taken away; what a guard does in detail is tested where it lives: owners in `test_api_owners`, keys in
`test_api_keys` and `test_api_admin`, limits in `test_api_limits`, uploads in `test_api_requests`, webhooks' targets in
`tests/unit/test_outbound`, browsers in `test_api_browsers`.
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
    "webhooks": "generate",
    "search": "search",
    "admin": "admin",
}
"""What each group of operations asks of a key, written down a second time; images depend on the method."""


def new_job(client: Client, key: Key, **request: Any) -> str:
    answer = client.post(f"{API}/generate", json={"prompt": "a secret", **request}, headers=key)
    assert answer.status_code == 202, answer.text
    return str(answer.json["id"])


def refused(answer: Any, status: int, code: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.json["code"] == code


def operations(client: Client) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Method, path with some id in it, and description of all that the document names."""
    for path, methods in client.get(f"{API}/openapi.json").json["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), re.sub(r"\{\w+\}", str(uuid4()), path), operation


def test_api1_broken_object_level_authorization(guarded: Client, session: Session) -> None:
    """Who knows the id of another owner's object reads, changes and deletes nothing of it."""
    mine, theirs = a_key(session, "generate", owner="mine"), a_key(session, "generate", owner="theirs")
    job = f"{API}/jobs/{new_job(guarded, mine)}"
    for method, path in [("GET", job), ("GET", f"{job}/events"), ("POST", f"{job}/cancel"), ("DELETE", job)]:
        refused(guarded.open(path, method=method, headers=theirs), 404, "not_found")
    assert guarded.get(job, headers=mine).json["state"] == "queued"


def test_api2_broken_authentication(guarded: Client, session: Session) -> None:
    """A key counts as it was given out, in its one place, until it ends; a stolen database holds none."""
    key = a_key(session, "generate")
    secret = key["Authorization"].removeprefix("Bearer ")
    assert guarded.get(f"{API}/jobs", headers=key).status_code == 200
    for header in (f"Bearer {secret[:-1]}", f"Bearer {secret.swapcase()}", f"Basic {secret}", secret, "Bearer "):
        refused(guarded.get(f"{API}/jobs", headers={"Authorization": header}), 401, "authentication_required")
    refused(guarded.get(f"{API}/jobs?api_key={secret}"), 401, "authentication_required")
    row = session.query(ApiKey).one()
    assert secret not in str(vars(row))

    admin = a_key(session, "admin", owner="operators")
    assert guarded.post(f"{API}/admin/keys/{row.id}/revoke", headers=admin).status_code == 200
    refused(guarded.get(f"{API}/jobs", headers=key), 401, "authentication_required")


def test_api3_broken_object_property_level_authorization(guarded: Client, session: Session) -> None:
    """Nothing that is not a client's to say is taken from it, and nothing that is not its to know is told."""
    key = a_key(session, "generate", "search", "corpus:write")
    for field, value in {"owner_id": str(uuid4()), "state": "succeeded", "id": str(uuid4()), "attempt": 0}.items():
        refused(
            guarded.post(f"{API}/generate", json={"prompt": "x", field: value}, headers=key), 422, "validation_failed"
        )
    guarded.environ_base["HTTP_AUTHORIZATION"] = key["Authorization"]
    image = upload(guarded, picture()).json["images"][0]
    for field, value in {"state": "ready", "collection": "private", "sha256": "0" * 64, "blob_key": "x"}.items():
        refused(guarded.patch(image["url"], json={field: value}), 422, "validation_failed")
    job = guarded.get(f"{API}/jobs/{new_job(guarded, key, webhook={'url': 'https://receiver.example/s3cret'})}")
    for answer in (job, guarded.get(image["url"]), guarded.get(f"{API}/images"), guarded.get(f"{API}/jobs")):
        assert not re.search(r"owner_id|blob_key|whsec|secret_sha256|s3cret", answer.text)
    listed = guarded.get(f"{API}/admin/keys", headers=a_key(session, "admin", owner="operators"))
    assert not re.search(r"secret|sha256", listed.text)


def test_api4_unrestricted_resource_consumption(
    guarded: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request costs only so much, one key asks only so often, and others do not feel it."""
    key, other = a_key(session, "generate", "search", "corpus:write"), a_key(session, "generate", owner="other")
    for field, most in {"num_images": 16, "width": 2048, "num_inference_steps": 150, "timeout_s": 86_400}.items():
        answer = guarded.post(f"{API}/generate", json={"prompt": "x", field: most + 1}, headers=key)
        assert [error["field"] for error in answer.json["errors"]] == [f"body.{field}"]
    refused(guarded.get(f"{API}/jobs?limit=101", headers=key), 422, "validation_failed")
    too_much = b"{" + bytes(get_settings().api.max_body_bytes)
    answer = guarded.post(f"{API}/generate", data=too_much, content_type="application/json", headers=key)
    refused(answer, 413, "body_too_large")

    monkeypatch.setenv("AFTERIMAGE_LIMITS__WRITES_PER_MINUTE", "2")
    get_settings.cache_clear()
    limited = create_app(get_settings()).test_client()
    statuses = [limited.post(f"{API}/generate", json={"prompt": "x"}, headers=key).status_code for _ in range(3)]
    assert statuses == [202, 202, 429]
    assert limited.post(f"{API}/generate", json={"prompt": "x"}, headers=other).status_code == 202


def test_api5_broken_function_level_authorization(guarded: Client, session: Session) -> None:
    """A key with every scope but the one that an operation needs cannot call it, whichever operation it is."""
    without = {scope: a_key(session, *(other for other in keys.SCOPES if other != scope)) for scope in keys.SCOPES}
    free = set()
    for method, path, operation in operations(guarded):
        (tag,) = operation["tags"]
        scope = ("search" if method == "GET" else "corpus:write") if tag == "images" else SCOPE_OF_TAG.get(tag)
        if scope is None:
            free.add(operation["operationId"])
        else:
            refused(guarded.open(path, method=method, headers=without[scope]), 403, "forbidden")
    assert free == {"getHealth", "getLiveness", "getReadiness", "listModels", "getStats", "getUsage"}


def test_api6_unrestricted_access_to_sensitive_business_flows(
    guarded: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flow worth automating is drawing images: an owner's quota holds over all its keys and ways to ask."""
    monkeypatch.setenv("AFTERIMAGE_LIMITS__DAILY_IMAGES", "3")
    get_settings.cache_clear()
    one, another = a_key(session, "generate"), a_key(session, "generate")
    new_job(guarded, one, num_images=2)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"json": {"prompt": "x", "num_images": 2}}),
        ("/rag/generate", {"json": {"prompt": "x", "num_images": 2}}),
        ("/bulks", {"data": b'{"prompt": "x"}\n{"prompt": "y"}\n', "content_type": "application/jsonl"}),
    ]
    for path, sent in ways:
        refused(guarded.post(API + path, headers=another, **sent), 429, "quota_exceeded")
    new_job(guarded, another, num_images=1)
    new_job(guarded, a_key(session, "generate", owner="other"), num_images=2)


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
def test_api7_server_side_request_forgery(guarded: Client, session: Session, url: str) -> None:
    """A webhook is the only address that a user names and this service calls."""
    key = a_key(session, "generate")
    for path in ("/generate", "/rag/generate"):
        answer = guarded.post(API + path, json={"prompt": "x", "webhook": {"url": url}}, headers=key)
        refused(answer, 422, "forbidden_target")
    lines = f'{{"bulk": {{"webhook": {{"url": "{url}"}}}}}}\n{{"prompt": "x"}}\n'.encode()
    answer = guarded.post(f"{API}/bulks", data=lines, content_type="application/jsonl", headers=key)
    refused(answer, 422, "forbidden_target")


def test_api7_a_name_for_a_private_address_is_not_called(
    guarded: Client, session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEBHOOKS__ALLOW_HTTP", "true")
    get_settings.cache_clear()
    key = a_key(session, "generate")
    job_id = new_job(guarded, key, webhook={"url": receiver.url})  # http://localhost
    guarded.post(f"{API}/jobs/{job_id}/cancel", headers=key)
    deliver_due(get_settings().webhooks, stopping=lambda: False)
    (delivery,) = guarded.get(f"{API}/webhooks/deliveries", headers=key).json["items"]
    assert (delivery["attempts"], delivery["state"]) == (1, "pending")
    assert receiver.got == []


def test_api8_security_misconfiguration(guarded: Client, session: Session) -> None:
    """Answers tell browsers to do nothing, other origins nothing at all, and of a fault only that it was one."""

    def crash() -> None:
        raise RuntimeError("postgresql://user:password@host")

    guarded.application.view_functions["document"] = crash
    elsewhere = {"Origin": "https://elsewhere.example"}
    answers = [
        guarded.get(f"{API}/openapi.json", headers=elsewhere),
        guarded.get(f"{API}/jobs", headers=elsewhere),
        guarded.get("/nothing", headers=elsewhere),
        guarded.open(f"{API}/jobs", method="TRACE", headers=elsewhere),
        guarded.get(f"{API}/jobs", headers=elsewhere | a_key(session, "generate")),
    ]
    assert [answer.status_code for answer in answers] == [500, 401, 404, 405, 200]
    for answer in answers:
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["Content-Security-Policy"]
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert not re.search(r"password|Traceback|RuntimeError|site-packages", answer.text)


def test_api9_improper_inventory_management(guarded: Client) -> None:
    """One version is served, all of it is documented, and what stands beside it is named here.

    (Studio's pages are no API; who may open each of them: `test_studio`.)
    """
    documented = {
        (method.upper(), re.sub(r"\{(\w+)\}", r"<\1>", path))
        for path, methods in guarded.get(f"{API}/openapi.json").json["paths"].items()
        for method in methods
    }
    served = {
        (method, rule.rule)
        for rule in guarded.application.url_map.iter_rules()
        if not rule.endpoint.startswith("studio")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    beside = {f"{API}/openapi.json", "/metrics", "/health", "/health/live", "/health/ready", "/docs"}
    swagger = {path for _, path in served if path.startswith("/docs/")}  # files of Swagger UI
    assert served - documented == {("GET", path) for path in beside | swagger}
    assert documented <= served
    assert all(path.startswith(f"{API}/") for _, path in documented)


def test_api10_unsafe_consumption_of_apis(
    guarded: Client, session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only others whose answers are read are webhooks' receivers: their status, and how long to wait, within a day.

    (Models come from where the operator says: `tests/unit/test_diffusion_loading`.)
    """
    for name in ("ALLOW_HTTP", "ALLOW_PRIVATE"):
        monkeypatch.setenv(f"AFTERIMAGE_WEBHOOKS__{name}", "true")
    get_settings.cache_clear()
    key = a_key(session, "generate")
    moved = {"Location": f"{receiver.url}/elsewhere", "Retry-After": "9" * 400, "X-Note": "<script>"}
    receiver.answers = [(307, moved)]
    job_id = new_job(guarded, key, webhook={"url": receiver.url})
    guarded.post(f"{API}/jobs/{job_id}/cancel", headers=key)
    deliver_due(get_settings().webhooks, stopping=lambda: False)
    assert len(receiver.got) == 1, "a redirect leads nowhere"
    answer = guarded.get(f"{API}/webhooks/deliveries", headers=key)
    (delivery,) = answer.json["items"]
    assert (delivery["state"], delivery["last_status"]) == ("pending", 307)
    assert datetime.fromisoformat(delivery["due_at"]) < datetime.now(UTC) + timedelta(days=1, minutes=1)
    assert "script" not in answer.text
    assert session.get_one(Job, UUID(job_id)).state == JobState.CANCELED
