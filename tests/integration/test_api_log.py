"""The job and the error in the log line of a request."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.contextvars import get_contextvars

from tests.integration.conftest import API, Client

Lines = list[dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    """The fields of each request's line, with the ids that were bound when it was written."""
    lines: Lines = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(get_contextvars() | vars(record))

    logger, collector = logging.getLogger("api_service.app"), Collector()
    level = logger.level
    logger.addHandler(collector)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(collector)
    logger.setLevel(level)


def send(client: Client, method: str, path: str, **request: Any) -> Any:
    answer = client.open(f"{API}{path}", method=method, **request)
    answer.close()
    return answer


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/jobs/00000000-0000-4000-8000-000000000009", None, 404, "not_found"),
        ("POST", "/generate", {"prompt": ""}, 422, "validation_failed"),
        ("POST", "/generate", {"prompt": "a cat", "model": "none"}, 422, "model_not_found"),
        ("PUT", "/generate", None, 405, "method_not_allowed"),
        ("GET", "/nothing", None, 404, "not_found"),
    ],
)
def test_a_refused_request_is_logged_with_its_code(
    client: Client, lines: Lines, method: str, path: str, body: Any, status: int, code: str
) -> None:
    answer = send(client, method, path, json=body)
    assert (answer.status_code, answer.json["code"]) == (status, code)
    (line,) = lines
    assert (line["msg"], line["status"], line["code"]) == ("request", status, code)


def test_an_unexpected_error_is_logged_with_its_code(client: Client, lines: Lines) -> None:
    def crash() -> None:
        raise RuntimeError

    client.application.view_functions["document"] = crash
    send(client, "GET", "/openapi.json")
    (line,) = lines
    assert (line["status"], line["code"]) == (500, "internal_error")


def test_an_answered_request_has_no_code(client: Client, lines: Lines) -> None:
    send(client, "GET", "/jobs")
    (line,) = lines
    assert "code" not in line
    assert "job_id" not in line


def test_a_submit_is_logged_with_its_job(client: Client, lines: Lines) -> None:
    key = {"Idempotency-Key": "order-17"}
    first = send(client, "POST", "/generate", json={"prompt": "a cat"}, headers=key).json["id"]
    send(client, "POST", "/generate", json={"prompt": "a cat"}, headers=key)
    send(client, "POST", f"/jobs/{first}/cancel")
    retry = send(client, "POST", f"/jobs/{first}/retry").json["id"]
    submitted, again, _, retried = (line.get("job_id") for line in lines)
    assert (submitted, again, retried) == (first, first, retry)
