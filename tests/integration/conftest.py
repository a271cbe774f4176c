"""The API for tests: in this process through Flask's client, or as the real server."""

import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from flask import Flask
from flask.testing import FlaskClient
from PIL import Image
from psycopg2 import extensions
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from api_service.app import create_app
from ops.local.stack import REPOSITORY, LocalStack
from shared.db import keys, owners, spaces
from shared.db.session import session_scope
from shared.imaging import UploadDecoder
from shared.messaging import job_updates, queue
from shared.messaging.coalesce import close_notifiers
from shared.settings import APISettings, ModelSettings, Settings, get_settings
from tests.conftest import emptied, fresh_database, process_settings
from tests.stack import wait_until

if TYPE_CHECKING:
    from tests.recording_generator import RecordingGenerator
    from worker_service.jobs.leases import JobLeases
    from worker_service.models.clip import Clip
    from worker_service.models.worker_models import Models

API = "/api/v1"
Client = Any
"""A FlaskClient. It is `Any`, so that tests can use the `.json` of an answer without casts."""


class FlushingClient(FlaskClient):
    """A client that sends all coalesced notifications before it returns, so that every message is in the broker."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        answer = super().open(*args, **kwargs)
        close_notifiers()
        return answer


@pytest.fixture(scope="session")
def decoders() -> Iterator[Callable[[APISettings], UploadDecoder]]:
    """Decoders by their settings. Their child processes take a quarter of a second to start, so tests share them."""
    started: dict[str, UploadDecoder] = {}

    def decoder(settings: APISettings) -> UploadDecoder:
        key = settings.model_dump_json()
        if key not in started:
            started[key] = UploadDecoder(settings)
        return started[key]

    yield decoder
    for each in started.values():
        each.close()


AppFactory = Callable[[Settings], Flask]


@pytest.fixture
def new_app(decoders: Callable[[APISettings], UploadDecoder]) -> Iterator[AppFactory]:
    """`new_app(settings)`: the API in this process."""

    def new_app(settings: Settings) -> Flask:
        app = create_app(settings)
        app.extensions["decoder"].close()
        app.extensions["decoder"] = decoders(settings.api)
        return app

    yield new_app
    job_updates.close_subscriber()


@pytest.fixture
def client(settings: Settings, new_app: AppFactory) -> Client:
    """A client of the API in this process, on this test's servers."""
    app = new_app(settings)
    app.test_client_class = FlushingClient
    return app.test_client()


@pytest.fixture
def keyed_client(settings: Settings, new_app: AppFactory, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client of the API in this process, with API keys required."""
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    get_settings.cache_clear()
    return new_app(get_settings()).test_client()


def a_key(session: Session, *scopes: str, owner: str = "team") -> dict[str, str]:
    _, secret = keys.create(session, owners.ensure(session, owner), name="test", scopes=frozenset(scopes))
    session.commit()
    return {"Authorization": f"Bearer {secret}"}


# --- parts of workers. Torch takes seconds to import, so only the tests that need it import it ----------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> "Clip":
    """A small CLIP with random weights."""
    from tests.small_pipelines import save_clip
    from worker_service.models.clip import Clip

    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return Clip.load(ModelSettings.model_validate({"clip": {"model": f"local-dir:{folder}"}}))


@pytest.fixture
def model(settings: Settings) -> "RecordingGenerator":
    from tests.recording_generator import RecordingGenerator

    return RecordingGenerator(settings.model)


@pytest.fixture
def models(settings: Settings, session: Session, clip: "Clip", model: "RecordingGenerator") -> Iterator["Models"]:
    """The models of a generate worker: `clip`, whose space is the active one, and `model`."""
    from worker_service.execution.watchdog import Watchdog
    from worker_service.models.embedder import Embedder
    from worker_service.models.worker_models import Models

    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    models = Models.of(Embedder(clip, space, watchdog), model, settings.model.generators["cheap"], watchdog)
    yield models
    models.close(5)


@pytest.fixture
def leases(settings: Settings) -> Iterator["JobLeases"]:
    from worker_service.jobs.leases import JobLeases

    with JobLeases(settings.jobs) as leases:
        yield leases


# --- servers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    url: str
    process: "subprocess.Popen[bytes]"


@pytest.fixture
def server(settings: Settings) -> Iterator[Server]:
    """`python -m api_service` on a free port, with this test's settings."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="module")
def shared_server(servers: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with default settings and one database, for those tests of a module that leave it running.

    This process has the same settings, in tests without the fixture `settings`.
    """
    environment = servers.environment()
    redis_urls = emptied(environment["AFTERIMAGE_QUEUE__URL"]), emptied(environment["AFTERIMAGE_CACHE__URL"])
    with (
        fresh_database(servers) as postgres_url,
        pytest.MonkeyPatch.context() as patch,
        process_settings(patch, postgres_url, *redis_urls, tmp_path_factory.mktemp("shared") / "blobs"),
        running_server() as server,
    ):
        yield server


@contextmanager
def running_server() -> Iterator[Server]:
    """Run `python -m api_service` on a free port, with the settings of this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "AFTERIMAGE_API__PORT": str(port)}
    process = subprocess.Popen([sys.executable, "-m", "api_service"], cwd=REPOSITORY, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=1) as http:
            wait_until(lambda: _answers(http) or process.poll() is not None, timeout_s=60, what="the API to answer")
        assert process.poll() is None
        yield Server(url, process)
    finally:
        process.terminate()
        process.wait(20)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health/live").is_success
    except httpx.TransportError:
        return False


@dataclass
class Receiver:
    """An HTTP server for webhooks. It sends the answers that a test sets, and keeps the requests that it received."""

    url: str = ""
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    hanging: bool = False
    dripping: bool = False
    """Whether it sends its answer's head byte by byte, for 5 seconds."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            if receiver.hanging:
                receiver.release.wait(20)
            if receiver.dripping:
                self._drip()
                return
            status, headers = receiver.answers.pop(0) if receiver.answers else (204, {})
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def _drip(self) -> None:
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.1 204 No Content\r\nx-drip: ")
                for _ in range(50):
                    self.wfile.write(b"a")
                    receiver.release.wait(0.1)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://localhost:{server.server_port}/hook"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield receiver
        receiver.release.set()
        server.shutdown()
        thread.join()


def messages(queue_name: str) -> list[Any]:
    """The messages in a Celery queue, of all priorities. Each priority is a list of its own in Redis."""
    keys = queue.broker().scan_iter(f"{queue_name}*", _type="list")
    return [json.loads(message) for key in keys for message in queue.broker().lrange(key, 0, -1)]


def count_waiting() -> int:
    """How many sessions of the database wait for a lock."""
    with session_scope() as session:
        return session.scalar(text("select count(*) from pg_locks where not granted")) or 0


@contextmanager
def sent_statements(engine: Any, *, all_threads: bool = False) -> Iterator[list[str]]:
    """Collects the statements that this thread sends in the block, `COMMIT` included. engine: or a connection."""
    sent: list[str] = []
    thread = threading.get_ident()

    def add(statement: str) -> None:
        if all_threads or threading.get_ident() == thread:
            sent.append(statement)

    def executed(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        add(statement)

    def committed(connection: Any) -> None:
        # psycopg2 sends nothing when no transaction has begun.
        if connection.connection.dbapi_connection.info.transaction_status != extensions.TRANSACTION_STATUS_IDLE:
            add("COMMIT")

    event.listen(engine, "before_cursor_execute", executed)
    event.listen(engine, "commit", committed)
    try:
        yield sent
    finally:
        event.remove(engine, "before_cursor_execute", executed)
        event.remove(engine, "commit", committed)


@contextmanager
def waiting(work: Callable[[], Any], *, count: int = 1) -> Iterator["Future[Any]"]:
    """Run `work` in a thread, and the block as soon as `work` waits for a lock, as one of `count` sessions that do."""
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(work)
        wait_until(lambda: running.done() or count_waiting() == count, timeout_s=10, what="a lock to be waited for")
        assert not running.done(), f"it has not waited: {running.result()}"
        yield running


def picture(colour: str = "red", *, size: tuple[int, int] = (64, 48), kind: str = "PNG") -> bytes:
    """A small image file."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()
