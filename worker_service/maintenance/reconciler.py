"""What should be running and is not: a plain loop that compares jobs with leases and broker, and sets them right.

It runs in a process of its own, without Celery, because it repairs Celery's broker. Any number may run; per tick one
of them works, by a lock that ends with its transaction.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from uuid import UUID

import orjson
import redis
from sqlalchemy import func, select

from shared.contracts.images import ImageState
from shared.db import bulks, idempotency, images, jobs, webhooks
from shared.db.session import session_scope
from shared.errors import BrokerUnavailableError, DatabaseError
from shared.messaging import queue
from shared.metrics import increment_counter, set_gauge
from shared.settings import JobSettings, Settings, get_settings
from worker_service.maintenance.housekeeping import Housekeeping

logger = logging.getLogger(__name__)

LOCK = "reconciler"
COUNT_S = 15.0
"""How often the waiting jobs are counted, which reads all of them: as often as Prometheus asks."""
STOP_S = 5.0
"""How long a chore may take to notice that the process ends; cut short, it is only less far."""
UNCLAIMED_S = 5.0
"""A published job that is in no list of the broker for this long is in no worker's hands either: workers claim what
they receive within milliseconds."""


class Reconciler:
    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._last_tick: float | None = None
        self._models_told: set[str] = set()
        self._count_at = 0.0
        self._leases_count_from = 0.0

    def tick(self) -> None:
        """Set right, once, whatever is wrong now.

        Raises:
            DatabaseError: nothing could be compared.
        """
        self._forgive_after_a_gap()
        with session_scope() as session:
            if not session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(LOCK, 0)))):
                return
            if time.monotonic() >= self._leases_count_from:
                lost = jobs.take_back_expired(session, max_crashes=self._settings.max_crashes)
                if lost:
                    increment_counter("leases_expired_total", len(lost))
                    logger.warning("leases_expired", extra={"jobs": [str(job_id) for job_id in lost]})
                silent = images.take_back_expired(session, max_crashes=self._settings.max_crashes)
                if silent:
                    increment_counter("image_leases_expired_total", len(silent))
                    failed = [str(image_id) for image_id, state in silent if state is ImageState.FAILED]
                    logger.warning("image_leases_expired", extra={"images": len(silent), "failed": failed})
            jobs.end_expired(session)
            bulks.sweep(session, abandoned_after_s=get_settings().bulks.abandoned_after_s)
            idempotency.forget_old(session)
            published = jobs.published(session, older_than_s=UNCLAIMED_S)
            missing = self._missing_from_broker(published)
            # A worker that took one while the broker was asked has it: that is no loss.
            if missing and (again := jobs.unpublish(session, missing)):
                increment_counter("jobs_republished_total", again)
                logger.warning("jobs_missing_from_broker", extra={"jobs": again})
        with session_scope() as session:
            waiting = {*jobs.waiting_models(session), *bulks.running_models(session)}
            images_wait = images.any_pending(session)
            webhooks_wait = webhooks.any_due(session)
            if time.monotonic() >= self._count_at:
                self._tell_depths(jobs.queued_by_model(session), held=bulks.held_by_model(session))
                set_gauge("bulk_items_waiting", bulks.waiting_items(session))
        for model in waiting:
            queue.feed(model)
        if images_wait:
            _ring(queue.EMBED_IMAGES_QUEUE, queue.publish_embed_pending)
        if webhooks_wait:
            _ring(queue.IO_QUEUE, queue.publish_deliver_webhooks)
        self._last_tick = time.monotonic()

    def _tell_depths(self, queued: dict[str, int], *, held: dict[str, int]) -> None:
        self._count_at = time.monotonic() + COUNT_S
        for model in {*queued, *self._models_told}:
            depth = queued.get(model, 0) - held.get(model, 0)
            set_gauge("queue_depth", max(depth, 0), labels={"queue": model})
        self._models_told = set(queued)

    def _forgive_after_a_gap(self) -> None:
        """Who did not look for a while, or could not, gives every worker one full lease to renew before judging it:
        the same fault may have kept them from renewing."""
        now = time.monotonic()
        if self._last_tick is None or now - self._last_tick > 3 * self._settings.reconcile_s:
            self._leases_count_from = now + self._settings.lease_s

    def _missing_from_broker(self, published: Iterable[tuple[UUID, str]]) -> list[UUID]:
        """Published jobs whose message is in none of the broker's lists.

        Messages that Celery holds as unacknowledged do not count: the job of a worker that lives is not `queued` any
        more, and that of a killed one waits for nobody.
        """
        by_model: dict[str, list[UUID]] = {}
        for job_id, model in published:
            by_model.setdefault(model, []).append(job_id)
        try:
            listed = {model: _listed_jobs(model) for model in by_model}
        except redis.RedisError as error:
            logger.warning("broker_unavailable", extra={"cause": str(error)})
            return []
        return [job_id for model, ids in by_model.items() for job_id in ids if str(job_id) not in listed[model]]


def _ring(name: str, publish: Callable[[], None]) -> None:
    """Ring a doorbell that nobody has rung already."""
    try:
        if queue.broker().llen(name) == 0:
            publish()
    except (redis.RedisError, BrokerUnavailableError) as error:
        logger.warning("broker_unavailable", extra={"cause": str(error)})


def _listed_jobs(model: str) -> set[str]:
    """Ids of the jobs whose messages wait in the broker."""
    with queue.broker().pipeline(transaction=False) as pipeline:
        for name in queue.broker_lists(queue.generate_queue(model)):
            pipeline.lrange(name, 0, -1)
        lists: list[list[bytes]] = pipeline.execute()
    return {orjson.loads(message)["headers"]["id"] for messages in lists for message in messages}


def serve(settings: Settings) -> None:
    """Repair until told to stop."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    housekeeping = threading.Thread(target=Housekeeping(settings, stopping).run, name="housekeeping", daemon=True)
    housekeeping.start()
    reconciler = Reconciler(settings.jobs)
    logger.info("reconciler_started", extra={"every_s": settings.jobs.reconcile_s})
    while not stopping.is_set():
        try:
            reconciler.tick()
        except DatabaseError as error:
            logger.warning("tick_failed", extra={"cause": error.code})
        stopping.wait(settings.jobs.reconcile_s)
    housekeeping.join(STOP_S)
