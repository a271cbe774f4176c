"""Process-wide singletons: a thread-safe `functools.cache`."""

import threading
from collections.abc import Callable
from functools import cache, update_wrapper
from typing import Generic, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Resource = TypeVar("Resource")


class process_singleton(Generic[Arguments, Resource]):  # noqa: N801 - a decorator
    """`functools.cache` for resources: threads that call the function at the same time get the same object.

    `functools.cache` itself may call the function once per thread. A second pool would leave the connections of the
    first one open. A second semaphore would admit its whole number again.
    """

    def __init__(self, function: Callable[Arguments, Resource]) -> None:
        self._cached = cache(function)
        self._lock = threading.RLock()
        self.cache_info = self._cached.cache_info
        update_wrapper(self, function)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Resource:
        with self._lock:
            return self._cached(*args, **kwargs)  # type: ignore[arg-type]  # types cannot express that they are hashable

    def cache_clear(self) -> None:
        """Forget all results, also the one that another thread is about to store."""
        with self._lock:
            self._cached.cache_clear()
