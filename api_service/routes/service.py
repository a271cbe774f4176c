"""The service itself: health, models, statistics."""

from flask import Response, g, request
from flask_openapi3.models.tag import Tag

from api_service import services
from api_service.http import responses
from api_service.http.auth import may_see_details
from api_service.http.blueprint import Resource
from api_service.services.views import API
from shared.contracts.service import (
    HealthStatus,
    HealthView,
    ModelsResponse,
    ReadinessQuery,
    StatsView,
    UsageView,
)

TAG = Tag(name="service", description="How it is doing.")

service = Resource("service", __name__, url_prefix=API, abp_tags=[TAG])
probes = Resource("probes", __name__, url_prefix=API, abp_tags=[TAG])
"""Also registered at the root, where orchestrators look."""


@probes.get("/health", operation_id="getHealth", responses={200: HealthView, 503: HealthView})
def get_health() -> Response:
    """How every part is doing

    503 when a part without which nothing works is away; `degraded`, with 200, when the service works around it. Where
    keys are on, only one with the scope `admin` is told details.
    """
    return _answer(services.health.everything())


@probes.get("/health/live", operation_id="getLiveness", responses={200: HealthView})
def get_liveness() -> Response:
    """Does this process answer? Asks nothing else"""
    return _answer(services.health.alive())


@probes.get("/health/ready", operation_id="getReadiness", responses={200: HealthView, 503: HealthView})
def get_readiness(query: ReadinessQuery) -> Response:
    """Can this process serve requests?

    503 while database or storage is away. Without a broker or a worker it is `degraded`, with 200: jobs are accepted
    and run later. With `strict=true` that is 503, too.
    """
    return _answer(services.health.ready(strict=query.strict))


@service.get("/models", operation_id="listModels", responses={200: ModelsResponse})
def list_models() -> ModelsResponse:
    """The configured generators and what each can do"""
    return services.status.models()


@service.get("/stats", operation_id="getStats", responses={200: StatsView})
def get_stats() -> StatsView:
    """Counts of images, jobs and outputs, the queues, workers, cache and pools"""
    return services.status.stats()


@service.get("/usage", operation_id="getUsage", responses={200: UsageView})
def get_usage() -> UsageView:
    """What the key's owner has used of its quota and caps"""
    return services.status.own_usage(caller=g.caller)


def _answer(view: HealthView) -> Response:
    if not may_see_details(request):
        view = view.without_details()
    response = responses.json(view, 503 if view.status is HealthStatus.DOWN else 200)
    if view.status is HealthStatus.DOWN:
        response.headers["Retry-After"] = "5"
    response.headers["Cache-Control"] = "no-store"
    return response
