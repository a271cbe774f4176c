"""Jobs: the work that users submitted, and its progress."""

from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, Metadata, PageQuery, QueryMoment
from shared.contracts.records import StoredProvenance, StoredResolution
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
    """Priority of a job when more jobs wait than the workers can take."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"
    BULK = "bulk"

    @property
    def rank(self) -> int:
        """Rank of the lane; 0 runs first."""
        return list(Lane).index(self)


class Progress(Contract):
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)


class Preview(Contract):
    """A small picture of one image of a running job after some steps. It is not stored."""

    index: int = Field(ge=0, description="index of the image in the job")
    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    image: str = Field(max_length=100_000, description="`data:` URL of a JPEG, at most 256 pixels per side")


class JobError(Contract):
    code: str
    detail: str
    context: dict[str, Any] = Field(default_factory=dict)


class JobWarning(Contract):
    """A way in which the images differ from the request."""

    code: str = Field(
        description="`prompt_cut`, `negative_prompt_cut`, `caption_left_out`, `image_cropped`, `reference_padded` or "
        "`weights_not_applied`",
        examples=["image_cropped"],
    )
    detail: str
    context: dict[str, Any] = Field(default_factory=dict, description="such as the text that the model did not read")


class ReferenceKind(StrEnum):
    """Where a reference comes from."""

    CORPUS = "corpus"  # an image of the corpus
    REQUEST = "request"  # a picture that the request brought


class UsedReference(Contract):
    """One reference of an output."""

    kind: ReferenceKind = ReferenceKind.CORPUS
    image_id: UUID = Field(description="id of the corpus image or, for the kind `request`, of the job's picture")
    sha256: str
    similarity: float | None = Field(
        description="cosine to the vector of its concept, or of the prompt; `null` if it was not computed"
    )
    weight: float
    pinned: bool
    caption: str | None = None
    concepts: list[str] = Field(
        default_factory=list, description="the things of the prompt that it stands for; empty for older outputs"
    )


class ReplayVerdict(StrEnum):
    """How the output of a replay compares with the original."""

    IDENTICAL = "identical"
    WITHIN_TOLERANCE = "within_tolerance"
    DIFFERENT = "different"


class Change(Contract):
    """A value that determines pixels and differs from the original."""

    what: str = Field(examples=["versions.torch"], description="path of the value in the provenance")
    was: Any
    now: Any


class Replay(Contract):
    """The comparison of a replay's output with the original."""

    of: UUID = Field(description="the original output; it may have been deleted since")
    verdict: ReplayVerdict
    max_difference: int = Field(
        ge=0, le=255, description="largest difference of one channel of one pixel, in levels of 255"
    )
    psnr_db: float | None = Field(
        description="peak signal-to-noise ratio; 40 and more is within tolerance; `null`: all pixels are equal"
    )
    changed: list[Change] = Field(description="changes that may explain a difference")


class WithdrawnView(Contract):
    """Why an output cannot be read any more: an image from which it drew was withdrawn."""

    at: datetime
    reason: str | None = Field(description="as the withdrawal gave it")


class OutputView(Contract):
    """One generated image.

    A withdrawn one has neither addresses nor a record, and its references no captions.
    """

    id: UUID
    job_id: UUID
    index: int
    seed: int
    width: int
    height: int
    format: str
    size_bytes: int
    sha256: str
    favourite: bool = Field(False, description="whether its owner marked it as one to find again")
    created_at: datetime
    content_url: str | None = Field(description="`null`: the output was withdrawn")
    thumbnail_url: str | None = Field(description="`null`: the output was withdrawn")
    withdrawn: WithdrawnView | None = Field(None, description="every request for it gets 410; `null`: it stands")
    references: list[UsedReference]
    safety: SafetyRecord | None = Field(
        None, description="decisions of the content policy on the image and its prompt; `null`: no policy was active"
    )
    warnings: list[JobWarning] = Field(
        default_factory=list, description="ways in which the image differs from the request"
    )
    replay: Replay | None = Field(None, description="only for an output of a replay: its comparison with the original")
    provenance: StoredProvenance = Field(description="all data that determined the pixels")


class ReferenceImageView(Contract):
    """A picture that the request of a job brought as a reference."""

    id: UUID
    sha256: str = Field(description="SHA-256 of the file that was sent")
    weight: float | None
    caption: str | None
    format: str
    width: int
    height: int
    size_bytes: int
    content_url: str
    thumbnail_url: str


class JobView(Contract):
    """A job as its owner sees it."""

    id: UUID
    kind: JobKind
    state: JobState
    lane: Lane
    model: str
    prompt: str
    attempt: int = Field(description="attempts so far")
    seq: int = Field(description="number of the latest event; pass it as `after` to wait for the next event")
    retry_of: UUID | None = Field(None, description="the job that this job repeats")
    replay_of: UUID | None = Field(None, description="the output that this job draws again")
    bulk_id: UUID | None = Field(None, description="the bulk to which this job belongs")
    progress: Progress | None = None
    queue_position: int | None = Field(
        None,
        description="queued jobs of the same model in a higher-priority lane, or in the same lane and submitted "
        "earlier; `null` in lists and when the job is not queued",
    )
    estimated_start_s: float | None = Field(
        None,
        description="estimated seconds until the images ahead of a queued job are drawn, from the latest speed of the "
        "model's workers; `null` in lists, when the speed is unknown, and when no worker is ready",
    )
    parameters: dict[str, Any] = Field(description="the request with every default resolved")
    reference_images: list[ReferenceImageView] = Field(
        default_factory=list, description="pictures of the request, kept until the job is deleted"
    )
    resolution: StoredResolution | None = Field(None, description="the chosen mode and references, with reasons")
    warnings: list[JobWarning] = Field(
        default_factory=list, description="ways in which the images differ from the request, such as a cut prompt"
    )
    safety: SafetyRecord | None = Field(
        None,
        description="decisions of the content policy; images with the action `block` are not among the outputs; "
        "`null`: no policy was active",
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
    """Wait for a job instead of polling."""

    wait: float | None = Field(None, ge=0, le=120, description="seconds to wait; the service may answer earlier")
    after: int | None = Field(
        None, ge=0, description="answer when there is an event with a higher number; by default, when the job has ended"
    )


class EventsQuery(Contract):
    after: int | None = Field(
        None, ge=0, description="only events with a higher number; the header `Last-Event-ID` has the same effect"
    )


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
