"""Rows for tests, with defaults for every column that a test does not set."""

import hashlib
from itertools import count
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import ArrayLike
from sqlalchemy.orm import Session

from shared.contracts.generation import GenerationParameters, Mode, Webhook
from shared.contracts.jobs import JobKind, JobState, Lane
from shared.contracts.search import ImageFilter
from shared.db import images, jobs, owners, spaces
from shared.db.images import ImageClaim
from shared.db.spaces import Space
from shared.db.tables import Image, Job, Output
from tests import one_attempt

SHARED_COLLECTION = UUID("00000000-0000-4000-8000-000000000002")
DIM = 16

_numbers = count(1)


def make_parameters(**changes: Any) -> GenerationParameters:
    return GenerationParameters(
        **{
            "prompt": "a red apple",
            "negative_prompt": None,
            "model": "cheap",
            "seeds": [1],
            "width": 32,
            "height": 32,
            "num_inference_steps": 4,
            "guidance_scale": 3.0,
            "scheduler": None,
            "loras": {},
            "format": "png",
            "quality": 90,
            "mode": Mode.AUTO,
            "ip_adapter_scale": 1.0,
            "strength": 0.6,
            "k": 4,
            "min_similarity": -1.0,
            "filter": ImageFilter(),
            "references": [],
            **changes,
        }
    )


def make_job(
    session: Session,
    *,
    state: JobState = JobState.QUEUED,
    owner: str = "local",
    lane: Lane = Lane.NORMAL,
    timeout_s: float = 60,
    expires_in_s: float | None = None,
    webhook: Webhook | None = None,
    **parameters: Any,
) -> Job:
    """A job in `state`, brought there by the product's own functions. The caller commits.

    Raises:
        ValueError: no function of this module leads to `state`.
    """
    job = jobs.insert(
        session,
        owner_id=owners.ensure(session, owner),
        kind=JobKind.RAG_GENERATE,
        lane=lane,
        parameters=make_parameters(**parameters),
        metadata={},
        timeout_s=timeout_s,
        expires_in_s=expires_in_s,
        webhook=webhook,
    )
    if state is JobState.QUEUED:
        return job
    taken = one_attempt.claim(session, job.id, worker="factory", lease_s=30)
    assert taken is not None
    if state is JobState.SUCCEEDED:
        assert one_attempt.finish(session, taken[0], [], timings={})
    elif state is JobState.CANCELED:
        assert jobs.cancel(session, job.id, owner_id=job.owner_id)
    elif state is not JobState.PROCESSING:
        raise ValueError(f"make_job cannot bring a job into the state {state}")
    session.refresh(job)
    return job


def make_output_row(job_id: UUID, owner_id: UUID, **columns: Any) -> Output:
    """An output without blobs, in no session. Its id is new."""
    return Output(
        **{
            "id": uuid4(),
            "job_id": job_id,
            "owner_id": owner_id,
            "index": 0,
            "seed": 1,
            "format": "png",
            "blob_key": f"outputs/{job_id}/1/0.png",
            "thumbnail_key": f"outputs/{job_id}/1/0.webp",
            "width": 32,
            "height": 32,
            "size_bytes": 10,
            "sha256": "0" * 64,
            "pixels_sha256": "0" * 64,
            "provenance": {},
            **columns,
        }
    )


def make_space(session: Session, *, dim: int = DIM) -> Space:
    return spaces.ensure(session, digest=hashlib.sha256(b"space %d" % dim).hexdigest(), model="test", dim=dim)


def make_image(
    session: Session,
    *,
    vector: ArrayLike | None = None,
    space: Space | None = None,
    collection_id: UUID = SHARED_COLLECTION,
    **columns: Any,
) -> Image:
    """An image row without a blob. A `vector` (shape (space.dim,), any length) makes it searchable in `space`."""
    number = next(_numbers)
    digest = hashlib.sha256(b"image %d" % number).hexdigest()
    image, _ = images.add(
        session,
        collection_id,
        **{
            "sha256": digest,
            "blob_key": f"images/{digest}.png",
            "thumbnail_key": f"thumbnails/{digest}.webp",
            "format": "png",
            "width": 64,
            "height": 64,
            "size_bytes": 1000,
            "perceptual_hash": int.from_bytes(bytes.fromhex(digest[:16]), signed=True),
            "caption": f"image {number}",
            "tags": [],
            "attributes": {},
            **columns,
        },
    )
    if vector is not None:
        projection = np.asarray(vector, np.float32)
        norm = np.linalg.norm(projection)
        images.store_embeddings(
            session,
            space or make_space(session),
            [ImageClaim.of(image)],
            (projection / norm)[None],
            np.array([norm], np.float32),
        )
        session.refresh(image)
    return image
