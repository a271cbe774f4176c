"""The cache: values in Redis, or in this process's memory while Redis is away.

The cache may lose any value at any time, so it never holds the only copy of a fact. While Redis is away, each process
caches in its own memory, for at most `MEMORY_TTL_S`. Before it uses Redis again, it deletes there each key that it
changed during the outage. Until then, other processes may read the old values. A caller that must not get an old value
puts the version of the data into the key.
"""

import asyncio
import hashlib
import inspect
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial, wraps
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, get_origin, get_type_hints
from uuid import uuid4

import numpy as np
import orjson
from cachetools import TLRUCache
from pydantic import BaseModel, TypeAdapter
from redis import Redis, RedisError, ResponseError

from shared.messaging import foreign
from shared.messaging.redis import fail_fast
from shared.metrics import CACHE_FALLBACKS, CACHE_HITS, CACHE_MISSES, increment_counter
from shared.settings import CacheSettings, get_settings
from shared.singleton import process_singleton

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger(__name__)

NAMESPACE = "afterimage:cache:"
MEMORY_TTL_S = 60.0
PROBE_INTERVAL_S = 1.0
"""While Redis is away, one call per interval tries it."""
MAX_TRACKED_CHANGES = 10_000
"""Keys changed during an outage that are deleted one by one afterwards; with more changes, the whole cache is."""
JOIN_TIMEOUT_S = 30.0
"""How long a call of a cached function waits for an equal call before it runs the function itself."""
KEYS_PER_COMMAND = 500
CLAIM_PREFIX, RELEASED_PREFIX = f"{NAMESPACE}claim:", f"{NAMESPACE}released:"
CLAIM_TTL_S = 10.0
"""How long a process that has died keeps others from computing a value. They wait `wait_s` and compute then."""


class _MemoryEntry(NamedTuple):
    data: bytes
    ttl_s: float


class Cache:
    """Values by key. Safe to share between threads. No method raises because Redis is away.

    A value is bytes, a numpy array, or anything that JSON can hold (tuples come back as lists). A call waits for Redis
    at most a few times `socket_timeout_s`. While Redis is away, one call a second waits so long, the others not at all.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self._settings = settings
        self._redis: Redis = Redis.from_url(
            settings.url.get_secret_value(),
            **fail_fast(settings.socket_timeout_s),
        )
        self._lock = threading.RLock()
        self._memory: TLRUCache[str, _MemoryEntry] = TLRUCache(
            settings.memory_max_items, ttu=lambda _key, entry, now: now + entry.ttl_s, timer=time.monotonic
        )
        self._next_probe: float | None = None
        """None while Redis answers; otherwise the monotonic time from which a call may try it again."""
        self._changed_keys: set[str] = set()
        self._changed_patterns: set[str] = set()
        self._hits = self._misses = self._fallbacks = 0
        self._running_calls: dict[str, Future[bytes]] = {}

    def get(self, key: str, read: Callable[[Any], Any] | None = None) -> Any | None:
        """The value under `key`; None when the cache has no value, or one that cannot be read.

        read: makes the result from the value. Another program or another release may have written the value.
        """
        data = self.get_encoded(key)
        if data is None:
            return None
        try:
            return _decode(data) if read is None else read(_decode(data))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            foreign.record_dropped("cache", error)
            return None

    def set(self, key: str, value: Any, ttl: float | None = None) -> None:
        """Store `value` for `ttl` seconds (default: the setting `default_ttl_s`).

        Raises:
            TypeError: `value` cannot be encoded.
        """
        self.set_encoded(key, _encode(value), ttl)

    def get_or_compute(
        self,
        keys: Sequence[str],
        compute: Callable[[list[str]], Sequence[T]],
        *,
        read: Callable[[Any], T | None],
        ttl: float | None = None,
        wait_s: float,
    ) -> list[T]:
        """The values under `keys`. Missing ones are computed once, also when many processes want them at the same time.

        Args:
            compute: returns the values of the keys that it gets, in the same order. If it raises, the other calls in
                this process that wait for them raise the same. Those in other processes compute.
            read: as in `get`.
            wait_s: longest wait for another process. Then this one computes too.
        """
        values = {key: value for key in dict.fromkeys(keys) if (value := self.get(key, read)) is not None}
        calls = {key: self.join_call(key) for key in dict.fromkeys(keys) if key not in values}
        leading = {key: running for key, (is_first, running) in calls.items() if is_first}
        if leading:
            with ExitStack() as leads:
                for key, running in leading.items():
                    leads.enter_context(self.lead_call(key, running))
                computed = self._compute_in_one_process(list(leading), compute, read=read, ttl=ttl, wait_s=wait_s)
                encoded = {key: _encode(value) for key, value in computed.items()}
                for key, running in leading.items():
                    running.set_result(encoded[key])
            values |= computed
        for key, (_, running) in calls.items():
            if key not in values:
                try:
                    joined = read(_decode(running.result(JOIN_TIMEOUT_S)))
                except (_LeaderCanceledError, TimeoutError):
                    joined = None
                values[key] = compute([key])[0] if joined is None else joined
        return [values[key] for key in keys]

    def delete(self, key: str) -> bool:
        """Delete `key`; True when it had a value."""

        def delete_in_memory() -> bool:
            self._track_change(key)
            return self._memory.pop(key, None) is not None

        return self._redis_or_memory(lambda: bool(self._redis.unlink(NAMESPACE + key)), delete_in_memory)

    def invalidate(self, pattern: str) -> int:
        """Delete every key that matches `pattern` (`*`: any text, `?`: any one character); return how many."""

        def delete_in_memory() -> int:
            self._changed_patterns.add(pattern)
            matches = re.compile(re.escape(pattern).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL).fullmatch
            return sum(self._memory.pop(key, None) is not None for key in list(self._memory) if matches(key))

        return self._redis_or_memory(lambda: self._unlink_matching(pattern), delete_in_memory)

    def stats(self) -> dict[str, Any]:
        """`backend` in use, `memory_items`, and since start: `hits`, `misses`, `hit_rate`, `fallbacks`."""
        with self._lock:
            lookups = self._hits + self._misses
            return {
                "backend": "redis" if self._next_probe is None else "memory",
                "hits": self._hits,
                "misses": self._misses,
                "hit_rate": self._hits / lookups if lookups else 0.0,
                "fallbacks": self._fallbacks,
                "memory_items": len(self._memory),
            }

    @property
    def redis(self) -> Redis:
        """The Redis client, for operations that this class lacks. Its calls raise RedisError while Redis is away."""
        return self._redis

    def close(self) -> None:
        self._redis.close()

    # --- for `cache_result`

    def get_encoded(self, key: str) -> bytes | None:
        def get_from_memory() -> bytes | None:
            entry = self._memory.get(key)
            return entry.data if entry else None

        def get_from_redis() -> bytes | None:
            try:
                return cast(bytes | None, self._redis.get(NAMESPACE + key))
            except ResponseError as error:
                if not str(error).startswith("WRONGTYPE"):
                    raise
                self._redis.unlink(NAMESPACE + key)
                foreign.record_dropped("cache", "a key of another type")
                return None

        data = self._redis_or_memory(get_from_redis, get_from_memory)
        with self._lock:
            self._hits += data is not None
            self._misses += data is None
        prefix = {"prefix": key.partition(":")[0]}
        # Both series exist from the first read on. The ratio of one that does not exist is nothing instead of 0.
        increment_counter(CACHE_MISSES, data is None, prefix)
        increment_counter(CACHE_HITS, data is not None, prefix)
        return data

    def set_encoded(self, key: str, data: bytes, ttl: float | None) -> None:
        ttl_s = self._settings.default_ttl_s if ttl is None else ttl

        def set_in_redis() -> None:
            self._redis.set(NAMESPACE + key, data, px=max(1, round(ttl_s * 1000)))

        def set_in_memory() -> None:
            self._track_change(key)
            self._memory[key] = _MemoryEntry(data, min(ttl_s, MEMORY_TTL_S))

        self._redis_or_memory(set_in_redis, set_in_memory)

    def join_call(self, key: str) -> tuple[bool, Future[bytes]]:
        """Join the running call for `key`, or start one.

        Returns whether the caller is the first, which must run the function, and the future of the result.
        """
        with self._lock:
            running = self._running_calls.get(key)
            if running is not None:
                return False, running
            running = self._running_calls[key] = Future()
            running.set_running_or_notify_cancel()  # a waiter that is cancelled must not cancel the others
            return True, running

    @contextmanager
    def lead_call(self, key: str, running: Future[bytes]) -> Iterator[None]:
        """Run the first caller's block, which sets the result. If the block raises, the other callers get its error."""
        try:
            yield
        except Exception as error:
            running.set_exception(error)
            raise
        except BaseException:
            running.set_exception(_LeaderCanceledError())
            raise
        finally:
            with self._lock:
                del self._running_calls[key]

    # --- one process among several

    def _compute_in_one_process(
        self,
        keys: list[str],
        compute: Callable[[list[str]], Sequence[T]],
        *,
        read: Callable[[Any], T | None],
        ttl: float | None,
        wait_s: float,
    ) -> dict[str, T]:
        """Compute and store values. Wait for those that another process computes at the moment."""
        claim = uuid4().hex
        claimed_by = self._redis_or_memory(lambda: self._claim(keys, claim), lambda: dict.fromkeys(keys, claim))
        own = [key for key in keys if claimed_by[key] == claim]
        values: dict[str, T] = {}

        def compute_and_store(missing: list[str]) -> None:
            for key, value in zip(missing, compute(missing), strict=True):
                values[key] = value
                self.set(key, value, ttl)

        def look_up(missing: Iterable[str]) -> None:
            values.update({key: value for key in missing if (value := self.get(key, read)) is not None})

        if own:
            try:
                look_up(own)  # another process may have stored them just before the claim
                if missing := [key for key in own if key not in values]:
                    compute_and_store(missing)
            finally:
                self._redis_or_memory(lambda: self._release(own, claim), lambda: None)
        until = time.monotonic() + wait_s
        for other in {claimed_by[key] for key in keys} - {claim}:
            self._redis_or_memory(partial(self._wait_for_release, other, until), lambda: None)
        look_up(key for key in keys if key not in values)
        if left := [key for key in keys if key not in values]:  # that process has failed or is slow
            compute_and_store(left)
        return values

    def _claim(self, keys: Sequence[str], claim: str) -> dict[str, str]:
        """Claim the computation of each key, unless it is claimed already; return the claim of each key."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.set(f"{CLAIM_PREFIX}{key}", claim, nx=True, px=round(CLAIM_TTL_S * 1000))
                pipeline.get(f"{CLAIM_PREFIX}{key}")
            holders = pipeline.execute()[1::2]
        return {key: (holder or claim.encode()).decode() for key, holder in zip(keys, holders, strict=True)}

    def _release(self, keys: Sequence[str], claim: str) -> None:
        """Give up claims, and notify the processes that wait. An expired claim may be of another process by now."""
        released = f"{RELEASED_PREFIX}{claim}"
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.rpush(released, 1)
            pipeline.expire(released, round(CLAIM_TTL_S))
            pipeline.unlink(*(f"{CLAIM_PREFIX}{key}" for key in keys))
            pipeline.execute()

    def _wait_for_release(self, claim: str, until: float) -> None:
        """Wait until the claim is released, or the monotonic time `until`."""
        released = f"{RELEASED_PREFIX}{claim}"
        while (left_s := until - time.monotonic()) > 0:
            # The command moves the notification to the end of its list, so that it also wakes the next one.
            patience_s = max(0.01, min(left_s, self._settings.socket_timeout_s / 2))
            if self._redis.blmove(released, released, patience_s):  # type: ignore[arg-type]  # it may be a fraction
                return

    # --- Redis or memory

    def _redis_or_memory(self, in_redis: Callable[[], R], in_memory: Callable[[], R]) -> R:
        """Call `in_redis`, or `in_memory` with the lock held while Redis is away."""
        while True:
            if self._is_redis_available():
                try:
                    return in_redis()
                except RedisError as error:
                    self._mark_redis_lost(error)
            with self._lock:
                if self._next_probe is not None:  # otherwise Redis is back since, and memory must not be used
                    self._fallbacks += 1
                    CACHE_FALLBACKS.inc()
                    return in_memory()

    def _is_redis_available(self) -> bool:
        with self._lock:
            if self._next_probe is None:
                return True
            now = time.monotonic()
            if now < self._next_probe:
                return False
            self._next_probe = now + PROBE_INTERVAL_S  # this call tries Redis, the others use memory
        try:
            self._redis.ping()
            self._resume_redis()
        except RedisError as error:
            self._mark_redis_lost(error)
            return False
        return True

    def _mark_redis_lost(self, error: RedisError) -> None:
        with self._lock:
            if self._next_probe is None:
                logger.warning("cache_redis_lost", extra={"cause": str(error)})
            self._next_probe = time.monotonic() + PROBE_INTERVAL_S

    def _resume_redis(self) -> None:
        """Delete from Redis the keys that changed during the outage, then use Redis again."""
        while True:
            with self._lock:
                keys, patterns = list(self._changed_keys), list(self._changed_patterns)
                if not keys and not patterns:
                    self._memory.clear()
                    self._next_probe = None
                    logger.info("cache_redis_returned")
                    return
            self._unlink([NAMESPACE + key for key in keys])
            for pattern in patterns:
                self._unlink_matching(pattern)
            with self._lock:
                self._changed_keys.difference_update(keys)
                self._changed_patterns.difference_update(patterns)

    def _track_change(self, key: str) -> None:
        if len(self._changed_keys) < MAX_TRACKED_CHANGES:
            self._changed_keys.add(key)
        else:
            self._changed_patterns.add("*")

    def _unlink_matching(self, pattern: str) -> int:
        # SCAN instead of KEYS, which would block the server for every client.
        glob = NAMESPACE + re.sub(r"([\[\]\\^])", r"\\\1", pattern)
        removed, page = 0, []
        for key in self._redis.scan_iter(match=glob, count=KEYS_PER_COMMAND):
            page.append(key)
            if len(page) == KEYS_PER_COMMAND:
                removed += self._unlink(page)
                page = []
        return removed + self._unlink(page)

    def _unlink(self, keys: list[Any]) -> int:
        pages = (keys[start : start + KEYS_PER_COMMAND] for start in range(0, len(keys), KEYS_PER_COMMAND))
        return sum(int(self._redis.unlink(*page)) for page in pages)


@process_singleton
def get_cache_manager() -> Cache:
    """The cache of this process, opened at first use."""
    return Cache(get_settings().cache)


# --- the decorator ------------------------------------------------------------------------------------------------


class _LeaderCanceledError(Exception):
    """The first caller was cancelled before it had a result, so the others run the function themselves."""


def cache_result(*, key_prefix: str, ttl: float | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Cache the results of a plain or async function by its arguments, for `ttl` seconds.

    Concurrent calls with equal arguments in one process run the function once. An exception is not cached, but every
    concurrent call gets it. A cached result has the type of the function's return annotation: a Pydantic model,
    dataclass, tuple, UUID, numpy array and so on. Without an annotation it has the types of JSON.

    The function must belong to a module, not to a class, because the key consists of the prefix, the function's name
    and the arguments. Arguments may be numbers, texts, bytes, UUIDs, dates, enums, dataclasses, Pydantic models,
    arrays, and lists and dicts of them. A call with any other argument raises TypeError.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        call = _CachedCall(function, key_prefix)
        if inspect.iscoroutinefunction(function):

            @wraps(function)
            async def cached_coroutine(*args: P.args, **kwargs: P.kwargs) -> Any:
                cache, key = get_cache_manager(), call.key(*args, **kwargs)
                is_first, running = cache.join_call(key)
                if not is_first:
                    try:
                        return call.decode(await asyncio.wait_for(asyncio.wrap_future(running), JOIN_TIMEOUT_S))
                    except (_LeaderCanceledError, TimeoutError):
                        return await function(*args, **kwargs)
                with cache.lead_call(key, running):
                    data = await asyncio.to_thread(call.find_cached, cache, key)
                    if data is None:
                        data = call.encode(await function(*args, **kwargs))
                        await asyncio.to_thread(cache.set_encoded, key, data, ttl)
                    running.set_result(data)
                    return call.decode(data)

            return cast(Callable[P, R], cached_coroutine)

        @wraps(function)
        def cached(*args: P.args, **kwargs: P.kwargs) -> R:
            cache, key = get_cache_manager(), call.key(*args, **kwargs)
            is_first, running = cache.join_call(key)
            if not is_first:
                try:
                    return call.decode(running.result(JOIN_TIMEOUT_S))
                except (_LeaderCanceledError, TimeoutError):
                    return function(*args, **kwargs)
            with cache.lead_call(key, running):
                data = call.find_cached(cache, key)
                if data is None:
                    data = call.encode(function(*args, **kwargs))
                    cache.set_encoded(key, data, ttl)
                running.set_result(data)
                return call.decode(data)

        return cached

    return decorate


class _CachedCall(Generic[R]):
    """A cached function: makes its keys, and encodes and decodes its results."""

    def __init__(self, function: Callable[..., R], key_prefix: str) -> None:
        self._function = function
        self._prefix = f"{key_prefix}:{function.__module__}.{function.__qualname__}"
        self._signature = inspect.signature(function)

    def key(self, *args: Any, **kwargs: Any) -> str:
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        arguments = orjson.dumps(call.arguments, default=_argument, option=orjson.OPT_SORT_KEYS)
        return f"{self._prefix}:{hashlib.sha256(arguments).hexdigest()[:32]}"

    def find_cached(self, cache: Cache, key: str) -> bytes | None:
        data = cache.get_encoded(key)
        if data is not None:
            try:
                self.decode(data)
            except ValueError:
                return None  # written by another program, or by a release whose result had another type
        return data

    def encode(self, value: R) -> bytes:
        return _encode(value, self._adapter)

    def decode(self, data: bytes) -> R:
        return cast(R, _decode(data, self._adapter))

    @cached_property
    def _adapter(self) -> "TypeAdapter[R] | None":
        """The adapter of the return annotation. It is built at the first call, when every name in it exists."""
        annotation = get_type_hints(self._function).get("return", Any)
        is_array = annotation is np.ndarray or get_origin(annotation) is np.ndarray
        return None if annotation is Any or is_array else TypeAdapter(annotation)


# --- values as bytes; the first byte is the kind: bytes, numpy, JSON ----------------------------------------------


def _encode(value: Any, adapter: "TypeAdapter[Any] | None" = None) -> bytes:
    if isinstance(value, bytes):
        return b"b" + value
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects cannot be cached")
        return b"n" + orjson.dumps([value.dtype.str, value.shape]) + b"\n" + value.tobytes()
    return b"j" + (orjson.dumps(value) if adapter is None else adapter.dump_json(value))


def _decode(data: bytes, adapter: "TypeAdapter[Any] | None" = None) -> Any:
    """The value that `_encode` wrote.

    Raises:
        ValueError: `data` is not an encoded value of this type.
    """
    kind, body = data[:1], data[1:]
    if kind == b"b":
        return body
    if kind == b"n":
        header, _, samples = body.partition(b"\n")
        try:
            dtype, shape = orjson.loads(header)
            return np.frombuffer(samples, dtype=dtype).reshape(shape).copy()
        except TypeError as error:
            raise ValueError("not a cached array") from error
    if kind == b"j":
        return orjson.loads(body) if adapter is None else adapter.validate_json(body)
    raise ValueError("not a cached value")


def _argument(value: Any) -> Any:
    """A JSON value that stands for an argument of another type, different for different arguments."""
    if isinstance(value, BaseModel):
        return [type(value).__qualname__, value.model_dump(mode="json")]
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes):
        return ["bytes", hashlib.sha256(value).hexdigest()]
    raise TypeError(f"an argument of type {type(value).__name__} cannot be part of a cache key")
