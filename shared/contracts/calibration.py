"""The relevance gate: its thresholds, and how they were measured."""

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from pydantic import Field

from shared.contracts.common import Contract


class GateOrigin(StrEnum):
    """Where the thresholds come from."""

    SETTING = "setting"
    CALIBRATION = "calibration"
    DEFAULT = "default"


class Thresholds(Contract):
    """Thresholds of relevance; all of them are cosines or differences of cosines."""

    min_similarity: float = Field(ge=-1, le=1, description="lowest cosine of a reference that is used")
    max_gap: float | None = Field(
        None, ge=0, le=2, description="largest distance of a reference below the best hit; `null`: any"
    )
    matched_min_similarity: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="lowest cosine of a reference whose caption has all words of the query; with a part of the words, "
        "or with words that only the tags have, the limit lies between; `null`: words do not count",
    )


class Calibration(Thresholds):
    """Thresholds that `scripts.calibrate` measured on a collection, with the figures on its sample."""

    measured_at: datetime
    collection_id: UUID
    images: int = Field(ge=1, description="searchable images of the collection at that time")
    queries: int = Field(description="captions, tags and prompts that were searched")
    references: int = Field(description="candidates per query, as a generation chooses them")
    precision: float = Field(description="share of the used references that were right")
    recall: float = Field(description="share of the queries for which a right reference was used")
    recall_without_words: float = Field(description="the same by the vectors alone")
    false_accepts: float = Field(description="share of the queries with a reference though nothing fitted them")
    separable: bool = Field(
        True, description="`false`: no threshold keeps wrong images out and right ones in, so this is a compromise"
    )


class RelevanceView(Thresholds):
    """The relevance gate in force, where neither the request nor its collection sets `min_similarity`."""

    origin: GateOrigin
    calibration: Calibration | None = Field(
        None, description="calibration of the active embedding space, also if a setting takes its place"
    )
    warning: str | None = Field(None, description="why the thresholds may be wrong; `null`: nothing is known")
