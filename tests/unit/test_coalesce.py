"""The bell: everybody who pulls it is rung for, and not everybody gets a ring."""

import threading
import time

from shared.messaging.coalesce import Bell
from tests.stack import wait_until


class Heard:
    """Remembers when it was rung. `answer` is waited for in every ring."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.at: list[float] = []
        self.answer = threading.Event()
        self.fault = fault

    def __call__(self) -> None:
        self.at.append(time.monotonic())
        assert self.answer.wait(10)
        if self.fault is not None:
            raise self.fault


def test_many_pulls_are_two_rings_one_at_once_and_one_after_all_of_them() -> None:
    heard = Heard()
    bell = Bell(heard, interval_s=0.05)
    bell.pull()
    wait_until(lambda: len(heard.at) == 1, timeout_s=10, what="the first ring")
    for _ in range(100):
        bell.pull()  # too late for the ring that is going on
    pulled = time.monotonic()
    heard.answer.set()
    wait_until(lambda: len(heard.at) == 2, timeout_s=10, what="a ring for the others")
    assert heard.at[1] > pulled
    assert heard.at[1] - heard.at[0] >= 0.05
    bell.pull()
    wait_until(lambda: len(heard.at) == 3, timeout_s=10, what="a ring for whoever comes later")


def test_no_fault_ends_the_bell() -> None:
    heard = Heard(ValueError())
    heard.answer.set()
    bell = Bell(heard, interval_s=0)
    bell.pull()
    wait_until(lambda: len(heard.at) == 1, timeout_s=10, what="a ring")
    bell.pull()
    wait_until(lambda: len(heard.at) == 2, timeout_s=10, what="another ring")


def test_closing_rings_for_those_who_wait_and_for_nobody_else() -> None:
    heard = Heard()
    heard.answer.set()
    idle, busy = Bell(heard, interval_s=0), Bell(heard, interval_s=3600)
    idle.close()
    assert heard.at == []
    busy.pull()
    wait_until(lambda: len(heard.at) == 1, timeout_s=10, what="the first ring")
    busy.pull()
    busy.close()
    assert len(heard.at) == 2
    assert not busy._thread.is_alive()
