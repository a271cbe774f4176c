"""Requests for images."""

import base64
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Self
from uuid import UUID

from pydantic import Field, model_validator

from shared.contracts.common import Contract, ImageFormat, Metadata, Name, Prompt, Seed, Text
from shared.contracts.images import Caption
from shared.contracts.jobs import EventType, JobKind, Lane
from shared.contracts.search import Concept, ImageFilter, SearchMode, refuse_repeated_concepts


@dataclass(frozen=True)
class ModeTraits:
    """The parts of a reference, and of a pipeline, that a mode uses."""

    uses_image_prompt: bool = False
    """An IP-Adapter conditions on the references."""
    uses_initial_image: bool = False
    """The first reference is the image that img2img starts from."""
    uses_native_references: bool = False
    """The pipeline itself reads several reference images, beside the prompt."""
    needs_pixels: bool = False
    """The references are read as images; without it, their vectors or captions are enough."""
    needs_captions: bool = False
    """The references' captions are appended to the prompt."""


class Mode(StrEnum):
    """How references condition the image."""

    AUTO = "auto"
    IMAGE_PROMPT = "image_prompt"
    IMG2IMG = "img2img"
    IMAGE_PROMPT_IMG2IMG = "image_prompt+img2img"
    CAPTION = "caption"
    REFERENCE = "reference"
    NONE = "none"

    @property
    def traits(self) -> ModeTraits:
        return _TRAITS[self]


_TRAITS = {
    Mode.AUTO: ModeTraits(),
    Mode.IMAGE_PROMPT: ModeTraits(uses_image_prompt=True),
    Mode.IMG2IMG: ModeTraits(uses_initial_image=True, needs_pixels=True),
    Mode.IMAGE_PROMPT_IMG2IMG: ModeTraits(uses_image_prompt=True, uses_initial_image=True, needs_pixels=True),
    Mode.CAPTION: ModeTraits(needs_captions=True),
    Mode.REFERENCE: ModeTraits(uses_native_references=True, needs_pixels=True),
    Mode.NONE: ModeTraits(),
}


class Webhook(Contract):
    """Receiver of the events of a job, signed with the owner's secret (Standard Webhooks)."""

    url: Annotated[Text, Field(min_length=8, max_length=2000)] = Field(
        examples=["https://example.com/hooks/afterimage"]
    )
    events: Annotated[list[EventType], Field(min_length=1, max_length=len(EventType))] = Field(
        default_factory=lambda: [event for event in EventType if event.ends_job], description="events to send"
    )


class GenerateRequest(Contract):
    """Generate images from a prompt alone."""

    prompt: Prompt = Field(examples=["a red apple with a bite"])
    negative_prompt: Annotated[Text, Field(max_length=2000)] | None = None
    model: Name | None = Field(None, description="a name from `GET /models`; `null`: the default model of the service")
    num_images: int = Field(1, ge=1, le=16)
    width: int | None = Field(None, ge=16, le=2048, description="pixels; `null`: the default of the model")
    height: int | None = Field(None, ge=16, le=2048, description="pixels; `null`: the default of the model")
    exact_size: bool = Field(
        False, description="refuse a size that the model cannot draw; false: crop and scale the image to the size"
    )
    num_inference_steps: int | None = Field(None, ge=1, le=150)
    guidance_scale: float | None = Field(None, ge=0, le=30)
    scheduler: Annotated[Text, Field(max_length=64)] | None = None
    loras: dict[Name, Annotated[float, Field(ge=-2, le=2)]] = Field(
        default_factory=dict, max_length=4, description="scale of each LoRA, by its configured name"
    )
    seed: Seed | None = Field(None, description="seed of the first image; image i gets seed + i modulo 2**32")
    format: ImageFormat = ImageFormat.PNG
    quality: int = Field(90, ge=1, le=100, description="quality of JPEG and WebP")
    preview_every: int | None = Field(
        None,
        ge=1,
        le=150,
        description="steps between small previews of each image; they are `preview` events of the job's stream, a few "
        "per second at most, and do not change the result; `null`: no previews",
    )
    lane: Lane = Lane.NORMAL
    expires_in_s: float | None = Field(
        None, gt=0, le=30 * 86_400, description="longest wait until the model starts; after it the job is `expired`"
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="longest run from the start of the model's work; after it the job is `failed` with `job_timeout`",
    )
    webhook: Webhook | None = None
    metadata: Metadata = Field(default_factory=dict, description="returned with the job")
    dry_run: bool = Field(False, description="return the resolved parameters and queue no job")


class PinnedReference(Contract):
    image_id: UUID
    weight: float | None = Field(None, gt=0, le=100, description="relative weight; `null`: 1")
    # Excluded when it is empty, so that a worker of the previous release can read the row.
    concepts: list[Prompt] = Field(
        default_factory=list,
        max_length=8,
        exclude_if=lambda texts: not texts,
        description="things of the prompt that it stands for; they are recorded, and in the mode `reference` they can "
        "change the order and the size in which the model reads the pictures",
    )
    # Excluded at its default, for the same reason.
    pinned: bool = Field(
        True,
        exclude_if=lambda pinned: pinned,
        description="`false`: a search found it, and the request uses it as it was shown; the record of the image then "
        "does not say that a person chose it",
    )

    @classmethod
    def recorded(cls, image_id: UUID, weight: float, *, concepts: Sequence[str] = (), pinned: bool = True) -> Self:
        """A reference with the weight that an output's record has. A weight of 0 becomes the smallest positive one.

        weight: a share of 1. A very small share is rounded to 0. concepts: the things that it was used for.
        """
        return cls(image_id=image_id, weight=max(weight, sys.float_info.min), concepts=list(concepts), pinned=pinned)


class SentReferenceImage(Contract):
    """A picture that only this job uses as a reference. It does not become an image of the corpus."""

    data: str = Field(description="PNG, JPEG, WebP or AVIF file in base64", repr=False)
    weight: float | None = Field(None, gt=0, le=100, description="relative weight; `null`: 1")
    caption: Caption | None = None

    @classmethod
    def of(cls, file: bytes, *, weight: float | None = None, caption: str | None = None) -> Self:
        """A reference from the bytes of an image file."""
        return cls(data=base64.b64encode(file).decode(), weight=weight, caption=caption)


MAX_PLAN_LENGTH = 131_072
"""Longest token of a plan. Eight concepts of 2,000 characters of 4 bytes, the longest filter and 16 references need
less."""
REFERENCE_FIELDS = (
    *("similar_examples_count", "concepts", "split_prompt", "reference_ids", "reference_images"),
    *("min_similarity", "filter", "avoid", "avoid_ids"),
)
"""Fields that choose references. A plan has already chosen them."""


class RagGenerateRequest(GenerateRequest):
    """Generate images conditioned on the corpus images nearest to the prompt, or on the references of the request."""

    similar_examples_count: int | None = Field(
        None, ge=0, le=16, description="largest number of references to search, for all concepts together"
    )
    # The next two are excluded at their defaults: requests without them have the fingerprint of the previous release.
    concepts: list[Concept] = Field(
        default_factory=list,
        max_length=8,
        exclude_if=lambda concepts: not concepts,
        description="the things that the image shows, each with references of its own; empty: see `split_prompt`",
    )
    split_prompt: bool = Field(
        True, exclude_if=lambda split: split, description="find references for each thing that the prompt names"
    )
    mode: Mode = Mode.AUTO
    reference_ids: Annotated[
        list[Annotated[UUID | PinnedReference, Field(title="Reference")]], Field(max_length=16)
    ] = Field(default_factory=list, description="use exactly these images in this order, without a search")
    # Excluded when it is empty, so that requests without pictures have the fingerprint of the previous release.
    reference_images: list[SentReferenceImage] = Field(
        default_factory=list,
        max_length=16,
        exclude_if=lambda images: not images,
        description="pictures to use after those of `reference_ids`, without a search",
    )
    # The next two are excluded when they are empty, for the same reason.
    avoid: list[Prompt] = Field(
        default_factory=list,
        max_length=8,
        exclude_if=lambda texts: not texts,
        description="texts that searched references must not show",
    )
    avoid_ids: list[UUID] = Field(
        default_factory=list,
        max_length=64,
        exclude_if=lambda ids: not ids,
        description="images that are not used as searched references",
    )
    # Excluded when it is `None`, for the same reason.
    plan: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_PLAN_LENGTH,
        exclude_if=lambda plan: plan is None,
        description="`plan` of `GET /rag/search` for this prompt: use exactly the references that it has shown",
    )
    min_similarity: float | None = Field(
        None, ge=-1, le=1, description="lowest cosine of a reference that is used; `null`: the value of the service"
    )
    filter: ImageFilter = ImageFilter()
    ip_adapter_scale: float | None = Field(None, ge=0, le=2, description="strength of the image conditioning")
    strength: float | None = Field(None, ge=0.01, le=1, description="img2img: share of the noise schedule that is run")

    @model_validator(mode="after")
    def _references_are_named_once(self) -> Self:
        ids = [reference.image_id for reference in self.pinned]
        if len(set(ids)) != len(ids):
            raise ValueError("reference_ids names an image twice")
        return self

    @model_validator(mode="after")
    def _a_plan_has_the_references(self) -> Self:
        if self.plan is None:
            return self
        fields = type(self).model_fields
        others = [
            name
            for name in REFERENCE_FIELDS
            if name in fields and getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if others:
            raise ValueError(f"plan has the references, so it excludes {', '.join(others)}")
        return self

    @model_validator(mode="after")
    def _concepts_are_searched(self) -> Self:
        refuse_repeated_concepts([concept.text for concept in self.concepts])
        for name in ("concepts", "avoid", "avoid_ids"):
            if getattr(self, name) and (self.reference_ids or self.reference_images):
                raise ValueError(f"{name} is for a search, so it excludes reference_ids and reference_images")
        return self

    @property
    def pinned(self) -> list[PinnedReference]:
        return [r if isinstance(r, PinnedReference) else PinnedReference(image_id=r) for r in self.reference_ids]


class ResolvedReferenceImage(Contract):
    """A picture of the request. Its file is stored beside the job."""

    sha256: str = Field(description="SHA-256 of the file that was sent")
    weight: float | None
    caption: str | None


class ResolvedConcept(Contract):
    """One thing that the image shows, and how its references are searched."""

    text: str
    k: int | None = Field(None, description="largest number of its references; `null`: as many as there is room")
    filter: ImageFilter | None = Field(None, description="`null`: the filter of the job")


class GenerationParameters(Contract):
    """A request with its defaults resolved. The worker runs it, and the provenance records it.

    The API writes it once at submit; a replay runs it again. `mode` may still be `auto`, and searched references are
    found when the job runs.
    """

    prompt: str
    negative_prompt: str | None
    model: str
    seeds: list[Seed] = Field(min_length=1, description="one per image")
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str | None
    loras: dict[str, float]
    format: ImageFormat
    quality: int
    mode: Mode
    ip_adapter_scale: float
    strength: float
    k: int = Field(description="largest number of references to search; 0: no search")
    # Fields with `exclude_if` are left out at their defaults: a worker of the previous release can read the row.
    concepts: list[ResolvedConcept] = Field(
        default_factory=list,
        exclude_if=lambda concepts: not concepts,
        description="the things for which references are searched; empty: the prompt as a whole",
    )
    avoid: list[str] = Field(
        default_factory=list,
        exclude_if=lambda texts: not texts,
        description="texts that searched references must not show",
    )
    avoid_ids: list[UUID] = Field(
        default_factory=list, exclude_if=lambda ids: not ids, description="images that are not used as references"
    )
    search_mode: SearchMode = Field(
        SearchMode.HYBRID,
        exclude_if=lambda mode: mode is SearchMode.HYBRID,
        description="how the corpus is searched",
    )
    min_similarity: float
    max_gap: float | None = Field(
        None,
        exclude_if=lambda gap: gap is None,
        description="largest distance of a reference below the most similar image of its concept; `null`: any",
    )
    matched_min_similarity: float | None = Field(
        None,
        exclude_if=lambda similarity: similarity is None,
        description="lowest cosine of a reference whose caption has all words of the concept; `null`: words do nothing",
    )
    filter: ImageFilter
    references: list[PinnedReference] = Field(description="pinned images of the corpus")
    # Excluded when it is empty, so that a worker of the previous release can read the row.
    reference_images: list[ResolvedReferenceImage] = Field(
        default_factory=list,
        exclude_if=lambda images: not images,
        description="pictures of the request, used after the pinned images",
    )
    exact_size: bool = Field(False, description="fail with `size_not_supported` instead of cropping and scaling")
    # Excluded when it is `None`, so that a worker of the previous release can read the row.
    preview_every: int | None = Field(
        None, exclude_if=lambda steps: steps is None, description="steps between previews; `null`: no previews"
    )

    planned_at: datetime | None = Field(
        None,
        exclude_if=lambda moment: moment is None,
        description="when the plan was made that has these references; `null`: the request used no plan",
    )

    @property
    def named_references(self) -> int:
        """Number of references that the request names or brings; 0: they are searched."""
        return len(self.references) + len(self.reference_images)

    @property
    def searched_filters(self) -> list[ImageFilter]:
        """Where references are searched; empty: they are not."""
        return [concept.filter or self.filter for concept in self.searched_concepts] if self.k else []

    @property
    def searched_concepts(self) -> list[ResolvedConcept]:
        """The things for which references are searched: the whole prompt, if it was not split."""
        return self.concepts or [ResolvedConcept(text=self.prompt)]


class DryRunView(Contract):
    """The parameters that the request would run without `dry_run`."""

    kind: JobKind
    parameters: GenerationParameters


def seeds_from(first: int | None, count: int) -> list[int]:
    """Return `count` seeds in [0, 2**32), consecutive from `first` or, if that is `None`, from a random start."""
    start = secrets.randbelow(2**32) if first is None else first
    return [(start + i) % 2**32 for i in range(count)]
