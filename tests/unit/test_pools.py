"""The pools of a process lend, count and close connections, on real Postgres, Valkey and HTTP servers."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import redis
from prometheus_client import REGISTRY
from sqlalchemy import text

from shared.cache import get_cache_manager
from shared.db.session import build_engine, get_engine
from shared.errors import DatabaseQueryError
from shared.metrics import recent_operations
from shared.pools import (
    ResourceType,
    aclose,
    async_connection_from_pool,
    close_all,
    connection_from_pool,
    optimize_performance,
    pool_statistics,
    thread_executor,
)
from shared.settings import Settings
from tests.conftest import forget_process_resources


@pytest.fixture(autouse=True)
def _pools_of_this_test(settings: Settings) -> Iterator[None]:
    get_cache_manager.cache_clear()
    yield
    close_all()
    get_cache_manager.cache_clear()


@pytest.fixture
def http_url() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = str(self.client_address[1]).encode()  # the client's port identifies the connection
            self.send_response(302 if self.path == "/elsewhere" else 200)
            self.send_header("Location", "/")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def in_use(resource: str) -> int:
    return pool_statistics()[resource]["in_use"]


def active_connections() -> float:
    return REGISTRY.get_sample_value("database_connections_active") or 0.0


def test_a_database_connection_is_lent_counted_and_returned() -> None:
    before = active_connections()
    with connection_from_pool(ResourceType.DATABASE) as connection:
        assert connection.execute(text("select 42")).scalar_one() == 42
        assert in_use("database") == 1
        assert active_connections() == before + 1
    assert in_use("database") == 0
    assert active_connections() == before
    assert pool_statistics()["database"]["idle"] == 1


def test_a_block_commits_and_a_raising_block_rolls_back() -> None:
    with connection_from_pool(ResourceType.DATABASE) as connection:
        connection.execute(text("create table seen (n int)"))

    def insert_and_fail() -> None:
        with connection_from_pool(ResourceType.DATABASE) as connection:
            connection.execute(text("insert into seen values (1)"))
            raise KeyError

    with pytest.raises(KeyError):
        insert_and_fail()
    with connection_from_pool(ResourceType.DATABASE) as connection:
        assert connection.execute(text("select count(*) from seen")).scalar_one() == 0
    assert in_use("database") == 0


def test_many_threads_share_the_connections_of_the_pool(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Connections above the pool's size would be closed when they are returned, and replaced by new ones.
    monkeypatch.setenv("AFTERIMAGE_DATABASE__MAX_OVERFLOW", "0")
    forget_process_resources()
    backends = set(thread_executor().map(lambda _: backend(), range(100)))
    assert len(backends) <= settings.database.pool_size
    assert in_use("database") == 0


def test_every_statement_is_timed_even_a_failing_one() -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("database_query_duration_seconds_count") or 0.0

    with connection_from_pool(ResourceType.DATABASE) as connection:
        before = count()
        connection.execute(text("select 1"))
        assert count() == before + 1

    def fail() -> None:
        with connection_from_pool(ResourceType.DATABASE) as connection:
            connection.execute(text("select nonsense"))

    with pytest.raises(DatabaseQueryError):
        fail()
    assert count() == before + 2
    with connection_from_pool(ResourceType.DATABASE) as connection:
        assert "statements_started" not in connection.info or connection.info["statements_started"] == []


def backend() -> int:
    with connection_from_pool(ResourceType.DATABASE) as connection:
        return int(connection.execute(text("select pg_backend_pid()")).scalar_one())


def test_a_connection_that_the_server_ended_is_replaced_before_it_is_lent(settings: Settings) -> None:
    victim = backend()
    assert backend() == victim
    other = build_engine(settings.database)
    with other.connect() as connection:
        assert connection.execute(text("select pg_terminate_backend(:pid, 5000)"), {"pid": victim}).scalar_one()
    other.dispose()
    before = active_connections()
    assert backend() != victim
    assert active_connections() == before


def test_redis_is_lent_through_the_caches_own_pool() -> None:
    with connection_from_pool(ResourceType.REDIS) as client:
        client.set("x", "1")
        assert client.get("x") == b"1"
    assert pool_statistics()["redis"] == {"in_use": 0, "idle": 1}


def test_http_connections_are_reused(http_url: str) -> None:
    ports = set()
    for _ in range(3):
        with connection_from_pool(ResourceType.HTTP) as client:
            ports.add(client.get(http_url).text)
            assert client.get(f"{http_url}elsewhere").status_code == 302
    assert len(ports) == 1


def test_async_http_connections_are_reused_and_closed(http_url: str) -> None:
    async def scenario() -> httpx.AsyncClient:
        ports = set()
        for _ in range(3):
            async with async_connection_from_pool(ResourceType.HTTP) as client:
                ports.add((await client.get(http_url)).text)
        assert len(ports) == 1
        await aclose()
        await aclose()
        return client

    first, second = asyncio.run(scenario()), asyncio.run(scenario())
    assert first.is_closed
    assert second.is_closed
    assert first is not second


def test_closing_leaves_no_connection_and_the_next_use_works(settings: Settings) -> None:
    def backends() -> int:
        with connection_from_pool(ResourceType.DATABASE) as connection:
            found = connection.execute(
                text("select count(*) from pg_stat_activity where datname = current_database()")
            ).scalar_one()
            return int(found)

    assert backends() == 1
    with connection_from_pool(ResourceType.REDIS) as client:
        client.ping()
    with connection_from_pool(ResourceType.HTTP) as http_client:
        pass
    close_all()
    assert pool_statistics()["database"]["idle"] == 0
    with redis.Redis.from_url(settings.cache.url.get_secret_value()) as raw:
        assert len(raw.client_list()) == 1
    assert http_client.is_closed
    assert backends() == 1
    close_all()


def test_statistics_open_no_pool(settings: Settings) -> None:
    close_all()
    get_cache_manager.cache_clear()
    get_engine.cache_clear()
    assert pool_statistics() == {}


@optimize_performance
def expensive_operation(n: int) -> int:
    return n + 1


@optimize_performance
async def expensive_coroutine(n: int) -> int:
    return n + 1


def test_an_optimised_function_is_timed_and_listed_in_the_statistics() -> None:
    before = recent_operations().get("expensive_operation", {}).get("count", 0)
    assert expensive_operation(1) == 2
    assert asyncio.run(expensive_coroutine(1)) == 2
    assert recent_operations()["expensive_operation"]["count"] == before + 1
    assert "expensive_coroutine" in recent_operations()
    assert REGISTRY.get_sample_value("expensive_operation_duration_seconds_count")
