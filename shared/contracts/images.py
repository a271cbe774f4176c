"""Images of the corpus."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self
from uuid import UUID

from pydantic import Field, model_validator

from shared.contracts.common import CollectionName, Contract, MatchedText, OnInvalid, PageQuery, Tag, Tags, Text


class ImageState(StrEnum):
    PENDING = "pending"  # stored, waiting for its vector
    READY = "ready"  # searchable
    FAILED = "failed"  # stored, but no vector can be computed: see `error_code`


Caption = Annotated[Text, Field(max_length=2000)]
Attributes = Annotated[
    dict[Annotated[MatchedText, Field(min_length=1, max_length=64)], Annotated[MatchedText, Field(max_length=200)]],
    Field(max_length=32),
]


class ImageDescription(Contract):
    """The description of an image."""

    caption: Caption | None = None
    tags: Tags = Field(default_factory=list)
    licence: Annotated[MatchedText, Field(max_length=100)] | None = None
    source: Annotated[MatchedText, Field(max_length=200)] | None = None
    attributes: Attributes = Field(default_factory=dict)


class UploadFields(ImageDescription):
    """The descriptions of an upload. A value applies to every file for which `each` has no other value."""

    collection: CollectionName = "shared"
    on_invalid: OnInvalid = Field(
        OnInvalid.REFUSE,
        description="`refuse`: one invalid file stops the whole upload; `skip`: the other files are stored",
    )
    each: list[ImageDescription] = Field(
        default_factory=list,
        max_length=1000,
        description="as JSON: descriptions of single files, in the order of the files",
    )


class ImagePatch(Contract):
    """New values for the given fields. Other fields keep their values."""

    caption: Caption | None = None
    tags: Tags | None = None
    licence: Annotated[MatchedText, Field(max_length=100)] | None = None
    source: Annotated[MatchedText, Field(max_length=200)] | None = None
    attributes: Attributes | None = None
    file_description: ImageDescription | None = Field(
        None,
        description="what the image's file says now. Its changes since the last such request, or since the upload, are "
        "applied; values that were set or removed otherwise stay. Not together with other fields",
    )


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
    file_description: ImageDescription | None = Field(
        None, description="the description at the upload, or the last `file_description` of a PATCH"
    )
    filename: str | None
    format: str
    width: int
    height: int
    size_bytes: int
    sha256: str = Field(description="SHA-256 of the uploaded file")
    created_at: datetime
    url: str
    content_url: str
    thumbnail_url: str


class Cascade(StrEnum):
    """Other things that go when an image is deleted."""

    WITHDRAW = "withdraw"  # the outputs that drew from it, and the images made of these outputs


class ImageDelete(Contract):
    """How an image is deleted. `reason` and `dry_run` belong to `cascade`."""

    cascade: Cascade | None = Field(None, description="by default only the image goes")
    reason: Annotated[Text, Field(min_length=1, max_length=500)] | None = Field(
        None, description="shown to the owners of the outputs, and kept in the audit"
    )
    dry_run: bool = Field(False, description="true: only count what would be withdrawn")

    @model_validator(mode="after")
    def _belong_to_cascade(self) -> Self:
        if self.cascade is None and (self.reason is not None or self.dry_run):
            raise ValueError("`reason` and `dry_run` need `cascade=withdraw`")
        return self


class WithdrawalView(Contract):
    """The effects of a withdrawal; of a dry run, the effects that it would have."""

    image_id: UUID
    reason: str | None
    dry_run: bool = Field(description="true: nothing has changed")
    outputs: int = Field(description="outputs that drew from the image or from one made of it, of all owners")
    owners: int = Field(description="owners of these outputs")
    images: int = Field(description="images deleted: this one, and those that are such outputs")
    running_jobs: int = Field(description="running jobs that drew from it and were ended")
    needs_admin: bool = Field(description="an output or image of another owner is among them")


class FileOutcome(StrEnum):
    CREATED = "created"
    EXISTING = "existing"  # the collection already had the image
    SKIPPED = "skipped"  # see `code`


class UploadedFile(Contract):
    """The outcome of one file."""

    outcome: FileOutcome
    image_id: UUID | None = None
    code: str | None = Field(None, description="error code of a skipped file")
    detail: str | None = None


class UploadResponse(Contract):
    images: list[ImageView] = Field(description="images of the files that were not skipped")
    files: list[UploadedFile] = Field(description="outcomes in the order of the files")
    created: int
    existing: int = Field(description="files that the collection already had; `images` contains its image")


class ImageQuery(PageQuery):
    collection: CollectionName = "shared"
    state: ImageState | None = None
    tag: Tag | None = None
    source: Annotated[MatchedText, Field(max_length=200)] | None = None
    licence: Annotated[MatchedText, Field(max_length=100)] | None = None
