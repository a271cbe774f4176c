"""Bulks on the server that users run: real streams, connections that break, processes that are killed."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.tables import BulkItem
from tests.integration.conftest import API, Server
from tests.stack import wait_until

JSON_LINES = {"Content-Type": "application/jsonl"}


@pytest.fixture
def http_client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url + API, timeout=60) as client:
        yield client


def line(number: int) -> bytes:
    return (
        json.dumps({"prompt": f"a {number}th apple on a wooden table", "custom_id": f"item-{number}"}).encode() + b"\n"
    )


def resident_kib(server: Server) -> int:
    """The largest of the server's processes, as it is now."""
    pids = [server.process.pid, *children(server.process.pid)]
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return max(int(text.split("VmRSS:")[1].split()[0]) for text in status)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_ten_thousand_items_stream_in_quickly_and_memory_stays_flat(server: Server, http_client: httpx.Client) -> None:
    http_client.get("/bulks").raise_for_status()

    def send(count: int) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        answer = http_client.post("/bulks", content=(line(number) for number in range(count)), headers=JSON_LINES)
        assert answer.status_code == 202, answer.text
        return dict(answer.json()), count / (time.monotonic() - started)

    send(1000)
    before = resident_kib(server)
    bulk, rate = send(10_000)
    assert resident_kib(server) - before < 20_000, "KiB"
    assert rate > 300, "the bar is 2,000 per second on two processors that have nothing else to do"
    assert (bulk["state"], bulk["total"]) == ("receiving", 10_000), "only its sender knows that a stream is whole"
    done = http_client.post(f"/bulks/{bulk['id']}/complete", json={"lines": 10_000, "digest": bulk["digest"]})
    assert done.json()["state"] == "running"


@contextmanager
def begun(server: Server, path: str, *, length: int | None) -> Iterator[http.client.HTTPConnection]:
    """A request whose body the test sends itself, with a declared length or in chunks."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest("POST", API + path)
    connection.putheader("Content-Type", "application/jsonl")
    connection.putheader("Idempotency-Key", "a-stream")
    if length is None:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(length))
    connection.endheaders()
    try:
        yield connection
    finally:
        connection.close()


def received(http_client: httpx.Client) -> int:
    bulks = http_client.get("/bulks").json()["items"]
    return int(bulks[0]["received_lines"]) if bulks else 0


@pytest.mark.parametrize("chunked", [True, False])
def test_after_a_broken_connection_whole_lines_stay_and_the_rest_follows(
    server: Server, http_client: httpx.Client, session: Session, chunked: bool
) -> None:
    lines = [line(number) for number in range(1200)]
    whole = b"".join(lines)
    part = b"".join(lines[:700]) + lines[700][:20]
    with begun(server, "/bulks", length=None if chunked else len(whole)) as connection:
        connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        wait_until(lambda: received(http_client) >= 500, timeout_s=20, what="a chunk of lines to be stored")
        connection.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: received(http_client) == 700, timeout_s=20, what="the whole lines to be stored")
    (bulk,) = http_client.get("/bulks").json()["items"]
    assert (bulk["state"], bulk["total"], bulk["invalid"]) == ("receiving", 700, 0)
    rest = http_client.post(
        f"/bulks/{bulk['id']}/lines", params={"from_line": 700}, content=b"".join(lines[700:]), headers=JSON_LINES
    )
    assert (rest.status_code, rest.json()["state"], rest.json()["total"]) == (202, "running", 1200)
    assert session.scalar(select(func.count(BulkItem.custom_id.distinct()))) == 1200


def test_of_two_senders_of_the_same_lines_one_is_told(server: Server, http_client: httpx.Client) -> None:
    lines = [line(number) for number in range(1000)]
    bulk = http_client.post("/bulks", params={"complete": False}, content=b"", headers=JSON_LINES).json()
    with begun(server, f"/bulks/{bulk['id']}/lines?from_line=0", length=sum(map(len, lines))) as slow:
        slow.send(b"".join(lines[:700]))
        wait_until(lambda: received(http_client) == 500, timeout_s=20, what="its first chunk to be stored")
        quick = http_client.post(
            f"/bulks/{bulk['id']}/lines", params={"from_line": 500}, content=b"".join(lines[500:]), headers=JSON_LINES
        )
        assert (quick.status_code, quick.json()["total"]) == (202, 1000)
        slow.send(b"".join(lines[700:]))
        answer = slow.getresponse()
        assert (answer.status, json.load(answer)["code"]) == (409, "bulk_state_conflict")
    assert http_client.get(f"/bulks/{bulk['id']}").json()["total"] == 1000


def test_a_sender_that_went_silent_is_let_go(settings: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.setenv("AFTERIMAGE_BULKS__RECEIVE_TIMEOUT_S", "1")
    server: Server = request.getfixturevalue("server")
    with begun(server, "/bulks", length=1000) as connection:
        connection.send(line(1) * 2)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["code"]) == (408, "request_timeout")


def test_a_body_over_its_own_limit_is_refused_and_the_limit_of_other_bodies_does_not_count(
    settings: Any, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    monkeypatch.setenv("AFTERIMAGE_API__MAX_BODY_BYTES", "1024")
    monkeypatch.setenv("AFTERIMAGE_BULKS__MAX_BODY_BYTES", "20000")
    server: Server = request.getfixturevalue("server")
    for count, status in ((150, 202), (400, 413)):
        content = [line(number) for number in range(count)]
        assert sum(map(len, content)) > 10_000
        for body in (b"".join(content), iter(content)):
            answer = httpx.post(f"{server.url}{API}/bulks", content=body, headers=JSON_LINES, timeout=30)
            assert answer.status_code == status, answer.text


def test_a_download_ends_with_its_end(server: Server, http_client: httpx.Client) -> None:
    bulk = http_client.post("/bulks", content=b"".join(map(line, range(300))), headers=JSON_LINES).json()
    lines = http_client.get(bulk["manifest_url"].removeprefix(API)).text.splitlines()
    assert json.loads(lines[-1]) == {"end": True, "items": 300}
    assert [json.loads(each)["line"] for each in lines[:-1]] == list(range(1, 301))
