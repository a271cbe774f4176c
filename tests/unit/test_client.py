"""The client against a server that misbehaves on command: what it repeats, what it does not, what it raises."""

import hashlib
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from afterimage_client import (
    Afterimage,
    AfterimageError,
    CorruptDownloadError,
    GenerateRequest,
    InvalidRequestError,
    JobState,
    NotFoundError,
    OutputView,
    QueueFullError,
    RagGenerateRequest,
    ServerError,
    UnreachableError,
    WaitTimeoutError,
)
from ops.local.stack import REPOSITORY

NOW = "2026-01-01T00:00:00Z"
JOB = UUID(int=1)


@dataclass
class Answer:
    """One answer of the server. `cut`: the connection breaks after so many bytes of the body; -1: before any answer."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


def problem(status: int, code: str, **headers: str) -> Answer:
    body = {"type": f"urn:{code}", "title": "t", "status": status, "code": code, "detail": "d", "request_id": "r"}
    return Answer(status, json.dumps(body).encode(), {name.replace("_", "-"): value for name, value in headers.items()})


def job_body(state: str = "queued", seq: int = 1, **more: Any) -> bytes:
    job = {
        "id": str(JOB),
        "kind": "generate",
        "state": state,
        "lane": "normal",
        "model": "m",
        "prompt": "p",
        "attempt": 1,
        "seq": seq,
        "parameters": {},
        "created_at": NOW,
        "url": "u",
        "events_url": "e",
        **more,
    }
    return json.dumps(job).encode()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float


class Scripted:
    """A real HTTP server that gives prepared answers in turn and remembers what it was asked."""

    def __init__(self, answers: list[Answer]) -> None:
        self.asked: list[Request] = []
        remaining, asked, lock = iter(answers), self.asked, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    asked.append(Request(self.command, self.path, dict(self.headers.items()), body, time.monotonic()))
                    answer = next(remaining)
                self.close_connection = True
                if answer.cut == -1:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer.status)
                headers = {"Content-Length": str(len(answer.body))} | answer.headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(answer.body[: answer.cut])

            do_GET = do_POST = do_DELETE = do_PATCH = answer  # noqa: N815

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


Script = Callable[..., tuple[Afterimage, list[Request]]]


@pytest.fixture
def script() -> Iterator[Script]:
    """`script(answer, ...)`: a client of a server that gives these answers, and what the server was asked."""
    opened: list[Any] = []

    def start(*answers: Answer, **options: Any) -> tuple[Afterimage, list[Request]]:
        server = Scripted(list(answers))
        client = Afterimage(server.url, **({"retry_for_s": 10} | options))
        opened.extend((client, server))
        return client, server.asked

    yield start
    for each in opened:
        each.close()


# --- trying again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        problem(503, "database_unavailable", Retry_After="0"),
        problem(429, "rate_limited", Retry_After="0"),
        Answer(502, b"<html>a proxy</html>"),
        Answer(cut=-1),
        Answer(202, job_body(), cut=20),
    ],
    ids=["503", "429", "proxy", "no answer", "half an answer"],
)
def test_a_submit_is_sent_again_with_the_same_key(script: Script, failure: Answer) -> None:
    client, asked = script(failure, Answer(202, job_body()))
    assert client.jobs.submit(RagGenerateRequest(prompt="p", seed=7)).id == JOB
    keys = {request.headers["Idempotency-Key"] for request in asked}
    assert len(asked) == 2
    assert len(keys) == 1
    assert {request.path for request in asked} == {"/api/v1/rag/generate"}
    assert {request.body for request in asked} == {b'{"prompt":"p","seed":7}'}, "only what was said, the same each time"


def test_two_submits_have_two_keys_and_your_own_is_kept(script: Script) -> None:
    client, asked = script(*[Answer(202, job_body())] * 3)
    for key in (None, None, "mine"):
        client.jobs.submit(GenerateRequest(prompt="p"), idempotency_key=key)
    keys = [request.headers["Idempotency-Key"] for request in asked]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


@pytest.mark.parametrize("as_date", [False, True])
def test_the_time_that_the_service_asks_for_is_waited(script: Script, as_date: bool) -> None:
    # A date has whole seconds: 2 s from now may be little more than one.
    advice = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
    client, asked = script(problem(503, "queue_full", Retry_After=advice), Answer(202, job_body()))
    client.jobs.submit(GenerateRequest(prompt="p"))
    assert asked[1].at - asked[0].at >= 0.9


def test_what_would_have_to_wait_too_long_fails_at_once(script: Script) -> None:
    client, asked = script(problem(503, "queue_full", Retry_After="30"))
    with pytest.raises(QueueFullError) as failed:
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert failed.value.retry_after_s == 30
    assert len(asked) == 1


@pytest.mark.parametrize("status", [400, 409, 422, 500])
def test_what_will_not_change_is_not_sent_again(script: Script, status: int) -> None:
    client, asked = script(problem(status, "some_code"))
    with pytest.raises(ServerError if status == 500 else AfterimageError):
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert len(asked) == 1


def test_a_second_job_is_never_made_by_repeating_a_retry(script: Script) -> None:
    client, asked = script(Answer(cut=-1), problem(503, "database_unavailable", Retry_After="0"))
    with pytest.raises(UnreachableError):
        client.jobs.retry(JOB)
    assert len(asked) == 1


def test_a_delete_that_was_done_by_its_first_try_has_succeeded(script: Script) -> None:
    client, _ = script(Answer(cut=-1), problem(404, "not_found"), problem(404, "not_found"))
    client.jobs.delete(JOB)
    with pytest.raises(NotFoundError):
        client.jobs.delete(JOB)


def test_closing_ends_the_pauses_of_other_threads(script: Script) -> None:
    client, asked = script(*[problem(503, "database_unavailable", Retry_After="20")] * 2, retry_for_s=60)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            client.jobs.get(JOB)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not asked:
        thread.join(0.01)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert failed


# --- errors -------------------------------------------------------------------------------------------------------


def test_a_problem_tells_its_code_and_its_fields(script: Script) -> None:
    body = json.loads(problem(422, "validation_failed").body)
    body |= {"errors": [{"field": "body.width", "code": "int", "message": "too wide"}], "new_member": 1}
    client, _ = script(Answer(422, json.dumps(body).encode()))
    with pytest.raises(InvalidRequestError, match=r"body\.width: too wide") as failed:
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert (failed.value.code, failed.value.errors[0].field) == ("validation_failed", "body.width")


def test_an_answer_that_is_no_problem_document_is_named_by_its_status(script: Script) -> None:
    client, _ = script(Answer(418, b"<html>teapot</html>"))
    with pytest.raises(InvalidRequestError) as failed:
        client.jobs.get(JOB)
    assert failed.value.code == "http_418"


def test_fields_that_a_newer_service_adds_are_passed_over(script: Script) -> None:
    client, _ = script(Answer(200, job_body(brand_new="field", progress={"step": 1, "total_steps": 2, "eta": 3})))
    assert client.jobs.get(JOB).progress is not None


# --- the key ------------------------------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client, asked = script(problem(401, "authentication_required"), api_key="ai_very_secret")
    with pytest.raises(AfterimageError) as failed:
        client.jobs.get(JOB)
    assert asked[0].headers["Authorization"] == "Bearer ai_very_secret"
    shown = [repr(client), repr(vars(client)), repr(vars(client._connection.http)), str(failed.value), caplog.text]
    assert "very_secret" not in "".join(shown)


def test_address_and_key_come_from_the_environment(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    here, asked = script(Answer(200, job_body()))
    monkeypatch.setenv("AFTERIMAGE_URL", here.url)
    monkeypatch.setenv("AFTERIMAGE_API_KEY", "from-outside")
    with Afterimage() as client:
        client.jobs.get(JOB)
    assert asked[0].headers["Authorization"] == "Bearer from-outside"


@pytest.mark.parametrize("options", [{"url": "localhost:8000"}, {"url": "ftp://host"}, {"api_key": "two words"}])
def test_what_can_never_work_is_refused_at_once_without_repeating_the_key(options: dict[str, str]) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Afterimage(**options)  # type: ignore[arg-type]
    assert "two words" not in str(refused.value)


# --- following ----------------------------------------------------------------------------------------------------


def stream(*events: tuple[int, str], cut: bool = False) -> Answer:
    """A stream of events that then ends, or breaks in the middle of a line."""
    text = "retry: 2000\n\n"
    for seq, kind in events:
        if seq:
            data = json.dumps({"seq": seq, "type": kind, "at": NOW, "data": {}})
            text += f"id: {seq}\nevent: {kind}\ndata: {data}\n\n: still here\n\n"
        else:
            text += 'event: progress\ndata: {"step": 3, "total_steps": 4}\n\n'
    body = (text + "event: fail").encode()
    return Answer(200, body + b" " * 9, {"Content-Type": "text/event-stream"}, cut=len(body) if cut else None)


def test_a_broken_stream_is_resumed_after_what_was_heard(script: Script) -> None:
    client, asked = script(
        stream((1, "queued"), (2, "started"), (0, "progress"), cut=True),
        Answer(cut=-1),
        problem(503, "database_unavailable", Retry_After="0"),
        stream((3, "succeeded")),
    )
    updates = list(client.jobs.follow(JOB))
    assert [update.seq for update in updates] == [1, 2, 2, 3]
    assert [update.progress is not None for update in updates] == [False, False, True, False]
    assert updates[-1].state is JobState.SUCCEEDED
    assert [request.headers["Last-Event-ID"] for request in asked] == ["0", "2", "2", "2"]


def test_previews_are_told_and_what_a_newer_service_tells_is_passed_over(script: Script) -> None:
    def told(seq: int, kind: str, **more: Any) -> str:
        data = {"seq": seq, "type": kind, "at": NOW, "data": {}, **more}
        return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"

    preview = {"index": 0, "step": 1, "total_steps": 4, "image": "data:image/jpeg;base64,"}
    text = told(1, "queued", new_field=1)
    text += f"event: preview\ndata: {json.dumps(preview)}\n\n"
    text += told(2, "teleported") + told(3, "succeeded")
    body = text.encode()
    client, _ = script(Answer(200, body, {"Content-Type": "text/event-stream"}))
    updates = list(client.jobs.follow(JOB))
    assert [(update.seq, update.preview is not None) for update in updates] == [(1, False), (1, True), (3, False)]


def test_without_a_stream_it_polls(script: Script) -> None:
    client, asked = script(
        problem(503, "too_many_streams", Retry_After="30"),
        Answer(200, job_body("queued", 1), {"Preference-Applied": "wait=10"}),
        Answer(200, job_body("processing", 2)),  # no place to wait was left: the next is asked after a pause
        Answer(200, job_body("succeeded", 3), {"Preference-Applied": "wait=10"}),
    )
    updates = list(client.jobs.follow(JOB))
    assert [(update.state.value, update.seq) for update in updates] == [
        ("queued", 1),
        ("processing", 2),
        ("succeeded", 3),
    ]
    assert [request.path.partition("?")[2] for request in asked] == ["", "after=0", "after=1", "after=2"]
    assert asked[3].at - asked[2].at >= 0.9


def test_a_job_that_had_ended_needs_no_stream(script: Script) -> None:
    client, asked = script(Answer(204, b""), Answer(200, job_body("failed", 4)), Answer(200, job_body("failed", 4)))
    assert client.jobs.wait(JOB).state is JobState.FAILED
    assert asked[0].path == f"/api/v1/jobs/{JOB}/events"


def test_a_wait_ends_in_time(script: Script) -> None:
    client, _ = script(*[Answer(200, job_body("processing", 2))] * 5)
    started = time.monotonic()
    with pytest.raises(WaitTimeoutError):
        client.jobs.wait(JOB, timeout_s=1.5)
    assert 1.4 < time.monotonic() - started < 6


# --- downloading --------------------------------------------------------------------------------------------------

CONTENT = b"the bytes of an image"


def output(content: bytes = CONTENT) -> OutputView:
    return OutputView(
        id=uuid4(),
        job_id=JOB,
        index=0,
        seed=1,
        width=1,
        height=1,
        format="png",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        created_at=datetime.now(UTC),
        content_url="",
        thumbnail_url="",
        references=[],
        provenance={},
    )


def test_a_download_that_broke_or_was_changed_on_its_way_is_fetched_again(script: Script, tmp_path: Path) -> None:
    wrong = b"THE bytes of an image"
    client, asked = script(Answer(200, CONTENT, cut=5), Answer(200, wrong), Answer(200, CONTENT))
    target = tmp_path / "new" / "image.png"
    client.outputs.download(output(), target)
    assert target.read_bytes() == CONTENT
    assert len(asked) == 3
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_download_leaves_what_was_there(script: Script, tmp_path: Path) -> None:
    client, _ = script(Answer(200, b"other"), retry_for_s=0)
    target = tmp_path / "image.png"
    target.write_bytes(b"before")
    with pytest.raises(CorruptDownloadError):
        client.outputs.download(output(), target)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_the_client_loads_nothing_of_the_server() -> None:
    heavy = ["torch", "sqlalchemy", "celery", "redis", "flask", "numpy", "PIL", "pydantic_settings", "api_service"]
    program = f"import sys, afterimage_client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
