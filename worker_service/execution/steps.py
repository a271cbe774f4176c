"""How a running model call reports its steps, and how it is stopped."""

from collections.abc import Callable

OnStep = Callable[[int, int], bool]
"""Called after every denoising step with (steps done, steps in total); it returns False to stop the whole call."""


class CallStopped(Exception):  # noqa: N818 - not a failure: the caller asked for it
    """The call was stopped by its `on_step`, or its item was dropped before it ran. It has no result."""


def go_on(_step: int, _steps: int) -> bool:
    """An `OnStep` that never stops the call."""
    return True
