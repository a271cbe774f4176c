"""The API for tests: in this process through Flask's client, or as the real server."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from flask.testing import FlaskClient
from PIL import Image
from sqlalchemy.orm import Session

from api_service.app import create_app
from ops.local.stack import REPOSITORY
from shared.db import keys, owners
from shared.messaging import job_updates, queue
from shared.messaging.coalesce import close_bells
from shared.settings import Settings, get_settings
from tests.stack import wait_until

API = "/api/v1"
Client = Any
"""A FlaskClient, whose answers' `.json` is what a test expects it to be."""


class RungOut(FlaskClient):
    """Answers when everything has been rung for: what a test does not find in the broker then will not come."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().open(*args, **kwargs)
        close_bells()
        return answer


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """A client of the API in this process, on this test's servers."""
    app = create_app(settings)
    app.test_client_class = RungOut
    yield app.test_client()
    job_updates.close_subscriber()
    app.extensions["decoder"].close()


@pytest.fixture
def guarded(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """The API with keys required."""
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    get_settings.cache_clear()
    app = create_app(get_settings())
    yield app.test_client()
    job_updates.close_subscriber()
    app.extensions["decoder"].close()


def a_key(session: Session, *scopes: str, owner: str = "team") -> dict[str, str]:
    _, secret = keys.create(session, owners.ensure(session, owner), name="test", scopes=frozenset(scopes))
    session.commit()
    return {"Authorization": f"Bearer {secret}"}


@dataclass(frozen=True)
class Server:
    url: str
    process: "subprocess.Popen[bytes]"


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    """`python -m api_service` on a free port, with this test's settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "AFTERIMAGE_API__PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "api_service"], cwd=REPOSITORY, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(url) or process.poll() is not None, timeout_s=60, what="the API to answer")
        assert process.poll() is None
        yield Server(url, process)
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=1).is_success
    except httpx.TransportError:
        return False


@dataclass
class Receiver:
    """A receiver that answers what the test tells it, and keeps what it got."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    hanging: bool = False


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if receiver.hanging:
                receiver.release.wait(20)
            status, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://localhost:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver
        receiver.release.set()
        server.shutdown()
        thread.join()


def messages(queue_name: str) -> list[Any]:
    """What waits in a Celery queue, each of whose priorities is a list of its own."""
    keys = queue.broker().scan_iter(f"{queue_name}*", _type="list")
    return [json.loads(message) for key in keys for message in queue.broker().lrange(key, 0, -1)]


def picture(colour: str = "red", *, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()
