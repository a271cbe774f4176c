"""How the services speak through Celery: configuration, task names, queues, publishing.

Messages carry ids only. The broker is a doorbell: what is true stands in Postgres, and the reconciler rings again.
"""

import logging
from collections.abc import Sequence
from typing import Any

import redis
from celery import Celery
from kombu.exceptions import OperationalError
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.contracts.jobs import Lane
from shared.db.dispatch import Published, next_jobs
from shared.db.session import session_scope
from shared.errors import BrokerUnavailableError, DatabaseError
from shared.settings import QueueSettings, get_settings
from shared.singleton import once

logger = logging.getLogger(__name__)

GENERATE = "afterimage.generate"
EMBED_QUERY = "afterimage.embed_query"
EMBED_PENDING = "afterimage.embed_pending"
DELIVER_WEBHOOKS = "afterimage.deliver_webhooks"

EMBED_QUERIES_QUEUE = "embed.queries"
EMBED_IMAGES_QUEUE = "embed.images"
IO_QUEUE = "io"

LANES = range(len(Lane))
LANE_SEPARATOR = ":"


def broker_lists(queue: str) -> list[str]:
    """The Redis lists that make up a queue, best lane first."""
    return [queue if lane == 0 else f"{queue}{LANE_SEPARATOR}{lane}" for lane in LANES]


def generate_queue(model: str) -> str:
    return f"generate.{model}"


def configure(app: Celery, settings: QueueSettings) -> Celery:
    """The same configuration for publishers, workers and Flower: of several timeouts the shortest would win."""
    url = settings.url.get_secret_value()
    app.conf.update(
        broker_url=url,
        broker_transport="shared.messaging.transport:Transport",
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_s,
            # The sweep that delivers unacknowledged messages again, at its own pace instead of every 100 s.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "socket_timeout": settings.socket_timeout_s,
            "socket_connect_timeout": settings.socket_timeout_s,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "queue_order_strategy": "priority",
            # One list per lane, the best one read first.
            "priority_steps": list(LANES),
            "sep": LANE_SEPARATOR,
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


@once
def celery_app() -> Celery:
    """The Celery application of this process, without tasks: publishers send by name."""
    app = configure(Celery("afterimage"), get_settings().queue)
    # Kombu would try again after 2 s for as long as 4 s: a submit that meets a frozen broker took 7.5 s.
    app.conf.broker_transport_options["max_retries"] = 0
    return app


@once
def broker() -> redis.Redis:
    """A plain connection to the broker's Redis, for query replies and for looking into the queues."""
    settings = get_settings().queue
    return redis.Redis.from_url(
        settings.url.get_secret_value(),
        socket_timeout=settings.socket_timeout_s,
        socket_connect_timeout=settings.socket_timeout_s,
        health_check_interval=10,
        # The default retries three times with pauses: a frozen server would then cost seconds.
        retry=Retry(NoBackoff(), 0),
    )


def publish_jobs(model: str, published: Sequence[Published]) -> None:
    """Ring for each job. The task's id is the job's, so Flower shows it under the id that its user knows.

    Raises:
        BrokerUnavailableError: some were not sent; the reconciler will.
    """
    for each in published:
        job_id = str(each.job_id)
        _send(GENERATE, generate_queue(model), args=[job_id], task_id=job_id, priority=each.lane)


def publish_embed_pending() -> None:
    """Tell the embed workers that images wait.

    Raises:
        BrokerUnavailableError
    """
    _send(EMBED_PENDING, EMBED_IMAGES_QUEUE, args=[])


def publish_deliver_webhooks() -> None:
    """Tell the io workers that something is due.

    Raises:
        BrokerUnavailableError
    """
    _send(DELIVER_WEBHOOKS, IO_QUEUE, args=[])


def publish_embed_query(reply_key: str, payload: dict[str, Any], *, expires_s: float) -> None:
    """Ask for the vector of a query; the answer is pushed to the list `reply_key`.

    Raises:
        BrokerUnavailableError
    """
    _send(EMBED_QUERY, EMBED_QUERIES_QUEUE, args=[reply_key, payload], expires=max(1, int(expires_s)))


def feed(model: str) -> None:
    """Publish what the model's window has room for. A fault here fails no caller: the reconciler feeds again."""
    settings = get_settings().queue
    try:
        with session_scope() as session:
            published = next_jobs(session, model, window=settings.window, starving_s=settings.starving_s)
        publish_jobs(model, published)
    except (BrokerUnavailableError, DatabaseError) as error:
        logger.warning("feed_failed", extra={"model": model, "cause": error.code})


def ring_for_images() -> None:
    """Tell the embed workers that images wait. A fault here fails no caller: the reconciler rings again."""
    try:
        publish_embed_pending()
    except BrokerUnavailableError as error:
        logger.warning("embed_not_announced", extra={"cause": error.code})


def ring_for_webhooks() -> None:
    """Tell the io workers that something may be due. A fault here fails no caller: the reconciler rings again."""
    try:
        publish_deliver_webhooks()
    except BrokerUnavailableError as error:
        logger.warning("ring_failed", extra={"cause": error.code})


def _send(task: str, queue: str, **options: Any) -> None:
    try:
        celery_app().send_task(task, queue=queue, **options)
    except (OperationalError, redis.RedisError, OSError) as error:
        raise BrokerUnavailableError from error
