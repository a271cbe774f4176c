"""Is every part there? Each is asked at the same time and none is waited for longer than `PATIENCE_S`."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import text

from shared.contracts.service import ComponentHealth, HealthStatus, HealthView
from shared.db import workers
from shared.db.session import session_scope
from shared.errors import BaseAppException
from shared.messaging.queue import generate_queue
from shared.settings import get_settings
from shared.singleton import once
from shared.storage import get_blobs
from shared.version import VERSION

PATIENCE_S = 2.0

Check = Callable[[], str | None]
"""Raises when the part is away; returns what is missing of it."""


def alive() -> HealthView:
    return HealthView(status=HealthStatus.OK, version=VERSION, components={})


def ready(*, strict: bool) -> HealthView:
    """strict: jobs must be able to run, too; else it is enough that they are accepted and run later."""
    accepting: dict[str, Check] = {"database": _database, "storage": _storage}
    running: dict[str, Check] = {"broker": _broker, "workers": _workers}
    if strict:
        return _asked(needed=accepting | running, useful={})
    return _asked(needed=accepting, useful=running)


def everything() -> HealthView:
    return _asked(
        needed={"database": _database, "storage": _storage},
        # Without a broker jobs are accepted and run later; without a cache everything is slower; workers may start.
        useful={"broker": _broker, "cache": _cache, "workers": _workers},
    )


def _asked(*, needed: dict[str, Check], useful: dict[str, Check]) -> HealthView:
    futures = {name: _askers().submit(_timed, check) for name, check in (needed | useful).items()}
    wait(futures.values(), timeout=PATIENCE_S)
    components = {
        name: _outcome(future, missing=HealthStatus.DOWN if name in needed else HealthStatus.DEGRADED)
        for name, future in futures.items()
    }
    order = [HealthStatus.OK, HealthStatus.DEGRADED, HealthStatus.DOWN]
    return HealthView(
        status=max((component.status for component in components.values()), key=order.index),
        version=VERSION,
        components=components,
    )


def _timed(check: Check) -> tuple[str | None, float]:
    started = time.monotonic()
    return check(), (time.monotonic() - started) * 1000


def _outcome(future: "Future[tuple[str | None, float]]", *, missing: HealthStatus) -> ComponentHealth:
    if not future.done():
        future.cancel()
        return ComponentHealth(status=missing, detail=f"does not answer within {PATIENCE_S:g} s")
    error = future.exception()
    if error is None:
        remark, latency_ms = future.result()
        return ComponentHealth(
            status=HealthStatus.OK if remark is None else missing,
            detail=remark,
            latency_ms=round(latency_ms, 2),
        )
    if isinstance(error, BaseAppException):
        return ComponentHealth(status=missing, detail=error.message)
    if isinstance(error, redis.RedisError):
        return ComponentHealth(status=missing, detail="cannot be reached")
    raise error


def _database() -> None:
    with session_scope() as session:
        session.execute(text("select 1"))


def _storage() -> None:
    get_blobs().check()


def _broker() -> None:
    _ping(get_settings().queue.url.get_secret_value())


def _cache() -> None:
    _ping(get_settings().cache.url.get_secret_value())


def _workers() -> str | None:
    with session_scope() as session:
        ready = {(worker.kind, worker.model) for worker in workers.live(session) if worker.state == "ready"}
    kinds = {kind for kind, _ in ready}
    missing = [kind for kind in ("embed", "io") if kind not in kinds]
    missing += [generate_queue(name) for name in get_settings().model.generators if ("generate", name) not in ready]
    return f"no worker is ready for {', '.join(missing)}" if missing else None


def _ping(url: str) -> None:
    _connection(url).ping()


@once
def _connection(url: str) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_timeout=PATIENCE_S / 2, socket_connect_timeout=PATIENCE_S / 2, retry=Retry(NoBackoff(), 0)
    )


@once
def _askers() -> ThreadPoolExecutor:
    # As many as checks: one that hangs must not keep the others from being asked.
    return ThreadPoolExecutor(max_workers=16, thread_name_prefix="health")
