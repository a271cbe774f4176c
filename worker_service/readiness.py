"""Whether this process can do its work, as `/ready` on the port of its metrics answers.

A process confirms its readiness again and again. One that stops to confirm it, for whatever reason, is soon not ready.
"""

import threading
import time

from shared.singleton import process_singleton


class Readiness:
    def __init__(self) -> None:
        self._ready_until = 0.0
        self._withdrawn = threading.Event()

    def confirm(self, *, for_s: float) -> None:
        """Be ready for the next `for_s` seconds, unless the process stops."""
        self._ready_until = time.monotonic() + for_s

    def withdraw(self) -> None:
        """Be ready never again: the process stops."""
        self._withdrawn.set()

    def is_ready(self) -> bool:
        return not self._withdrawn.is_set() and time.monotonic() < self._ready_until


@process_singleton
def get_readiness() -> Readiness:
    """Return the readiness of this process."""
    return Readiness()
