"""The service itself: health, models, statistics."""

from datetime import date, datetime
from enum import StrEnum
from typing import Any, Self

from pydantic import Field

from shared.contracts.common import Contract
from shared.contracts.safety import PolicyView


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

    def without_details(self) -> Self:
        bare = {name: ComponentHealth(status=component.status) for name, component in self.components.items()}
        return self.model_copy(update={"components": bare})


class ReadinessQuery(Contract):
    strict: bool = Field(False, description="ready only if jobs can run now: a broker, and a worker for every queue")


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
    policy: PolicyView | None = Field(
        None, description="what prompts and outputs are looked through for; none: nothing"
    )


class UsageView(Contract):
    """What the caller's owner has asked for, and how much more it may."""

    day: date = Field(description="in UTC")
    images: int = Field(description="asked for today, without those of jobs that ended without them")
    daily_images: int | None = Field(description="images per day; none: no quota")
    resets_at: datetime = Field(description="when a new day begins")
    queued_jobs: int
    max_queued_jobs: int


class RequestWindow(Contract):
    """Requests of the last minutes: whole ones and the running one."""

    seconds: float = Field(description="how much time it covers")
    requests: int
    rate_per_s: float
    client_errors: int = Field(description="answers 4xx")
    server_errors: int = Field(description="answers 5xx")
    p50_s: float | None = Field(description="seconds to answer, from a histogram; none without requests")
    p95_s: float | None
    p99_s: float | None
    everyones: bool = Field(description="of all API processes; false while Redis is away: of this one")


class JobWindow(Contract):
    """Jobs that ended in the last minutes."""

    seconds: float = Field(description="how much time it covers")
    ended: dict[str, int] = Field(description="by final state")
    rate_per_s: float
    wait_p50_s: float | None = Field(description="from accepted to started; none when none had started")
    wait_p95_s: float | None
    wait_p99_s: float | None
    total_p50_s: float | None = Field(description="from accepted to ended; none when none ended")
    total_p95_s: float | None
    total_p99_s: float | None


class StatsView(Contract):
    images: dict[str, int] = Field(description="by state")
    jobs: dict[str, int] = Field(description="by state")
    generations: int
    queues: dict[str, int] = Field(description="queued jobs by model")
    workers: list[dict[str, Any]]
    cache: dict[str, Any]
    pools: dict[str, Any]
    embedding_spaces: list[dict[str, Any]]
    recent_requests: list[RequestWindow] = Field(description="the last 1, 5 and 60 minutes")
    recent_jobs: list[JobWindow] = Field(description="the last 1, 5 and 60 minutes")
    operations: dict[str, dict[str, float]] = Field(
        description="count and seconds (mean, p50, p95, p99, max) of what this process did in the last 5 minutes"
    )
