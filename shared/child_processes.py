"""Child processes that do not outlive the process that started them."""

import os
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait


def end_with_parent() -> None:
    """End this process at once when the process that started it through `multiprocessing` has ended.

    A killed parent cannot stop its children. A pool's child would then wait for its next task forever. A server's child
    would go on to answer requests, on the port that its successor opens too.
    """
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_wait_and_end, args=(parent.sentinel,), name="end-with-parent", daemon=True).start()


def _wait_and_end(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
