"""Clients that send or read slowly: how long the server waits for them, and for how many at a time."""

import io
import os
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from sqlalchemy.orm import Session

from tests.integration.conftest import API, Server, a_key
from tests.slow_clients import Crowd, SlowClient, open_stream, slow_body, slow_reader, wait_for_answers
from tests.stack import wait_until

Start = Callable[..., Server]


@pytest.fixture
def start(settings: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Start:
    """Start the server with these settings of `api`."""

    def start(**api: float) -> Server:
        for name, value in api.items():
            monkeypatch.setenv(f"AFTERIMAGE_API__{name.upper()}", str(value))
        server: Server = request.getfixturevalue("server")
        return server

    return start


def serving_process(server: Server) -> psutil.Process:
    """Granian's worker process, the one with the threads."""
    return max(psutil.Process(server.process.pid).children(recursive=True), key=lambda child: child.num_threads())


def status(client: SlowClient) -> int:
    return int(client.answer.split(b" ", 2)[1]) if client.answer else 0


def test_a_body_that_arrives_too_slowly_gets_408_and_leaves_no_thread_behind(start: Start) -> None:
    server = start(body_timeout_s=1, body_bytes_per_s=1000)
    process = serving_process(server)
    clients = [slow_body(f"{API}/generate") for _ in range(20)]
    before = process.num_threads()
    with Crowd(server.url, clients) as crowd:
        wait_for_answers(clients, lambda answer: answer.endswith(b"}"), timeout_s=20)
        wait_until(lambda: crowd.disconnects == 20, timeout_s=20, what="the server to close all connections")
        # Reading threads end at once; the server's own threads end after half a minute without work.
        wait_until(lambda: process.num_threads() <= before + 20, timeout_s=20, what="the readers to end")
    for client in clients:
        assert status(client) == 408
        assert b'"request_timeout"' in client.answer
    assert httpx.post(f"{server.url}{API}/generate", json={"prompt": "a"}).status_code == 202
    assert process.cpu_percent(interval=0.5) < 50, "no thread spins on a closed connection"


def test_a_slow_body_above_the_minimum_rate_is_accepted(start: Start) -> None:
    server = start(body_timeout_s=0.5, body_bytes_per_s=5)
    client = slow_body(f"{API}/generate", length=24)  # ten bytes a second, so almost five times the timeout
    client.slowly = client.slowly[:-2] + b'"}'
    with Crowd(server.url, [client]):
        wait_for_answers([client], lambda answer: bool(answer), timeout_s=20)
    assert status(client) == 202


def test_slow_bodies_over_the_limit_are_refused_and_quick_ones_are_not(start: Start) -> None:
    server = start(max_slow_bodies=2, body_timeout_s=60)
    clients = [slow_body(f"{API}/generate") for _ in range(3)]
    with Crowd(server.url, clients):
        wait_until(
            lambda: any(client.answer.endswith(b"}") for client in clients),
            timeout_s=20,
            what="one client to be refused",
        )
        (refused,) = [client for client in clients if client.answer]
        assert status(refused) == 503
        assert b'"too_many_streams"' in refused.answer
        assert httpx.post(f"{server.url}{API}/generate", json={"prompt": "a"}).status_code == 202


def test_the_server_does_not_wait_for_the_body_of_a_client_without_a_key(
    start: Start, monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    server = start(max_slow_bodies=1, body_timeout_s=60)
    clients = [slow_body(f"{API}/generate") for _ in range(5)]
    with Crowd(server.url, clients):
        wait_for_answers(clients, lambda answer: b" 401 " in answer, timeout_s=20)
        key = a_key(session, "generate")
        assert httpx.post(f"{server.url}{API}/generate", json={"prompt": "a"}, headers=key).status_code == 202


def test_waiting_requests_take_no_thread_from_other_requests(start: Start) -> None:
    server = start(threads=1)
    job = httpx.post(f"{server.url}{API}/generate", json={"prompt": "a"}).json()
    waits = [SlowClient(at_once=f"GET {job['url']}?wait=20 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())]
    streams = [open_stream(job["events_url"]) for _ in range(3)]
    bodies = [slow_body(f"{API}/generate") for _ in range(3)]
    with Crowd(server.url, [*waits, *streams, *bodies]):
        wait_for_answers(streams, lambda answer: b"event: queued" in answer, timeout_s=20)
        for _ in range(5):
            assert httpx.get(f"{server.url}{API}/jobs", timeout=5).is_success


def test_downloads_of_large_files_are_limited_in_number_and_others_are_not(start: Start) -> None:
    server = start(max_downloads=2, max_downloads_per_owner=2)
    large, small = (uploaded(server, size) for size in ((1900, 1900), (20, 20)))
    readers = [slow_reader(large) for _ in range(2)]
    with Crowd(server.url, readers):
        wait_for_answers(readers, lambda answer: answer.startswith(b"HTTP/1.1 200"), timeout_s=20)
        refused = httpx.get(server.url + large)
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_streams")
        assert httpx.get(server.url + small).is_success
    wait_until(
        lambda: httpx.get(server.url + large).is_success,
        timeout_s=20,
        what="the slots of disconnected readers to be free",
    )


def uploaded(server: Server, size: tuple[int, int]) -> str:
    """The path of the content of an image that cannot be compressed."""
    file = io.BytesIO()
    Image.frombytes("RGB", size, os.urandom(size[0] * size[1] * 3)).save(file, "PNG")
    answer = httpx.post(f"{server.url}{API}/upload", files={"file": ("noise.png", file.getvalue())}, timeout=30)
    return f"{API}/images/{answer.json()['images'][0]['id']}/content"
