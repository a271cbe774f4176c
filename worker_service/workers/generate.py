"""The generate worker: it loads one image model and runs the jobs of this model."""

import logging
from uuid import UUID

from celery import Task
from celery.exceptions import Ignore, Reject

from shared import metrics
from shared.errors import DatabaseConnectionError
from shared.messaging import foreign, queue
from shared.settings import Settings
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs import content_credentials
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import STAGES, run_job
from worker_service.models.worker_models import Models
from worker_service.workers.active_space import follow_active_space, wait_until_active
from worker_service.workers.process import WorkerProcess

logger = logging.getLogger(__name__)


class JobFailedError(Exception):
    """The job ended `failed`. Raised so that Flower shows the task as failed too."""


def serve(settings: Settings, model: str | None) -> None:
    """Load one generator and serve its jobs until SIGTERM or SIGINT.

    model: name of the generator; None: `worker.generator`, or the default generator of the settings.

    Raises:
        ModelNotFoundError: the settings have no generator of that name.
        ModelLoadError: a model cannot be loaded; the message gives the cause.
        ConfigurationError: the outputs cannot be signed, and the settings ask for it.
        DatabaseError: the database failed at the start.
    """
    content_credentials.get_signer()
    name = model or settings.worker.generator or settings.model.default_generator
    lane_headroom, bulk_pause_s = settings.worker.lane_headroom, settings.worker.bulk_pause_s
    with (
        WorkerProcess("generate", name, settings, lane_headroom, bulk_pause_s) as process,
        Watchdog(settings.watchdog) as watchdog,
    ):
        models = Models.load(name, settings, watchdog)
        try:
            wait_until_active(process, models.space)
            with JobLeases(settings.jobs) as leases:
                _consume(process, models, leases)
        finally:
            models.close(settings.jobs.shutdown_grace_s)


def _consume(process: WorkerProcess, models: Models, leases: JobLeases) -> None:
    app = process.app()

    @app.task(name=queue.GENERATE, bind=True, throws=(JobFailedError, DatabaseConnectionError))
    def generate(task: Task[[str], None], job_id: str) -> None:
        """Run one job; safe to deliver twice."""
        if process.stopping.is_set():
            raise Reject("shutting down", requeue=True)
        try:
            job = UUID(str(job_id))
        except ValueError:
            foreign.record_dropped("queue", "no job id")
            raise Ignore from None
        outcome = run_job(job, models=models, leases=leases, settings=process.settings, worker=process.id)
        if outcome is Outcome.FAILED:
            raise JobFailedError(job_id)
        if outcome is not Outcome.SUCCEEDED:
            raise Ignore

    def finish_or_hand_back() -> None:
        if not leases.wait_until_empty(process.settings.jobs.shutdown_grace_s):
            logger.info("jobs_handed_back", extra={"jobs": leases.hand_back()})

    metrics.expect_jobs_of(models.name, stages=STAGES)
    queues = [queue.generate_queue(models.name)]
    follow_active_space(process, models.space, queues, is_available=models.is_available)
    process.serve(app, queues, on_stop=finish_or_hand_back)
