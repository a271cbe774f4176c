"""Embeds the corpus images that wait for their vectors: claim a chunk, read the files, decode, embed, store.

Crash isolation: when a worker process crashes, each image that it was decoding or embedding can be the cause. From then
on such an image is claimed alone, and its process decodes and embeds no other corpus image at the same time.
"""

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
from worker_service.models.clip import ImageInput
from worker_service.models.embedder import Embedder

logger = logging.getLogger(__name__)

CHUNK_IMAGES = 32
"""Images that one thread claims and embeds at a time."""


class ImageEmbedding:
    """Embeds the images that wait in their table. One per process, for any number of threads.

    At most `embedder.chunks_at_once` threads work at a time, each on one chunk of images.
    """

    def __init__(self, embedder: Embedder, leases: ImageLeases) -> None:
        self._embedder = embedder
        self._leases = leases
        self._requested = threading.Event()
        self._slots = embedder.chunks_at_once
        self._free_threads = threading.BoundedSemaphore(self._slots)
        self._slot_lock = threading.Lock()
        self._free_slots = threading.BoundedSemaphore(self._slots)

    def embed_pending(self, *, stopping: Callable[[], bool]) -> int:
        """Embed all waiting images; how many became searchable. Thread-safe.

        When enough threads work already, the call returns at once, and one of those threads looks for images again.

        Raises:
            DatabaseError: see `embed_until_empty`.
        """
        done = 0
        self._requested.set()
        # Checked again after each release: a request that came just before it found no free thread and has returned.
        while self._requested.is_set() and self._free_threads.acquire(blocking=False):
            self._requested.clear()
            try:
                done += self.embed_until_empty(stopping=stopping)
            finally:
                self._free_threads.release()
        return done

    def embed_until_empty(self, *, stopping: Callable[[], bool]) -> int:
        """Embed chunk after chunk until no image waits or the process stops; how many images became searchable.

        stopping: whether the process stops. It is called before each chunk.

        An image that is uploaded during the last chunk waits for its own notification. Claimed at once, it would be
        embedded alone instead of in a batch.

        When the blob store fails, the call ends early, and the unread images are handed back. Only the image whose read
        failed keeps its lease until that expires, so that it does not block the others.

        Raises:
            DatabaseError: the database failed. See `ImageLeases.holding` for the claimed images.
        """
        done = 0
        while not stopping():
            with session_scope() as session:
                rows = images.claim_pending(
                    session, limit=CHUNK_IMAGES, lease_s=self._leases.lease_s, space=self._embedder.space
                )
            if not rows:
                break
            with self._leases.holding([ImageClaim.of(row) for row in rows]):
                files, unread = self._read(rows)
                if files:
                    done += self._embed_files(files, isolated=rows[0].crashes > 0)
                if unread is not None:
                    with session_scope() as session:
                        images.hand_back(session, unread)
                    break
            if len(rows) < CHUNK_IMAGES and not rows[0].crashes:
                break
        return done

    def _embed_files(self, files: Mapping[ImageClaim, bytes], *, isolated: bool) -> int:
        with self._take_slots(isolated=isolated):
            # Marked before decoding: damaged bytes can crash the process as well as a model can.
            with session_scope() as session:
                owned = images.mark_model_started(session, files)
            inputs = self._decode({claim: data for claim, data in files.items() if claim.image_id in owned})
            return self._embed(inputs) if inputs else 0

    @contextmanager
    def _take_slots(self, *, isolated: bool) -> Iterator[None]:
        """Take one slot, or all of them for an image that may crash the process.

        So other images share at most one crash with an image that always crashes its process.
        """
        slots = self._slots if isolated else 1
        with self._slot_lock:  # without it, two threads that each had one slot and needed all would deadlock
            for _ in range(slots):
                self._free_slots.acquire()
        try:
            yield
        finally:
            self._free_slots.release(slots)

    def _decode(self, files: Mapping[ImageClaim, bytes]) -> dict[ImageClaim, ImageInput]:
        """Decode one file after the other, and keep only the pixels that the model needs.

        An image that cannot be decoded is marked `failed`.
        """
        inputs = {}
        for claim, data in files.items():
            try:
                inputs[claim] = self._embedder.prepare(open_image(data))
            except (InvalidImageError, EmbeddingError) as error:
                self._mark_failed(claim, error)
        return inputs

    def _embed(self, inputs: Mapping[ImageClaim, ImageInput]) -> int:
        claims = list(inputs)
        try:
            vectors = self._embedder.embed_corpus_images(list(inputs.values()))
        except (EmbeddingError, ModelError) as error:
            if len(claims) == 1:
                self._mark_failed(claims[0], error)
                return 0
            # One image caused the error: embedded one by one, only that image fails.
            return sum(self._embed({claim: inputs[claim]}) for claim in claims)
        norms = np.linalg.norm(vectors, axis=1)
        with session_scope() as session:
            stored = images.store_embeddings(session, self._embedder.space, claims, vectors / norms[:, None], norms)
        logger.info("images_embedded", extra={"images": len(stored)})
        return len(stored)

    def _read(self, rows: Sequence[ImageRow]) -> tuple[dict[ImageClaim, bytes], Sequence[ImageClaim] | None]:
        """Read the files from the blob store, by claim.

        When the store fails, the second value holds the claims after the one whose read failed. Otherwise it is `None`.
        """
        files = {}
        for position, row in enumerate(rows):
            try:
                files[ImageClaim.of(row)] = get_blobs().get(row.blob_key)
            except ResourceNotFoundError as error:
                self._mark_failed(ImageClaim.of(row), error)
            except StorageError as error:
                logger.warning("image_unreadable", extra={"image_id": str(row.id), "cause": error.code}, exc_info=True)
                return files, [ImageClaim.of(later) for later in rows[position + 1 :]]
        return files, None

    def _mark_failed(self, claim: ImageClaim, error: BaseAppException) -> None:
        logger.warning("image_failed", extra={"image_id": str(claim.image_id), "cause": error.code})
        with session_scope() as session:
            images.mark_embedding_failed(session, self._embedder.space, claim, code=error.code)
