"""Asking for images."""

import secrets
from enum import StrEnum
from typing import Annotated, Self
from uuid import UUID

from pydantic import Field, model_validator

from shared.contracts.common import Contract, ImageFormat, Metadata, Name, Prompt, Seed, Text
from shared.contracts.jobs import EventType, JobKind, Lane
from shared.contracts.search import ImageFilter


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
    def uses_image_prompt(self) -> bool:
        return self in (Mode.IMAGE_PROMPT, Mode.IMAGE_PROMPT_IMG2IMG)

    @property
    def uses_initial_image(self) -> bool:
        return self in (Mode.IMG2IMG, Mode.IMAGE_PROMPT_IMG2IMG)


class Webhook(Contract):
    """Whom to tell of a job, signed by Standard Webhooks with the owner's secret."""

    url: Annotated[Text, Field(min_length=8, max_length=2000)] = Field(
        examples=["https://example.com/hooks/afterimage"]
    )
    events: Annotated[list[EventType], Field(min_length=1, max_length=len(EventType))] = Field(
        default_factory=lambda: [event for event in EventType if event.ends_job], description="which events to send"
    )


class GenerateRequest(Contract):
    """Generate images from a prompt alone."""

    prompt: Prompt = Field(examples=["a red apple with a bite"])
    negative_prompt: Annotated[Text, Field(max_length=2000)] | None = None
    model: Name | None = Field(None, description="one of `GET /models`; none: the service's default")
    num_images: int = Field(1, ge=1, le=16)
    width: int | None = Field(None, ge=16, le=2048, description="pixels; none: what the model draws natively")
    height: int | None = Field(None, ge=16, le=2048, description="pixels; none: what the model draws natively")
    exact_size: bool = Field(False, description="refuse a size that the model cannot draw, instead of scaling")
    num_inference_steps: int | None = Field(None, ge=1, le=150)
    guidance_scale: float | None = Field(None, ge=0, le=30)
    scheduler: Annotated[Text, Field(max_length=64)] | None = None
    loras: dict[Name, Annotated[float, Field(ge=-2, le=2)]] = Field(
        default_factory=dict, max_length=4, description="configured LoRA names and their scale"
    )
    seed: Seed | None = Field(None, description="seed of the first image; image i gets seed + i modulo 2**32")
    format: ImageFormat = ImageFormat.PNG
    quality: int = Field(90, ge=1, le=100, description="JPEG and WebP")
    preview_every: int | None = Field(
        None,
        ge=1,
        le=150,
        description="show each image small after every so many steps, as `preview` events of the job's stream, a few "
        "per second at most; no effect on the result; none: no previews",
    )
    lane: Lane = Lane.NORMAL
    expires_in_s: float | None = Field(
        None, gt=0, le=30 * 86_400, description="longest wait until the model starts; then the job is `expired`"
    )
    timeout_s: float | None = Field(
        None, gt=0, le=86_400, description="longest run from there; then `failed` with `job_timeout`"
    )
    webhook: Webhook | None = None
    metadata: Metadata = Field(default_factory=dict, description="echoed wherever the job is shown")
    dry_run: bool = Field(False, description="resolve and answer, queue nothing")


class PinnedReference(Contract):
    image_id: UUID
    weight: float | None = Field(None, gt=0, le=100, description="relative; none: 1")


class RagGenerateRequest(GenerateRequest):
    """Generate images conditioned on what the corpus remembers of the prompt, or on pinned references."""

    similar_examples_count: int | None = Field(None, ge=0, le=16, description="references looked for")
    mode: Mode = Mode.AUTO
    reference_ids: Annotated[
        list[Annotated[UUID | PinnedReference, Field(title="Reference")]], Field(max_length=16)
    ] = Field(default_factory=list, description="use exactly these, in this order, instead of searching")
    min_similarity: float | None = Field(None, ge=-1, le=1, description="relevance gate; none: the service's")
    filter: ImageFilter = ImageFilter()
    ip_adapter_scale: float | None = Field(None, ge=0, le=2, description="strength of the image conditioning")
    strength: float | None = Field(None, gt=0, le=1, description="img2img: share of the noise schedule that is run")

    @model_validator(mode="after")
    def _references_are_named_once(self) -> Self:
        ids = [reference.image_id for reference in self.pinned]
        if len(set(ids)) != len(ids):
            raise ValueError("reference_ids names an image twice")
        return self

    @property
    def pinned(self) -> list[PinnedReference]:
        return [r if isinstance(r, PinnedReference) else PinnedReference(image_id=r) for r in self.reference_ids]


class GenerationParameters(Contract):
    """A request with nothing left open: what the worker runs and what provenance records.

    The API writes it once at submit; a replay runs it again.
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
    k: int = Field(description="references looked for; 0 for none")
    min_similarity: float
    filter: ImageFilter
    references: list[PinnedReference] = Field(description="pinned ones; empty: search")
    exact_size: bool = Field(False, description="fail with `size_not_supported` instead of scaling")
    # Left out where it is not asked for, so that a worker of the release before reads the row.
    preview_every: int | None = Field(None, exclude_if=lambda steps: steps is None, description="steps; none: never")


class DryRunView(Contract):
    """What a request would run, had it not been a `dry_run`."""

    kind: JobKind
    parameters: GenerationParameters


def seeds_from(first: int | None, count: int) -> list[int]:
    """`count` seeds in [0, 2**32): consecutive from `first`, or from a random start."""
    start = secrets.randbelow(2**32) if first is None else first
    return [(start + i) % 2**32 for i in range(count)]
