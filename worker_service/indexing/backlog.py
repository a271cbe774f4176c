"""Embeds the corpus images that an inactive embedding space lacks, before an operator activates that space.

The images stay `ready` in the active space meanwhile. Several workers may share the work: each begins at a random id,
and a vector that another worker has stored first stays.
"""

import logging
from collections.abc import Mapping, Sequence
from uuid import UUID, uuid4

import numpy as np

from shared.db import images
from shared.db.session import session_scope
from shared.db.tables import Image
from shared.errors import BaseAppException, DatabaseError, EmbeddingError, ModelError
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.models.clip import ImageInput
from worker_service.models.embedder import Embedder

logger = logging.getLogger(__name__)

CHUNK_IMAGES = 32
FIRST_ID = UUID(int=0)


class Backlog:
    """The images that the embedder's space lacks."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._failed: set[UUID] = set()

    def embed_chunk(self) -> bool:
        """Embed up to `CHUNK_IMAGES` images; return False if no image is left that this process has not tried.

        Errors are logged, not raised.
        """
        try:
            rows = self._list_images()
            self._embed(self._prepare(rows))
        except DatabaseError as error:
            logger.warning("backlog_waits", extra={"cause": error.code})
            return False
        return bool(rows)

    def _list_images(self) -> list[Image]:
        space, limit = self._embedder.space, CHUNK_IMAGES + len(self._failed)
        with session_scope() as session:
            for after in (uuid4(), FIRST_ID):
                rows = images.list_without_vector(session, space, after=after, limit=limit)
                if untried := [row for row in rows if row.id not in self._failed]:
                    return untried[:CHUNK_IMAGES]
        return []

    def _prepare(self, rows: Sequence[Image]) -> dict[UUID, ImageInput]:
        inputs = {}
        for row in rows:
            try:
                inputs[row.id] = self._embedder.prepare(open_image(get_blobs().get(row.blob_key)))
            except BaseAppException as error:
                self._skip(row.id, error)
        return inputs

    def _embed(self, inputs: Mapping[UUID, ImageInput]) -> None:
        if not inputs:
            return
        try:
            vectors = self._embedder.embed_corpus_images(list(inputs.values()))
        except (EmbeddingError, ModelError) as error:
            if len(inputs) == 1:
                self._skip(next(iter(inputs)), error)
                return
            for image_id, prepared in inputs.items():  # one image caused the error, so only that image is skipped
                self._embed({image_id: prepared})
            return
        norms = np.linalg.norm(vectors, axis=1)
        with session_scope() as session:
            images.add_vectors(session, self._embedder.space, list(inputs), vectors / norms[:, None], norms)

    def _skip(self, image_id: UUID, error: BaseAppException) -> None:
        """Leave an image out until the next start. It stays searchable in the active space."""
        self._failed.add(image_id)
        logger.warning("image_failed", extra={"image_id": str(image_id), "cause": error.code})
