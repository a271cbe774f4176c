"""Bulks on the server that users run: real streams, broken connections, silent senders and size limits."""

import http.client
import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, select

from shared.db.session import session_scope
from shared.db.tables import BulkItem
from tests.integration.conftest import API, Server
from tests.stack import wait_until

JSON_LINES = {"Content-Type": "application/jsonl"}


@pytest.fixture
def http_client(shared_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared_server.url + API, timeout=60) as client:
        yield client


def line(number: int) -> bytes:
    return (
        json.dumps({"prompt": f"a {number}th apple on a wooden table", "custom_id": f"item-{number}"}).encode() + b"\n"
    )


def resident_kib(server: Server) -> int:
    """The resident memory of the server's largest process in KiB."""
    pids = [server.process.pid, *children(server.process.pid)]
    status = [Path(f"/proc/{pid}/status").read_text() for pid in pids]
    return max(int(text.split("VmRSS:")[1].split()[0]) for text in status)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def test_ten_thousand_items_stream_in_quickly_and_memory_stays_flat(
    shared_server: Server, http_client: httpx.Client
) -> None:
    http_client.get("/bulks").raise_for_status()

    def send(count: int) -> tuple[dict[str, Any], float]:
        started = time.monotonic()
        answer = http_client.post("/bulks", content=(line(number) for number in range(count)), headers=JSON_LINES)
        assert answer.status_code == 202, answer.text
        return dict(answer.json()), count / (time.monotonic() - started)

    send(1000)
    before = resident_kib(shared_server)
    bulk, rate = send(10_000)
    assert resident_kib(shared_server) - before < 20_000, "KiB"
    assert rate > 300, "the goal is 2,000 per second on two idle processors"
    assert (bulk["state"], bulk["total"]) == ("receiving", 10_000), "only the sender knows that a stream is complete"
    done = http_client.post(f"/bulks/{bulk['id']}/complete", json={"lines": 10_000, "digest": bulk["digest"]})
    assert done.json()["state"] == "running"


@contextmanager
def started_request(
    server: Server, path: str, *, length: int | None, key: str | None = None
) -> Iterator[http.client.HTTPConnection]:
    """A request whose body the test sends itself, with a declared length or in chunks."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.putrequest("POST", API + path)
    connection.putheader("Content-Type", "application/jsonl")
    connection.putheader("Idempotency-Key", key or uuid4().hex)
    if length is None:
        connection.putheader("Transfer-Encoding", "chunked")
    else:
        connection.putheader("Content-Length", str(length))
    connection.endheaders()
    try:
        yield connection
    finally:
        connection.close()


def bulks_since(http_client: httpx.Client, earlier: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """The newest bulks, without the `earlier` ones."""
    earlier_ids = {bulk["id"] for bulk in earlier}
    return [bulk for bulk in http_client.get("/bulks").json()["items"] if bulk["id"] not in earlier_ids]


@pytest.mark.parametrize("chunked", [True, False])
def test_after_a_broken_connection_whole_lines_stay_and_the_rest_can_be_sent(
    shared_server: Server, http_client: httpx.Client, chunked: bool
) -> None:
    lines = [line(number) for number in range(1200)]
    whole = b"".join(lines)
    part = b"".join(lines[:700]) + lines[700][:20]
    earlier = bulks_since(http_client)

    def received() -> int:
        return sum(bulk["received_lines"] for bulk in bulks_since(http_client, earlier))

    with started_request(shared_server, "/bulks", length=None if chunked else len(whole)) as connection:
        connection.send(b"%x\r\n%s\r\n" % (len(part), part) if chunked else part)
        wait_until(lambda: received() >= 500, timeout_s=20, what="a chunk of lines to be stored")
        connection.sock.shutdown(socket.SHUT_RDWR)
    wait_until(lambda: received() == 700, timeout_s=20, what="the whole lines to be stored")
    (bulk,) = bulks_since(http_client, earlier)
    assert (bulk["state"], bulk["total"], bulk["invalid"]) == ("receiving", 700, 0)
    rest = http_client.post(
        f"/bulks/{bulk['id']}/lines", params={"from_line": 700}, content=b"".join(lines[700:]), headers=JSON_LINES
    )
    assert (rest.status_code, rest.json()["state"], rest.json()["total"]) == (202, "running", 1200)
    stored = select(func.count(BulkItem.custom_id.distinct())).where(BulkItem.bulk_id == UUID(bulk["id"]))
    with session_scope() as session:
        assert session.scalar(stored) == 1200


@pytest.mark.parametrize("sent", [b"", b'{"bulk": {"name"'])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_request_that_breaks_before_its_first_line_is_sent_again_with_its_key(
    shared_server: Server, http_client: httpx.Client, chunked: bool, sent: bytes
) -> None:
    key, whole = uuid4().hex, b'{"bulk": {"name": "cut"}}\n' + line(1)
    earlier = bulks_since(http_client)
    with started_request(shared_server, "/bulks", length=None if chunked else len(whole), key=key) as connection:
        connection.send(b"%x\r\n%s\r\n" % (len(sent), sent) if chunked and sent else sent)
        connection.sock.shutdown(socket.SHUT_RDWR)
    http_client.get("/bulks").raise_for_status()
    again = http_client.post("/bulks", content=whole, headers={**JSON_LINES, "Idempotency-Key": key})
    assert (again.status_code, again.json()["total"]) == (202, 1)
    assert [bulk["name"] for bulk in bulks_since(http_client, earlier)] == ["cut"]


def test_of_two_senders_of_the_same_lines_one_gets_a_conflict(shared_server: Server, http_client: httpx.Client) -> None:
    lines = [line(number) for number in range(1000)]
    bulk = http_client.post("/bulks", params={"complete": False}, content=b"", headers=JSON_LINES).json()
    path = f"/bulks/{bulk['id']}"
    length = sum(map(len, lines))
    with started_request(shared_server, f"{path}/lines?from_line=0", length=length) as slow:
        slow.send(b"".join(lines[:700]))
        wait_until(
            lambda: http_client.get(path).json()["received_lines"] == 500,
            timeout_s=20,
            what="its first chunk to be stored",
        )
        quick = http_client.post(
            f"{path}/lines", params={"from_line": 500}, content=b"".join(lines[500:]), headers=JSON_LINES
        )
        assert (quick.status_code, quick.json()["total"]) == (202, 1000)
        slow.send(b"".join(lines[700:]))
        answer = slow.getresponse()
        assert (answer.status, json.load(answer)["code"]) == (409, "bulk_state_conflict")
    assert http_client.get(path).json()["total"] == 1000


def test_a_silent_sender_gets_a_timeout(settings: Any, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    monkeypatch.setenv("AFTERIMAGE_BULKS__RECEIVE_TIMEOUT_S", "1")
    server: Server = request.getfixturevalue("server")
    with started_request(server, "/bulks", length=1000) as connection:
        connection.send(line(1) * 2)
        answer = connection.getresponse()
        assert (answer.status, json.load(answer)["code"]) == (408, "request_timeout")


def test_bodies_of_bulks_have_their_own_size_limit(
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


def test_a_manifest_ends_with_an_end_line(http_client: httpx.Client) -> None:
    bulk = http_client.post("/bulks", content=b"".join(map(line, range(300))), headers=JSON_LINES).json()
    lines = http_client.get(bulk["manifest_url"].removeprefix(API)).text.splitlines()
    assert json.loads(lines[-1]) == {"end": True, "items": 300}
    assert [json.loads(each)["line"] for each in lines[:-1]] == list(range(1, 301))
