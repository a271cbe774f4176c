"""Two owners at the decoders of one server: the slow files of one do not delay the other."""

import io
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image
from sqlalchemy.orm import Session

from shared.image_files import MAX_SCANS
from shared.settings import Settings
from tests.factories import make_space
from tests.integration.conftest import API, a_key, picture, running_server
from tests.stack import wait_until

FLOOD = 12
BOUND_S = 5


def slow_jpeg() -> bytes:
    """A small progressive JPEG with as many scans of 4 megapixels as are accepted."""
    file = io.BytesIO()
    Image.new("RGB", (2000, 2000), (100, 50, 20)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + MAX_SCANS - scans) + data[-2:]


def test_the_upload_of_one_owner_does_not_wait_for_the_slow_files_of_another(
    settings: Settings, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__TEXT_TIMEOUT_S", "0.1")
    make_space(session)
    flooding, other = a_key(session, "search", owner="flooding"), a_key(session, "corpus:write", owner="other")
    slow, answered = slow_jpeg(), list[int]()
    with running_server() as server, ThreadPoolExecutor(FLOOD) as pool:

        def search(number: int) -> None:
            # Equal files would be decoded once for all of them.
            files = {"image": ("slow.jpg", slow + number.to_bytes(4))}
            answer = httpx.post(f"{server.url}{API}/search", files=files, headers=flooding, timeout=120)
            answered.append(answer.status_code)

        def upload_s() -> float:
            started = time.monotonic()
            files = {"file": ("small.png", picture())}
            answer = httpx.post(f"{server.url}{API}/upload", files=files, headers=other, timeout=60)
            assert answer.is_success, answer.text
            return time.monotonic() - started

        flood = [pool.submit(search, number) for number in range(FLOOD)]
        wait_until(lambda: answered, timeout_s=60, what="the first of the slow files")
        upload_s()  # starts the other decoder
        assert max(upload_s() for _ in range(3)) < BOUND_S
        assert len(answered) <= FLOOD // 2, "most of the flood still waits"
        for each in flood:
            each.result()
    assert set(answered) == {503}, "they were decoded, and no worker answers"
