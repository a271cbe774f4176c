"""The io worker: tasks that wait for other servers instead of computing, such as webhooks. It never loads torch."""

import threading

from celery.exceptions import Ignore

from shared.messaging import queue
from shared.settings import Settings
from worker_service.maintenance.deliver_webhooks import deliver_due
from worker_service.workers.process import WorkerProcess


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        DatabaseError: the database failed at the start.
    """
    with WorkerProcess("io", None, settings) as process:
        _consume(process)


def _consume(process: WorkerProcess) -> None:
    settings = process.settings
    app = process.app()
    # One thread stays free for other messages while slow receivers occupy the others.
    delivering = threading.Semaphore(max(1, process.concurrency - 1))

    @app.task(name=queue.DELIVER_WEBHOOKS)
    def deliver_webhooks() -> None:
        """Deliver all due webhooks; do nothing when enough threads deliver already."""
        if not delivering.acquire(blocking=False):
            raise Ignore
        try:
            deliver_due(settings.webhooks, stopping=process.stopping.is_set)
        finally:
            delivering.release()

    process.serve(app, [queue.IO_QUEUE], on_stop=lambda: None)
