"""Health checks of all components. They run at the same time, each for at most `CHECK_TIMEOUT_S`."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import redis
from sqlalchemy import text

from shared.contracts.service import ComponentHealth, HealthStatus, HealthView
from shared.db import workers
from shared.db.session import session_scope
from shared.errors import BaseAppException
from shared.messaging.queue import generate_queue
from shared.messaging.redis import connect
from shared.settings import get_settings
from shared.singleton import process_singleton
from shared.storage import get_blobs
from shared.version import VERSION

CHECK_TIMEOUT_S = 2.0

Check = Callable[[], str | None]
"""Raises an error if the component is unavailable; returns what is missing, or `None`."""


def alive() -> HealthView:
    """Report that this process answers, without any check."""
    return HealthView(status=HealthStatus.OK, version=VERSION, components={})


def ready(*, strict: bool, may_see_details: Callable[[], bool]) -> HealthView:
    """Check whether this process can serve requests.

    may_see_details: called beside the checks, because it may wait for the database. The view has details if it returns
        True in time.

    strict: jobs must also be able to run now. Otherwise it is enough that they are accepted and run later.
    """
    accepting: dict[str, Check] = {"database": _check_database, "storage": _check_storage}
    running: dict[str, Check] = {"broker": _check_broker, "workers": _check_workers}
    if strict:
        return _run_checks(needed=accepting | running, useful={}, may_see_details=may_see_details)
    return _run_checks(needed=accepting, useful=running, may_see_details=may_see_details)


def everything(*, may_see_details: Callable[[], bool]) -> HealthView:
    """Check all components. may_see_details: as in `ready`."""
    return _run_checks(
        needed={"database": _check_database, "storage": _check_storage},
        # Without a broker or workers, jobs are accepted and run later. Without a cache, requests are slower.
        useful={"broker": _check_broker, "cache": _check_cache, "workers": _check_workers},
        may_see_details=may_see_details,
    )


def _run_checks(
    *, needed: dict[str, Check], useful: dict[str, Check], may_see_details: Callable[[], bool]
) -> HealthView:
    details = _check_executor().submit(may_see_details)
    futures = {name: _check_executor().submit(_timed, check) for name, check in (needed | useful).items()}
    running: list[Future[Any]] = [details, *futures.values()]
    wait(running, timeout=CHECK_TIMEOUT_S)
    components = {
        name: _component_health(future, failed_status=HealthStatus.DOWN if name in needed else HealthStatus.DEGRADED)
        for name, future in futures.items()
    }
    order = [HealthStatus.OK, HealthStatus.DEGRADED, HealthStatus.DOWN]
    view = HealthView(
        status=max((component.status for component in components.values()), key=order.index),
        version=VERSION,
        components=components,
    )
    details.cancel()
    return view if details.done() and not details.cancelled() and details.result() else view.without_details()


def _timed(check: Check) -> tuple[str | None, float]:
    started = time.monotonic()
    return check(), (time.monotonic() - started) * 1000


def _component_health(future: "Future[tuple[str | None, float]]", *, failed_status: HealthStatus) -> ComponentHealth:
    if not future.done():
        future.cancel()
        return ComponentHealth(status=failed_status, detail=f"does not answer within {CHECK_TIMEOUT_S:g} s")
    error = future.exception()
    if error is None:
        detail, latency_ms = future.result()
        return ComponentHealth(
            status=HealthStatus.OK if detail is None else failed_status,
            detail=detail,
            latency_ms=round(latency_ms, 2),
        )
    if isinstance(error, BaseAppException):
        return ComponentHealth(status=failed_status, detail=error.message)
    if isinstance(error, redis.RedisError):
        return ComponentHealth(status=failed_status, detail="cannot be reached")
    raise error


def _check_database() -> None:
    with session_scope() as session:
        session.execute(text("select 1"))


def _check_storage() -> None:
    get_blobs().check()


def _check_broker() -> None:
    _ping(get_settings().queue.url.get_secret_value())


def _check_cache() -> None:
    _ping(get_settings().cache.url.get_secret_value())


def _check_workers() -> str | None:
    with session_scope() as session:
        ready = {(worker.kind, worker.model) for worker in workers.list_live(session) if worker.state == "ready"}
    kinds = {kind for kind, _ in ready}
    missing = [kind for kind in ("embed", "io") if kind not in kinds]
    missing += [generate_queue(name) for name in get_settings().model.generators if ("generate", name) not in ready]
    return f"no worker is ready for {', '.join(missing)}" if missing else None


def _ping(url: str) -> None:
    _connection(url).ping()


@process_singleton
def _connection(url: str) -> redis.Redis:
    return connect(url, timeout_s=CHECK_TIMEOUT_S / 2)


@process_singleton
def _check_executor() -> ThreadPoolExecutor:
    # More threads than checks, so that checks that hang do not block the others.
    return ThreadPoolExecutor(max_workers=32, thread_name_prefix="health")
