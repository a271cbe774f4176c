"""The corpus."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract, Name, OnInvalid, PageQuery, Tag, Text


class ImageState(StrEnum):
    PENDING = "pending"  # stored, waiting for its vector
    READY = "ready"  # searchable
    FAILED = "failed"  # stored, but no vector can be computed: see `error_code`


Caption = Annotated[Text, Field(max_length=2000)]
Attributes = Annotated[
    dict[Annotated[Text, Field(min_length=1, max_length=64)], Annotated[Text, Field(max_length=200)]],
    Field(max_length=32),
]


class ImageDescription(Contract):
    """What is said of an image."""

    caption: Caption | None = None
    tags: list[Tag] = Field(default_factory=list, max_length=32)
    licence: Annotated[Text, Field(max_length=100)] | None = None
    source: Annotated[Text, Field(max_length=200)] | None = None
    attributes: Attributes = Field(default_factory=dict)


class UploadFields(ImageDescription):
    """What an upload says of its images; each value holds for every file of which `each` does not say another."""

    collection: Name = "shared"
    on_invalid: OnInvalid = Field(
        OnInvalid.REFUSE,
        description="`refuse`: one file that is no image, and nothing is kept; `skip`: the others are",
    )
    each: list[ImageDescription] = Field(
        default_factory=list,
        max_length=1000,
        description="as JSON, what is said of single files, in the order of the files",
    )


class ImagePatch(Contract):
    """New values for the fields given; the others stay."""

    caption: Caption | None = None
    tags: Annotated[list[Tag], Field(max_length=32)] | None = None
    licence: Annotated[Text, Field(max_length=100)] | None = None
    source: Annotated[Text, Field(max_length=200)] | None = None
    attributes: Attributes | None = None


class ImageView(Contract):
    id: UUID
    collection: str
    state: ImageState
    error_code: str | None = None
    caption: str | None
    tags: list[str]
    licence: str | None
    source: str | None
    attributes: dict[str, str]
    filename: str | None
    format: str
    width: int
    height: int
    size_bytes: int
    sha256: str = Field(description="of the file as it was uploaded")
    created_at: datetime
    url: str
    content_url: str
    thumbnail_url: str


class FileOutcome(StrEnum):
    CREATED = "created"
    EXISTING = "existing"  # the collection had it
    SKIPPED = "skipped"  # see `code`


class UploadedFile(Contract):
    """What became of one file."""

    outcome: FileOutcome
    image_id: UUID | None = None
    code: str | None = Field(None, description="why it was skipped")
    detail: str | None = None


class UploadResponse(Contract):
    images: list[ImageView] = Field(description="those of the files that were kept")
    files: list[UploadedFile] = Field(description="in the order in which they were sent")
    created: int
    existing: int = Field(description="files that the collection already had; answered with the image it has")


class ImageQuery(PageQuery):
    collection: Name = "shared"
    state: ImageState | None = None
    tag: Tag | None = None
    source: Annotated[Text, Field(max_length=200)] | None = None
    licence: Annotated[Text, Field(max_length=100)] | None = None
