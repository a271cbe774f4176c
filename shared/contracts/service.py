"""The service itself: health, models, statistics."""

from datetime import date, datetime
from enum import StrEnum
from typing import Any, Literal, Self

from pydantic import Field

from shared.contracts.calibration import RelevanceView
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
    strict: bool = Field(
        False, description="ready only if jobs can run now: the broker answers, and every queue has a worker"
    )


class ModelDefaults(Contract):
    """Values for the fields that a request leaves out."""

    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None = None
    ip_adapter_scale: float
    strength: float


class Capabilities(Contract):
    """The abilities of a loaded model. Its worker writes them after warm-up, and the API reads them."""

    modes: list[str]
    native_width: int
    native_height: int
    size_multiple: int = Field(description="width and height of the images that the model draws are multiples of this")
    any_size: bool = Field(description="the model draws sizes near its native one well")
    max_batch_size: int
    max_references: int
    schedulers: list[str]
    loras: list[str]
    supports_negative_prompt: bool
    supports_guidance: bool
    pipeline: str = Field(description="class of the diffusers pipeline; `openai:` and a model name for an engine")
    weights_digest: str
    device: str
    dtype: str
    # Fields with a default are missing in rows that a worker of the previous release has written.
    weights_digest_kind: Literal["tensors", "files", "stated"] = Field(
        "tensors",
        description="input of `weights_digest`; digests of different kinds cannot be compared; `stated`: the operator "
        "states it, and nothing has verified it",
    )
    defaults: ModelDefaults | None = Field(
        None, description="values for the fields that a request leaves out: by the settings, else by the pipeline"
    )
    batching_changes_images: bool = Field(
        False, description="measured at start: an image depends on the others of its batch, so each is drawn alone"
    )
    interruption_changes_images: bool = Field(
        False,
        description="measured at start: an image changes when another is drawn between two of its steps, so jobs of "
        "higher-priority lanes wait for its end",
    )
    reference_side: int | None = Field(
        None, description="mode `reference`: pixels per side of a reference; `null`: the pipeline decides"
    )
    reference_side_of_several: int | None = Field(
        None, description="`reference_side` in images whose references stand for several things"
    )
    needs_reference: bool = Field(False, description="the model edits pictures only, and draws nothing without one")
    weighs_references: bool = Field(
        False, description="mode `reference`: weights and `ip_adapter_scale` have an effect beyond the order"
    )
    images_at_once: int = Field(
        1, description="calls of the model that a worker makes at the same time; above 1, an engine elsewhere draws"
    )
    reports_steps: bool = Field(
        True, description="false: no progress and no previews, and jobs of higher-priority lanes wait for its end"
    )
    repeating_changes_images: bool = Field(
        False,
        description="measured at start: the same request and seed give another image the second time, so a replay "
        "differs",
    )


class ModelView(Contract):
    name: str
    default: bool
    ready_workers: int
    capabilities: Capabilities | None = Field(description="`null` until a worker has loaded the model")
    defaults: dict[str, Any]
    updated_at: datetime | None = None


class ModelsResponse(Contract):
    models: list[ModelView]
    policy: PolicyView | None = Field(None, description="content policy of the service; `null`: no policy")
    relevance: RelevanceView | None = Field(
        None, description="relevance gate of the service; `null`: no embed worker has started yet"
    )


class UsageView(Contract):
    """Usage and limits of the caller's owner."""

    day: date = Field(description="date in UTC")
    images: int = Field(description="images requested today, without those of jobs that ended without outputs")
    daily_images: int | None = Field(description="images per day; `null`: no quota")
    resets_at: datetime = Field(description="when the next day begins")
    queued_jobs: int
    max_queued_jobs: int


class RequestWindow(Contract):
    """Requests of the last whole minutes and the current minute."""

    seconds: float = Field(description="length of the window")
    requests: int
    rate_per_s: float
    client_errors: int = Field(description="responses with status 4xx")
    server_errors: int = Field(description="responses with status 5xx")
    p50_s: float | None = Field(description="seconds to answer, from a histogram; `null` without requests")
    p95_s: float | None
    p99_s: float | None
    everyones: bool = Field(
        description="true: of all API processes; false: of this process only, because Redis is away"
    )


class JobWindow(Contract):
    """Jobs that ended in the last minutes."""

    seconds: float = Field(description="length of the window")
    ended: dict[str, int] = Field(description="number by final state")
    rate_per_s: float
    wait_p50_s: float | None = Field(description="seconds from submit to start; `null` if no job had started")
    wait_p95_s: float | None
    wait_p99_s: float | None
    total_p50_s: float | None = Field(description="seconds from submit to end; `null` if no job ended")
    total_p95_s: float | None
    total_p99_s: float | None


class EmbeddingSpaceView(Contract):
    """Vectors of one CLIP. The fields from `vectors` on are `null` for callers that see only their own numbers."""

    digest: str = Field(description="names the space in `space` of a search")
    model: str
    dim: int = Field(description="components of a vector")
    active: bool = Field(description="searches use it unless they name another, and so do generations")
    vectors: int | None = None
    missing: int | None = Field(None, description="searchable images that a worker still has to embed for this space")
    failed: int | None = Field(None, description="searchable images that no worker could embed for this space")
    rate_per_s: float | None = Field(None, description="vectors per second; `null`: no worker adds vectors now")
    remaining_s: float | None = Field(None, description="estimated seconds until none is missing; `null`: unknown")
    workers: dict[str, int] | None = Field(None, description="live workers with this CLIP by kind and state")


class StatsView(Contract):
    images: dict[str, int] = Field(description="number by state")
    jobs: dict[str, int] = Field(description="number by state")
    generations: int
    queues: dict[str, int] = Field(description="queued jobs by model")
    workers: list[dict[str, Any]]
    cache: dict[str, Any]
    pools: dict[str, Any]
    embedding_spaces: list[EmbeddingSpaceView]
    recent_requests: list[RequestWindow] = Field(description="the last 1, 5 and 60 minutes")
    recent_jobs: list[JobWindow] = Field(description="the last 1, 5 and 60 minutes")
    operations: dict[str, dict[str, float]] = Field(
        description="count and seconds (mean, p50, p95, p99, max) by operation of this process in the last 5 minutes"
    )
