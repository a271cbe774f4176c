"""The planner against a real HTTP server: good answers are used, and all others leave the prompt to the rules."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shared import prompt_planner
from shared.concepts import split_prompt
from shared.metrics import PLANNER_ANSWERS
from shared.settings import PlannerSettings, Settings
from tests.conftest import forget_process_resources

PROMPT = "a heron and a rusty bicycle"
BY_RULES = split_prompt(PROMPT)
KEY = "sk-very-secret-key"


class Endpoint:
    """A chat endpoint on loopback. `answer` writes its answer, and `requests` keeps what it received."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.released = threading.Event()
        self.answer: Callable[[BaseHTTPRequestHandler], None] = lambda handler: reply(handler, completion(["x"]))


@pytest.fixture
def endpoint(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """An endpoint that the settings name as planner, with a timeout of 0.5 seconds."""
    endpoint = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            endpoint.requests.append((headers | {"path": self.path}, body))
            with suppress(OSError):
                endpoint.answer(self)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("AFTERIMAGE_PLANNER__URL", f"http://127.0.0.1:{server.server_port}/v1/")
        monkeypatch.setenv("AFTERIMAGE_PLANNER__MODEL", "small-chat")
        monkeypatch.setenv("AFTERIMAGE_PLANNER__API_KEY", KEY)
        monkeypatch.setenv("AFTERIMAGE_PLANNER__TIMEOUT_S", "0.5")
        forget_process_resources()
        yield endpoint
        endpoint.released.set()
        server.shutdown()
        thread.join()
    forget_process_resources()


def completion(concepts: Any) -> bytes:
    return chat(json.dumps({"concepts": concepts}))


def chat(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def reply(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200) -> None:
    handler.send_response(status)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def counted(outcome: str) -> float:
    return float(PLANNER_ANSWERS.labels(outcome=outcome)._value.get())


def test_without_a_url_the_rules_decide(settings: Settings) -> None:
    assert settings.planner.url is None
    assert prompt_planner.concepts_of(PROMPT) == BY_RULES


def test_a_good_answer_is_used_and_remembered(endpoint: Endpoint) -> None:
    endpoint.answer = lambda handler: reply(handler, completion(["a heron", " a rusty bicycle ", "a heron"]))

    assert prompt_planner.concepts_of(PROMPT) == ["a heron", "a rusty bicycle"]
    assert prompt_planner.concepts_of(PROMPT) == ["a heron", "a rusty bicycle"]

    [(headers, body)] = endpoint.requests
    assert headers["path"] == "/v1/chat/completions"
    assert headers["authorization"] == f"Bearer {KEY}"
    assert body["model"] == "small-chat"
    assert body["messages"][-1] == {"role": "user", "content": PROMPT}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 200),
        (b"<html>hello</html>", 200),
        (b'{"choices": []}', 200),
        (chat(None), 200),
        (chat("a heron, a bicycle"), 200),
        (completion([]), 200),
        (completion(["thing"] * 9), 200),
        (completion(["x" * 201]), 200),
        (completion(["a\x00b"]), 200),
        (completion([7]), 200),
        (completion(["a heron"]) + b" " * prompt_planner.MAX_ANSWER_BYTES, 200),
        (completion(["a heron"]), 500),
        (completion(["a heron"]), 302),
    ],
)
def test_a_bad_answer_leaves_the_prompt_to_the_rules(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture, body: bytes, status: int
) -> None:
    endpoint.answer = lambda handler: reply(handler, body, status)
    outcome = "invalid" if status == 200 else "refused"
    before = counted(outcome)

    with caplog.at_level(logging.WARNING):
        assert prompt_planner.concepts_of(PROMPT) == BY_RULES

    assert counted(outcome) == before + 1
    [line] = [record for record in caplog.records if record.message == "planner_failed"]
    assert KEY not in str(vars(line))
    assert PROMPT not in str(vars(line))


def drip_head(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-drip: ")
    while not endpoint.released.wait(0.05):
        handler.wfile.write(b"a")


def drip_body(endpoint: Endpoint, handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not endpoint.released.wait(0.05):
        handler.wfile.write(b" ")


def say_nothing(endpoint: Endpoint, _: BaseHTTPRequestHandler) -> None:
    endpoint.released.wait(20)


@pytest.mark.parametrize("late", [say_nothing, drip_head, drip_body])
def test_a_late_answer_is_not_waited_for(
    endpoint: Endpoint, late: Callable[[Endpoint, BaseHTTPRequestHandler], None]
) -> None:
    endpoint.answer = lambda handler: late(endpoint, handler)
    before, started = counted("timeout"), time.monotonic()

    assert prompt_planner.concepts_of(PROMPT) == BY_RULES

    assert time.monotonic() - started < 2
    assert counted("timeout") == before + 1


def test_after_a_failure_the_endpoint_is_left_alone_for_a_while(endpoint: Endpoint) -> None:
    endpoint.answer = lambda handler: reply(handler, b"no", 500)
    prompt_planner.concepts_of(PROMPT)

    assert prompt_planner.concepts_of("a crane, a bus") == split_prompt("a crane, a bus")
    assert len(endpoint.requests) == 1


def test_after_the_pause_the_endpoint_is_asked_again(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_PLANNER__PAUSE_S", "0")
    forget_process_resources()
    endpoint.answer = lambda handler: reply(handler, b"no", 500)
    prompt_planner.concepts_of(PROMPT)
    endpoint.answer = lambda handler: reply(handler, completion(["a heron"]))

    assert prompt_planner.concepts_of(PROMPT) == ["a heron"]


def test_a_dead_port_leaves_the_prompt_to_the_rules(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_PLANNER__URL", "http://127.0.0.1:1/v1")
    forget_process_resources()
    before = counted("unreachable")

    assert prompt_planner.concepts_of(PROMPT) == BY_RULES
    assert counted("unreachable") == before + 1


@pytest.mark.parametrize(
    "values",
    [
        {"url": "http://127.0.0.1:1/v1"},
        {"url": "ftp://host/v1", "model": "m"},
        {"url": "http://", "model": "m"},
        {"url": "http://user:password@host/v1", "model": "m"},
        {"url": "http://host:port/v1", "model": "m"},
    ],
)
def test_a_wrong_url_stops_the_start(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"url|model"):
        PlannerSettings.model_validate(values)
