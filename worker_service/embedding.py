"""What an embed worker does: vectors for waiting images, and for queries whose asker waits."""

import logging
from collections.abc import Callable

import numpy as np

from shared.db import images
from shared.db.models import Image as ImageRow
from shared.db.session import session_scope
from shared.errors import BaseAppException, EmbeddingError, InvalidImageError, ResourceNotFoundError
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.models import Embedder

logger = logging.getLogger(__name__)

QUERY_LANE, IMAGE_LANE = 0, 1
CHUNK = 32
LEASE_S = 60.0


def embed_pending(embedder: Embedder, *, stopping: Callable[[], bool]) -> int:
    """Embed images that wait for a vector until none is left or the process stops; how many became searchable."""
    done = 0
    while not stopping():
        with session_scope() as session:
            claimed = images.claim_pending(session, limit=CHUNK, lease_s=LEASE_S)
        if not claimed:
            break
        done += _embed(embedder, claimed)
    return done


def _embed(embedder: Embedder, rows: list[ImageRow]) -> int:
    pictures = {}
    for row in rows:
        try:
            pictures[row.id] = open_image(get_blobs().get(row.blob_key))
        except (InvalidImageError, ResourceNotFoundError) as error:
            _failed(row, error)
    if not pictures:
        return 0
    try:
        vectors = embedder.embed(list(pictures.values()), lane=IMAGE_LANE)
    except EmbeddingError as error:
        if len(rows) == 1:
            _failed(rows[0], error)
            return 0
        # One of them is at fault: alone, each can only fail itself.
        return sum(_embed(embedder, [row]) for row in rows if row.id in pictures)
    norms = np.linalg.norm(vectors, axis=1)
    with session_scope() as session:
        images.embedded(session, embedder.space, list(pictures), vectors / norms[:, None], norms)
    logger.info("images_embedded", extra={"images": len(pictures)})
    return len(pictures)


def _failed(row: ImageRow, error: BaseAppException) -> None:
    logger.warning("image_failed", extra={"image_id": str(row.id), "cause": error.code})
    with session_scope() as session:
        images.embedding_failed(session, row.id, code=error.code)
