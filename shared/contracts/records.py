"""The records of a job and of an output, as JSON: how its references were chosen, and what determined the pixels.

They are plain dictionaries. Records of older releases lack keys, and records of newer ones have more.
"""

from typing import Annotated, Any

from pydantic import ConfigDict, SkipValidation
from typing_extensions import TypedDict


def _require_no_key(schema: dict[str, Any]) -> None:
    """A record lacks the keys that its release did not know, so no key is required in the OpenAPI document."""
    schema.pop("required", None)


class _Record(TypedDict, total=False):
    __pydantic_config__ = ConfigDict(extra="allow", json_schema_extra=_require_no_key)  # type: ignore[misc]


class RecordedReference(_Record, total=False):
    """A reference, with the values at the time of the job."""

    kind: str
    image_id: str
    sha256: str
    similarity: float | None
    weight: float
    pinned: bool
    caption: str | None
    concepts: list[str]


class ConsideredReference(RecordedReference, total=False):
    """A reference that was found or named, used or not."""

    used: bool
    reason: str


class RecordedConcept(_Record, total=False):
    """A thing that the image shows, and its references."""

    text: str
    found: bool
    image_ids: list[str]
    reason: str | None


class RecordedWarning(_Record, total=False):
    """A way in which the image differs from the request."""

    code: str
    detail: str
    context: dict[str, Any]


class RecordedModel(_Record, total=False):
    """The model that drew an image."""

    name: str
    source_revision: str | None
    pipeline: str
    weights_digest: str
    weights_digest_kind: str
    device: str
    dtype: str
    attention: str | None
    compile: str | None
    text_arguments: dict[str, Any] | None


class Resolution(_Record, total=False):
    """The chosen mode and references, with reasons."""

    mode: str
    reason: str
    embedding_space: str
    references: list[ConsideredReference]
    concepts: list[RecordedConcept]
    warnings: list[RecordedWarning]


class Provenance(_Record, total=False):
    """All data that determined the pixels of an output. A withdrawn output has an empty one."""

    job_id: str
    index: int
    seed: int
    parameters: dict[str, Any]
    mode: str
    mode_reason: str
    drawn_width: int
    drawn_height: int
    scaled: bool
    crop: Any
    initial_image_box: Any
    reference_call: dict[str, Any] | None
    text_parts: int | None
    warnings: list[RecordedWarning]
    memory_savers: list[str]
    references: list[RecordedReference]
    concepts: list[RecordedConcept]
    embedding_space: str
    model: RecordedModel
    versions: dict[str, str]
    safety: dict[str, Any]
    file_pixels_sha256: str


# Not validated: the service returns a stored record as it is, and the client keeps the keys that it does not know.
StoredResolution = Annotated[Resolution, SkipValidation]
StoredProvenance = Annotated[Provenance, SkipValidation]
