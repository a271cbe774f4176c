"""The embed worker: its tasks make the vectors of queries and of corpus images. Queries run first.

Every embed worker answers the queries of its own embedding space. While its space is active, it also embeds the images
that wait, and answers the processes of the previous release, whose queries name no space. While another space is
active, it embeds the images that its own space lacks.
"""

import logging
from typing import Any

from celery import Task
from structlog.contextvars import bound_contextvars

from shared import tracing
from shared.messaging import queue
from shared.messaging.embedding_rpc import answer
from shared.settings import Settings
from worker_service.execution.watchdog import Watchdog
from worker_service.indexing import embed_images
from worker_service.indexing.backlog import Backlog
from worker_service.indexing.image_leases import ImageLeases
from worker_service.models.embedder import Embedder
from worker_service.workers.active_space import follow_active_space
from worker_service.workers.process import WorkerProcess

logger = logging.getLogger(__name__)

QUEUES_OF_ACTIVE_SPACE = [queue.EMBED_QUERIES_QUEUE, queue.EMBED_IMAGES_QUEUE]


def serve(settings: Settings) -> None:
    """Load CLIP, then serve until SIGTERM or SIGINT.

    Raises:
        ModelLoadError: CLIP cannot be loaded; the message gives the cause.
        DatabaseError: the database failed at the start.
    """
    with WorkerProcess("embed", None, settings) as process, Watchdog(settings.watchdog) as watchdog:
        embedder = Embedder.load(settings, watchdog, only_model=True)
        with (
            ImageLeases(settings.jobs) as leases,
            Backlog(embedder, settings.jobs) as backlog,
            backlog.embedding(process.standby, stopping=process.stopping),
        ):
            try:
                _consume(process, embedder, leases)
            finally:
                embedder.close(settings.jobs.shutdown_grace_s)


def _consume(process: WorkerProcess, embedder: Embedder, leases: ImageLeases) -> None:
    app = process.app()
    images = embed_images.ImageEmbedding(embedder, leases)

    @app.task(name=queue.EMBED_QUERY, bind=True)
    def embed_query(task: Task[[str, dict[str, Any]], None], reply_key: str, payload: dict[str, Any]) -> None:
        """Embed a query and send the vector to the caller that waits for it."""
        context = tracing.read_context(vars(task.request))
        with (
            bound_contextvars(**tracing.ids(context)),
            tracing.span("embed query", kind="consumer", within=context, root=True),
        ):
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

    follow_active_space(process, embedder.space, QUEUES_OF_ACTIVE_SPACE)
    process.serve(
        app,
        [queue.embed_queries_queue(embedder.space)],
        on_stop=finish_or_hand_back,
        optional_queues=QUEUES_OF_ACTIVE_SPACE,
    )
