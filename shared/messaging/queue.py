"""How the services use Celery: configuration, task names, queues, publishing.

A message carries ids only, and Postgres is the record. When the broker loses a message, the reconciler publishes it
again.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from structlog.contextvars import bound_contextvars

from shared import tracing
from shared.contracts.jobs import Lane
from shared.db.dispatch import DispatchedJob, mark_next_published
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import BrokerUnavailableError, DatabaseError
from shared.messaging.redis import connect
from shared.messaging.sentinels import SentinelAddress
from shared.settings import QueueSettings, get_settings
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

GENERATE = "afterimage.generate"
EMBED_QUERY = "afterimage.embed_query"
EMBED_PENDING = "afterimage.embed_pending"
DELIVER_WEBHOOKS = "afterimage.deliver_webhooks"

EMBED_QUERIES_QUEUE = "embed.queries"
"""Queries for whichever space is active. The previous release sends all queries here."""
EMBED_IMAGES_QUEUE = "embed.images"
IO_QUEUE = "io"

LANES = range(len(Lane))
LANE_SEPARATOR = ":"


def broker_lists(queue: str) -> list[str]:
    """The Redis lists that make up a queue, highest-priority lane first."""
    return [queue if lane == 0 else f"{queue}{LANE_SEPARATOR}{lane}" for lane in LANES]


def generate_queue(model: str) -> str:
    return f"generate.{model}"


def embed_queries_queue(space: Space) -> str:
    """Queries for this embedding space."""
    return f"{EMBED_QUERIES_QUEUE}.{space.short}"


def configure(app: Celery, settings: QueueSettings) -> Celery:
    """Give publishers, workers and Flower the same configuration: with different timeouts, the shortest would win."""
    url = settings.url.get_secret_value()
    sentinels = SentinelAddress.parse(url)
    if sentinels is not None:  # Celery and kombu only show this URL
        url = f"redis://{sentinels.service}/{sentinels.database}"
    app.conf.update(
        broker_url=url,
        broker_transport="shared.messaging.transport:Transport",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_s,
            # Look for unacknowledged messages every 5 s instead of every 100 s, and deliver those that timed out again.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "socket_timeout": settings.socket_timeout_s,
            "socket_connect_timeout": settings.socket_timeout_s,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "queue_order_strategy": "priority",
            # One Redis list per lane; workers read the highest-priority lane first.
            "priority_steps": list(LANES),
            "sep": LANE_SEPARATOR,
            "sentinel_url": None if sentinels is None else settings.url,
        },
        task_acks_late=True,
        task_reject_on_worker_lost=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_create_missing_queues=True,
        task_serializer="json",
        accept_content=["json"],
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_send_task_events=True,
        task_send_sent_event=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        enable_utc=True,
        timezone="UTC",
    )
    return app


@process_singleton
def celery_app() -> Celery:
    """The Celery application of this process. It has no tasks: publishers send them by name."""
    app = configure(Celery("afterimage"), get_settings().queue)
    # Kombu would retry after 2 s, for up to 4 s: while the broker was frozen, a submit took 7.5 s.
    app.conf.broker_transport_options["max_retries"] = 0
    return app


@process_singleton
def broker() -> redis.Redis:
    """A plain connection to the broker's Redis, for query replies and for reading the queues."""
    settings = get_settings().queue
    return connect(settings.url.get_secret_value(), timeout_s=settings.socket_timeout_s, health_check_interval=10)


def publish_jobs(model: str, published: Sequence[DispatchedJob]) -> None:
    """Send one message per job. The task's id is the job's id, so Flower shows the id that the user knows.

    Raises:
        BrokerUnavailableError: some messages were not sent; the reconciler sends them later.
    """
    for each in published:
        job_id = str(each.job_id)
        with _publishing(each, model):
            _send(GENERATE, generate_queue(model), args=[job_id], task_id=job_id, priority=each.lane)


@contextmanager
def _publishing(published: DispatchedJob, model: str) -> Iterator[None]:
    """Record the block in the trace of the job, if it has one."""
    context = published.trace_context
    if context is None:
        yield
        return
    with (
        bound_contextvars(**{**tracing.ids(context), "job_id": str(published.job_id)}),
        tracing.span("publish", {"model": model}, kind="producer", within=context),
    ):
        yield


def publish_embed_pending() -> None:
    """Send the message that makes an embed worker embed all waiting images.

    Raises:
        BrokerUnavailableError: the broker did not take the message.
    """
    _send(EMBED_PENDING, EMBED_IMAGES_QUEUE, args=[])


def publish_deliver_webhooks() -> None:
    """Send the message that makes an io worker deliver all due webhooks.

    Raises:
        BrokerUnavailableError: the broker did not take the message.
    """
    _send(DELIVER_WEBHOOKS, IO_QUEUE, args=[])


def publish_embed_query(queue: str, reply_key: str, payload: dict[str, Any], *, expires_s: float) -> None:
    """Request the vector of a query; the worker pushes the answer to the Redis list `reply_key`.

    queue: of the queries of one space, or of the active one.

    Raises:
        BrokerUnavailableError: the broker did not take the message.
    """
    expires = max(1, int(expires_s))
    with tracing.span("publish query", kind="producer") if tracing.current() else nullcontext():
        _send(EMBED_QUERY, queue, args=[reply_key, payload], expires=expires, headers=tracing.current())


def dispatch_jobs(model: str) -> None:
    """Publish the next waiting jobs of `model`, as many as may be in the broker at a time.

    Errors are logged, not raised: the reconciler dispatches again.
    """
    settings = get_settings().queue
    try:
        with session_scope() as session:
            published = mark_next_published(
                session,
                model,
                window=settings.published_jobs_per_lane,
                starvation_timeout_s=settings.starvation_timeout_s,
            )
        publish_jobs(model, published)
    except (BrokerUnavailableError, DatabaseError) as error:
        logger.warning("dispatch_failed", extra={"model": model, "cause": error.code})


def notify_embed_workers() -> None:
    """Notify the embed workers. Errors are logged, not raised: the reconciler notifies again."""
    try:
        publish_embed_pending()
    except BrokerUnavailableError as error:
        logger.warning("notification_failed", extra={"cause": error.code})


def notify_webhook_workers() -> None:
    """Notify the io workers. Errors are logged, not raised: the reconciler notifies again."""
    try:
        publish_deliver_webhooks()
    except BrokerUnavailableError as error:
        logger.warning("notification_failed", extra={"cause": error.code})


def _send(task: str, queue: str, **options: Any) -> None:
    try:
        celery_app().send_task(task, queue=queue, **options)
    except (OperationalError, redis.RedisError, OSError) as error:
        raise BrokerUnavailableError from error
