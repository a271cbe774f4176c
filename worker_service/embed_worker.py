"""The embed worker: CLIP for queries whose asker waits, then for images that wait for their vectors."""

import threading
from typing import Any

from celery.exceptions import Ignore

from shared import queue
from shared.embedding_query import answer
from shared.settings import Settings
from worker_service import embedding
from worker_service.celery_app import WorkerProcess
from worker_service.models import Embedder


def serve(settings: Settings) -> None:
    """Serve until told to stop.

    Raises:
        ModelLoadError
    """
    process = WorkerProcess("embed", None, settings)
    process.announce("loading")
    embedder = Embedder.load(settings)
    _consume(process, embedder)
    embedder.close(settings.jobs.shutdown_grace_s)


def _consume(process: WorkerProcess, embedder: Embedder) -> None:
    app = process.app()
    draining = threading.Semaphore(2)

    @app.task(name=queue.EMBED_QUERY)
    def embed_query(reply_key: str, payload: dict[str, Any]) -> None:
        """Answer a query whose asker waits."""
        answer(
            reply_key,
            payload,
            space_digest=embedder.space.digest,
            embed=lambda items: embedder.embed(items, lane=embedding.QUERY_LANE),
        )

    @app.task(name=queue.EMBED_PENDING)
    def embed_pending() -> None:
        """Embed whatever waits; many rings are one."""
        # Two drain the table: one decodes while the other's batch is in the model. More would only hold threads.
        if not draining.acquire(blocking=False):
            raise Ignore
        try:
            embedding.embed_pending(embedder, stopping=process.stopping.is_set)
        finally:
            draining.release()

    process.serve(app, [queue.EMBED_QUERIES_QUEUE, queue.EMBED_IMAGES_QUEUE], on_stop=lambda: None)
