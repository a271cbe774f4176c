"""News of running jobs over Redis pub/sub: who waits for a job hears of it at once.

News may be lost, late or doubled. What is true stands in `job_events`; a message only says that it is worth a look.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from uuid import UUID

import orjson
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.contracts.jobs import Progress
from shared.settings import QueueSettings, get_settings

logger = logging.getLogger(__name__)

CHANNEL_PREFIX = "afterimage:job:"
PAUSE_S = 1.0
"""Rest after a failure, so that a broker in trouble is not asked at every step."""
REMEMBERED_JOBS = 4096


def channel(job_id: UUID) -> str:
    return f"{CHANNEL_PREFIX}{job_id}"


# --- telling ------------------------------------------------------------------------------------------------------


def publish_progress(job_id: UUID, step: int, total: int) -> None:
    """Say that `step` of `total` steps are done. Touches memory only: a thread of its own speaks to Redis."""
    _publisher().tell(job_id, Progress(step=step, total_steps=total))


def publish_changed(job_id: UUID) -> None:
    """Say that the job has a new event. Call it after the commit. Touches memory only."""
    _publisher().tell(job_id, None)


class _Publisher:
    """Sends the latest news of each job. What waits is bounded by the number of jobs in work; when Redis is away it
    is dropped."""

    def __init__(self, settings: QueueSettings) -> None:
        self._redis = _connect(settings)
        self._news: OrderedDict[tuple[UUID, bool], Progress | None] = OrderedDict()
        self._awake = threading.Condition()
        threading.Thread(target=self._run, name="progress-publisher", daemon=True).start()

    def tell(self, job_id: UUID, progress: Progress | None) -> None:
        with self._awake:
            self._news[job_id, progress is None] = progress
            self._awake.notify()

    def _run(self) -> None:
        while True:
            with self._awake:
                self._awake.wait_for(lambda: self._news)
                news, self._news = self._news, OrderedDict()
            try:
                with self._redis.pipeline(transaction=False) as pipeline:
                    for (job_id, _), progress in news.items():
                        pipeline.publish(channel(job_id), _message(progress))
                    pipeline.execute()
            except redis.RedisError as error:
                logger.warning("progress_not_published", extra={"cause": str(error)})
                time.sleep(PAUSE_S)


@cache
def _publisher() -> _Publisher:
    return _Publisher(get_settings().queue)


def _message(progress: Progress | None) -> bytes:
    return orjson.dumps(None if progress is None else [progress.step, progress.total_steps])


# --- listening ----------------------------------------------------------------------------------------------------


class Watch:
    """One waiter's ear on one job."""

    def __init__(self, subscriber: "Subscriber") -> None:
        self._subscriber = subscriber
        self._news = threading.Condition()
        self._changed = False
        self._progress: Progress | None = None

    def wait(self, timeout_s: float) -> tuple[bool, Progress | None]:
        """Wait for news, at most `timeout_s`: (look at the job's events, its latest progress since the last call).

        Without a subscription it says after a second at the latest that a look is worth it; with one, after five,
        because a message can be lost.
        """
        patience_s = 5.0 if self._subscriber.connected else 1.0
        with self._news:
            heard = self._news.wait_for(self._is_over, min(timeout_s, patience_s))
            changed = self._changed or (not heard and patience_s <= timeout_s)
            progress, self._changed, self._progress = self._progress, False, None
            return changed, progress

    def _is_over(self) -> bool:
        return self._changed or self._progress is not None or self._subscriber.closing

    def hear(self, progress: Progress | None) -> None:
        with self._news:
            if progress is None:
                self._changed = True
            else:
                self._progress = progress
            self._news.notify_all()


class Subscriber:
    """One pub/sub subscription for all the waiters of a process. Safe to share between threads."""

    def __init__(self, settings: QueueSettings) -> None:
        self._redis = _connect(settings)
        self._lock = threading.Lock()
        self._watches: dict[UUID, set[Watch]] = {}
        self._latest: OrderedDict[UUID, Progress] = OrderedDict()
        self._closed = threading.Event()
        self.connected = False
        """Messages arrive. While they do not, watches ask to look at the table once a second."""
        self._thread = threading.Thread(target=self._run, name="progress-subscriber", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[Watch]:
        """Hear of `job_id` from here on: start watching, then read the job, and nothing is missed in between."""
        watch = Watch(self)
        with self._lock:
            self._watches.setdefault(job_id, set()).add(watch)
        try:
            yield watch
        finally:
            with self._lock:
                remaining = self._watches[job_id]
                remaining.discard(watch)
                if not remaining:
                    del self._watches[job_id]

    def latest(self, job_id: UUID) -> Progress | None:
        """The newest progress heard of a running job; none when nothing was heard."""
        with self._lock:
            return self._latest.get(job_id)

    @property
    def closing(self) -> bool:
        """Whoever waits should come to an end: nothing will be heard any more."""
        return self._closed.is_set()

    def close(self) -> None:
        self._closed.set()
        self._wake_all()
        self._thread.join()
        self._redis.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                logger.warning("progress_subscription_lost", extra={"cause": str(error)})
                self.connected = False
                self._wake_all()
                self._closed.wait(PAUSE_S)
        self.connected = False

    def _listen(self) -> None:
        with self._redis.pubsub() as subscription:  # type: ignore[no-untyped-call]
            subscription.psubscribe(f"{CHANNEL_PREFIX}*")
            silent_since = time.monotonic()
            while not self._closed.is_set():
                # Also how long close() waits.
                message = subscription.get_message(timeout=0.2)
                now = time.monotonic()
                if message is None:
                    # A frozen server keeps the connection open and says nothing, so it has to be asked.
                    if now - silent_since > 2 * PAUSE_S:
                        self.connected = False
                        raise redis.TimeoutError("the subscription does not answer")
                    subscription.ping()
                    continue
                silent_since = now
                if message["type"] == "psubscribe":
                    self.connected = True
                    self._wake_all()
                elif message["type"] == "pmessage":
                    self._hear(message["channel"], message["data"])

    def _hear(self, where: bytes, data: bytes) -> None:
        try:
            job_id = UUID(where.decode().removeprefix(CHANNEL_PREFIX))
            news = orjson.loads(data)
            progress = None if news is None else Progress(step=news[0], total_steps=news[1])
        except (ValueError, TypeError, LookupError):
            logger.warning("progress_message_not_understood")
            return
        with self._lock:
            if progress is None:
                self._latest.pop(job_id, None)
            else:
                self._latest[job_id] = progress
                self._latest.move_to_end(job_id)
                if len(self._latest) > REMEMBERED_JOBS:
                    self._latest.popitem(last=False)
            watches = list(self._watches.get(job_id, ()))
        for watch in watches:
            watch.hear(progress)

    def _wake_all(self) -> None:
        with self._lock:
            watches = [watch for watches in self._watches.values() for watch in watches]
        for watch in watches:
            watch.hear(None)


def subscriber() -> Subscriber:
    """The subscription of this process, started at first use."""
    with _building:
        return _subscriber()


_building = threading.Lock()
"""`cache` alone would let two threads that come first together start one each."""


@cache
def _subscriber() -> Subscriber:
    return Subscriber(get_settings().queue)


def close_subscriber() -> None:
    """End the subscription of this process, if there is one."""
    with _building:
        if _subscriber.cache_info().currsize:
            _subscriber().close()


def _connect(settings: QueueSettings) -> redis.Redis:
    return redis.Redis.from_url(
        settings.url.get_secret_value(),
        socket_timeout=settings.socket_timeout_s,
        socket_connect_timeout=settings.socket_timeout_s,
        # The default retries three times with pauses: a frozen server would then cost seconds.
        retry=Retry(NoBackoff(), 0),
    )
