"""`process_singleton` makes one resource per process, even for concurrent callers."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier, BrokenBarrierError

from shared.singleton import process_singleton


def slow_to_make(threads: int) -> Callable[[str], object]:
    """A singleton function that waits up to 0.2 s until `threads` callers are inside of it."""
    meeting = Barrier(threads)

    @process_singleton
    def resource(_name: str) -> object:
        """The only one."""
        with suppress(BrokenBarrierError):  # not all threads were inside
            meeting.wait(0.2)
        return object()

    return resource


def test_concurrent_callers_get_the_same_resource() -> None:
    resource = slow_to_make(8)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: resource("a"), range(8)))
    assert len(set(map(id, made))) == 1
    assert resource("b") is not made[0]
    assert resource.__doc__ == "The only one."
