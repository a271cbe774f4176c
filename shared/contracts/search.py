"""Searches in the corpus."""

from datetime import datetime
from typing import Annotated, Self
from uuid import UUID

from pydantic import Field, model_validator

from shared.contracts.common import Contract, FilterTags, MatchedText, Moment, Name, Prompt


class ImageFilter(Contract):
    """Conditions on the images. All of them must hold."""

    collection: Name = Field("shared", description="name of a collection of the caller, or `shared`")
    tags: FilterTags = Field(default_factory=list, description="tags that an image must have, all of them")
    source: Annotated[MatchedText, Field(max_length=200)] | None = None
    licence: Annotated[MatchedText, Field(max_length=100)] | None = None
    attributes: Annotated[
        dict[Annotated[MatchedText, Field(max_length=64)], Annotated[MatchedText, Field(max_length=200)]],
        Field(max_length=16),
    ] = Field(default_factory=dict, description="name and value pairs that an image must have, all of them")
    created_after: Moment | None = None
    created_before: Moment | None = None


class SearchRequest(Contract):
    """Find images by text, by an image, or by both (the normalised sum of the two vectors)."""

    query: Prompt | None = Field(
        None, description="text to search for; a long text counts as the mean of its parts", examples=["a cat playing"]
    )
    image_id: UUID | None = Field(None, description="image of the corpus that the results resemble")
    image: str | None = Field(
        None, description="PNG, JPEG, WebP or AVIF file in base64 that the results resemble", repr=False
    )
    k: int = Field(10, ge=1, le=100, description="largest number of results")
    threshold: float | None = Field(None, ge=-1, le=1, description="lowest cosine similarity of a result")
    filter: ImageFilter = ImageFilter()
    diversity: float = Field(
        0,
        ge=0,
        le=1,
        description="0 ranks by similarity alone; more ranks by maximal marginal relevance, so `similarity` may "
        "rise from one result to the next",
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if self.query is None and self.image_id is None and self.image is None:
            raise ValueError("one of query, image_id and image is needed")
        if self.image_id is not None and self.image is not None:
            raise ValueError("image_id and image exclude each other")
        return self


class Neighbour(Contract):
    """One image of a search result."""

    image_id: UUID
    similarity: float = Field(description="cosine similarity to the query, in [-1, 1]")
    caption: str | None
    tags: list[str]
    source: str | None
    licence: str | None
    width: int
    height: int
    sha256: str
    created_at: datetime
    content_url: str
    thumbnail_url: str


class SearchResponse(Contract):
    results: list[Neighbour] = Field(description="most similar first; with `diversity` in the order of their choice")
    requested: int = Field(description="`k` of the request")
    shortfall: int = Field(description="`requested` minus the number of results")
    embedding_space: str
    exact: bool = Field(description="true: every matching image was compared; false: an approximate index was used")


class RagSearchQuery(Contract):
    """Asks for the references that `POST /rag/generate` would use for this prompt."""

    prompt: Prompt
    k: int | None = Field(None, ge=1, le=16)
    min_similarity: float | None = Field(None, ge=-1, le=1)
    collection: Name = "shared"
    tags: FilterTags = Field(default_factory=list)
    model: Name | None = None


class PlannedReference(Neighbour):
    used: bool = Field(description="the image passed the relevance gate")
    reason: str = Field(description="reason why it would be used or not")
    weight: float = Field(
        ge=0, le=1, description="share of the image conditioning; the shares of the used references sum to 1"
    )


class RagSearchResponse(Contract):
    """The planned references. Pass the ids of the used ones as `reference_ids` to pin exactly these."""

    prompt: str
    references: list[PlannedReference]
    min_similarity: float
    mode: str = Field(description="mode to which `auto` resolves")
    mode_reason: str
    embedding_space: str
