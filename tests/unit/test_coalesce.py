"""Coalesced notifications: every request is followed by a call, and many requests share one."""

import threading
import time

from shared.messaging.coalesce import CoalescedNotifier
from tests.stack import wait_until


class Receiver:
    """Records when it was called. Each call waits for `release`, then raises `fault` if it is set."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.called_at: list[float] = []
        self.release = threading.Event()
        self.fault = fault

    def __call__(self) -> None:
        self.called_at.append(time.monotonic())
        assert self.release.wait(10)
        if self.fault is not None:
            raise self.fault

    def wait_for(self, calls: int) -> None:
        wait_until(lambda: len(self.called_at) == calls, timeout_s=10, what=f"{calls} calls")


def test_many_requests_cause_one_call_at_once_and_one_call_after_the_last() -> None:
    receiver = Receiver()
    notifier = CoalescedNotifier(receiver, interval_s=0.05)
    notifier.notify()
    receiver.wait_for(1)
    for _ in range(100):
        notifier.notify()  # too late for the call that is running
    requested_at = time.monotonic()
    receiver.release.set()
    receiver.wait_for(2)
    assert receiver.called_at[1] > requested_at
    assert receiver.called_at[1] - receiver.called_at[0] >= 0.05
    notifier.notify()
    receiver.wait_for(3)


def test_an_error_does_not_end_the_notifier() -> None:
    receiver = Receiver(ValueError())
    receiver.release.set()
    notifier = CoalescedNotifier(receiver, interval_s=0)
    notifier.notify()
    receiver.wait_for(1)
    notifier.notify()
    receiver.wait_for(2)


def test_closing_makes_a_requested_call_and_no_other() -> None:
    receiver = Receiver()
    receiver.release.set()
    idle, busy = CoalescedNotifier(receiver, interval_s=0), CoalescedNotifier(receiver, interval_s=3600)
    idle.close()
    assert receiver.called_at == []
    busy.notify()
    receiver.wait_for(1)
    busy.notify()
    busy.close()
    assert len(receiver.called_at) == 2
    assert not busy._thread.is_alive()
