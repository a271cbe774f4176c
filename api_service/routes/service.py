"""Routes of the service itself: health probes, models, statistics and usage."""

from collections.abc import Callable
from functools import partial

from flask import Response, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.auth import may_see_details, statistics_owner
from api_service.http.blueprint import ApiBlueprint
from api_service.http.urls import API
from shared.contracts.service import (
    HealthStatus,
    HealthView,
    ModelsResponse,
    ReadinessQuery,
    StatsView,
    UsageView,
)

TAG = Tag(name="service", description="Health, models, statistics and usage.")

service = ApiBlueprint("service", __name__, url_prefix=API, abp_tags=[TAG])
probes = ApiBlueprint("probes", __name__, url_prefix=API, abp_tags=[TAG])
"""Also registered at the root, where orchestrators expect probes."""


@probes.get("/health", operation_id="getHealth", responses={200: HealthView, 503: HealthView})
def get_health() -> Response:
    """Check every component

    The answer is 503 while the database or the storage is down. It is 200 with `degraded` while the broker, the cache
    or a worker is missing. When keys are on, only a key with the scope `admin` sees details.
    """
    return _health_response(services.health.everything(may_see_details=_may_see_details()))


@probes.get("/health/live", operation_id="getLiveness", responses={200: HealthView})
def get_liveness() -> Response:
    """Check that this process answers

    No other component is checked.
    """
    return _health_response(services.health.alive())


@probes.get("/health/ready", operation_id="getReadiness", responses={200: HealthView, 503: HealthView})
def get_readiness(query: ReadinessQuery) -> Response:
    """Check that this process can serve requests

    The answer is 503 while the database or the storage is down. It is 200 with `degraded` while the broker or a worker
    is missing, because jobs are accepted and run later. With `strict=true` that is 503, too.
    """
    return _health_response(services.health.ready(strict=query.strict, may_see_details=_may_see_details()))


@service.get("/models", operation_id="listModels", responses={200: ModelsResponse})
def list_models() -> ModelsResponse:
    """List the configured generators with their capabilities"""
    return services.status.models()


@service.get("/stats", operation_id="getStats", responses={200: StatsView})
def get_stats() -> StatsView:
    """Get counts of images, jobs and outputs, and the state of queues, workers, cache and pools

    A key without the scope `admin` gets the counts of its own owner. It gets no names of hosts, and no statistics of
    the cache, pools, requests, operations and vectors.
    """
    return services.status.stats(owner_id=statistics_owner(g.caller))


@service.get("/usage", operation_id="getUsage", responses={200: UsageView})
def get_usage() -> UsageView:
    """Get what the key's owner has used of its quota and limits"""
    return services.status.own_usage(caller=g.caller)


def _may_see_details() -> Callable[[], bool]:
    """Whether the caller of this request may see details. The result may be called in another thread."""
    return partial(may_see_details, request._get_current_object())  # type: ignore[attr-defined]


def _health_response(view: HealthView) -> Response:
    response = responses.json(view, 503 if view.status is HealthStatus.DOWN else 200)
    if view.status is HealthStatus.DOWN:
        response.headers["Retry-After"] = "5"
    response.headers["Cache-Control"] = "no-store"
    return response
