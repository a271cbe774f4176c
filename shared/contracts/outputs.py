"""Requests about generated images."""

from uuid import UUID

from pydantic import Field

from shared.contracts.common import CollectionName, Contract, PageQuery, Tags
from shared.contracts.images import Caption


class OutputQuery(PageQuery):
    reference_id: UUID | None = Field(None, description="only outputs that used this image")


class RememberRequest(Contract):
    """The description of an output as an image of the corpus."""

    collection: CollectionName = "shared"
    caption: Caption | None = None
    tags: Tags = Field(default_factory=list)
