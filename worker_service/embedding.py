"""What an embed worker does: vectors for waiting images, and for queries whose asker waits."""

import logging
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import numpy as np
from PIL import Image

from shared.db import images
from shared.db.models import Image as ImageRow
from shared.db.session import session_scope
from shared.errors import BaseAppException, EmbeddingError, InvalidImageError, ResourceNotFoundError, StorageError
from shared.imaging import open_image
from shared.storage import get_blobs
from worker_service.models import Embedder

logger = logging.getLogger(__name__)

QUERY_LANE, IMAGE_LANE = 0, 1
CHUNK = 32
LEASE_S = 60.0


def embed_pending(embedder: Embedder, *, stopping: Callable[[], bool]) -> int:
    """Embed images that wait for a vector until none is left or the process stops; how many became searchable.

    When the blob store fails it ends early: the image that could not be read waits for its lease, so that it holds up
    nobody for ever, and the others wait for the next ring.
    """
    done = 0
    while not stopping():
        with session_scope() as session:
            claimed = images.claim_pending(session, limit=CHUNK, lease_s=LEASE_S)
        if not claimed:
            break
        pictures, unread = _read(claimed)
        if pictures:
            done += _embed(embedder, pictures)
        if unread is not None:
            with session_scope() as session:
                images.release_pending(session, unread)
            break
    return done


def _read(rows: Sequence[ImageRow]) -> tuple[dict[UUID, Image.Image], Sequence[UUID] | None]:
    """The pictures by image id; and, when the store failed, the ids behind the one it failed at, else None."""
    pictures = {}
    for position, row in enumerate(rows):
        try:
            pictures[row.id] = open_image(get_blobs().get(row.blob_key))
        except (InvalidImageError, ResourceNotFoundError) as error:
            _failed(row.id, error)
        except StorageError as error:
            logger.warning("image_unreadable", extra={"image_id": str(row.id), "cause": error.code}, exc_info=True)
            return pictures, [later.id for later in rows[position + 1 :]]
    return pictures, None


def _embed(embedder: Embedder, pictures: Mapping[UUID, Image.Image]) -> int:
    ids = list(pictures)
    try:
        vectors = embedder.embed(list(pictures.values()), lane=IMAGE_LANE)
    except EmbeddingError as error:
        if len(ids) == 1:
            _failed(ids[0], error)
            return 0
        # One of them is at fault: alone, each can only fail itself.
        return sum(_embed(embedder, {image_id: pictures[image_id]}) for image_id in ids)
    norms = np.linalg.norm(vectors, axis=1)
    with session_scope() as session:
        images.embedded(session, embedder.space, ids, vectors / norms[:, None], norms)
    logger.info("images_embedded", extra={"images": len(ids)})
    return len(ids)


def _failed(image_id: UUID, error: BaseAppException) -> None:
    logger.warning("image_failed", extra={"image_id": str(image_id), "cause": error.code})
    with session_scope() as session:
        images.embedding_failed(session, image_id, code=error.code)
