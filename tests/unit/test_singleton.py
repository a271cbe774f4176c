"""One resource per process, whoever asks for it at the same time."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

from shared.singleton import once


def slow_to_make(threads: int) -> Callable[[str], object]:
    """A function under which all `threads` meet, if it lets them all in."""
    meeting = Barrier(threads)

    @once
    def resource(_name: str) -> object:
        """What there is one of."""
        with suppress(BrokenBarrierError):  # they were not all let in
            meeting.wait(0.2)
        return object()

    return resource


def test_threads_that_ask_at_the_same_time_get_the_same() -> None:
    resource = slow_to_make(8)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: resource("a"), range(8)))
    assert len(set(map(id, made))) == 1
    assert resource("b") is not made[0]
    assert resource.__doc__ == "What there is one of."
