"""Pictures that the request of a job brought as references: reads and embeds them."""

import numpy as np

from shared.db import reference_images, withdrawals
from shared.db.images import ScoredImage
from shared.db.session import session_scope
from shared.db.tables import Image, ReferenceImage
from shared.errors import ReferenceDeletedError
from shared.vectors import l2_normalised
from worker_service.jobs import outputs
from worker_service.jobs.attempt import Attempt
from worker_service.models.worker_models import Models


def embed(attempt: Attempt, vector: np.ndarray, *, models: Models) -> list[ScoredImage]:
    """The pictures of the request, in order, with their vectors by this worker's CLIP.

    vector: CLIP's projection of the prompt, shape (dim,), float32.

    Raises:
        ReferenceDeletedError: the job's pictures are gone, or withdrawn.
        InvalidImageError: a stored picture is damaged.
        EmbeddingError: CLIP cannot take a picture.
        StorageError: the blob store failed.
    """
    described = attempt.parameters.reference_images
    if not described:
        return []
    with session_scope() as session:
        rows = reference_images.list_by_job(session, [attempt.job_id]).get(attempt.job_id, [])
        withdrawn = withdrawals.filter_withdrawn(session, [row.id for row in rows])
    if withdrawn or [row.sha256 for row in rows] != [each.sha256 for each in described]:
        raise ReferenceDeletedError(sha256=[each.sha256 for each in described])
    images = [_as_image(row, caption=each.caption) for row, each in zip(rows, described, strict=True)]
    projections = models.embedder.embed([models.embedder.prepare(outputs.picture_of(image)) for image in images])
    units, query = l2_normalised(projections), l2_normalised(vector)
    return [
        ScoredImage(image=image, similarity=float(unit @ query), vector=unit, norm=float(np.linalg.norm(projection)))
        for image, unit, projection in zip(images, units, projections, strict=True)
    ]


def _as_image(row: ReferenceImage, *, caption: str | None) -> Image:
    """The picture in the form of a corpus image. No session knows it, so it is never stored."""
    return Image(
        id=row.id,
        sha256=row.sha256,
        blob_key=row.blob_key,
        thumbnail_key=row.thumbnail_key,
        format=row.format,
        width=row.width,
        height=row.height,
        size_bytes=row.size_bytes,
        caption=caption,
    )
