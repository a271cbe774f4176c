"""The API leaves no process behind when it is terminated or killed."""

import signal

import httpx
import psutil
import pytest

from tests.integration.conftest import API, Server, picture
from tests.stack import wait_until


def _is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["terminated", "killed"])
def test_an_api_that_has_decoded_uploads_leaves_no_process_behind(server: Server, number: signal.Signals) -> None:
    answer = httpx.post(f"{server.url}{API}/upload", files={"file": ("a.png", picture(), "image/png")}, timeout=20)
    assert answer.is_success, answer.text
    started = psutil.Process(server.process.pid).children(recursive=True)
    assert any("spawn_main" in " ".join(process.cmdline()) for process in started)
    server.process.send_signal(number)
    # Well below the time after which granian kills a worker that does not end.
    server.process.wait(7)
    wait_until(lambda: not any(map(_is_alive, started)), timeout_s=7, what="every process of the API to end")
