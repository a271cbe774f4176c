"""The service itself: health, models, statistics."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from shared.contracts.common import Contract


class HealthStatus(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"
    DOWN = "down"


class ComponentHealth(Contract):
    status: HealthStatus
    detail: str | None = None
    latency_ms: float | None = None


class HealthView(Contract):
    status: HealthStatus
    version: str
    components: dict[str, ComponentHealth]


class Capabilities(Contract):
    """What a loaded model can do; its worker writes it at warm-up, the API reads it."""

    modes: list[str]
    native_width: int
    native_height: int
    size_multiple: int = Field(description="width and height must be multiples of this")
    any_size: bool = Field(description="the model draws other sizes than its native one well")
    max_batch_size: int
    max_references: int
    schedulers: list[str]
    loras: list[str]
    supports_negative_prompt: bool
    supports_guidance: bool
    pipeline: str = Field(description="class of the diffusers pipeline")
    weights_digest: str
    device: str
    dtype: str


class ModelView(Contract):
    name: str
    default: bool
    ready_workers: int
    capabilities: Capabilities | None = Field(description="none until a worker has loaded it")
    defaults: dict[str, Any]
    updated_at: datetime | None = None


class ModelsResponse(Contract):
    models: list[ModelView]


class StatsView(Contract):
    images: dict[str, int] = Field(description="by state")
    jobs: dict[str, int] = Field(description="by state")
    generations: int
    queues: dict[str, int] = Field(description="queued jobs by model")
    workers: list[dict[str, Any]]
    cache: dict[str, Any]
    pools: dict[str, Any]
    embedding_spaces: list[dict[str, Any]]
    operations: dict[str, dict[str, float]] = Field(
        description="count and seconds (mean, p50, p95, p99, max) of what this process did in the last 5 minutes"
    )
