"""What an embed worker does: vectors for waiting images, and for queries whose asker waits."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from shared.db import images
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.db.tables import Image as ImageRow
from shared.errors import (
    BaseAppException,
    EmbeddingError,
    InvalidImageError,
    ModelError,
    ResourceNotFoundError,
    StorageError,
)
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.indexing.image_leases import ImageLeases
from worker_service.models.clip import Picture
from worker_service.models.embedder import IMAGE_LANE, Embedder

logger = logging.getLogger(__name__)

CHUNK = 32


class ImageEmbedding:
    """Embeds the images that wait in their table. One per process, for any number of threads."""

    def __init__(self, embedder: Embedder, leases: ImageLeases) -> None:
        self._embedder = embedder
        self._leases = leases
        self._rung = threading.Event()
        self._at_once = embedder.chunks_at_once
        self._hands = threading.BoundedSemaphore(self._at_once)
        self._entry = threading.Lock()
        self._places = threading.BoundedSemaphore(self._at_once)

    def ring(self, *, stopping: Callable[[], bool]) -> int:
        """Embed what waits; how many became searchable. Rings that come while all hands are full are one."""
        done = 0
        self._rung.set()
        # Asked again after each release: a ring that found no free hand just before it is not lost.
        while self._rung.is_set() and self._hands.acquire(blocking=False):
            self._rung.clear()
            try:
                done += self.drain(stopping=stopping)
            finally:
                self._hands.release()
        return done

    def drain(self, *, stopping: Callable[[], bool]) -> int:
        """Embed what waits, unless the process stops; how many became searchable.

        What comes while the last chunk is in work is rung for: taken at once, it would come one by one and share no
        batch.

        When the blob store fails it ends early: the image that could not be read waits for its lease, so that it holds
        up nobody for ever, and the others wait for the next ring.
        """
        done = 0
        while not stopping():
            with session_scope() as session:
                claimed = images.claim_pending(session, limit=CHUNK, lease_s=self._leases.lease_s)
            if not claimed:
                break
            with self._leases.holding([ImageClaim.of(row) for row in claimed]):
                files, unread = _read(claimed)
                if files:
                    done += self._embed_files(files, alone=claimed[0].crashes > 0)
                if unread is not None:
                    with session_scope() as session:
                        images.hand_back(session, unread)
                    break
            if len(claimed) < CHUNK and not claimed[0].crashes:
                break
        return done

    def _embed_files(self, files: Mapping[ImageClaim, bytes], *, alone: bool) -> int:
        with self._place(alone=alone):
            # Decoding is part of it: damaged bytes can end a process as well as a model can.
            with session_scope() as session:
                owned = images.model_started(session, files)
            pictures = self._decode({claim: data for claim, data in files.items() if claim.image_id in owned})
            return self._embed(pictures) if pictures else 0

    @contextmanager
    def _place(self, *, alone: bool) -> Iterator[None]:
        """Work beside another chunk; `alone`, for an image that may bring the process down, beside none.

        So whoever is lost with an image that kills its process three times was beside it only once.
        """
        places = self._at_once if alone else 1
        with self._entry:  # two that each held one place and wanted all would wait for ever
            for _ in range(places):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(places)

    def _decode(self, files: Mapping[ImageClaim, bytes]) -> dict[ImageClaim, Picture]:
        """One after the other: of an image with many pixels only what the model needs is kept."""
        pictures = {}
        for claim, data in files.items():
            try:
                pictures[claim] = self._embedder.prepare(open_image(data))
            except (InvalidImageError, EmbeddingError) as error:
                _failed(claim, error)
        return pictures

    def _embed(self, pictures: Mapping[ImageClaim, Picture]) -> int:
        claims = list(pictures)
        try:
            vectors = self._embedder.embed(list(pictures.values()), lane=IMAGE_LANE)
        except (EmbeddingError, ModelError) as error:
            if len(claims) == 1:
                _failed(claims[0], error)
                return 0
            # One of them is at fault: alone, each can only fail itself.
            return sum(self._embed({claim: pictures[claim]}) for claim in claims)
        norms = np.linalg.norm(vectors, axis=1)
        with session_scope() as session:
            stored = images.embedded(session, self._embedder.space, claims, vectors / norms[:, None], norms)
        logger.info("images_embedded", extra={"images": len(stored)})
        return len(stored)


def _read(rows: Sequence[ImageRow]) -> tuple[dict[ImageClaim, bytes], Sequence[ImageClaim] | None]:
    """The files by claim; and, when the store failed, the claims behind the one it failed at, else None."""
    files = {}
    for position, row in enumerate(rows):
        try:
            files[ImageClaim.of(row)] = get_blobs().get(row.blob_key)
        except ResourceNotFoundError as error:
            _failed(ImageClaim.of(row), error)
        except StorageError as error:
            logger.warning("image_unreadable", extra={"image_id": str(row.id), "cause": error.code}, exc_info=True)
            return files, [ImageClaim.of(later) for later in rows[position + 1 :]]
    return files, None


def _failed(claim: ImageClaim, error: BaseAppException) -> None:
    logger.warning("image_failed", extra={"image_id": str(claim.image_id), "cause": error.code})
    with session_scope() as session:
        images.embedding_failed(session, claim, code=error.code)
