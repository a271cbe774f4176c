"""The protection of users whose browser also runs pages of other origins."""

import base64
import hashlib
import re
from collections.abc import Callable

import pytest

from api_service.app import create_app
from shared.errors import ConfigurationError
from shared.settings import get_settings, load_settings
from tests.integration.conftest import API, Client

ELSEWHERE = "https://studio.example"


@pytest.fixture
def with_origins(client: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Client]:
    """`with_origins(ELSEWHERE)`: a client of the API whose answers pages of that origin may read."""

    def create_client(*origins: str, keys: bool = False) -> Client:
        monkeypatch.setenv("AFTERIMAGE_SECURITY__CORS_ORIGINS", str(list(origins)).replace("'", '"'))
        monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", str(keys).lower())
        get_settings.cache_clear()
        return create_app(get_settings()).test_client()

    return create_client


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", f"{API}/jobs", 200),
        ("GET", f"{API}/jobs/x", 422),
        ("GET", "/nothing", 404),
        ("PUT", f"{API}/jobs", 405),
        ("GET", "/metrics", 200),
        ("GET", "/health/live", 200),
    ],
)
def test_every_answer_carries_the_security_headers(client: Client, method: str, path: str, status: int) -> None:
    answer = client.open(path, method=method)
    assert answer.status_code == status
    assert answer.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    if status >= 400:
        assert answer.headers["Cache-Control"] == "no-store"


def test_swagger_ui_may_run_its_own_inline_script_and_no_other(client: Client) -> None:
    answer = client.get("/docs/swagger")
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    directives = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert directives["script-src"] == f"'self' 'sha256-{digest}'"
    assert directives["default-src"] == "'self'"
    assert directives["frame-ancestors"] == "'none'"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"


def test_only_pages_of_configured_origins_may_read_answers(client: Client, with_origins: Callable[..., Client]) -> None:
    def allowed_origin(client: Client, origin: str) -> str | None:
        allowed: str | None = client.get(f"{API}/models", headers={"Origin": origin}).headers.get(
            "Access-Control-Allow-Origin"
        )
        return allowed

    assert allowed_origin(client, ELSEWHERE) is None
    opened = with_origins(ELSEWHERE)
    assert allowed_origin(opened, ELSEWHERE) == ELSEWHERE
    assert allowed_origin(opened, "https://studio.example.evil.example") is None
    assert allowed_origin(opened, "https://studioxexample") is None
    answer = opened.get(f"{API}/models", headers={"Origin": ELSEWHERE})
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert {"Retry-After", "X-Request-ID"} <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))


def test_a_preflight_needs_no_key_and_the_request_after_it_does(with_origins: Callable[..., Client]) -> None:
    client = with_origins(ELSEWHERE, keys=True)
    preflight_headers = {"Origin": ELSEWHERE, "Access-Control-Request-Method": "POST"}
    headers = preflight_headers | {"Access-Control-Request-Headers": "authorization, content-type"}
    preflight = client.options(f"{API}/generate", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["Access-Control-Allow-Origin"] == ELSEWHERE
    assert "authorization" in preflight.headers["Access-Control-Allow-Headers"].lower()
    refused = client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Origin": ELSEWHERE})
    assert refused.status_code == 401
    assert refused.headers["Access-Control-Allow-Origin"] == ELSEWHERE, "so that the page sees why"


@pytest.mark.parametrize("origin", ["studio.example", "https://studio.example/", "https://.*", "https://a b", "null"])
def test_an_invalid_cors_origin_stops_the_start(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="cors_origins"):
        load_settings(security={"cors_origins": [origin]})


def test_without_keys_the_service_answers_only_to_its_own_host_names(client: Client) -> None:
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get(f"{API}/models", headers={"Host": host}).status_code == 200, host
    for host in ("rebound.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "[::1", "a b"):
        answer = client.get(f"{API}/models", headers={"Host": host})
        assert (answer.status_code, answer.json["code"]) == (403, "forbidden"), host


@pytest.mark.parametrize(
    "origin", [ELSEWHERE, "null", "http://[", "http://localhost:9999", "http://localhost.evil.example"]
)
def test_without_keys_a_page_of_another_origin_changes_nothing(client: Client, origin: str) -> None:
    job = client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Origin": "http://localhost"}).json
    # A browser sends such a request without a preflight.
    answer = client.post(f"{job['url']}/cancel", headers={"Origin": origin})
    assert (answer.status_code, answer.json["code"]) == (403, "forbidden")
    assert client.get(job["url"]).json["state"] == "queued"
    assert client.get(job["url"], headers={"Origin": origin}).status_code == 200, "it cannot read the answer"


def test_with_keys_neither_host_name_nor_origin_is_checked(with_origins: Callable[..., Client]) -> None:
    client = with_origins(keys=True)
    answer = client.post(f"{API}/generate", json={}, headers={"Host": "api.example", "Origin": ELSEWHERE})
    assert answer.status_code == 401


def test_a_request_cannot_inject_response_headers(client: Client) -> None:
    for sent in ("a\tb", "a b", "x" * 200, "a\x0bb", "é"):
        assert client.get("/health/live", headers={"X-Request-ID": sent}).headers["X-Request-ID"] != sent
    answer = client.get(f"{API}/jobs/%0d%0aX-Injected:%201")
    assert "X-Injected" not in answer.headers
    assert answer.status_code == 422
