"""Bulks: many thousand generations, sent as one stream of JSON Lines.

The first line of the stream may be a header, `{"bulk": {...}}`. Every other line is one item. Line numbers start at 1
and count blank lines and the header, as an editor does.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, FieldProblem, Metadata, OnInvalid, PageQuery, Text
from shared.contracts.generation import GenerateRequest, RagGenerateRequest, SentReferenceImage
from shared.contracts.jobs import JobError, JobKind, Lane, OutputView, WithdrawnView
from shared.contracts.records import StoredResolution
from shared.contracts.safety import SafetyRecord

CustomId = Annotated[Text, Field(min_length=1, max_length=200)]


class BulkState(StrEnum):
    RECEIVING = "receiving"  # lines arrive; no item runs yet
    RUNNING = "running"
    PAUSED = "paused"  # running items end, no other item starts
    COMPLETED = "completed"  # every item has ended, in any final state
    CANCELED = "canceled"
    REFUSED = "refused"  # a line was invalid and `on_invalid` is `refuse`, or no line was valid
    ABANDONED = "abandoned"  # its lines stopped arriving

    @property
    def is_final(self) -> bool:
        return self not in (BulkState.RECEIVING, BulkState.RUNNING, BulkState.PAUSED)


class BulkWebhook(Contract):
    """Receiver of an event when the bulk has ended, signed with the owner's secret (Standard Webhooks)."""

    url: Annotated[Text, Field(min_length=8, max_length=2000)]


class BulkOptions(Contract):
    """Options of the whole bulk."""

    name: Annotated[Text, Field(min_length=1, max_length=200)] | None = None
    on_invalid: OnInvalid = Field(
        OnInvalid.REFUSE, description="`refuse`: one invalid line stops the whole bulk; `skip`: the valid lines run"
    )
    lane: Lane = Lane.BULK
    defaults: dict[str, Any] = Field(
        default_factory=dict, max_length=64, description="values for the fields that a line leaves out"
    )
    items: int | None = Field(
        None,
        ge=1,
        description="announced number of items; the service reserves room for them or refuses the bulk at once",
    )
    expires_in_s: float | None = Field(
        None,
        gt=0,
        le=30 * 86_400,
        description="seconds from the start of the bulk; items that wait longer become `expired`",
    )
    webhook: BulkWebhook | None = None
    metadata: Metadata = Field(default_factory=dict, description="returned with the bulk")


class BulkHeader(Contract):
    """The first line of the stream, if it is not an item."""

    bulk: BulkOptions


BULK_LEVEL_FIELDS = ("lane", "webhook", "expires_in_s", "dry_run")
"""Request fields that apply to a whole bulk. A line must not contain them."""


class BulkGenerateItem(GenerateRequest):
    """A line that asks for images from a prompt alone."""

    kind: Literal[JobKind.GENERATE]
    custom_id: CustomId | None = Field(None, description="name that the caller gives the item, unique in the bulk")


class BulkRagGenerateItem(RagGenerateRequest):
    """A line that asks for retrieval-augmented images."""

    kind: Literal[JobKind.RAG_GENERATE] = JobKind.RAG_GENERATE
    reference_images: list[SentReferenceImage] = Field(
        default_factory=list, max_length=0, description="always empty: a line of a bulk brings no pictures"
    )
    plan: Annotated[str, Field(max_length=0)] | None = Field(
        None, exclude_if=lambda plan: not plan, description="always `null`: a plan is for a single request"
    )
    custom_id: CustomId | None = Field(None, description="name that the caller gives the item, unique in the bulk")


class BulkSend(Contract):
    complete: bool = Field(
        True,
        description="this body ends the lines of the bulk; only a `Content-Length` proves that all of it arrived; "
        "after a chunked body send `POST /bulks/{bulk_id}/complete`",
    )


class BulkAppend(BulkSend):
    from_line: int = Field(ge=0, description="number of lines received before; the body starts with the next line")


class BulkComplete(Contract):
    """The sender's own count of lines, which reveals a lost line."""

    lines: int = Field(ge=0, description="all lines of the stream, blank lines and the header included")
    digest: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="digest of these lines; compared if given")


class BulkCounts(Contract):
    """Number of items by state. The sum is `total`."""

    queued: int = 0
    processing: int = 0
    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    expired: int = 0
    dead: int = 0
    deleted: int = Field(0, description="items whose job was deleted")


class BulkView(Contract):
    """A bulk as its owner sees it."""

    id: UUID
    name: str | None
    state: BulkState
    lane: Lane
    on_invalid: OnInvalid
    metadata: Metadata
    received_lines: int = Field(description="stored lines; a resumed stream continues with the next one")
    digest: str = Field(
        description="hex digest of these lines: d(0) is empty, d(n) = SHA-256(d(n-1) + line n without its line feed)"
    )
    total: int = Field(description="valid items")
    invalid: int = Field(description="invalid lines; `errors_url` lists them")
    counts: BulkCounts
    rate_per_s: float | None = Field(None, description="items ended per second in the last minute; only while running")
    estimated_end: datetime | None = None
    created_at: datetime
    started_at: datetime | None = Field(None, description="when all lines had arrived")
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
    """The state of the item's job, or of an item that has no job, or no longer has one."""

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
    """A generated image with the fields that a download needs."""

    id: UUID
    index: int
    seed: int
    width: int
    height: int
    format: str
    size_bytes: int
    sha256: str
    content_url: str | None = Field(description="`null`: the output was withdrawn")
    withdrawn: WithdrawnView | None = None


class BulkItemView(Contract):
    line: int
    custom_id: str | None
    kind: JobKind
    model: str
    prompt: str
    metadata: Metadata
    state: ItemState
    job_id: UUID | None = Field(description="`null` while the item waits for its first or next job")
    error: JobError | None = None
    outputs: list[BulkOutput] = Field(default_factory=list)


class BulkManifestLine(Contract):
    """An item with all data that determined its pixels."""

    line: int
    custom_id: str | None
    kind: JobKind
    model: str
    prompt: str
    metadata: Metadata
    state: ItemState
    job_id: UUID | None
    retry_of: UUID | None = Field(None, description="the previous job of the item")
    attempt: int = Field(0, description="attempts of the job so far")
    parameters: dict[str, Any] = Field(description="the request with every default resolved")
    resolution: StoredResolution | None = Field(None, description="the chosen mode and references, with reasons")
    safety: SafetyRecord | None = Field(
        None, description="decisions of the content policy; `null`: no policy was active"
    )
    error: JobError | None = None
    outputs: list[OutputView] = Field(default_factory=list)
    missing: list[int] = Field(
        default_factory=list, description="in an archive: indexes of outputs whose file does not exist any more"
    )
    timings: dict[str, float] = Field(default_factory=dict, description="seconds per stage of the last attempt")
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None


class BulkEnd(Contract):
    """The last line of a manifest and the last member of an archive. Without it the download is incomplete."""

    end: Literal[True] = True
    items: int


class LineQuery(Contract):
    """A page in the order of lines. The cursor is a line number."""

    cursor: int | None = Field(None, ge=0, description="the page starts after this line")
    limit: int = Field(100, ge=1, le=1000)


class BulkItemQuery(LineQuery):
    state: ItemState | None = None


class BulkRest(Contract):
    """The position at which an interrupted download continues."""

    cursor: int | None = Field(None, ge=0, description="start after this line")


class BulkLineError(Contract):
    """The reason why a line is not a valid item."""

    line: int
    custom_id: str | None = None
    code: str = Field(
        description="code as in a problem: `validation_failed`, `malformed_body`, `mode_not_supported`, ..."
    )
    detail: str
    errors: list[FieldProblem] = Field(default_factory=list)
