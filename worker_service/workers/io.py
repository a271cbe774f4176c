"""The io worker: what waits for others instead of computing. It never loads torch."""

import threading

from celery.exceptions import Ignore

from shared.messaging import queue
from shared.settings import Settings
from worker_service.maintenance.deliver_webhooks import deliver_due
from worker_service.workers.process import WorkerProcess


def serve(settings: Settings) -> None:
    """Serve until told to stop."""
    with WorkerProcess("io", None, settings) as process:
        _consume(process)


def _consume(process: WorkerProcess) -> None:
    settings = process.settings
    app = process.app()
    # One thread stays free to hear of other work while receivers keep the others waiting.
    delivering = threading.Semaphore(max(1, settings.worker.concurrency - 1))

    @app.task(name=queue.DELIVER_WEBHOOKS)
    def deliver_webhooks() -> None:
        """Deliver whatever is due; many rings are one."""
        if not delivering.acquire(blocking=False):
            raise Ignore
        try:
            deliver_due(settings.webhooks, stopping=process.stopping.is_set)
        finally:
            delivering.release()

    process.serve(app, [queue.IO_QUEUE], on_stop=lambda: None)
