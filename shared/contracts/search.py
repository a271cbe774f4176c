"""Searches in the corpus."""

from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self
from uuid import UUID

from pydantic import Field, model_validator

from shared.contracts.common import CollectionName, Contract, FilterTags, MatchedText, Moment, Name, Prompt


class SearchMode(StrEnum):
    """Which of the two searches answers: the one by vectors, the one by words, or both."""

    VECTOR = "vector"
    TEXT = "text"
    HYBRID = "hybrid"


SpaceDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{12,64}$")]
"""The digest of an embedding space, or its beginning."""


class FoundBy(StrEnum):
    """The search that found an image: by its vector, or by the words of its caption and tags."""

    VECTOR = "vector"
    TEXT = "text"


class ImageFilter(Contract):
    """Conditions on the images. All of them must hold."""

    collection: CollectionName = Field(
        "shared", description="a collection of the caller, `shared`, or `owner/name` for one that another owner shares"
    )
    tags: FilterTags = Field(default_factory=list, description="tags that an image must have, all of them")
    source: Annotated[MatchedText, Field(max_length=200)] | None = None
    licence: Annotated[MatchedText, Field(max_length=100)] | None = None
    attributes: Annotated[
        dict[Annotated[MatchedText, Field(max_length=64)], Annotated[MatchedText, Field(max_length=200)]],
        Field(max_length=16),
    ] = Field(default_factory=dict, description="name and value pairs that an image must have, all of them")
    created_after: Moment | None = None
    created_before: Moment | None = None


class QueryPart(Contract):
    """A text or an image that the results of a search resemble, or must not resemble."""

    text: Prompt | None = Field(None, description="a text")
    image_id: UUID | None = Field(None, description="an image of the corpus")
    image: str | None = Field(None, description="PNG, JPEG, WebP or AVIF file in base64", repr=False)
    weight: float = Field(1, gt=0, le=10, description="weight of its vector, compared with the other parts")

    @model_validator(mode="after")
    def _one_thing_is_given(self) -> Self:
        if sum(each is not None for each in (self.text, self.image_id, self.image)) != 1:
            raise ValueError("exactly one of text, image_id and image is needed")
        return self


class SearchRequest(Contract):
    """Find images by texts, by images, or by both.

    The vectors of all texts and images are added by their weights, and half of the vectors of `negative` is subtracted.
    """

    query: Prompt | None = Field(
        None, description="text to search for; a long text counts as the mean of its parts", examples=["a cat playing"]
    )
    image_id: UUID | None = Field(None, description="image of the corpus that the results resemble")
    image: str | None = Field(
        None, description="PNG, JPEG, WebP or AVIF file in base64 that the results resemble", repr=False
    )
    mix: list[QueryPart] = Field(
        default_factory=list,
        max_length=8,
        description="further texts and images that the results resemble; `query`, `image_id` and `image` weigh 1",
    )
    negative: list[QueryPart] = Field(
        default_factory=list,
        max_length=8,
        description="texts and images that the results must not resemble; "
        "words do not find an image whose caption and tags have all words of such a text",
    )
    mode: SearchMode | None = Field(
        None,
        description="`vector`: by similarity; `text`: by the words of captions and tags, without similarities; "
        "`hybrid`: both, ranked together; unset: the collection's default, else `hybrid` where the query has words",
    )
    k: int = Field(10, ge=1, le=100, description="largest number of results")
    threshold: float | None = Field(None, ge=-1, le=1, description="lowest cosine similarity of a result")
    filter: ImageFilter = ImageFilter()
    space: SpaceDigest | None = Field(
        None,
        description="embedding space to search, by its digest or at least 12 characters of it; unset: the active one",
    )
    diversity: float = Field(
        0,
        ge=0,
        le=1,
        description="0 ranks by similarity alone; more ranks by maximal marginal relevance, so `similarity` may "
        "rise from one result to the next",
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if self.query is None and self.image_id is None and self.image is None and not self.mix:
            raise ValueError("one of query, image_id, image and mix is needed")
        if self.image_id is not None and self.image is not None:
            raise ValueError("image_id and image exclude each other")
        if self.mode in (SearchMode.TEXT, SearchMode.HYBRID) and self.words is None:
            raise ValueError(f"the mode `{self.mode}` needs a text in query or mix")
        if self.mode is SearchMode.TEXT and self.needs_vectors:
            raise ValueError("the mode `text` excludes images, threshold and diversity, which need vectors")
        return self

    @property
    def words(self) -> str | None:
        """The words of `query` and `mix` together; `None` if they have no text."""
        return " ".join(text for text in (self.query, *(part.text for part in self.mix)) if text is not None) or None

    @property
    def needs_vectors(self) -> bool:
        """Whether the request has a part that the mode `text` cannot use."""
        by_image = any(part.text is None for part in (*self.mix, *self.negative))
        sent = self.image_id is not None or self.image is not None or by_image
        return sent or self.threshold is not None or self.diversity > 0


class Neighbour(Contract):
    """One image of a search result."""

    image_id: UUID
    similarity: float | None = Field(
        description="cosine similarity to the query, in [-1, 1]; `null` only in the mode `text`"
    )
    found_by: list[FoundBy] = Field(description="the searches that found it")
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
    results: list[Neighbour] = Field(
        description="best first; in the mode `vector` that is most similar first, and with `diversity` in the order of "
        "their choice"
    )
    mode: SearchMode = Field(description="the mode that was used")
    requested: int = Field(description="`k` of the request")
    shortfall: int = Field(description="`requested` minus the number of results")
    embedding_space: str
    exact: bool = Field(
        description="true: every matching image was compared; false: an approximate index was used, or a word was too "
        "common to compare all images that have it"
    )


class Concept(Contract):
    """One thing that the image shows. It gets references of its own."""

    text: Prompt = Field(examples=["a robot"])
    k: int | None = Field(
        None, ge=1, le=16, description="largest number of references of this concept; `null`: as many as there is room"
    )
    filter: ImageFilter | None = Field(
        None,
        description="where to search; `null`: the filter of the request; a near-duplicate found elsewhere may serve",
    )


def refuse_repeated_concepts(texts: Sequence[str]) -> None:
    """Refuse a text that appears twice: references are shown under the text of their concept.

    Raises:
        ValueError: two texts differ at most in the case of letters.
    """
    if len({text.casefold() for text in texts}) != len(texts):
        raise ValueError("a concept is named twice")


class RagSearchQuery(Contract):
    """Asks for the references that `POST /rag/generate` would use for this prompt."""

    prompt: Prompt
    concept: list[Prompt] = Field(
        default_factory=list,
        max_length=8,
        description="the things that the image shows, one per parameter; empty: see `split_prompt`",
    )
    split_prompt: bool = Field(True, description="find references for each thing that the prompt names")
    avoid: list[Prompt] = Field(
        default_factory=list, max_length=8, description="texts that references must not show, one per parameter"
    )
    avoid_ids: list[UUID] = Field(default_factory=list, max_length=64, description="images that are not used")
    k: int | None = Field(None, ge=1, le=16)
    min_similarity: float | None = Field(None, ge=-1, le=1)
    collection: CollectionName = "shared"
    tags: FilterTags = Field(default_factory=list)
    model: Name | None = None
    space: SpaceDigest | None = Field(
        None,
        description="embedding space to search, by its digest or at least 12 characters of it; unset: the active "
        "one, which generations use",
    )

    @model_validator(mode="after")
    def _concepts_differ(self) -> Self:
        refuse_repeated_concepts(self.concept)
        return self


class PlannedConcept(Contract):
    """A concept of the prompt, and its references."""

    text: str
    found: bool = Field(description="an image passed the relevance gate")
    image_ids: list[UUID] = Field(description="images that would be used for it")
    reason: str | None = Field(None, description="reason why no image would be used for it")


class PlannedReference(Neighbour):
    similarity: float = Field(description="cosine similarity to the query, in [-1, 1]")
    used: bool = Field(description="the image passed the relevance gate")
    reason: str = Field(description="reason why it would be used or not")
    weight: float = Field(
        ge=0, le=1, description="share of the image conditioning; the shares of the used references sum to 1"
    )
    concepts: list[str] = Field(
        default_factory=list, description="texts of the concepts that it would be used for or was found for"
    )


class RagSearchResponse(Contract):
    """The planned references. Pass the ids of the used ones as `reference_ids` to pin exactly these."""

    prompt: str
    references: list[PlannedReference]
    concepts: list[PlannedConcept] = Field(
        default_factory=list, description="the things that were searched, each with its references"
    )
    min_similarity: float
    plan: str | None = Field(
        None,
        description="pass it as `plan` with the same prompt and model, and exactly the used references are drawn from; "
        "it can be used for about an hour; `null`: the service has no keys to sign it",
    )
    mode: str = Field(description="mode to which `auto` resolves")
    mode_reason: str
    embedding_space: str
