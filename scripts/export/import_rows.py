"""Add rows of an image file to a collection."""

import json
from collections import Counter
from typing import Any
from uuid import UUID, uuid4

import numpy as np
from sqlalchemy import null, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from scripts.export.image_file import Header, ImageFileError, Row
from scripts.export.rows import COPIED_COLUMNS
from shared.contracts.common import ImageFormat
from shared.contracts.images import ImageDescription, ImageState
from shared.db import blobs, images, spaces, withdrawals
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Image
from shared.storage import get_blobs, image_key, thumbnail_key


def space_for_import(session: Session, header: Header) -> Space | None:
    """Return the active space if the file's vectors belong to it, else None.

    In an installation without a space, the file's space becomes the active one.
    """
    active = spaces.find_active(session)
    if header.space is None or (active is not None and active.digest != header.space):
        return None
    assert header.model is not None
    assert header.dim is not None
    return spaces.ensure(session, digest=header.space, model=header.model, dim=header.dim)


def import_rows(rows: list[Row], collection_id: UUID, space: Space | None) -> Counter[str]:
    """Import one group of rows, all or none; return the counts `new`, `existing`, `withdrawn` and `to_embed`.

    Raises:
        ImageFileError: a digest is not valid, or the sweeper deleted the new blobs before their rows were written.
    """
    with session_scope() as session:
        digests = [row["sha256"] for row in rows]
        there = select(Image.sha256).where(Image.collection_id == collection_id, Image.sha256.in_(digests))
        known = set(session.scalars(there))
        ids = {UUID(row["id"]) for row in rows}
        taken = set(session.scalars(select(Image.id).where(Image.id.in_(ids))))
        # A withdrawal cannot be undone, not even by a file that was exported before it.
        withdrawn = withdrawals.filter_withdrawn(session, ids) | withdrawals.find(session, ids).keys()
        wanted = [row for row in rows if UUID(row["id"]) not in withdrawn]
        new = [_ImportedImage(row, taken) for row in wanted if row["sha256"] not in known]
        # Store bytes before rows, and claim them first, so that the sweeper does not delete them in between.
        claim_id = blobs.claim(session, [key for each in new for key in (each.blob_key, each.thumbnail_key)])
    for image in new:
        image.store_bytes()
    counts = Counter(existing=len(wanted) - len(new), withdrawn=len(rows) - len(wanted))
    with session_scope() as session:
        if not blobs.end_claim(session, claim_id):
            raise ImageFileError("the sweeper deleted the blobs before their rows were written: start again")
        withdrawals.delay_withdrawals(session)
        since = withdrawals.filter_withdrawn(session, ids) | withdrawals.find(session, ids).keys()
        for each in new:
            if UUID(each.row["id"]) in since:
                counts["withdrawn"] += 1
                continue
            embedded = space is not None and each.row["embedding"] is not None
            statement = upsert(Image).values(
                collection_id=collection_id,
                state=ImageState.READY if embedded else ImageState.PENDING,
                **each.columns(),
            )
            added = session.scalar(
                statement.on_conflict_do_nothing(index_elements=["collection_id", "sha256"]).returning(Image.id)
            )
            if added is None:
                counts["existing"] += 1
                continue
            counts["new"] += 1
            counts["to_embed"] += not embedded
            if embedded:
                assert space is not None
                vector = np.asarray(each.row["embedding"], np.float32)
                values = {"image_id": added, "embedding": vector.tolist(), "norm": each.row["norm"]}
                session.execute(upsert(space.table).values(values))
        images.bump_collection_version(session, collection_id)
    return counts


class _ImportedImage:
    """A row of the file as an image of this installation."""

    def __init__(self, row: Row, taken: set[UUID]) -> None:
        self.row = row
        self.format = ImageFormat(row["format"])
        if len(row["sha256"]) != 64 or not set(row["sha256"]) <= set("0123456789abcdef"):
            raise ImageFileError(f"{row['sha256']!r} is not a sha256 digest")
        self.blob_key = image_key(row["sha256"], self.format, row["image"])
        self.thumbnail_key = thumbnail_key(row["sha256"], row["thumbnail"])
        # Provenance records name images by id, so the id is kept unless another image here has it.
        self._id = uuid4() if UUID(row["id"]) in taken else UUID(row["id"])

    def store_bytes(self) -> None:
        get_blobs().put(self.blob_key, self.row["image"], media_type=self.format.media_type)
        get_blobs().put(self.thumbnail_key, self.row["thumbnail"], media_type=ImageFormat.WEBP.media_type)

    def columns(self) -> dict[str, Any]:
        described = ImageDescription.model_validate(
            {
                **{name: self.row[name] for name in ("caption", "tags", "source", "licence")},
                "attributes": json.loads(self.row["attributes"]),
            }
        )
        of_file: Any = null()
        if self.row.get("file_description") is not None:  # files of earlier releases have no such column
            of_file = ImageDescription.model_validate_json(self.row["file_description"]).model_dump()
        return {
            **{name: self.row[name] for name in COPIED_COLUMNS},
            **described.model_dump(),
            "file_description": of_file,
            "id": self._id,
            "format": self.format.value,
            "blob_key": self.blob_key,
            "thumbnail_key": self.thumbnail_key,
            "size_bytes": len(self.row["image"]),
        }
