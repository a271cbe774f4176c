"""The generate worker: one image model per process, and its tasks."""

import logging
from uuid import UUID

from celery import Task
from celery.exceptions import Ignore, Reject

from shared.messaging import queue
from shared.settings import Settings
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs import run as generation
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import Leases
from worker_service.models.loaded import Models
from worker_service.workers.process import WorkerProcess

logger = logging.getLogger(__name__)


class JobFailedError(Exception):
    """The job ended `failed`, so its task does too, and Flower tells the truth."""


def serve(settings: Settings, model: str | None) -> None:
    """Serve the jobs of one generator until told to stop.

    Raises:
        ModelNotFoundError, ModelLoadError
    """
    name = model or settings.worker.generator or settings.model.default_generator
    spare_seats, bulk_pause_s = settings.worker.spare_seats, settings.worker.bulk_pause_s
    with (
        WorkerProcess("generate", name, settings, spare_seats, bulk_pause_s) as process,
        Watchdog(settings.watchdog) as watchdog,
    ):
        models = Models.load(name, settings, watchdog)
        try:
            with Leases(settings.jobs) as leases:
                _consume(process, models, leases)
        finally:
            models.close(settings.jobs.shutdown_grace_s)


def _consume(process: WorkerProcess, models: Models, leases: Leases) -> None:
    app = process.app()

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
