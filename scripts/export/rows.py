"""Read the images of a collection, or outputs with their records, as rows of an image file."""

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
from shared.db import images, outputs, withdrawals
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import BulkItem, Image, Job, Output, OutputReference, Owner
from shared.errors import EmbeddingError, EmbeddingUnavailableError
from shared.imaging import open_image, perceptual_hash
from shared.messaging import embedding_rpc

PAGE_SIZE = 64
EMBED_TRIES = 5
"""Tries before an export fails without an embed worker, because the worker may be restarting."""
GENERATED_TAG = "generated"
"""Tag of outputs that are exported as images of a corpus."""

COPIED_COLUMNS = (
    *("sha256", "format", "width", "height", "perceptual_hash"),
    *("caption", "tags", "source", "licence", "filename", "created_at"),
)


@dataclass(frozen=True)
class OutputSelection:
    """Select outputs by owner (None: all owners) and creation time: `after` <= time < `before`.

    Withdrawn outputs are never selected.
    """

    owner_id: UUID | None = None
    after: datetime | None = None
    before: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        conditions = [~withdrawals.is_withdrawn(Output.id)]
        if self.owner_id is not None:
            conditions.append(Output.owner_id == self.owner_id)
        if self.after is not None:
            conditions.append(Output.created_at >= self.after)
        if self.before is not None:
            conditions.append(Output.created_at < self.before)
        return conditions


def count_images(session: Session, collection_id: UUID) -> int:
    return session.scalar(select(func.count()).where(Image.collection_id == collection_id)) or 0


def count_outputs(session: Session, selection: OutputSelection) -> int:
    return session.scalar(select(func.count(Output.id)).where(*selection.conditions())) or 0


def corpus_rows(collection_id: UUID, space: Space | None) -> Iterator[Row]:
    """Yield every image, oldest first, including images that are added during the export.

    A row has the blob keys instead of the bytes.
    """
    last: tuple[Any, UUID] | None = None
    while True:
        with session_scope() as session:
            statement = select(Image).where(Image.collection_id == collection_id)
            if last is not None:
                statement = statement.where(tuple_(Image.created_at, Image.id) > last)
            page = session.scalars(statement.order_by(Image.created_at, Image.id).limit(PAGE_SIZE)).all()
            vectors = {} if space is None else _vectors_by_image(session, space, [image.id for image in page])
        if not page:
            return
        last = (page[-1].created_at, page[-1].id)
        for image in page:
            embedding, norm = vectors.get(image.id, (None, None))
            yield {
                **{name: getattr(image, name) for name in COPIED_COLUMNS},
                "id": str(image.id),
                "attributes": _json(image.attributes),
                "file_description": None if image.file_description is None else _json(image.file_description),
                "blob_key": image.blob_key,
                "thumbnail_key": image.thumbnail_key,
                "embedding": embedding,
                "norm": norm,
            }


def _vectors_by_image(
    session: Session, space: Space, image_ids: Sequence[UUID]
) -> dict[UUID, tuple[list[float], float]]:
    found = images.find_by_ids(session, space, image_ids, None)
    return {image_id: (each.vector.tolist(), each.norm) for image_id, each in found.items()}


def output_rows(selection: OutputSelection) -> Iterator[Row]:
    """Yield every selected output, oldest first.

    A row has the blob keys instead of the bytes; `with_hash` and `with_vector` complete it.
    """
    last: tuple[Any, UUID] | None = None
    of_item = and_(BulkItem.bulk_id == Job.bulk_id, BulkItem.line == Job.bulk_line)
    while True:
        with session_scope() as session:
            statement = (
                select(Output, Job, Owner.name, BulkItem.custom_id)
                .join(Job, Job.id == Output.job_id)
                .join(Owner, Owner.id == Output.owner_id)
                .outerjoin(BulkItem, of_item)
                .where(*selection.conditions())
            )
            if last is not None:
                statement = statement.where(tuple_(Output.created_at, Output.id) > last)
            statement = statement.order_by(Output.created_at, Output.id).limit(PAGE_SIZE)
            page = session.execute(statement).all()
            used = outputs.list_references(session, [output.id for output, *_ in page])
        if not page:
            return
        last = (page[-1][0].created_at, page[-1][0].id)
        for output, job, owner, custom_id in page:
            yield _image_columns(output, job) | _output_columns(output, job, owner, custom_id, used.get(output.id, []))


def _image_columns(output: Output, job: Job) -> Row:
    """Return the columns of the output as an image of a corpus."""
    record = output.provenance
    attributes = {"job_id": str(job.id), "seed": str(output.seed), "model": job.model}
    return {
        **{name: getattr(output, name) for name in ("sha256", "format", "width", "height", "created_at")},
        "id": str(output.id),
        "caption": record["parameters"]["prompt"],
        "tags": [GENERATED_TAG],
        "source": None,
        "licence": None,
        "attributes": _json(attributes),
        "file_description": None,
        "filename": f"{output.id}.{output.format}",
        "blob_key": output.blob_key,
        "thumbnail_key": output.thumbnail_key,
        "embedding": None,
        "norm": None,
    }


def _output_columns(
    output: Output, job: Job, owner: str, custom_id: str | None, references: Sequence[OutputReference]
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
    """Add the perceptual hash that an upload of the bytes would get.

    Raises:
        InvalidImageError: the stored bytes are damaged.
    """
    return row | {"perceptual_hash": perceptual_hash(open_image(row["image"]))}


def with_vector(row: Row, space: Space) -> Row:
    """Add the vector that an embed worker computes for the bytes; leave it None if the worker cannot.

    Images are embedded one at a time, so that a search waits for at most one of them.

    Raises:
        EmbeddingUnavailableError: no worker answered in `EMBED_TRIES` tries.
    """
    for attempt in range(EMBED_TRIES):
        try:
            vector = embedding_rpc.embed_image(row["image"], space)
            break
        except EmbeddingUnavailableError:
            if attempt == EMBED_TRIES - 1:
                raise
        except EmbeddingError:
            return row
    norm = float(np.linalg.norm(vector))
    return row | {"embedding": (vector / norm).astype(np.float16).astype(np.float32).tolist(), "norm": norm}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)
