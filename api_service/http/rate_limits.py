"""How many requests an API key may send in a minute: reads and writes have budgets of their own.

Flask-Limiter counts in Redis, together with all other API processes, and in this process's memory while Redis is away.
Where keys are off nobody is counted, nor are the probes, the metrics and the document, which ask for no key.
"""

import math
import time
from typing import Any

from flask import Flask, Response, g, request
from flask_limiter import Limiter, RateLimitExceeded
from limits.errors import StorageError
from redis.backoff import NoBackoff
from redis.retry import Retry

from api_service.http import problems
from api_service.http.auth import READING
from shared.errors import RateLimitError
from shared.settings import Settings

SEARCHING = ("search", "studio_search")


def register(app: Flask, settings: Settings) -> None:
    """Count every request after it was authenticated; to be called once that is registered."""
    limits = settings.limits
    budgets = {"read": f"{limits.reads_per_minute} per minute", "write": f"{limits.writes_per_minute} per minute"}
    # For redis-py, to which it hands whatever there is.
    options: dict[str, Any] = {
        "socket_timeout": limits.socket_timeout_s,
        "socket_connect_timeout": limits.socket_timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "wrap_exceptions": True,
    }
    limiter = Limiter(
        lambda: f"{_kind()}:{g.caller.key_id}",
        application_limits=[lambda: budgets[_kind()]],
        storage_uri=_storage_uri(settings),
        storage_options=options,
        strategy="fixed-window",
        in_memory_fallback_enabled=True,
        # Its own headers would put `Retry-After` on every answer.
        headers_enabled=False,
        key_prefix="afterimage",
        enabled=limits.enabled,
    )
    limiter.request_filter(lambda: "caller" not in g or g.caller.key_id is None)
    limiter.init_app(app)

    def tell(response: Response) -> Response:
        limit = limiter.current_limit if limiter.enabled else None
        if limit is not None:
            try:
                remaining, reset_in_s = limit.remaining, _seconds_until(limit.window.reset_time)
            except StorageError:
                return response  # it went away since the request was counted
            response.headers["RateLimit-Limit"] = str(limit.limit.amount)
            response.headers["RateLimit-Remaining"] = str(remaining)
            response.headers["RateLimit-Reset"] = str(reset_in_s)
        return response

    def refuse(_: RateLimitExceeded) -> Response:
        limit = limiter.current_limit
        assert limit is not None
        what = "reading" if _kind() == "read" else "writing"
        return problems.of_ours(
            RateLimitError(
                f"This API key has sent as many {what} requests as it may in a minute.",
                limit=limit.limit.amount,
                retry_after_s=_seconds_until(limit.window.reset_time),
            )
        )

    app.after_request(tell)
    app.register_error_handler(RateLimitExceeded, refuse)


def _kind() -> str:
    # A search changes nothing, though it is a POST.
    return "read" if request.method in READING or request.blueprint in SEARCHING else "write"


def _seconds_until(moment: float) -> int:
    return max(1, math.ceil(moment - time.time()))


def _storage_uri(settings: Settings) -> str:
    url = settings.limits.url or settings.cache.url
    return url.get_secret_value().replace("unix://", "redis+unix://", 1)
