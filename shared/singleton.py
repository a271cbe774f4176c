"""What a process has one of."""

import threading
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Resource = TypeVar("Resource")


class once(Generic[Arguments, Resource]):  # noqa: N801 - a decorator
    """`functools.cache` for resources: threads that ask for one that is not there yet all get the same.

    The standard one calls the function for each of them. Of two pools the second would stay, while the first held
    its connections with nobody to close them; of two semaphores each would let the whole number through.
    """

    def __init__(self, function: Callable[Arguments, Resource]) -> None:
        self._cached = cache(function)
        self._lock = threading.RLock()
        self.cache_info = self._cached.cache_info
        self.cache_clear = self._cached.cache_clear
        update_wrapper(self, function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Resource:
        with self._lock:
            return self._cached(*args, **kwargs)  # type: ignore[arg-type]  # that they are hashable cannot be said
