"""The inputs and outputs of a job: loads references from the blob store, stores images and records their provenance."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from shared import retrieval, tracing
from shared.contracts.common import ImageFormat
from shared.contracts.generation import Mode
from shared.contracts.jobs import JobWarning, UsedReference
from shared.contracts.safety import SafetyRecord, SafetyStage
from shared.db.attempts import StoredOutput
from shared.db.images import FoundImage
from shared.db.spaces import Space
from shared.db.tables import Image as ImageRow
from shared.db.tables import Output, OutputReference
from shared.errors import InvalidImageError, ReferenceDeletedError, ResourceNotFoundError
from shared.imaging import encode_image, open_image, pixels_sha256, thumbnail, with_record
from shared.storage import get_blobs, output_key, output_thumbnail_key
from worker_service.jobs import content_credentials
from worker_service.jobs.attempt import Attempt
from worker_service.models.generate_batch import GeneratedImage
from worker_service.models.generation import framing
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.worker_models import Models

LIBRARIES = ("afterimage", "torch", "diffusers", "transformers", "open_clip_torch")


def resolved_event(
    mode: Mode,
    reason: str,
    plan: retrieval.Plan,
    *,
    space: Space,
    warnings: Sequence[JobWarning],
) -> dict[str, Any]:
    """Data of the event `resolved`: the mode, all candidate references with reasons, and what each concept got.

    warnings: ways in which the images will differ from the request.
    """
    return {
        "mode": mode.value,
        "reason": reason,
        "embedding_space": space.digest,
        "references": [
            {**_used_reference(reference).model_dump(mode="json"), "used": reference.used, "reason": reference.reason}
            for reference in plan.candidates
        ],
        "concepts": [concept.model_dump(mode="json") for concept in plan.concepts],
        "warnings": [warning.model_dump(mode="json") for warning in warnings],
    }


def load_references(references: Sequence[retrieval.Candidate], *, with_pixels: bool) -> list[Reference]:
    """Convert references for the model. with_pixels: also read their images from the blob store.

    Raises:
        ReferenceDeletedError: an image was deleted, and the sweeper has deleted its blob.
        InvalidImageError: the stored file of an image is damaged.
        StorageError: the blob store failed.
    """
    return [
        Reference(
            # The adapter was trained on CLIP's projections, which are not normalised: the unit vector times its norm.
            vector=reference.scored.vector * reference.scored.norm,
            image=_pixels(reference) if with_pixels else None,
            weight=reference.weight,
            caption=reference.scored.image.caption,
            sha256=reference.scored.image.sha256,
            concepts=reference.concepts,
        )
        for reference in references
    ]


def initial_image_box(
    request: ImageRequest, references: Sequence[retrieval.Candidate]
) -> tuple[int, int, int, int] | None:
    """The place of the reference from which img2img starts, in pixels of the drawn image; None in other modes."""
    if not request.mode.traits.uses_initial_image:
        return None
    start = max(references, key=lambda reference: reference.weight).scored.image
    drawn = (request.width, request.height)
    return framing.placed_reference((start.width, start.height), drawn, request.output_size or drawn)


def _pixels(reference: retrieval.Candidate) -> Image.Image:
    return picture_of(reference.scored.image)


def picture_of(image: ImageRow | FoundImage) -> Image.Image:
    """Read the stored file of a reference.

    Raises:
        ReferenceDeletedError: the file is gone.
        InvalidImageError: the file is damaged.
        StorageError: the blob store failed.
    """
    try:
        return open_image(get_blobs().get(image.blob_key))
    except ResourceNotFoundError as error:
        raise ReferenceDeletedError(image_ids=[str(image.id)]) from error
    except InvalidImageError as error:
        message = "The stored image of a reference is damaged."
        raise InvalidImageError(message, image_ids=[str(image.id)]) from error


def store(
    attempt: Attempt,
    mode: Mode,
    reason: str,
    plan: retrieval.Plan,
    requests: Sequence[ImageRequest],
    images: Sequence[GeneratedImage | None],
    *,
    warnings: Sequence[JobWarning],
    models: Models,
) -> list[StoredOutput]:
    """Crop, scale, encode and store the images of a job. Returns their rows, which the caller has to write.

    images: one per request; None for an image that the content policy blocked.

    Raises:
        StorageError: the blob store failed.
        InvalidOutputError: an image cannot be encoded.
        ContentCredentialsError: an image cannot be signed.
    """
    plan = plan.used if mode is not Mode.NONE else plan.unused
    return [
        _store_image(
            attempt,
            index,
            image.pixels,
            provenance_record(attempt, index, mode, reason, plan, request, image, warnings=warnings, models=models),
            plan.candidates,
        )
        for index, (request, image) in enumerate(zip(requests, images, strict=True))
        if image is not None
    ]


def _store_image(
    attempt: Attempt,
    index: int,
    pixels: np.ndarray,
    provenance: dict[str, Any],
    references: Sequence[retrieval.Candidate],
) -> StoredOutput:
    parameters = attempt.parameters
    with tracing.span("encode", {"format": parameters.format.value, "index": index}):
        image = framing.to_requested_size(pixels, (parameters.width, parameters.height))
        data = encode_image(image, image_format=parameters.format, quality=parameters.quality)
        drawn_sha256 = pixels_sha256(image)
        # A lossy format changes pixels, and the record has the digest of those that a reader of the file sees.
        is_lossless = parameters.format is ImageFormat.PNG
        provenance = {
            **provenance,
            "file_pixels_sha256": drawn_sha256 if is_lossless else pixels_sha256(open_image(data)),
        }
        record = content_credentials.record_of_file(provenance)
        data = with_record(data, record)
        if (signer := content_credentials.get_signer()) is not None:
            data = signer.sign(data, parameters.format, content_credentials.manifest_of(record))
        small = thumbnail(image)
    key = output_key(attempt.job_id, attempt=attempt.number, index=index, image_format=parameters.format)
    thumbnail_key = output_thumbnail_key(attempt.job_id, attempt=attempt.number, index=index)
    with tracing.span("put", {"index": index, "size_bytes": len(data)}):
        blobs = get_blobs()
        blobs.put(key, data, media_type=parameters.format.media_type)
        blobs.put(thumbnail_key, small, media_type="image/webp")
    output = Output(
        id=uuid4(),
        job_id=attempt.job_id,
        owner_id=attempt.owner_id,
        index=index,
        seed=parameters.seeds[index],
        format=parameters.format,
        blob_key=key,
        thumbnail_key=thumbnail_key,
        width=image.shape[1],
        height=image.shape[0],
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=drawn_sha256,
        provenance=provenance,
    )
    rows = [
        # The provenance has the concepts of each reference.
        OutputReference(
            generation_id=output.id, position=position, **_used_reference(reference).model_dump(exclude={"concepts"})
        )
        for position, reference in enumerate(references)
    ]
    return StoredOutput(output=output, references=rows)


def provenance_record(
    attempt: Attempt,
    index: int,
    mode: Mode,
    reason: str,
    plan: retrieval.Plan,
    request: ImageRequest,
    image: GeneratedImage,
    *,
    warnings: Sequence[JobWarning],
    models: Models,
) -> dict[str, Any]:
    """Provenance of one image, as JSON: everything that decided its pixels, so that a replay can generate it again."""
    capabilities = models.capabilities
    drawn = (request.width, request.height)
    return {
        "job_id": str(attempt.job_id),
        "index": index,
        "seed": request.seed,
        "parameters": attempt.parameters.model_dump(mode="json", exclude={"seeds", "preview_every"}),
        "mode": mode.value,
        "mode_reason": reason,
        "drawn_width": request.width,
        "drawn_height": request.height,
        "scaled": drawn != (attempt.parameters.width, attempt.parameters.height),
        "crop": framing.crop_of(request),
        "initial_image_box": initial_image_box(request, plan.candidates),
        "reference_call": models.image_model.reference_call(request),
        "text_parts": parts if (parts := models.image_model.text_parts(request)) > 1 else None,
        "warnings": [warning.model_dump(mode="json") for warning in warnings],
        "memory_savers": list(image.memory_savers),
        "references": [_used_reference(reference).model_dump(mode="json") for reference in plan.candidates],
        "concepts": [concept.model_dump(mode="json") for concept in plan.concepts],
        "embedding_space": models.space.digest,
        "model": {
            "name": models.name,
            "source_revision": models.settings.revision,
            "pipeline": capabilities.pipeline,
            "weights_digest": capabilities.weights_digest,
            "weights_digest_kind": capabilities.weights_digest_kind,
            "device": capabilities.device,
            "dtype": capabilities.dtype,
            # Unset like in the records of releases that had no such settings.
            "attention": models.settings.attention,
            "compile": None if models.settings.compile == "none" else models.settings.compile,
            "text_arguments": models.settings.text_arguments or None,
        },
        "versions": _versions(),
        **_safety(attempt, image),
    }


@cache
def _versions() -> dict[str, str]:
    # Cached: reading the versions from disk took 7 % of a worker's time per job outside of the model.
    return {library: version(library) for library in LIBRARIES}


def _safety(attempt: Attempt, image: GeneratedImage) -> dict[str, Any]:
    """Decisions of the content policy about the prompt and this image; an empty mapping without a policy."""
    if attempt.safety is None:
        return {}
    of_prompt = [decision for decision in attempt.safety.decisions if decision.stage is SafetyStage.PROMPT]
    record = SafetyRecord(policy=attempt.safety.policy, decisions=[*of_prompt, *image.decisions])
    return {"safety": record.model_dump(mode="json")}


def _used_reference(reference: retrieval.Candidate) -> UsedReference:
    image = reference.scored.image
    return UsedReference(
        kind=reference.kind,
        image_id=image.id,
        sha256=image.sha256,
        similarity=reference.scored.similarity,
        weight=reference.weight,
        pinned=reference.pinned,
        caption=image.caption,
        concepts=list(reference.concepts),
    )
