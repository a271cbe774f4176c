"""Connections to Redis whose calls fail after one timeout instead of trying again."""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool

from shared.messaging.sentinels import SentinelAddress

CALL_ONCE: dict[str, Any] = {
    # redis-py would try three times, with pauses, so a call to a frozen server would take seconds.
    "retry": Retry(NoBackoff(), 0),
    # Only makes redis-py close the connection: it leads to a former primary, and a new one may lead to the present one.
    "retry_on_error": [ReadOnlyError],
}
"""Options of a Redis connection whose calls are not repeated."""


def connect(url: str, *, timeout_s: float, reply_timeout_s: float | None = None, **options: Any) -> redis.Redis:
    """A client that connects at its first call.

    timeout_s: seconds to connect, and to wait for a reply. reply_timeout_s: seconds to wait for a reply instead, for a
    client that sends blocking commands.
    """
    options = {**fail_fast(timeout_s, reply_timeout_s=reply_timeout_s), **options}
    if (address := SentinelAddress.parse(url)) is not None:
        return redis.Redis(connection_pool=primary_pool(address, **options))
    return redis.Redis.from_url(url, **options)


def primary_pool(address: SentinelAddress, **options: Any) -> SentinelConnectionPool:
    """A pool of connections to the primary, which the sentinels name at each new connection. options: of each."""
    of_sentinels = {name: value for name, value in options.items() if name.startswith("socket_")}
    if address.tls:
        of_sentinels["ssl"] = options["ssl"] = True
    return SentinelConnectionPool(  # type: ignore[no-untyped-call]
        address.service,
        Sentinel(  # type: ignore[no-untyped-call]
            address.hosts, sentinel_kwargs={**of_sentinels, **CALL_ONCE, "password": address.sentinel_password}
        ),
        db=address.database,
        username=address.username,
        password=address.password,
        **options,
    )


def fail_fast(timeout_s: float, *, reply_timeout_s: float | None = None) -> dict[str, Any]:
    """The options of `connect` for a library that builds its own client."""
    return {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s if reply_timeout_s is None else reply_timeout_s,
        **CALL_ONCE,
    }
