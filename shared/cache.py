"""Answers worth keeping for a while: in Redis, and in this process's memory while Redis is away.

The cache may lose anything at any time and is never the only place of a fact. While Redis is away each process
remembers for itself, for at most `MEMORY_TTL_S`; what it wrote or removed meanwhile is removed from Redis before
Redis is trusted again. Other processes cannot be told during an outage, so whoever must not see an old answer puts
the version of what it depends on into the key.
"""

import asyncio
import hashlib
import inspect
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property, wraps
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, get_origin, get_type_hints

import numpy as np
import orjson
from cachetools import TLRUCache
from pydantic import BaseModel, TypeAdapter
from redis import Redis, RedisError

from shared.metrics import CACHE_FALLBACKS, increment_counter
from shared.settings import CacheSettings, get_settings
from shared.singleton import once

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

NAMESPACE = "afterimage:cache:"
MEMORY_TTL_S = 60.0
PROBE_INTERVAL_S = 1.0
MAX_REMEMBERED_CHANGES = 10_000
JOIN_TIMEOUT_S = 30.0
PAGE = 500


class _Kept(NamedTuple):
    data: bytes
    ttl_s: float


class Cache:
    """Values by key. Safe to share between threads; no method raises because Redis is away.

    A value is bytes, a numpy array, or what JSON holds (tuples come back as lists). A call waits for Redis at most
    a few times `socket_timeout_s`; while Redis is away, one call a second does, and the others do not wait.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._redis: Redis = Redis.from_url(
            settings.url.get_secret_value(),
            socket_timeout=settings.socket_timeout_s,
            socket_connect_timeout=settings.socket_timeout_s,
        )
        self._lock = threading.RLock()
        self._memory: TLRUCache[str, _Kept] = TLRUCache(
            settings.memory_max_items, ttu=lambda _key, kept, now: now + kept.ttl_s, timer=time.monotonic
        )
        self._away_until: float | None = None
        """None while Redis answers; otherwise when the next call may try it again."""
        self._changed_keys: set[str] = set()
        self._changed_patterns: set[str] = set()
        self._hits = self._misses = self._fallbacks = 0
        self._flights: dict[str, Future[bytes]] = {}

    def get(self, key: str) -> Any | None:
        """The value under `key`; None when there is none."""
        data = self.get_encoded(key)
        return None if data is None else _decode(data)

    def set(self, key: str, value: Any, ttl: float | None = None) -> None:
        """Keep `value` for `ttl` seconds (default: `default_ttl_s`). Raises TypeError when it cannot be encoded."""
        self.set_encoded(key, _encode(value), ttl)

    def delete(self, key: str) -> bool:
        """Forget `key`; tells whether there was something to forget."""

        def in_memory() -> bool:
            self._remember_change(key)
            return self._memory.pop(key, None) is not None

        return self._either(lambda: bool(self._redis.unlink(NAMESPACE + key)), in_memory)

    def invalidate(self, pattern: str) -> int:
        """Forget every key that matches (`*` is any text, `?` any one character); tells how many."""

        def in_memory() -> int:
            self._changed_patterns.add(pattern)
            matches = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL).fullmatch
            return sum(self._memory.pop(key, None) is not None for key in list(self._memory) if matches(key))

        return self._either(lambda: self._unlink_matching(pattern), in_memory)

    def stats(self) -> dict[str, Any]:
        """Since this process started: `backend` in use, `hits`, `misses`, `hit_rate`, `fallbacks`, `memory_items`."""
        with self._lock:
            lookups = self._hits + self._misses
            return {
                "backend": "redis" if self._away_until is None else "memory",
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / lookups if lookups else 0.0,
                "fallbacks": self._fallbacks,
                "memory_items": len(self._memory),
            }

    @property
    def redis(self) -> Redis:
        """The client below, for what only Redis can do. Its calls raise RedisError while Redis is away."""
        return self._redis

    def close(self) -> None:
        self._redis.close()

    # --- for `cache_result`

    def get_encoded(self, key: str) -> bytes | None:
        def in_memory() -> bytes | None:
            kept = self._memory.get(key)
            return kept.data if kept else None

        data = self._either(lambda: cast(bytes | None, self._redis.get(NAMESPACE + key)), in_memory)
        with self._lock:
            self._hits += data is not None
            self._misses += data is None
        name = "cache_misses_total" if data is None else "cache_hits_total"
        increment_counter(name, labels={"prefix": key.partition(":")[0]})
        return data

    def set_encoded(self, key: str, data: bytes, ttl: float | None) -> None:
        ttl_s = self._settings.default_ttl_s if ttl is None else ttl

        def in_redis() -> None:
            self._redis.set(NAMESPACE + key, data, px=max(1, round(ttl_s * 1000)))

        def in_memory() -> None:
            self._remember_change(key)
            self._memory[key] = _Kept(data, min(ttl_s, MEMORY_TTL_S))

        self._either(in_redis, in_memory)

    def join(self, key: str) -> tuple[bool, Future[bytes]]:
        """Whether the caller is the one to find the value of `key`, and where all others wait for it."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is not None:
                return False, flight
            flight = self._flights[key] = Future()
            flight.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel the others
            return True, flight

    @contextmanager
    def leading(self, key: str, flight: Future[bytes]) -> Iterator[None]:
        """The first caller's block: it sets the flight's result, or the others learn why not."""
        try:
            yield
        except Exception as error:
            flight.set_exception(error)
            raise
        except BaseException:
            flight.set_exception(_AbandonedError())
            raise
        finally:
            with self._lock:
                del self._flights[key]

    # --- Redis or memory

    def _either(self, in_redis: Callable[[], R], in_memory: Callable[[], R]) -> R:
        while True:
            if self._redis_answers():
                try:
                    return in_redis()
                except RedisError as error:
                    self._lost_redis(error)
            with self._lock:
                if self._away_until is not None:  # else it came back just now, and memory is not read any more
                    self._fallbacks += 1
                    CACHE_FALLBACKS.inc()
                    return in_memory()

    def _redis_answers(self) -> bool:
        with self._lock:
            if self._away_until is None:
                return True
            now = time.monotonic()
            if now < self._away_until:
                return False
            self._away_until = now + PROBE_INTERVAL_S  # this call tries; the others keep to memory meanwhile
        try:
            self._redis.ping()
            self._catch_up()
        except RedisError as error:
            self._lost_redis(error)
            return False
        return True

    def _lost_redis(self, error: RedisError) -> None:
        with self._lock:
            if self._away_until is None:
                logger.warning("cache_redis_lost", extra={"cause": str(error)})
            self._away_until = time.monotonic() + PROBE_INTERVAL_S

    def _catch_up(self) -> None:
        """Remove from Redis what changed while it was away, then trust it again."""
        while True:
            with self._lock:
                keys, patterns = list(self._changed_keys), list(self._changed_patterns)
                if not keys and not patterns:
                    self._memory.clear()
                    self._away_until = None
                    logger.info("cache_redis_returned")
                    return
            self._unlink([NAMESPACE + key for key in keys])
            for pattern in patterns:
                self._unlink_matching(pattern)
            with self._lock:
                self._changed_keys.difference_update(keys)
                self._changed_patterns.difference_update(patterns)

    def _remember_change(self, key: str) -> None:
        if len(self._changed_keys) < MAX_REMEMBERED_CHANGES:
            self._changed_keys.add(key)
        else:
            self._changed_patterns.add("*")

    def _unlink_matching(self, pattern: str) -> int:
        # SCAN in pages, because KEYS would stop the server for everyone.
        glob = NAMESPACE + re.sub(r"([\[\]\\^])", r"\\\1", pattern)
        removed, page = 0, []
        for key in self._redis.scan_iter(match=glob, count=PAGE):
            page.append(key)
            if len(page) == PAGE:
                removed += self._unlink(page)
                page = []
        return removed + self._unlink(page)

    def _unlink(self, keys: list[Any]) -> int:
        pages = (keys[start : start + PAGE] for start in range(0, len(keys), PAGE))
        return sum(int(self._redis.unlink(*page)) for page in pages)


@once
def get_cache_manager() -> Cache:
    """The cache of this process, opened at first use."""
    return Cache(get_settings().cache)


# --- the decorator ------------------------------------------------------------------------------------------------


class _AbandonedError(Exception):
    """The caller that was finding the value was cancelled."""


def cache_result(*, key_prefix: str, ttl: float | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Remember what a plain or async function returns, by its arguments, for `ttl` seconds.

    Calls with equal arguments at the same time, in one process, run the function once. An exception is not
    remembered, but those who wait for the same call get it too. The result comes back as the function's return
    annotation says (Pydantic models, dataclasses, tuples, UUIDs, numpy arrays, ...); without one as JSON reads it.

    For functions of a module, not methods: the key is made of the prefix, the function's name and its arguments
    (numbers, text, bytes, UUIDs, dates, enums, dataclasses, Pydantic models, arrays, and lists and dicts of them).
    A call with any other argument raises TypeError.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        call = _CachedCall(function, key_prefix)
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def remembered_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                store, key = get_cache_manager(), call.key(*args, **kwargs)
                is_first, flight = store.join(key)
                if not is_first:
                    try:
                        return call.decode(await asyncio.wait_for(asyncio.wrap_future(flight), JOIN_TIMEOUT_S))
                    except (_AbandonedError, TimeoutError):
                        return await function(*args, **kwargs)
                with store.leading(key, flight):
                    data = await asyncio.to_thread(call.find, store, key)
                    if data is None:
                        data = call.encode(await function(*args, **kwargs))
                        await asyncio.to_thread(store.set_encoded, key, data, ttl)
                    flight.set_result(data)
                    return call.decode(data)

            return cast(Callable[P, R], remembered_coroutine)

        @wraps(function)
        def remembered(*args: P.args, **kwargs: P.kwargs) -> R:
            store, key = get_cache_manager(), call.key(*args, **kwargs)
            is_first, flight = store.join(key)
            if not is_first:
                try:
                    return call.decode(flight.result(JOIN_TIMEOUT_S))
                except (_AbandonedError, TimeoutError):
                    return function(*args, **kwargs)
            with store.leading(key, flight):
                data = call.find(store, key)
                if data is None:
                    data = call.encode(function(*args, **kwargs))
                    store.set_encoded(key, data, ttl)
                flight.set_result(data)
                return call.decode(data)

        return remembered

    return decorate


class _CachedCall(Generic[R]):
    """What `cache_result` knows of one function."""

    def __init__(self, function: Callable[..., R], key_prefix: str) -> None:
        self._function = function
        self._prefix = f"{key_prefix}:{function.__module__}.{function.__qualname__}"
        self._signature = inspect.signature(function)

    def key(self, *args: Any, **kwargs: Any) -> str:
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        arguments = orjson.dumps(call.arguments, default=_argument, option=orjson.OPT_SORT_KEYS)
        return f"{self._prefix}:{hashlib.sha256(arguments).hexdigest()[:32]}"

    def find(self, store: Cache, key: str) -> bytes | None:
        data = store.get_encoded(key)
        if data is not None:
            try:
                self.decode(data)
            except ValueError:
                return None  # written by a release whose result had another shape
        return data

    def encode(self, value: R) -> bytes:
        return _encode(value, self._adapter)

    def decode(self, data: bytes) -> R:
        return cast(R, _decode(data, self._adapter))

    @cached_property
    def _adapter(self) -> "TypeAdapter[R] | None":
        """Of the return annotation; resolved at the first call, when every name in it exists."""
        annotation = get_type_hints(self._function).get("return", Any)
        is_array = annotation is np.ndarray or get_origin(annotation) is np.ndarray
        return None if annotation is Any or is_array else TypeAdapter(annotation)


# --- values as bytes, the first of which tells their kind -----------------------------------------------------------


def _encode(value: Any, adapter: "TypeAdapter[Any] | None" = None) -> bytes:
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects cannot be cached")
        return b"n" + orjson.dumps([value.dtype.str, value.shape]) + b"\n" + value.tobytes()
    return b"j" + (orjson.dumps(value) if adapter is None else adapter.dump_json(value))


def _decode(data: bytes, adapter: "TypeAdapter[Any] | None" = None) -> Any:
    """Raises ValueError on what `_encode` did not write for this type."""
    kind, body = data[:1], data[1:]
    if kind == b"b":
        return body
    if kind == b"n":
        header, _, samples = body.partition(b"\n")
        dtype, shape = orjson.loads(header)
        return np.frombuffer(samples, dtype=dtype).reshape(shape).copy()
    if kind == b"j":
        return orjson.loads(body) if adapter is None else adapter.validate_json(body)
    raise ValueError("not a cached value")


def _argument(value: Any) -> Any:
    """An argument that JSON does not know, as one that tells it from every other."""
    if isinstance(value, BaseModel):
        return [type(value).__qualname__, value.model_dump(mode="json")]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    raise TypeError(f"an argument of type {type(value).__name__} cannot be part of a cache key")
