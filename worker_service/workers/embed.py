"""The embed worker: its tasks make the vectors of queries and of corpus images. Queries run first.

A worker whose embedding space is not the active one takes no message. It embeds the images that its space lacks, until
an operator activates its space.
"""

import logging
from typing import Any

from shared.messaging import queue
from shared.messaging.embedding_rpc import answer
from shared.settings import Settings
from worker_service.execution.watchdog import Watchdog
from worker_service.indexing import embed_images
from worker_service.indexing.backlog import Backlog
from worker_service.indexing.image_leases import ImageLeases
from worker_service.models.embedder import Embedder
from worker_service.workers.active_space import stop_when_inactive, wait_until_active
from worker_service.workers.process import WorkerProcess

logger = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Load CLIP, then serve until SIGTERM or SIGINT.

    Raises:
        ModelLoadError: CLIP cannot be loaded; the message gives the cause.
        DatabaseError: the database failed at the start.
    """
    with WorkerProcess("embed", None, settings) as process, Watchdog(settings.watchdog) as watchdog:
        embedder = Embedder.load(settings, watchdog, only_model=True)
        try:
            with ImageLeases(settings.jobs) as leases:
                wait_until_active(process, embedder.space, meanwhile=Backlog(embedder).embed_chunk)
                _consume(process, embedder, leases)
        finally:
            embedder.close(settings.jobs.shutdown_grace_s)


def _consume(process: WorkerProcess, embedder: Embedder, leases: ImageLeases) -> None:
    app = process.app()
    images = embed_images.ImageEmbedding(embedder, leases)

    @app.task(name=queue.EMBED_QUERY)
    def embed_query(reply_key: str, payload: dict[str, Any]) -> None:
        """Embed a query and send the vector to the caller that waits for it."""
        answer(
            reply_key,
            payload,
            space_digest=embedder.space.digest,
            embed=embedder.embed,
        )

    @app.task(name=queue.EMBED_PENDING)
    def embed_pending() -> None:
        """Embed all waiting images."""
        images.embed_pending(stopping=process.stopping.is_set)

    def finish_or_hand_back() -> None:
        if not leases.wait_until_empty(process.settings.jobs.shutdown_grace_s):
            logger.info("images_handed_back", extra={"images": leases.hand_back()})

    stop_when_inactive(process, embedder.space)
    process.serve(app, [queue.EMBED_QUERIES_QUEUE, queue.EMBED_IMAGES_QUEUE], on_stop=finish_or_hand_back)
