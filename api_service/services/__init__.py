"""The use cases of the API and of Studio, without HTTP. Each module has the name of its resource in `routes`."""

from api_service.services import (
    admin,
    bulk_results,
    bulks,
    collections,
    generation,
    health,
    images,
    job_stream,
    jobs,
    outputs,
    queue,
    reference_images,
    search,
    status,
    webhooks,
)

__all__ = [
    "admin",
    "bulk_results",
    "bulks",
    "collections",
    "generation",
    "health",
    "images",
    "job_stream",
    "jobs",
    "outputs",
    "queue",
    "reference_images",
    "search",
    "status",
    "webhooks",
]
