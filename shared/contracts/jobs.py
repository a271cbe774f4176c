"""Jobs: what a user submitted, and how far it is."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, Metadata, PageQuery, QueryMoment
from shared.contracts.safety import SafetyRecord


class JobKind(StrEnum):
    GENERATE = "generate"
    RAG_GENERATE = "rag_generate"


class JobState(StrEnum):
    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.PROCESSING)


class Lane(StrEnum):
    """Which jobs go first when there are more than the workers can hold."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
    BULK = "bulk"

    @property
    def rank(self) -> int:
        """0 is served first."""
        return list(Lane).index(self)


class Progress(Contract):
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)


class Preview(Contract):
    """One image of a running job as it is after some steps: small, and gone when nobody looked."""

    index: int = Field(ge=0, description="which of the job's images")
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    image: str = Field(max_length=100_000, description="a `data:` URL of a JPEG, at most 256 pixels a side")


class JobError(Contract):
    code: str
    detail: str
    context: dict[str, Any] = Field(default_factory=dict)


class UsedReference(Contract):
    """One memory that shaped an output."""

    image_id: UUID
    sha256: str
    similarity: float | None = Field(description="cosine to the prompt's vector; none for a pinned one without vector")
    weight: float
    pinned: bool
    caption: str | None = None


class ReplayVerdict(StrEnum):
    """How a picture that was drawn again compares with the original."""

    IDENTICAL = "identical"
    WITHIN_TOLERANCE = "within_tolerance"
    DIFFERENT = "different"


class Change(Contract):
    """Something that decides pixels and is not what it was."""

    what: str = Field(examples=["versions.torch"], description="its place in the provenance")
    was: Any
    now: Any


class Replay(Contract):
    """An output compared with the one that it draws again."""

    of: UUID = Field(description="the output that was drawn again; it may be deleted by now")
    verdict: ReplayVerdict
    max_difference: int = Field(ge=0, le=255, description="of one channel of one pixel, in levels of 255")
    psnr_db: float | None = Field(
        description="peak signal-to-noise ratio; 40 and more is within tolerance; none: not a pixel differs"
    )
    changed: list[Change] = Field(description="what may explain a difference")


class OutputView(Contract):
    """One generated image."""

    id: UUID
    job_id: UUID
    index: int
    seed: int
    width: int
    height: int
    format: str
    size_bytes: int
    sha256: str
    created_at: datetime
    content_url: str
    thumbnail_url: str
    references: list[UsedReference]
    safety: SafetyRecord | None = Field(
        None, description="what a content policy decided about it and its prompt; none: there was no policy"
    )
    replay: Replay | None = Field(None, description="of a replay's output: how it compares with the original")
    provenance: dict[str, Any] = Field(description="everything that decided the pixels")


class JobView(Contract):
    """A job as its owner sees it."""

    id: UUID
    kind: JobKind
    state: JobState
    lane: Lane
    model: str
    prompt: str
    attempt: int = Field(description="tries so far")
    seq: int = Field(description="number of its latest event; pass it as `after` to wait for the next one")
    retry_of: UUID | None = Field(None, description="the job that this one tries again")
    replay_of: UUID | None = Field(None, description="the output that it draws again")
    bulk_id: UUID | None = Field(None, description="the bulk that it is an item of")
    progress: Progress | None = None
    queue_position: int | None = Field(None, description="jobs of the same model ahead of it, while queued")
    estimated_start_s: float | None = Field(
        None,
        description="an estimate: seconds until the images ahead of it are drawn, while queued, by how fast the "
        "model's workers were lately; none when that is not known or no worker is ready",
    )
    parameters: dict[str, Any] = Field(description="the request with every default resolved")
    resolution: dict[str, Any] | None = Field(None, description="mode and references chosen, and why")
    safety: SafetyRecord | None = Field(
        None,
        description="what a content policy decided; images with the action `block` are not among the outputs. None: "
        "there was no policy",
    )
    error: JobError | None = None
    outputs: list[OutputView] = Field(default_factory=list)
    metadata: Metadata = Field(default_factory=dict)
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    timings: dict[str, float] = Field(default_factory=dict, description="seconds per stage of the last attempt")
    url: str
    events_url: str


class JobQuery(PageQuery):
    state: JobState | None = None
    kind: JobKind | None = None
    bulk_id: UUID | None = Field(None, description="only items of this bulk")
    created_after: QueryMoment | None = None
    created_before: QueryMoment | None = None


class JobWait(Contract):
    """Wait for a job instead of asking again and again."""

    wait: float | None = Field(None, ge=0, le=120, description="seconds; the service may answer earlier")
    after: int | None = Field(
        None, ge=0, description="answer when an event later than this happened; none: when the job has ended"
    )


class EventsQuery(Contract):
    after: int | None = Field(None, ge=0, description="only events later than this; `Last-Event-ID` counts too")


class EventType(StrEnum):
    QUEUED = "queued"
    STARTED = "started"
    RESOLVED = "resolved"
    DEGRADED = "degraded"
    MODERATED = "moderated"
    REQUEUED = "requeued"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"
    DEAD = "dead"

    @property
    def ends_job(self) -> bool:
        return any(state.is_final and state.value == self.value for state in JobState)


class EventView(Contract):
    seq: int = Field(ge=1)
    type: EventType
    at: datetime
    data: dict[str, Any]
