"""Celery's side of a worker: the tasks, bound to what the process loaded, and its life from start to a clean end."""

import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from celery import Celery, Task
from celery.exceptions import Ignore, Reject
from celery.signals import worker_shutting_down

from shared import queue
from shared.db import workers
from shared.db.session import session_scope
from shared.embedding_query import answer
from shared.errors import DatabaseError
from shared.settings import Settings
from worker_service import embedding, generation
from worker_service.attempt import Outcome
from worker_service.leases import Leases
from worker_service.models import Embedder, Models

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0


class JobFailedError(Exception):
    """The job ended `failed`, so its task does too, and Flower tells the truth."""


@dataclass
class WorkerProcess:
    """This process as others see it: announced while it loads, ready when it serves, gone when it ends."""

    kind: str
    model: str | None
    settings: Settings
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def id(self) -> str:
        return f"{self.kind}{f'.{self.model}' if self.model else ''}-{os.getpid()}@{socket.gethostname()}"

    def announce(self, state: str) -> None:
        with session_scope() as session:
            workers.heartbeat(session, self.id, kind=self.kind, model=self.model, state=state)

    def keep_announcing(self) -> None:
        """Say `ready` from a side thread until the process stops."""

        def beat() -> None:
            while not self.stopping.wait(HEARTBEAT_S):
                try:
                    self.announce("ready")
                except DatabaseError as error:
                    logger.warning("heartbeat_failed", extra={"cause": error.code})

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def withdraw(self) -> None:
        with session_scope() as session:
            workers.gone(session, self.id)

    def serve(self, app: Celery, queues: list[str], *, on_stop: Callable[[], Any]) -> None:
        """Consume until SIGTERM or SIGINT, then end within the grace time.

        Celery's warm shutdown waits for running tasks without limit, so `on_stop` runs in a thread beside it and must
        make them end; a process that still hangs afterwards is ended hard: leases bring its jobs back.
        """

        def stop(**_: object) -> None:
            self.stopping.set()
            threading.Thread(target=on_stop, name="stop", daemon=True).start()
            hard_end = threading.Timer(self.settings.jobs.shutdown_grace_s + 15, os._exit, args=(1,))
            hard_end.daemon = True
            hard_end.start()

        worker_shutting_down.connect(stop, weak=False)
        self.announce("ready")
        self.keep_announcing()
        try:
            app.worker_main(
                [
                    "--quiet",  # no banner between the log's lines
                    "worker",
                    "--pool=threads",
                    f"--concurrency={self.settings.worker.concurrency}",
                    f"--queues={','.join(queues)}",
                    f"--hostname={self.id}",
                    "--task-events",
                    "--without-gossip",
                    "--without-mingle",
                    f"--loglevel={self.settings.logging.level}",
                ]
            )
        finally:
            self.withdraw()


def serve_generate(process: WorkerProcess, models: Models, leases: Leases) -> None:
    """Serve the jobs of one generator."""
    app = queue.configure(Celery("afterimage"), process.settings.queue)

    @app.task(name=queue.GENERATE, bind=True, throws=(JobFailedError,))
    def generate(task: Task[[str], None], job_id: str) -> None:
        """Run one job; safe to deliver twice."""
        if process.stopping.is_set():
            raise Reject("shutting down", requeue=True)
        outcome = generation.run(
            UUID(job_id), models=models, leases=leases, settings=process.settings, worker=process.id
        )
        if outcome is Outcome.FAILED:
            raise JobFailedError(job_id)
        if outcome is not Outcome.SUCCEEDED:
            raise Ignore

    def finish_or_hand_back() -> None:
        if not leases.wait_until_empty(process.settings.jobs.shutdown_grace_s):
            logger.info("jobs_handed_back", extra={"jobs": leases.hand_back()})

    process.serve(app, [queue.generate_queue(models.name)], on_stop=finish_or_hand_back)


def serve_embed(process: WorkerProcess, embedder: Embedder) -> None:
    """Serve queries first, then images that wait for their vectors."""
    app = queue.configure(Celery("afterimage"), process.settings.queue)
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
