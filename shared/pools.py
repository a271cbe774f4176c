"""Shared resources of a process: database and Redis connections, HTTP clients and executors.

SQLAlchemy, redis-py and httpx do the pooling. Their limits, recycling and health checks are set where each is built.
This module lends their connections, counts them, and closes them when the process ends.

`connection_from_pool`, `async_connection_from_pool`, `optimize_performance`, `thread_executor` and `aclose` serve the
usage examples of the first version; the product itself calls the pools directly.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from enum import StrEnum
from multiprocessing.util import Finalize
from typing import Any, Literal, ParamSpec, TypeVar, overload
from weakref import WeakKeyDictionary

import httpx
from redis import Redis
from sqlalchemy import Connection

from shared.cache import get_cache_manager
from shared.db.session import get_engine, session_scope
from shared.messaging.coalesce import close_notifiers
from shared.messaging.queue import broker
from shared.metrics import time_operation
from shared.singleton import process_singleton
from shared.tracing import stop as stop_traces

P = ParamSpec("P")
R = TypeVar("R")

HTTP_TIMEOUT = httpx.Timeout(10, connect=3, pool=3)
HTTP_LIMITS = httpx.Limits(max_connections=32, max_keepalive_connections=8, keepalive_expiry=30)


class ResourceType(StrEnum):
    DATABASE = "database"
    REDIS = "redis"
    HTTP = "http"


@overload
@contextmanager
def connection_from_pool(resource: Literal[ResourceType.DATABASE]) -> Iterator[Connection]: ...
@overload
@contextmanager
def connection_from_pool(resource: Literal[ResourceType.REDIS]) -> Iterator["Redis"]: ...
@overload
@contextmanager
def connection_from_pool(resource: Literal[ResourceType.HTTP]) -> Iterator[httpx.Client]: ...
@contextmanager
def connection_from_pool(resource: ResourceType) -> Iterator[Any]:
    """Lend a shared resource for one block.

    DATABASE: a connection in a transaction, checked before use. It commits at the end of the block, rolls back when the
    block raises, and returns to the pool.
    REDIS: the client of the cache's Redis, which takes a connection of its pool for each call.
    HTTP: a client that follows no redirects and has a timeout for every wait.

    Raises:
        DatabaseConnectionError: of DATABASE, when the database cannot be reached or has no free connection.
        DatabaseQueryError: of DATABASE, when a statement failed for any other reason.
    """
    match resource:
        case ResourceType.DATABASE:
            with session_scope() as session:
                yield session.connection()
        case ResourceType.REDIS:
            yield get_cache_manager().redis
        case ResourceType.HTTP:
            yield _http_client()


@asynccontextmanager
async def async_connection_from_pool(resource: Literal[ResourceType.HTTP]) -> AsyncIterator[httpx.AsyncClient]:
    """Lend the running event loop's shared HTTP client for one block. `aclose` closes it.

    Raises:
        ValueError: `resource` is not HTTP. The drivers of the other resources are not asynchronous.
    """
    if resource is not ResourceType.HTTP:
        raise ValueError(f"{resource} has no asynchronous pool")
    loop = asyncio.get_running_loop()
    client = _async_http_clients.get(loop)
    if client is None:
        client = _async_http_clients[loop] = httpx.AsyncClient(timeout=HTTP_TIMEOUT, limits=HTTP_LIMITS)
    yield client


def optimize_performance(function: Callable[P, R]) -> Callable[P, R]:
    """Measure every call of a plain or async function, as the metric `<its name>_duration_seconds` and in `/stats`."""
    return time_operation(re.sub(r"\W+", "_", function.__name__).strip("_").lower())(function)


@process_singleton
def thread_executor() -> Executor:
    """Threads for work that waits, such as many reads of the blob store.

    Work that computes for long belongs in a process of its own, as in `shared.imaging.UploadDecoder`.
    """
    return ThreadPoolExecutor(max_workers=16, thread_name_prefix="shared")


def pool_statistics() -> dict[str, dict[str, int]]:
    """How many connections of each opened pool are `in_use` and `idle`; for the database also `size` and `overflow`."""
    statistics = {}
    if get_engine.cache_info().currsize:
        pool: Any = get_engine().pool  # a QueuePool, whose counters the base class does not name
        statistics["database"] = {
            "size": pool.size(),
            "in_use": pool.checkedout(),
            "idle": pool.checkedin(),
            "overflow": max(pool.overflow(), 0),
        }
    if get_cache_manager.cache_info().currsize:
        counted = get_cache_manager().redis.connection_pool.get_connection_count()
        by_state = {attributes["db.client.connection.state"]: count for count, attributes in counted}
        statistics["redis"] = {"in_use": by_state["used"], "idle": by_state["idle"]}
    return statistics


def close_all() -> None:
    """Close every pool that this process opened, and the notifiers that use them. For the end of a process.

    The next use opens them again.
    """
    close_notifiers()
    if get_engine.cache_info().currsize:
        get_engine().dispose()  # the engine stays, with a new empty pool: sessions are bound to it
    if get_cache_manager.cache_info().currsize:
        get_cache_manager().close()
    if _http_client.cache_info().currsize:
        _http_client().close()
        _http_client.cache_clear()
    if thread_executor.cache_info().currsize:
        thread_executor().shutdown(cancel_futures=True)
        thread_executor.cache_clear()
    if broker.cache_info().currsize:
        broker().close()
    stop_traces()


def close_at_exit() -> None:
    """Call `close_all` when this process ends. A process that `multiprocessing` started runs no `atexit` functions."""
    Finalize(None, close_all, exitpriority=0)


async def aclose() -> None:
    """Close the running event loop's HTTP client, if it has one."""
    client = _async_http_clients.pop(asyncio.get_running_loop(), None)
    if client is not None:
        await client.aclose()


@process_singleton
def _http_client() -> httpx.Client:
    return httpx.Client(timeout=HTTP_TIMEOUT, limits=HTTP_LIMITS)


_async_http_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, httpx.AsyncClient] = WeakKeyDictionary()
"""One client per event loop, because a connection belongs to the loop that opened it."""
