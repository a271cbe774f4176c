"""The usage examples of the first version, on real servers.

Their requests (`search`, `rag/generate`) run against a whole stack in `tests/e2e/test_main_job`. Three things differ
from the first version:

- The key prefix and the time to live of a cache are keyword arguments.
- A function that waits for Postgres is synchronous, like the driver.
- A client polls a job instead of awaiting it.
"""

import asyncio
import re
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text

from shared.cache import cache_result, get_cache_manager
from shared.metrics import increment_counter, recent_operations, set_gauge, time_operation
from shared.pools import (
    ResourceType,
    aclose,
    async_connection_from_pool,
    close_all,
    connection_from_pool,
    optimize_performance,
    pool_statistics,
)
from shared.settings import Settings
from tests.integration.conftest import API, Client, Server

calls: list[Any] = []


@pytest.fixture(autouse=True)
def _real_servers(settings: Settings) -> Iterator[None]:
    calls.clear()
    yield
    close_all()


@cache_result(ttl=300, key_prefix="search")
async def search_images(query: str, k: int) -> list[str]:
    calls.append((query, k))
    return [f"{query} {number}" for number in range(k)]


@cache_result(ttl=3600, key_prefix="embeddings")
def generate_embedding(text: str) -> list[float]:
    calls.append(text)
    return [float(len(text)), 0.5]


def test_results_of_sync_and_async_functions_are_cached() -> None:
    assert generate_embedding("a cat") == generate_embedding("a cat") == [5.0, 0.5]

    async def twice() -> list[list[str]]:
        return [await search_images("a cat playing", k=2), await search_images("a cat playing", 2)]

    first, second = asyncio.run(twice())
    assert first == second == ["a cat playing 0", "a cat playing 1"]
    assert calls == ["a cat", ("a cat playing", 2)], "each calls once"
    assert get_cache_manager().invalidate("embeddings:*") == 1
    generate_embedding("a cat")
    assert len(calls) == 3


def test_the_cache_can_be_used_directly() -> None:
    cache_manager = get_cache_manager()
    cache_manager.set("key", {"value": 1}, ttl=3600)
    cached_value = cache_manager.get("key")
    assert cached_value == {"value": 1}
    assert cache_manager.stats()["backend"] == "redis"


def test_connections_come_from_pools(server: Server) -> None:
    with connection_from_pool(ResourceType.DATABASE) as conn:
        assert conn.execute(text("select 1")).scalar_one() == 1
        assert pool_statistics()["database"]["in_use"] == 1
    assert pool_statistics()["database"]["in_use"] == 0

    async def ask() -> int:
        async with async_connection_from_pool(ResourceType.HTTP) as client:
            status = (await client.get(f"{server.url}/health")).status_code
        await aclose()
        return status

    assert asyncio.run(ask()) == 200


@optimize_performance
def expensive_operation() -> str:
    return "done"


def test_timed_and_counted_operations_are_in_metrics_and_statistics(client: Client) -> None:
    with time_operation("database_query"), connection_from_pool(ResourceType.DATABASE) as database:
        results = database.execute(text("select 1")).all()
    assert len(results) == 1
    increment_counter("user_actions", labels={"action": "image_upload"})
    set_gauge("memory_usage_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    assert expensive_operation() == "done"

    shown = client.get("/metrics").text
    assert re.search(r'^user_actions_total\{action="image_upload"\} [1-9]', shown, re.MULTILINE)
    assert re.search(r"^memory_usage_bytes [1-9]", shown, re.MULTILINE)
    assert re.search(r"^database_query_duration_seconds_count [1-9]", shown, re.MULTILINE)
    assert re.search(r"^expensive_operation_duration_seconds_count [1-9]", shown, re.MULTILINE)
    assert "expensive_operation" in recent_operations()
    assert "expensive_operation" in client.get(f"{API}/stats").json["operations"]


def test_the_operational_endpoints_keep_their_paths(server: Server) -> None:
    with connection_from_pool(ResourceType.HTTP) as client:
        for path in ("/health", f"{API}/health", f"{API}/stats"):
            answer = client.get(server.url + path)
            assert answer.status_code == 200, path
        assert {"backend", "hits", "misses"} <= set(answer.json()["cache"])
