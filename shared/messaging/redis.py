"""Connections to Redis whose calls fail after one timeout instead of trying again."""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError
from redis.retry import Retry

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
    return redis.Redis.from_url(url, **fail_fast(timeout_s, reply_timeout_s=reply_timeout_s), **options)


def fail_fast(timeout_s: float, *, reply_timeout_s: float | None = None) -> dict[str, Any]:
    """The options of `connect` for a library that builds its own client."""
    return {
        "socket_connect_timeout": timeout_s,
        "socket_timeout": timeout_s if reply_timeout_s is None else reply_timeout_s,
        **CALL_ONCE,
    }
