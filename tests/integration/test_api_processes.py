"""What remains of the API's processes when they are told to stop, or killed."""

import signal

import httpx
import psutil
import pytest

from tests.integration.conftest import API, Server, picture
from tests.stack import wait_until


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["told", "killed"])
def test_nothing_is_left_of_an_api_that_has_decoded_uploads(server: Server, number: signal.Signals) -> None:
    answer = httpx.post(f"{server.url}{API}/upload", files={"file": ("a.png", picture(), "image/png")}, timeout=20)
    assert answer.is_success, answer.text
    started = psutil.Process(server.process.pid).children(recursive=True)
    assert any("spawn_main" in " ".join(process.cmdline()) for process in started)
    server.process.send_signal(number)
    # Well below the time after which granian kills a worker that does not end.
    server.process.wait(7)
    wait_until(lambda: not any(map(_lives, started)), timeout_s=7, what="every process of the API to end")
