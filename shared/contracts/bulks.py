"""Bulks: up to a hundred thousand generations sent as one stream of JSON Lines.

The stream's first line may be a header, `{"bulk": {...}}`; every other line is one item. Lines count from 1, blank ones
and the header included, so that a line's number is the one that an editor shows.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, FieldProblem, Metadata, OnInvalid, PageQuery, Text
from shared.contracts.generation import GenerateRequest, RagGenerateRequest
from shared.contracts.jobs import JobError, JobKind, Lane, OutputView
from shared.contracts.safety import SafetyRecord

CustomId = Annotated[Text, Field(min_length=1, max_length=200)]


class BulkState(StrEnum):
    RECEIVING = "receiving"  # lines arrive; nothing of it runs
    RUNNING = "running"
    PAUSED = "paused"  # what runs ends, nothing new starts
    COMPLETED = "completed"  # every item has ended, one way or another
    CANCELED = "canceled"
    REFUSED = "refused"  # it had invalid lines and was to be all or nothing, or it had no valid one
    ABANDONED = "abandoned"  # its lines stopped coming

    @property
    def is_final(self) -> bool:
        return self not in (BulkState.RECEIVING, BulkState.RUNNING, BulkState.PAUSED)


class BulkWebhook(Contract):
    """Whom to tell when the bulk has ended, signed by Standard Webhooks with the owner's secret."""

    url: Annotated[Text, Field(min_length=8, max_length=2000)]


class BulkOptions(Contract):
    """What holds for the whole bulk."""

    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    on_invalid: OnInvalid = Field(
        OnInvalid.REFUSE, description="`refuse`: one invalid line and nothing runs; `skip`: the valid lines run"
    )
    lane: Lane = Lane.BULK
    defaults: dict[str, Any] = Field(
        default_factory=dict, max_length=64, description="fields of an item, for every line that does not name them"
    )
    items: int | None = Field(
        None, ge=1, description="how many will come, to have room for them reserved, or to be told at once"
    )
    expires_in_s: float | None = Field(
        None, gt=0, le=30 * 86_400, description="from its completion on; items that wait longer are `expired`"
    )
    webhook: BulkWebhook | None = None
    metadata: Metadata = Field(default_factory=dict, description="echoed wherever the bulk is shown")


class BulkHeader(Contract):
    """The stream's first line, if it is not an item yet."""

    bulk: BulkOptions


OF_THE_BULK = ("lane", "webhook", "expires_in_s", "dry_run")
"""Fields of a request that hold for a bulk as a whole, so that no line may name them."""


class BulkGenerateItem(GenerateRequest):
    """A line that asks for images from a prompt alone."""

    kind: Literal[JobKind.GENERATE]
    custom_id: CustomId | None = Field(None, description="the caller's own name of the item, unique in the bulk")


class BulkRagGenerateItem(RagGenerateRequest):
    """A line that asks for retrieval-augmented images."""

    kind: Literal[JobKind.RAG_GENERATE] = JobKind.RAG_GENERATE
    custom_id: CustomId | None = Field(None, description="the caller's own name of the item, unique in the bulk")


class BulkSend(Contract):
    complete: bool = Field(
        True,
        description="the bulk is complete when this body has arrived whole, which only a `Content-Length` can prove: "
        "after a chunked body send `POST /bulks/{bulk_id}/complete`",
    )


class BulkAppend(BulkSend):
    from_line: int = Field(ge=0, description="how many lines were received before; the body starts with the next one")


class BulkComplete(Contract):
    """The sender's own count, so that no lost line goes unnoticed."""

    lines: int = Field(ge=0, description="all lines of the stream, blank ones and the header included")
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of these lines; compared if given")


class BulkCounts(Contract):
    """Items by state; they sum up to `total`."""

    queued: int = 0
    processing: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    expired: int = 0
    dead: int = 0
    deleted: int = Field(0, description="the item's job was deleted")


class BulkView(Contract):
    """A bulk as its owner sees it."""

    id: UUID
    name: str | None
    state: BulkState
    lane: Lane
    on_invalid: OnInvalid
    metadata: Metadata
    received_lines: int = Field(description="lines stored for good; a resumed stream goes on with the next one")
    digest: str = Field(
        description="of these lines: d(0) is empty, d(n) = SHA-256(d(n-1) + line n without its line feed), in hex"
    )
    total: int = Field(description="valid items")
    invalid: int = Field(description="invalid lines: see `errors_url`")
    counts: BulkCounts
    rate_per_s: float | None = Field(None, description="items ended per second, over the last minute, while running")
    estimated_end: datetime | None = None
    created_at: datetime
    started_at: datetime | None = Field(None, description="when it was complete")
    expires_at: datetime | None = None
    finished_at: datetime | None = None
    url: str
    items_url: str
    errors_url: str
    manifest_url: str
    archive_url: str


class BulkQuery(PageQuery):
    state: BulkState | None = None


class ItemState(StrEnum):
    """A job's state, or what the item is while it has no job (any more)."""

    QUEUED = "queued"
    PROCESSING = "processing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"
    DEAD = "dead"
    DELETED = "deleted"

    @property
    def is_final(self) -> bool:
        return self not in (ItemState.QUEUED, ItemState.PROCESSING)


class BulkOutput(Contract):
    """A generated image, as much of it as a download needs."""

    id: UUID
    index: int
    seed: int
    width: int
    height: int
    format: str
    size_bytes: int
    sha256: str
    content_url: str


class BulkItemView(Contract):
    line: int
    custom_id: str | None
    kind: JobKind
    model: str
    prompt: str
    metadata: Metadata
    state: ItemState
    job_id: UUID | None = Field(description="none while its turn has not come")
    error: JobError | None = None
    outputs: list[BulkOutput] = Field(default_factory=list)


class BulkManifestLine(Contract):
    """An item with everything that decided its pixels."""

    line: int
    custom_id: str | None
    kind: JobKind
    model: str
    prompt: str
    metadata: Metadata
    state: ItemState
    job_id: UUID | None
    retry_of: UUID | None = Field(None, description="its job before this one")
    attempt: int = Field(0, description="tries of the job so far")
    parameters: dict[str, Any] = Field(description="the request with every default resolved")
    resolution: dict[str, Any] | None = Field(None, description="mode and references chosen, and why")
    safety: SafetyRecord | None = Field(None, description="what a content policy decided; none: there was no policy")
    error: JobError | None = None
    outputs: list[OutputView] = Field(default_factory=list)
    missing: list[int] = Field(default_factory=list, description="in an archive: outputs whose file is gone")
    timings: dict[str, float] = Field(default_factory=dict, description="seconds per stage of the last attempt")
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


class BulkEnd(Contract):
    """The last line of a manifest, and the last member of an archive: without it the download was cut."""

    end: Literal[True] = True
    items: int


class LineQuery(Contract):
    """Pages in the order of lines. The cursor is a line number: the page starts behind it."""

    cursor: int | None = Field(None, ge=0, description="the page starts behind this line")
    limit: int = Field(100, ge=1, le=1000)


class BulkItemQuery(LineQuery):
    state: ItemState | None = None


class BulkRest(Contract):
    """Where a download that broke goes on."""

    cursor: int | None = Field(None, ge=0, description="start behind this line")


class BulkLineError(Contract):
    """Why a line is no item."""

    line: int
    custom_id: str | None = None
    code: str = Field(description="as of a problem: `validation_failed`, `malformed_body`, `mode_not_supported`, ...")
    detail: str
    errors: list[FieldProblem] = Field(default_factory=list)
