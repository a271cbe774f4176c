"""The health check of the containers: what is healthy, and what is killed."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from ops import probe


class Answering(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(int(self.path.strip("/")))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    calls: list[bool] = []
    monkeypatch.setattr(probe, "kill_container", lambda: calls.append(True))
    return calls


NOBODY = "http://127.0.0.1:1/"


@pytest.mark.parametrize(("status", "exit_status"), [(200, 0), (204, 0), (503, 1), (404, 1)])
def test_a_process_that_answers_is_healthy_by_its_status_and_is_never_killed(
    url: str, status: int, exit_status: int, killed: list[bool], tmp_path: Path
) -> None:
    for _ in range(3):
        assert probe.main(f"{url}/{status}", silent_since=tmp_path / "since", give_up_s=-1) == exit_status
    assert killed == []


def test_a_silent_process_is_killed_after_a_while(killed: list[bool], tmp_path: Path) -> None:
    since = tmp_path / "since"
    assert [probe.main(NOBODY, silent_since=since, give_up_s=3600) for _ in range(2)] == [1, 1]
    assert killed == []
    assert probe.main(NOBODY, silent_since=since, give_up_s=-1) == 1
    assert killed == [True]


def test_an_answer_ends_the_silence(url: str, killed: list[bool], tmp_path: Path) -> None:
    since = tmp_path / "since"
    probe.main(NOBODY, silent_since=since, give_up_s=-1)
    probe.main(f"{url}/503", silent_since=since, give_up_s=-1)
    probe.main(NOBODY, silent_since=since, give_up_s=-1)
    assert killed == []
