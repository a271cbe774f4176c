"""Waiting for a state, with a limit."""

import time
from collections.abc import Callable

POLL_S = 0.2


def wait_until(reached: Callable[[], bool], *, timeout_s: float, what: str) -> None:
    """Ask until `reached` says yes.

    Raises:
        TimeoutError: it did not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(POLL_S)
