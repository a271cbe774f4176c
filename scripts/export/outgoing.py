"""Rows for a file: the images of a collection, and what jobs have generated with the record of it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import numpy as np
from sqlalchemy import ColumnElement, and_, func, select, tuple_
from sqlalchemy.orm import Session

from scripts.export.image_file import Row
from shared.db import images, outputs
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import BulkItem, Generation, GenerationReference, Image, Job, Owner
from shared.errors import EmbeddingError, EmbeddingUnavailableError
from shared.imaging import open_image, perceptual_hash
from shared.messaging import embedding_rpc

PAGE = 64
TRIES = 5
"""Before a worker that does not answer ends an export: it may be starting again."""
GENERATED = "generated"
"""The tag of outputs that are taken for images of a corpus."""

COPIED = (
    *("sha256", "format", "width", "height", "perceptual_hash"),
    *("caption", "tags", "source", "licence", "filename", "created_at"),
)


@dataclass(frozen=True)
class Chosen:
    """Which outputs: of an owner, or of all; made at or after, and before, a moment."""

    owner_id: UUID | None = None
    after: datetime | None = None
    before: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        wanted = []
        if self.owner_id is not None:
            wanted.append(Generation.owner_id == self.owner_id)
        if self.after is not None:
            wanted.append(Generation.created_at >= self.after)
        if self.before is not None:
            wanted.append(Generation.created_at < self.before)
        return wanted


def count_images(session: Session, collection_id: UUID) -> int:
    return session.scalar(select(func.count()).where(Image.collection_id == collection_id)) or 0


def count_outputs(session: Session, chosen: Chosen) -> int:
    return session.scalar(select(func.count(Generation.id)).where(*chosen.conditions())) or 0


def corpus(collection_id: UUID, space: Space | None) -> Iterator[Row]:
    """Every image, oldest first, a page at a time; what is added meanwhile comes too. Bytes are named by their keys."""
    last: tuple[Any, UUID] | None = None
    while True:
        with session_scope() as session:
            statement = select(Image).where(Image.collection_id == collection_id)
            if last is not None:
                statement = statement.where(tuple_(Image.created_at, Image.id) > last)
            page = session.scalars(statement.order_by(Image.created_at, Image.id).limit(PAGE)).all()
            vectors = {} if space is None else _vectors(session, space, [image.id for image in page])
        if not page:
            return
        last = (page[-1].created_at, page[-1].id)
        for image in page:
            embedding, norm = vectors.get(image.id, (None, None))
            yield {
                **{name: getattr(image, name) for name in COPIED},
                "id": str(image.id),
                "attributes": _json(image.attributes),
                "blob_key": image.blob_key,
                "thumbnail_key": image.thumbnail_key,
                "embedding": embedding,
                "norm": norm,
            }


def _vectors(session: Session, space: Space, image_ids: Sequence[UUID]) -> dict[UUID, tuple[list[float], float]]:
    found = images.pinned(session, space, image_ids, None)
    return {image_id: (each.vector.tolist(), each.norm) for image_id, each in found.items()}


def generated(chosen: Chosen) -> Iterator[Row]:
    """Every output, oldest first, a page at a time. Bytes are named by their keys; see `with_hash`, `with_vector`."""
    last: tuple[Any, UUID] | None = None
    of_item = and_(BulkItem.bulk_id == Job.bulk_id, BulkItem.line == Job.bulk_line)
    while True:
        with session_scope() as session:
            statement = (
                select(Generation, Job, Owner.name, BulkItem.custom_id)
                .join(Job, Job.id == Generation.job_id)
                .join(Owner, Owner.id == Generation.owner_id)
                .outerjoin(BulkItem, of_item)
                .where(*chosen.conditions())
            )
            if last is not None:
                statement = statement.where(tuple_(Generation.created_at, Generation.id) > last)
            statement = statement.order_by(Generation.created_at, Generation.id).limit(PAGE)
            page = session.execute(statement).all()
            used = outputs.references_of(session, [output.id for output, *_ in page])
        if not page:
            return
        last = (page[-1][0].created_at, page[-1][0].id)
        for output, job, owner, custom_id in page:
            yield _as_image(output, job) | _as_output(output, job, owner, custom_id, used.get(output.id, []))


def _as_image(output: Generation, job: Job) -> Row:
    """What the output is as an image of a corpus."""
    record = output.provenance
    said = {"job_id": str(job.id), "seed": str(output.seed), "model": job.model}
    return {
        **{name: getattr(output, name) for name in ("sha256", "format", "width", "height", "created_at")},
        "id": str(output.id),
        "caption": record["parameters"]["prompt"],
        "tags": [GENERATED],
        "source": None,
        "licence": None,
        "attributes": _json(said),
        "filename": f"{output.id}.{output.format}",
        "blob_key": output.blob_key,
        "thumbnail_key": output.thumbnail_key,
        "embedding": None,
        "norm": None,
    }


def _as_output(
    output: Generation, job: Job, owner: str, custom_id: str | None, references: Sequence[GenerationReference]
) -> Row:
    record = output.provenance
    return {
        "owner": owner,
        "job_id": str(job.id),
        "index": output.index,
        "kind": job.kind,
        "retry_of": None if job.retry_of is None else str(job.retry_of),
        "bulk_id": None if job.bulk_id is None else str(job.bulk_id),
        "custom_id": custom_id,
        "metadata": _json(job.job_metadata),
        "prompt": record["parameters"]["prompt"],
        "seed": output.seed,
        "mode": record["mode"],
        "parameters": _json(record["parameters"]),
        "model": record["model"]["name"],
        "model_revision": record["model"]["source_revision"],
        "model_digest": record["model"]["weights_digest"],
        "references": [
            {
                "image_id": str(each.image_id),
                **{name: getattr(each, name) for name in ("sha256", "similarity", "weight", "pinned", "caption")},
            }
            for each in references
        ],
        "versions": _json(record["versions"]),
        "provenance": _json(record),
        "pixels_sha256": output.pixels_sha256,
    }


def with_hash(row: Row) -> Row:
    """The row with the perceptual hash that an upload of its bytes would get.

    Raises:
        InvalidImageError: the stored bytes are damaged.
    """
    return row | {"perceptual_hash": perceptual_hash(open_image(row["image"]))}


def with_vector(row: Row, space: Space) -> Row:
    """The row with the vector that an embed worker gives its bytes; without one where it cannot.

    One image at a time: who searches meanwhile waits for one at most.

    Raises:
        EmbeddingUnavailableError: no worker answers.
    """
    for attempt in range(TRIES):
        try:
            answer = embedding_rpc.embed_image(row["image"])
            break
        except EmbeddingUnavailableError:
            if attempt == TRIES - 1:
                raise
        except EmbeddingError:
            return row
    if answer.space != space.digest:
        return row  # of another model than the one that searches use
    vector = answer.vectors[0]
    norm = float(np.linalg.norm(vector))
    return row | {"embedding": (vector / norm).astype(np.float16).astype(np.float32).tolist(), "norm": norm}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
