"""The client against a server with scripted answers: retries, errors, streams and downloads."""

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
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import httpx
import pytest

from afterimage_client import (
    Afterimage,
    AfterimageError,
    CorruptDownloadError,
    GenerateRequest,
    InvalidRequestError,
    JobState,
    JobView,
    Mode,
    NotFoundError,
    OutputView,
    QueueFullError,
    RagGenerateRequest,
    ServerError,
    UnreachableError,
    WaitTimeoutError,
)
from ops.local.stack import REPOSITORY
from shared.contracts.outputs import OutputQuery

NOW = "2026-01-01T00:00:00Z"
JOB = UUID(int=1)


@dataclass
class Answer:
    """One answer of the server.

    cut: the connection breaks after this many bytes of the body; with -1, before any answer.
    """

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


class ScriptedServer:
    """A real HTTP server that gives prepared answers in turn and records the requests."""

    def __init__(self, answers: list[Answer]) -> None:
        self.requests: list[Request] = []
        remaining, requests, lock = iter(answers), self.requests, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    requests.append(
                        Request(self.command, self.path, dict(self.headers.items()), body, time.monotonic())
                    )
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
    """`script(answer, ...)` gives a client of a server with these answers, and the list of requests that it gets."""
    opened: list[Any] = []

    def start(*answers: Answer, **options: Any) -> tuple[Afterimage, list[Request]]:
        server = ScriptedServer(list(answers))
        client = Afterimage(server.url, **({"retry_for_s": 10} | options))
        opened.extend((client, server))
        return client, server.requests

    yield start
    for each in opened:
        each.close()


# --- retries ------------------------------------------------------------------------------------------------------


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
def test_a_submit_is_repeated_with_the_same_idempotency_key(script: Script, failure: Answer) -> None:
    client, requests = script(failure, Answer(202, job_body()))
    assert client.jobs.submit(RagGenerateRequest(prompt="p", seed=7)).id == JOB
    keys = {request.headers["Idempotency-Key"] for request in requests}
    assert len(requests) == 2
    assert len(keys) == 1
    assert {request.path for request in requests} == {"/api/v1/rag/generate"}
    assert {request.body for request in requests} == {b'{"prompt":"p","seed":7}'}, (
        "only the given fields, the same each time"
    )


def test_two_submits_have_two_keys_and_a_given_key_is_kept(script: Script) -> None:
    client, requests = script(*[Answer(202, job_body())] * 3)
    for key in (None, None, "mine"):
        client.jobs.submit(GenerateRequest(prompt="p"), idempotency_key=key)
    keys = [request.headers["Idempotency-Key"] for request in requests]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


@pytest.mark.parametrize("as_date", [False, True])
def test_the_client_waits_for_the_time_in_retry_after(script: Script, as_date: bool) -> None:
    # A date has whole seconds: 2 s from now may be little more than one.
    advice = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "1"
    client, requests = script(problem(503, "queue_full", Retry_After=advice), Answer(202, job_body()))
    client.jobs.submit(GenerateRequest(prompt="p"))
    assert requests[1].at - requests[0].at >= 0.9


def test_a_retry_after_beyond_retry_for_s_fails_at_once(script: Script) -> None:
    client, requests = script(problem(503, "queue_full", Retry_After="30"))
    with pytest.raises(QueueFullError) as failed:
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert failed.value.retry_after_s == 30
    assert len(requests) == 1


@pytest.mark.parametrize("status", [400, 409, 422, 500])
def test_a_permanent_error_is_not_retried(script: Script, status: int) -> None:
    client, requests = script(problem(status, "some_code"))
    with pytest.raises(ServerError if status == 500 else AfterimageError):
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert len(requests) == 1


def test_the_retry_of_a_job_is_never_sent_twice(script: Script) -> None:
    client, requests = script(Answer(cut=-1), problem(503, "database_unavailable", Retry_After="0"))
    with pytest.raises(UnreachableError):
        client.jobs.retry(JOB)
    assert len(requests) == 1


def test_a_repeated_delete_that_finds_nothing_has_succeeded(script: Script) -> None:
    client, _ = script(Answer(cut=-1), problem(404, "not_found"), problem(404, "not_found"))
    client.jobs.delete(JOB)
    with pytest.raises(NotFoundError):
        client.jobs.delete(JOB)


def test_closing_ends_the_retry_pauses_of_other_threads(script: Script) -> None:
    client, requests = script(*[problem(503, "database_unavailable", Retry_After="20")] * 2, retry_for_s=60)
    failed: list[BaseException] = []

    def ask() -> None:
        try:
            client.jobs.get(JOB)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not requests:
        thread.join(0.01)
    client.close()
    thread.join(5)
    assert not thread.is_alive()
    assert failed


def closed_address() -> str:
    """The address of a port where nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://user:secret@127.0.0.1:{listener.getsockname()[1]}"


def test_a_wrong_address_fails_soon_and_is_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    address = closed_address()
    started = time.monotonic()
    with Afterimage(address) as client, pytest.raises(UnreachableError) as failed:
        client.models()
    assert time.monotonic() - started < 10
    (warning,) = caplog.messages
    for shown in (str(failed.value), warning):
        assert address.rpartition("@")[2] in shown
        assert "AFTERIMAGE_URL" in shown
        assert "secret" not in shown


def test_after_an_answer_a_refused_connection_is_retried_all_the_time(script: Script) -> None:
    client, requests = script(Answer(200, job_body()), retry_for_s=60, connect_for_s=0)
    client.jobs.get(JOB)
    tries = 0

    def refuse(request: httpx.Request) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            client.close()
        raise httpx.ConnectError("refused", request=request)

    client._connection.http.event_hooks["request"].append(refuse)
    with pytest.raises(UnreachableError):
        client.jobs.get(JOB)
    assert (tries, len(requests)) == (3, 1)


# --- arguments ----------------------------------------------------------------------------------------------------


def test_outputs_are_listed_by_every_filter_of_the_service(script: Script) -> None:
    client, requests = script(Answer(200, b'{"items": [], "next_cursor": null}'))
    moment = datetime(2026, 11, 1, tzinfo=UTC)
    filters = {
        "words": "red apple",
        "model": "starter",
        "mode": Mode.CAPTION,
        "favourite": True,
        "reference_id": JOB,
        "job_id": JOB,
        "bulk_id": JOB,
        "created_after": moment,
        "created_before": moment,
    }
    assert list(client.outputs.list(**filters)) == []  # type: ignore[arg-type]  # values of many types
    query = parse_qs(urlsplit(requests[0].path).query)
    assert {name: values for name, (values,) in query.items()} == {
        **dict.fromkeys(("reference_id", "job_id", "bulk_id"), str(JOB)),
        **dict.fromkeys(("created_after", "created_before"), moment.isoformat()),
        "words": "red apple",
        "model": "starter",
        "mode": "caption",
        "favourite": "true",
        "limit": "100",
    }
    assert query.keys() - {"limit"} == OutputQuery.model_fields.keys() - {"limit", "cursor"}, "a new filter is missing"


def test_a_resource_is_named_by_its_object_or_by_its_id(script: Script) -> None:
    each = output()
    client, requests = script(*[Answer(202, job_body())] * 3, *[Answer(204, b"")] * 3)
    for named in (each, each.id, str(each.id)):
        client.outputs.replay(named)
    for named in (each, each.id, str(each.id)):
        client.outputs.delete(named)
    assert [request.path for request in requests[:3]] == [f"/api/v1/generations/{each.id}/replay"] * 3
    assert [request.path for request in requests[3:]] == [f"/api/v1/generations/{each.id}"] * 3


def test_an_argument_of_another_type_is_refused_before_a_request(script: Script) -> None:
    job = JobView.model_validate_json(job_body())
    client, requests = script()
    calls: list[Callable[[Any], object]] = [
        client.outputs.get,
        client.outputs.replay,
        client.outputs.remember,
        client.outputs.delete,
        client.images.delete,
        client.bulks.cancel,
        client.bulks.wait,
    ]
    for call in calls:
        with pytest.raises(TypeError, match="JobView"):
            call(job)
    with pytest.raises(TypeError, match="OutputView"):
        client.jobs.get(output())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not an id"):
        client.jobs.get("latest")
    assert requests == []


# --- errors -------------------------------------------------------------------------------------------------------


def test_an_error_has_the_code_and_the_fields_of_the_problem(script: Script) -> None:
    body = json.loads(problem(422, "validation_failed").body)
    body |= {"errors": [{"field": "body.width", "code": "int", "message": "too wide"}], "new_member": 1}
    client, _ = script(Answer(422, json.dumps(body).encode()))
    with pytest.raises(InvalidRequestError, match=r"body\.width: too wide") as failed:
        client.jobs.submit(GenerateRequest(prompt="p"))
    assert (failed.value.code, failed.value.errors[0].field) == ("validation_failed", "body.width")


def test_an_answer_without_a_problem_document_gets_a_code_from_its_status(script: Script) -> None:
    client, _ = script(Answer(418, b"<html>teapot</html>"))
    with pytest.raises(InvalidRequestError) as failed:
        client.jobs.get(JOB)
    assert failed.value.code == "http_418"


def test_unknown_fields_of_a_newer_service_are_ignored(script: Script) -> None:
    client, _ = script(Answer(200, job_body(brand_new="field", progress={"step": 1, "total_steps": 2, "eta": 3})))
    assert client.jobs.get(JOB).progress is not None


# --- the API key --------------------------------------------------------------------------------------------------


def test_the_api_key_is_sent_and_never_shown(script: Script, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client, requests = script(problem(401, "authentication_required"), api_key="ai_very_secret")
    with pytest.raises(AfterimageError) as failed:
        client.jobs.get(JOB)
    assert requests[0].headers["Authorization"] == "Bearer ai_very_secret"
    shown = [repr(client), repr(vars(client)), repr(vars(client._connection.http)), str(failed.value), caplog.text]
    assert "very_secret" not in "".join(shown)


def test_address_and_key_come_from_the_environment(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    here, requests = script(Answer(200, job_body()))
    monkeypatch.setenv("AFTERIMAGE_URL", here.url)
    monkeypatch.setenv("AFTERIMAGE_API_KEY", "from-outside")
    with Afterimage() as client:
        client.jobs.get(JOB)
    assert requests[0].headers["Authorization"] == "Bearer from-outside"


@pytest.mark.parametrize("options", [{"url": "localhost:8000"}, {"url": "ftp://host"}, {"api_key": "two words"}])
def test_invalid_options_are_refused_at_once_without_showing_the_key(options: dict[str, str]) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        Afterimage(**options)  # type: ignore[arg-type]
    assert "two words" not in str(refused.value)


# --- following a job ----------------------------------------------------------------------------------------------


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


def test_a_broken_stream_is_resumed_after_the_last_event(script: Script) -> None:
    client, requests = script(
        stream((1, "queued"), (2, "started"), (0, "progress"), cut=True),
        Answer(cut=-1),
        problem(503, "database_unavailable", Retry_After="0"),
        stream((3, "succeeded")),
    )
    updates = list(client.jobs.follow(JOB))
    assert [update.seq for update in updates] == [1, 2, 2, 3]
    assert [update.progress is not None for update in updates] == [False, False, True, False]
    assert updates[-1].state is JobState.SUCCEEDED
    assert [request.headers["Last-Event-ID"] for request in requests] == ["0", "2", "2", "2"]


def test_previews_are_reported_and_unknown_events_are_ignored(script: Script) -> None:
    def event_text(seq: int, kind: str, **more: Any) -> str:
        data = {"seq": seq, "type": kind, "at": NOW, "data": {}, **more}
        return f"id: {seq}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"

    preview = {"index": 0, "step": 1, "total_steps": 4, "image": "data:image/jpeg;base64,"}
    text = event_text(1, "queued", new_field=1)
    text += f"event: preview\ndata: {json.dumps(preview)}\n\n"
    text += event_text(2, "teleported") + event_text(3, "succeeded")
    body = text.encode()
    client, _ = script(Answer(200, body, {"Content-Type": "text/event-stream"}))
    updates = list(client.jobs.follow(JOB))
    assert [(update.seq, update.preview is not None) for update in updates] == [(1, False), (1, True), (3, False)]


def test_without_a_stream_the_client_polls(script: Script) -> None:
    client, requests = script(
        problem(503, "too_many_streams", Retry_After="30"),
        Answer(200, job_body("queued", 1), {"Preference-Applied": "wait=10"}),
        Answer(200, job_body("processing", 2)),  # the server did not wait: the client pauses before the next request
        Answer(200, job_body("succeeded", 3), {"Preference-Applied": "wait=10"}),
    )
    updates = list(client.jobs.follow(JOB))
    assert [(update.state.value, update.seq) for update in updates] == [
        ("queued", 1),
        ("processing", 2),
        ("succeeded", 3),
    ]
    assert [request.path.partition("?")[2] for request in requests] == ["", "after=0", "after=1", "after=2"]
    assert requests[3].at - requests[2].at >= 0.9


def test_an_ended_job_needs_no_stream(script: Script) -> None:
    client, requests = script(Answer(204, b""), Answer(200, job_body("failed", 4)), Answer(200, job_body("failed", 4)))
    assert client.jobs.wait(JOB).state is JobState.FAILED
    assert requests[0].path == f"/api/v1/jobs/{JOB}/events"


def test_a_wait_ends_at_its_time_limit(script: Script) -> None:
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


def test_a_broken_or_corrupt_download_is_fetched_again(script: Script, tmp_path: Path) -> None:
    wrong = b"THE bytes of an image"
    client, requests = script(Answer(200, CONTENT, cut=5), Answer(200, wrong), Answer(200, CONTENT))
    target = tmp_path / "new" / "image.png"
    client.outputs.download(output(), target)
    assert target.read_bytes() == CONTENT
    assert len(requests) == 3
    assert list(target.parent.iterdir()) == [target]


def test_a_failed_download_keeps_the_existing_file(script: Script, tmp_path: Path) -> None:
    client, _ = script(Answer(200, b"other"), retry_for_s=0)
    target = tmp_path / "image.png"
    target.write_bytes(b"before")
    with pytest.raises(CorruptDownloadError):
        client.outputs.download(output(), target)
    assert target.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [target]


def test_the_client_imports_nothing_of_the_server() -> None:
    heavy = ["torch", "sqlalchemy", "celery", "redis", "flask", "numpy", "PIL", "pydantic_settings", "api_service"]
    program = f"import sys, afterimage_client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
