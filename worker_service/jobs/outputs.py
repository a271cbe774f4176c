"""Around the model: references from the store to memory, pixels from memory to the store, and the record of it all."""

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any
from uuid import uuid4

import numpy as np
from PIL import Image

from shared import retrieval
from shared.contracts.generation import GenerationParameters, Mode
from shared.contracts.jobs import UsedReference
from shared.contracts.safety import SafetyRecord, SafetyStage
from shared.db.jobs import Output
from shared.db.spaces import Space
from shared.db.tables import Generation, GenerationReference
from shared.errors import InvalidImageError, ReferenceDeletedError, ResourceNotFoundError
from shared.imaging import encode_image, open_image, pixels_sha256, thumbnail
from shared.storage import get_blobs, output_key, output_thumbnail_key
from worker_service.jobs.attempt import Attempt
from worker_service.models.generate_batch import Drawn
from worker_service.models.interface import ImageRequest, Reference
from worker_service.models.loaded import Models

LIBRARIES = ("afterimage", "torch", "diffusers", "transformers", "open_clip_torch")


def resolution(mode: Mode, reason: str, references: Sequence[retrieval.Reference], *, space: Space) -> dict[str, Any]:
    """What will be drawn from and why, refused candidates included: shown with the job while it runs."""
    return {
        "mode": mode.value,
        "reason": reason,
        "embedding_space": space.digest,
        "references": [
            {**_used(reference).model_dump(mode="json"), "used": reference.used, "reason": reference.reason}
            for reference in references
        ],
    }


def load_references(references: Sequence[retrieval.Reference], *, with_pixels: bool) -> list[Reference]:
    """References as the model takes them, their images read from the store only where the mode needs pixels.

    Raises:
        ReferenceDeletedError: an image went away between retrieval and here.
        InvalidImageError: its stored bytes are damaged.
        StorageError
    """
    return [
        Reference(
            # The adapter was trained on projections as CLIP gives them: the unit vector times its norm.
            vector=reference.found.vector * reference.found.norm,
            image=_pixels(reference) if with_pixels else None,
            weight=reference.weight,
            caption=reference.found.image.caption,
        )
        for reference in references
    ]


def _pixels(reference: retrieval.Reference) -> Image.Image:
    try:
        return open_image(get_blobs().get(reference.found.image.blob_key))
    except ResourceNotFoundError as error:
        raise ReferenceDeletedError(image_ids=[str(reference.found.image.id)]) from error
    except InvalidImageError as error:
        message = "The stored image of a reference is damaged."
        raise InvalidImageError(message, image_ids=[str(reference.found.image.id)]) from error


def store(
    job: Attempt,
    mode: Mode,
    reason: str,
    references: Sequence[retrieval.Reference],
    requests: Sequence[ImageRequest],
    drawn: Sequence[Drawn | None],
    *,
    models: Models,
) -> list[Output]:
    """Scale, encode and store the images of a job; rows for them and their references, not yet written.

    drawn: one per request; None for one that is not to be stored.

    Raises:
        StorageError, InvalidOutputError
    """
    drawn_from = references if mode is not Mode.NONE else []
    return [
        _store_one(
            job,
            index,
            image.pixels,
            record(job, index, mode, reason, drawn_from, request, image, models=models),
            drawn_from,
        )
        for index, (request, image) in enumerate(zip(requests, drawn, strict=True))
        if image is not None
    ]


def _store_one(
    job: Attempt,
    index: int,
    drawn: np.ndarray,
    provenance: dict[str, Any],
    references: Sequence[retrieval.Reference],
) -> Output:
    parameters = job.parameters
    image = _scaled(drawn, parameters)
    data = encode_image(image, image_format=parameters.format, quality=parameters.quality, record=provenance)
    key = output_key(job.id, attempt=job.number, index=index, image_format=parameters.format)
    thumbnail_key = output_thumbnail_key(job.id, attempt=job.number, index=index)
    blobs = get_blobs()
    blobs.put(key, data, media_type=parameters.format.media_type)
    blobs.put(thumbnail_key, thumbnail(image), media_type="image/webp")
    generation = Generation(
        id=uuid4(),
        job_id=job.id,
        owner_id=job.owner_id,
        index=index,
        seed=parameters.seeds[index],
        format=parameters.format,
        blob_key=key,
        thumbnail_key=thumbnail_key,
        width=image.shape[1],
        height=image.shape[0],
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels_sha256(image),
        provenance=provenance,
    )
    rows = [
        GenerationReference(generation_id=generation.id, position=position, **_used(reference).model_dump())
        for position, reference in enumerate(references)
    ]
    return Output(generation=generation, references=rows)


def _scaled(drawn: np.ndarray, parameters: GenerationParameters) -> np.ndarray:
    if drawn.shape[:2] == (parameters.height, parameters.width):
        return drawn
    size = (parameters.width, parameters.height)
    return np.asarray(Image.fromarray(drawn).resize(size, Image.Resampling.LANCZOS))


def record(
    job: Attempt,
    index: int,
    mode: Mode,
    reason: str,
    references: Sequence[retrieval.Reference],
    request: ImageRequest,
    image: Drawn,
    *,
    models: Models,
) -> dict[str, Any]:
    """Everything that decided the pixels of one image, as JSON: enough to explain it, to audit it, to draw it again."""
    capabilities = models.capabilities
    scaled = (request.width, request.height) != (job.parameters.width, job.parameters.height)
    return {
        "job_id": str(job.id),
        "index": index,
        "seed": request.seed,
        "parameters": job.parameters.model_dump(mode="json", exclude={"seeds", "preview_every"}),
        "mode": mode.value,
        "mode_reason": reason,
        "drawn_width": request.width,
        "drawn_height": request.height,
        "scaled": scaled,
        "memory_savers": list(image.memory_savers),
        "references": [_used(reference).model_dump(mode="json") for reference in references],
        "embedding_space": models.space.digest,
        "model": {
            "name": models.name,
            "source_revision": models.settings.revision,
            "pipeline": capabilities.pipeline,
            "weights_digest": capabilities.weights_digest,
            "device": capabilities.device,
            "dtype": capabilities.dtype,
        },
        "versions": _versions(),
        **_safety(job, image),
    }


@cache
def _versions() -> dict[str, str]:
    # Kept: reading them from the disk took 7 % of what a job costs a worker beside the model.
    return {library: version(library) for library in LIBRARIES}


def _safety(job: Attempt, image: Drawn) -> dict[str, Any]:
    """What a content policy decided about the prompt and about this image; nothing where there is none."""
    if job.safety is None:
        return {}
    of_prompt = [decision for decision in job.safety.decisions if decision.stage is SafetyStage.PROMPT]
    record = SafetyRecord(policy=job.safety.policy, decisions=[*of_prompt, *image.decisions])
    return {"safety": record.model_dump(mode="json")}


def _used(reference: retrieval.Reference) -> UsedReference:
    image = reference.found.image
    return UsedReference(
        image_id=image.id,
        sha256=image.sha256,
        similarity=reference.found.similarity,
        weight=reference.weight,
        pinned=reference.pinned,
        caption=image.caption,
    )
