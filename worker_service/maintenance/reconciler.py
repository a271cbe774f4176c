"""The reconciler: a loop that finds jobs and images that are stuck, and recovers them.

It takes back jobs and images whose lease has expired, and publishes jobs again whose message the broker lost. It fails
jobs whose model is gone. It also dispatches waiting jobs and notifies workers, in case a notification was lost.

It runs in its own process and without Celery, because it repairs Celery's broker. Any number of reconcilers may run: a
lock that ends with its transaction lets one of them repair at a time.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable
from uuid import UUID

import redis
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared import metrics
from shared.contracts.images import ImageState
from shared.db import attempts, bulks, idempotency, images, jobs, space_backlog, spaces, webhooks, workers
from shared.db.session import session_scope
from shared.errors import BrokerUnavailableError, DatabaseError
from shared.messaging import foreign, queue
from shared.metrics import increment_counter, set_gauge
from shared.settings import JobSettings, Settings, get_settings
from worker_service.maintenance.housekeeping import Housekeeping
from worker_service.maintenance.watch_components import ComponentWatch
from worker_service.readiness import get_readiness

logger = logging.getLogger(__name__)

LOCK = "reconciler"
QUEUE_DEPTH_INTERVAL_S = 15.0
"""How often the waiting jobs are counted: as often as Prometheus scrapes, because a count reads all of them."""
SPACES_INTERVAL_S = 60.0
"""How often the vectors of each embedding space are counted: a count reads all images."""
STOP_TIMEOUT_S = 5.0
"""How long a periodic task may take to notice that the process ends. A task that is cut off continues next time."""
READY_TICKS, READY_TICK_S = 3, 60.0
"""A reconciler is ready until so many intervals have passed since its last tick, and the duration of a slow tick."""
CLAIM_GRACE_S = 5.0
"""A job published longer ago than this should be claimed or in a list of the broker. Workers claim a job within
milliseconds after they receive it."""

SPACE_GAUGES = (
    metrics.EMBEDDING_SPACE_VECTORS,
    metrics.EMBEDDING_SPACE_MISSING,
    metrics.EMBEDDING_SPACE_FAILED,
    metrics.EMBEDDING_SPACE_ACTIVE,
)
UNSERVED_JOBS_PER_TICK = 1000
"""At most so many jobs of a model that is gone fail in one tick."""
IMAGES_CHECKED_PER_TICK = 10_000
"""A pass over a large corpus takes many ticks, so that each tick stays short."""


class Reconciler:
    """Compares jobs and images with their leases and with the broker, once per `tick`."""

    def __init__(self, settings: JobSettings) -> None:
        self._settings = settings
        self._last_tick: float | None = None
        self._models_with_depth: set[str] = set()
        self._next_count_at = 0.0
        self._take_back_from = 0.0
        self._served_at: dict[str, float] = {}
        self._counting_from = 0.0
        self._checked_to: UUID | None = None
        self._spaces_counted: set[str] = set()
        self._next_spaces_at = 0.0

    def tick(self) -> None:
        """Find and repair everything once, unless another reconciler is repairing now.

        Raises:
            DatabaseError: the database failed; the next tick tries again.
        """
        self._grace_after_gap()
        with session_scope() as session:
            if not _lock(session):
                return
            if time.monotonic() >= self._take_back_from:
                lost = attempts.take_back_expired(session, max_crashes=self._settings.max_crashes)
                if lost:
                    increment_counter(metrics.LEASES_EXPIRED, len(lost))
                    logger.warning("leases_expired", extra={"jobs": [str(job_id) for job_id in lost]})
                lost_images = images.take_back_expired(session, max_crashes=self._settings.max_crashes)
                if lost_images:
                    increment_counter(metrics.IMAGE_LEASES_EXPIRED, len(lost_images))
                    failed = [str(image_id) for image_id, state in lost_images if state is ImageState.FAILED]
                    logger.warning("image_leases_expired", extra={"images": len(lost_images), "failed": failed})
            self._reopen_mislaid_images(session)
            bulks.delete_abandoned(session, abandoned_after_s=get_settings().bulks.abandoned_after_s)
            idempotency.delete_old(session)
            published = jobs.list_published(session, older_than_s=CLAIM_GRACE_S)
        with session_scope() as session:
            # Apart from `take_back_expired`: both change the usage of owners, each by itself in one order.
            if _lock(session):
                jobs.end_expired(session)
        # Without a transaction: the broker may take long, and nothing must be locked meanwhile.
        missing = self._missing_from_broker(published)
        with session_scope() as session:
            # `unpublish` skips jobs that a worker has claimed since `list_published`.
            if missing and _lock(session) and (unpublished := jobs.unpublish(session, missing)):
                increment_counter(metrics.JOBS_REPUBLISHED, unpublished)
                logger.warning("jobs_missing_from_broker", extra={"jobs": unpublished})
        with session_scope() as session:
            models = {*jobs.list_waiting_models(session), *bulks.list_running_models(session)}
            served = workers.list_served_models(session, load_limit_s=get_settings().watchdog.load_s)
            images_wait = images.any_pending(session)
            webhooks_wait = webhooks.any_due(session)
            if time.monotonic() >= self._next_count_at:
                self._set_queue_depths(jobs.count_queued_by_model(session), paused=bulks.count_paused_by_model(session))
                set_gauge(metrics.BULK_ITEMS_WAITING, bulks.count_waiting_items(session))
                set_gauge(metrics.WEBHOOKS_OVERDUE, webhooks.count_overdue(session))
        unserved = self._unserved_models({*models, *(model for _, model in published)}, served)
        for model in unserved:
            self._fail_jobs_of(model)
        for model in models - unserved:
            queue.dispatch_jobs(model)
        if images_wait:
            _publish_if_empty(queue.EMBED_IMAGES_QUEUE, queue.publish_embed_pending)
        if webhooks_wait:
            _publish_if_empty(queue.IO_QUEUE, queue.publish_deliver_webhooks)
        self._set_space_gauges()
        self._last_tick = time.monotonic()

    def _reopen_mislaid_images(self, session: Session) -> None:
        """Make images `pending` that are `ready` without a vector in the active space: no search could find them."""
        space = spaces.find_active(session)
        if space is None:
            return
        found = images.reopen_without_vector(session, space, after=self._checked_to, limit=IMAGES_CHECKED_PER_TICK)
        self._checked_to = found.next_after
        if found.image_ids:
            logger.warning("images_without_vector", extra={"images": len(found.image_ids)})

    def _unserved_models(self, models: set[str], served: set[str]) -> set[str]:
        """Those of `models` that the settings do not name and that no worker has served for `unserved_after_s`.

        During an upgrade, another release may know more models than this process. Its API accepts their jobs before
        its workers have loaded them.
        """
        limit_s, now, named = self._settings.unserved_after_s, time.monotonic(), get_settings().model.generators
        self._served_at.update(dict.fromkeys(served, now))
        return {
            model
            for model in models
            if limit_s and model not in named and now - self._served_at.get(model, self._counting_from) >= limit_s
        }

    def _fail_jobs_of(self, model: str) -> None:
        """Fail queued jobs of a model that is gone. Items of bulks become jobs first, so each gets its own error."""
        with session_scope() as session:
            if not _lock(session):
                return
            bulks.top_up(session, model, window=UNSERVED_JOBS_PER_TICK // 2)
            failed = jobs.fail_unserved(session, model, limit=UNSERVED_JOBS_PER_TICK)
        if failed:
            increment_counter(metrics.JOBS_UNSERVED, len(failed))
            logger.warning("model_unserved", extra={"model": model, "jobs": len(failed)})

    def _set_queue_depths(self, queued: dict[str, int], *, paused: dict[str, int]) -> None:
        """Set the metric of each model: its queued jobs, without those of paused bulks."""
        self._next_count_at = time.monotonic() + QUEUE_DEPTH_INTERVAL_S
        for model in {*queued, *self._models_with_depth, *get_settings().model.generators}:
            depth = queued.get(model, 0) - paused.get(model, 0)
            set_gauge(metrics.QUEUE_DEPTH, max(depth, 0), labels={"queue": model})
        self._models_with_depth = set(queued)

    def _set_space_gauges(self) -> None:
        """Set the metrics of each embedding space, and remove those of dropped ones."""
        if time.monotonic() < self._next_spaces_at:
            return
        self._next_spaces_at = time.monotonic() + SPACES_INTERVAL_S
        with session_scope() as session:
            known = {space.short: (space, active) for space, active in spaces.list_all(session)}
        for name, (space, active) in known.items():
            with session_scope() as session:
                progress = space_backlog.get_progress(session, space)
            set_gauge(metrics.EMBEDDING_SPACE_VECTORS, progress.vectors, labels={"space": name})
            set_gauge(metrics.EMBEDDING_SPACE_MISSING, progress.missing, labels={"space": name})
            set_gauge(metrics.EMBEDDING_SPACE_FAILED, progress.failed, labels={"space": name})
            set_gauge(metrics.EMBEDDING_SPACE_ACTIVE, active, labels={"space": name})
        for name in self._spaces_counted - known.keys():
            for gauge in SPACE_GAUGES:
                gauge.remove(name)
        self._spaces_counted = set(known)

    def _grace_after_gap(self) -> None:
        """After a gap between ticks, give every worker one full lease to renew before its jobs are taken back.

        The fault that stopped the ticks may also have stopped the renewals. The time without a worker counts anew too.
        """
        now = time.monotonic()
        if self._last_tick is None or now - self._last_tick > 3 * self._settings.reconcile_s:
            self._take_back_from = now + self._settings.lease_s
            self._served_at, self._counting_from = {}, now

    def _missing_from_broker(self, published: Iterable[tuple[UUID, str]]) -> list[UUID]:
        """Published jobs whose message is in none of the broker's lists. published: (job id, model).

        A message that a worker received and did not acknowledge is in no list. A live worker claims its job at once, so
        that the job is no longer `queued`. A job that is still `queued` therefore belonged to a dead worker.
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


def _lock(session: Session) -> bool:
    """Become the only reconciler that repairs, until the transaction ends; False while another one does."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(LOCK, 0)))))


def _publish_if_empty(name: str, publish: Callable[[], None]) -> None:
    """Publish a notification, unless the broker's list `name` already holds one."""
    try:
        foreign.drop_foreign_keys(queue.broker(), queue.broker_lists(name))
        if queue.broker().llen(name) == 0:
            publish()
    except (redis.RedisError, BrokerUnavailableError) as error:
        logger.warning("broker_unavailable", extra={"cause": str(error)})


def _listed_jobs(model: str) -> set[str]:
    """Ids of the model's jobs whose messages wait in the broker. Messages of other programs are dropped."""
    names = queue.broker_lists(queue.generate_queue(model))
    foreign.drop_foreign_keys(queue.broker(), names)
    with queue.broker().pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.lrange(name, 0, -1)
        lists: list[list[bytes]] = pipeline.execute()
    listed = set()
    for name, messages in zip(names, lists, strict=True):
        for message in messages:
            try:
                listed.add(foreign.read_task_id(message))
            except foreign.UnreadableMessageError as error:
                if queue.broker().lrem(name, 1, message):  # type: ignore[arg-type]  # bytes are a value as well
                    foreign.record_dropped("queue", error)
    return listed


def serve(settings: Settings) -> None:
    """Run the reconciler and housekeeping until SIGTERM or SIGINT."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    housekeeping = threading.Thread(target=Housekeeping(settings, stopping).run, name="housekeeping", daemon=True)
    housekeeping.start()
    reconciler, components = Reconciler(settings.jobs), ComponentWatch(settings)
    logger.info("reconciler_started", extra={"every_s": settings.jobs.reconcile_s})
    while not stopping.is_set():
        components.update()
        try:
            reconciler.tick()
            get_readiness().confirm(for_s=READY_TICKS * settings.jobs.reconcile_s + READY_TICK_S)
        except DatabaseError as error:
            logger.warning("tick_failed", extra={"cause": error.code})
        stopping.wait(settings.jobs.reconcile_s)
    get_readiness().withdraw()
    housekeeping.join(STOP_TIMEOUT_S)
