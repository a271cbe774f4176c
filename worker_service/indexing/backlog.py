"""Embeds the corpus images that an inactive embedding space lacks, while another space serves.

The images stay `ready` in the active space meanwhile. Several workers may share the work, and a worker that dies loses
nothing: see `shared.db.space_backlog`.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

import numpy as np

from shared.db import space_backlog
from shared.db.session import session_scope
from shared.db.tables import Image
from shared.errors import (
    BaseAppException,
    DatabaseError,
    EmbeddingError,
    InvalidImageError,
    ModelError,
    ResourceNotFoundError,
    StorageError,
)
from shared.imaging import open_image
from shared.settings import JobSettings
from shared.storage import get_blobs
from worker_service.execution.lease_keeper import LeaseKeeper
from worker_service.execution.steps import CallStopped
from worker_service.models.clip import ImageInput
from worker_service.models.embedder import Embedder

logger = logging.getLogger(__name__)

CHUNK_IMAGES = 32
CHECK_S = 1.0
IDLE_S = 5.0
"""Seconds between two looks for images when none is left, or when the database or the blob store has failed."""
IDLE_RATIO = 10
"""A look reads all images of the corpus. The wait after one that found none is at least so many times as long."""


class Backlog(LeaseKeeper[UUID]):
    """Embeds the images that the embedder's space lacks, and renews their leases meanwhile."""

    def __init__(self, embedder: Embedder, settings: JobSettings) -> None:
        super().__init__(poll_s=settings.heartbeat_s)
        self._embedder = embedder
        self._space = embedder.space
        self._settings = settings

    @contextmanager
    def embedding(self, inactive: threading.Event, *, stopping: threading.Event) -> Iterator[None]:
        """Embed in a thread for the length of the block, while `inactive` is set. Close the embedder inside it."""

        def embed_until_stopped() -> None:
            while not stopping.is_set():
                if not inactive.wait(CHECK_S):
                    continue
                started = time.monotonic()
                if not self._try_chunk():
                    stopping.wait(max(IDLE_S, IDLE_RATIO * (time.monotonic() - started)))

        thread = threading.Thread(target=embed_until_stopped, name="backlog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopping.set()
            thread.join(IDLE_S)

    def _try_chunk(self) -> bool:
        try:
            return self.embed_chunk()
        except CallStopped:
            return False
        except (DatabaseError, StorageError) as error:
            logger.warning("backlog_waits", extra={"cause": error.code})
            return False
        except Exception:  # if the thread ended, the process would look healthy and embed nothing
            logger.exception("backlog_failed")
            return False

    def embed_chunk(self) -> bool:
        """Claim and embed up to `CHUNK_IMAGES` images; return False if no image was claimed.

        Raises:
            DatabaseError, StorageError: the database or the blob store failed. The images are handed back.
            CallStopped: the embedder was closed. The images are handed back.
        """
        with session_scope() as session:
            rows = space_backlog.claim(
                session,
                self._space,
                limit=CHUNK_IMAGES,
                lease_s=self._settings.lease_s,
                max_crashes=self._settings.max_crashes,
            )
        ids = [row.id for row in rows]
        self._add(ids)
        try:
            inputs, unread = self._prepare(rows)
            self._embed(inputs)
            if unread is not None:
                raise unread
        except (DatabaseError, StorageError, CallStopped):
            with session_scope() as session:
                space_backlog.hand_back(session, self._space, ids)
            raise
        finally:
            self._remove(ids)
        return bool(ids)

    def _renew_due(self, held: Sequence[UUID]) -> None:
        if held:
            with session_scope() as session:
                space_backlog.renew(session, self._space, held, lease_s=self._settings.lease_s)

    def _prepare(self, rows: Sequence[Image]) -> tuple[dict[UUID, ImageInput], StorageError | None]:
        """The images that could be read, and the error of one that could not: it must not delay the others."""
        inputs: dict[UUID, ImageInput] = {}
        unread: StorageError | None = None
        for row in rows:
            try:
                inputs[row.id] = self._embedder.prepare(open_image(get_blobs().get(row.blob_key)))
            except (ResourceNotFoundError, InvalidImageError, EmbeddingError) as error:
                self._mark_failed(row.id, error)
            except StorageError as error:
                unread = error
        return inputs, unread

    def _embed(self, inputs: Mapping[UUID, ImageInput]) -> None:
        if not inputs:
            return
        try:
            vectors = self._embedder.embed_corpus_images(list(inputs.values()))
        except (EmbeddingError, ModelError) as error:
            if len(inputs) == 1:
                self._mark_failed(next(iter(inputs)), error)
                return
            for image_id, prepared in inputs.items():  # one image caused the error, so only that image fails
                self._embed({image_id: prepared})
            return
        norms = np.linalg.norm(vectors, axis=1)
        with session_scope() as session:
            added = space_backlog.store(session, self._space, list(inputs), vectors / norms[:, None], norms)
        with session_scope() as session:
            space_backlog.count_added(session, self._space, added)
        logger.info("backlog_embedded", extra={"images": len(inputs)})

    def _mark_failed(self, image_id: UUID, error: BaseAppException) -> None:
        """Leave an image out of this space. It stays searchable in the active one."""
        logger.warning("image_failed", extra={"image_id": str(image_id), "cause": error.code})
        with session_scope() as session:
            space_backlog.mark_failed(session, self._space, image_id, code=error.code)
