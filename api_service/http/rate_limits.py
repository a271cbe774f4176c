"""Rate limits: requests per minute and API key, with separate budgets for reads and writes.

Flask-Limiter counts in Redis for all API processes together. While Redis is unavailable, each process counts in its own
memory. Requests without a key are not limited: probes, metrics, the OpenAPI document, and all requests when keys are
off.
"""

import math
import time
from typing import Any

from flask import Flask, Response, g, request
from flask_limiter import Limiter, RateLimitExceeded
from limits.errors import StorageError

from api_service.http import problems
from api_service.http.auth import READ_METHODS
from shared.errors import RateLimitError
from shared.messaging.redis import fail_fast
from shared.settings import Settings

SEARCH_BLUEPRINTS = ("search", "studio_search")


def register(app: Flask, settings: Settings) -> None:
    """Count every request after its authentication. Call this after registering the authentication."""
    limits = settings.limits
    budgets = {"read": f"{limits.reads_per_minute} per minute", "write": f"{limits.writes_per_minute} per minute"}
    # The limiter passes these on to redis-py.
    options: dict[str, Any] = {**fail_fast(limits.socket_timeout_s), "wrap_exceptions": True}
    limiter = Limiter(
        lambda: f"{_budget()}:{g.caller.key_id}",
        application_limits=[lambda: budgets[_budget()]],
        storage_uri=_storage_uri(settings),
        storage_options=options,
        strategy="fixed-window",
        in_memory_fallback_enabled=True,
        # The first request that finds Redis down makes memory count. Other requests that wait for Redis at that moment
        # are answered without being counted. Otherwise the limiter would raise in them.
        swallow_errors=True,
        # Its own headers would include `Retry-After` in every response.
        headers_enabled=False,
        key_prefix="afterimage",
        enabled=limits.enabled,
    )
    limiter.request_filter(lambda: "caller" not in g or g.caller.key_id is None)
    limiter.init_app(app)

    def set_rate_headers(response: Response) -> Response:
        limit = limiter.current_limit if limiter.enabled else None
        if limit is not None:
            try:
                remaining, reset_in_s = limit.remaining, _seconds_until(limit.window.reset_time)
            except StorageError:
                return response  # Redis failed after the request was counted
            response.headers["RateLimit-Limit"] = str(limit.limit.amount)
            response.headers["RateLimit-Remaining"] = str(remaining)
            response.headers["RateLimit-Reset"] = str(reset_in_s)
        return response

    def refuse(_: RateLimitExceeded) -> Response:
        limit = limiter.current_limit
        assert limit is not None
        try:
            retry_after_s = _seconds_until(limit.window.reset_time)
        except StorageError:  # Redis failed after the request was counted
            retry_after_s = limit.limit.get_expiry()
        return problems.handle_app_error(
            RateLimitError(
                f"This API key has reached its limit of {_budget()} requests per minute.",
                limit=limit.limit.amount,
                retry_after_s=retry_after_s,
            )
        )

    app.after_request(set_rate_headers)
    app.register_error_handler(RateLimitExceeded, refuse)


def _budget() -> str:
    # A search is a read, although it is a POST.
    return "read" if request.method in READ_METHODS or request.blueprint in SEARCH_BLUEPRINTS else "write"


def _seconds_until(moment: float) -> int:
    return max(1, math.ceil(moment - time.time()))


def _storage_uri(settings: Settings) -> str:
    url = settings.limits.url or settings.cache.url
    return url.get_secret_value().replace("unix://", "redis+unix://", 1)
