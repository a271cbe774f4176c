"""Requests about generated images."""

from typing import Annotated
from uuid import UUID

from pydantic import Field

from shared.contracts.common import CollectionName, Contract, Name, PageQuery, QueryMoment, Tags, Text
from shared.contracts.generation import Mode
from shared.contracts.images import Caption


class OutputQuery(PageQuery):
    reference_id: UUID | None = Field(None, description="only outputs that used this image")
    words: Annotated[Text, Field(max_length=200)] | None = Field(
        None, description="only outputs whose prompt contains each of these words, in any case of letters"
    )
    model: Name | None = Field(None, description="only outputs of this model")
    mode: Mode | None = Field(None, description="only outputs that were drawn in this mode; never `auto`")
    favourite: bool | None = Field(None, description="`true`: only favourites; `false`: only the others")
    job_id: UUID | None = Field(None, description="only outputs of this job")
    bulk_id: UUID | None = Field(None, description="only outputs of this bulk")
    created_after: QueryMoment | None = None
    created_before: QueryMoment | None = None


class OutputPatch(Contract):
    """The fields of an output that its owner may change."""

    favourite: bool = Field(description="whether the owner marks it as one to find again")


class RememberRequest(Contract):
    """The description of an output as an image of the corpus."""

    collection: CollectionName = "shared"
    caption: Caption | None = None
    tags: Tags = Field(default_factory=list)
