"""Stored files over HTTP: ranges of their bytes, and encoded bodies that the service refuses."""

import gzip
import io
from typing import Any

import pytest
from sqlalchemy.orm import Session

from api_service.http import responses
from shared.settings import Settings
from tests.integration.conftest import API, Client, picture
from tests.integration.test_export_outputs import make_output


@pytest.fixture(params=["in one piece", "streamed"])
def addresses(
    request: pytest.FixtureRequest, client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Addresses of all kinds of stored files."""
    if request.param == "streamed":
        monkeypatch.setattr(responses, "MAX_UNSTREAMED_BYTES", 16)
    image = client.post(f"{API}/upload", data={"file": (io.BytesIO(picture()), "a.png")}).json["images"][0]
    output = make_output(session, 7)
    session.commit()
    addresses = [image["content_url"], image["thumbnail_url"]]
    return addresses + [f"{API}/generations/{output.id}/{name}" for name in ("content", "thumbnail")]


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-0", 0, 0), ("bytes=2-9", 2, 9), ("bytes=5-", 5, -1), ("bytes=-7", -7, -1), ("bytes=3-999999", 3, -1)],
)
def test_a_range_of_a_file_is_sent(client: Client, addresses: list[str], asked: str, first: int, last: int) -> None:
    for address in addresses:
        whole = client.get(address)
        assert (whole.status_code, whole.headers["Accept-Ranges"]) == (200, "bytes")
        size = len(whole.data)
        begin, end = first % size, last % size
        part = client.get(address, headers={"Range": asked})
        assert (part.status_code, part.data) == (206, whole.data[begin : end + 1])
        assert part.headers["Content-Range"] == f"bytes {begin}-{end}/{size}"
        assert part.content_length == end - begin + 1
        assert (part.mimetype, part.headers["ETag"]) == (whole.mimetype, whole.headers["ETag"])


def test_a_range_behind_the_end_gets_416_with_the_size(client: Client, addresses: list[str]) -> None:
    for address in addresses:
        size = len(client.get(address).data)
        for asked in (f"bytes={size}-", f"bytes={size + 5}-{size + 9}", "bytes=-0"):
            answer = client.get(address, headers={"Range": asked})
            assert (answer.status_code, answer.json["code"]) == (416, "range_not_satisfiable"), (address, asked)
            assert answer.headers["Content-Range"] == f"bytes */{size}"


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "bytes=5-2", "bytes=a-b", "items=0-1", "bytes", ""])
def test_other_ranges_get_the_whole_file(client: Client, addresses: list[str], asked: str) -> None:
    for address in addresses:
        answer = client.get(address, headers={"Range": asked})
        assert (answer.status_code, answer.data) == (200, client.get(address).data)


def test_a_range_is_sent_only_of_the_version_that_the_client_has(client: Client, addresses: list[str]) -> None:
    for address in addresses:
        etag = client.get(address).headers["ETag"]
        for condition, status in [
            (etag, 206),
            ('"another"', 200),
            (f"W/{etag}", 200),
            ("Sat, 01 Jan 2050 00:00:00 GMT", 200),
        ]:
            answer = client.get(address, headers={"Range": "bytes=0-3", "If-Range": condition})
            assert answer.status_code == status, condition
        known = client.get(address, headers={"Range": "bytes=0-3", "If-None-Match": etag})
        assert (known.status_code, known.data) == (304, b"")


def test_head_has_the_size_and_ignores_ranges(client: Client, addresses: list[str]) -> None:
    for address in addresses:
        size = len(client.get(address).data)
        for headers in ({}, {"Range": "bytes=0-3"}):
            answer = client.head(address, headers=headers)
            assert (answer.status_code, answer.headers["Content-Length"]) == (200, str(size)), address
            assert answer.headers["Accept-Ranges"] == "bytes"


def test_an_encoded_body_is_refused_by_every_route(client: Client, subtests: pytest.Subtests) -> None:
    bodies: list[tuple[str, str, Any]] = [
        (f"{API}/generate", "application/json", b'{"prompt": "a red apple"}'),
        (f"{API}/search", "application/json", b'{"query": "a red apple"}'),
        (f"{API}/bulks", "application/jsonl", b'{"prompt": "a red apple"}\n'),
        (f"{API}/upload", "multipart/form-data; boundary=b", b"--b--\r\n"),
        ("/", "application/x-www-form-urlencoded", b"prompt=a+red+apple"),
    ]
    for path, content_type, body in bodies:
        for encoding in ("gzip", "x-gzip", "deflate", "br", "zstd", "identity, gzip", "nonsense"):
            with subtests.test(path=path, encoding=encoding):
                headers = {"Content-Type": content_type, "Content-Encoding": encoding, "Origin": "http://localhost"}
                answer = client.post(path, data=gzip.compress(body), headers=headers)
                assert answer.status_code == 415
                assert answer.headers["Accept-Encoding"] == "identity"
                assert "Content-Encoding" in answer.text
                if path.startswith(API):
                    assert answer.json["errors"][0]["field"] == "header.Content-Encoding"


def test_a_body_that_is_declared_as_not_encoded_is_read(client: Client, settings: Settings) -> None:
    answer = client.post(
        f"{API}/generate", json={"prompt": "a red apple", "dry_run": True}, headers={"Content-Encoding": "Identity"}
    )
    assert answer.status_code == 200
