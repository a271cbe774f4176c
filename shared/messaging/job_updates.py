"""News of running jobs over Redis pub/sub: who waits for a job hears of it at once.

News may be lost, late or doubled. What is true stands in `job_events`; a message only says that it is worth a look.
Previews are shown and forgotten.
"""

import io
import logging
import threading
import time
from base64 import b64encode
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import numpy as np
import orjson
import redis
from PIL import Image
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.contracts.jobs import Preview, Progress
from shared.settings import QueueSettings, get_settings
from shared.singleton import once

logger = logging.getLogger(__name__)

CHANNEL_PREFIX = "afterimage:job:"
PREVIEW_PREFIX = "afterimage:preview:"
PREVIEW_INTERVAL_S = 0.4
"""Between two previews of the same image, at least."""
PREVIEW_QUALITY = 70
PREVIEWS_WAITING = 64
"""Of all jobs together, so that a broker that is away costs no memory."""
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


class PreviewStream:
    """Shows image `index` of a job while it is drawn, after every `every` steps and not too often."""

    def __init__(self, job_id: UUID, index: int, *, every: int) -> None:
        self._job_id = job_id
        self._index = index
        self._every = every
        self._not_before = 0.0

    def is_due(self, step: int, total_steps: int) -> bool:
        """The last step is not: the image itself comes next."""
        return step % self._every == 0 and step < total_steps and time.monotonic() >= self._not_before

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        """pixels: uint8, shape (height, width, 3), RGB, small. Touches memory only: the publisher's thread encodes.

        Raises:
            ValueError: `pixels` is something else.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a preview is uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
        self._not_before = time.monotonic() + PREVIEW_INTERVAL_S
        _publisher().show(self._job_id, _Picture(self._index, step, total_steps, pixels))


@dataclass(frozen=True)
class _Picture:
    """A preview that is not encoded yet."""

    index: int
    step: int
    total_steps: int
    pixels: np.ndarray

    def encoded(self) -> Preview:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, "JPEG", quality=PREVIEW_QUALITY)
        image = f"data:image/jpeg;base64,{b64encode(file.getvalue()).decode()}"
        return Preview(index=self.index, step=self.step, total_steps=self.total_steps, image=image)


class _Publisher:
    """Sends the latest news of each job. What waits is bounded by the number of jobs in work; when Redis is away it
    is dropped."""

    def __init__(self, settings: QueueSettings) -> None:
        self._redis = _connect(settings)
        self._news: OrderedDict[tuple[UUID, bool], Progress | None] = OrderedDict()
        self._pictures: OrderedDict[tuple[UUID, int], _Picture] = OrderedDict()
        self._awake = threading.Condition()
        threading.Thread(target=self._run, name="progress-publisher", daemon=True).start()

    def tell(self, job_id: UUID, progress: Progress | None) -> None:
        with self._awake:
            self._news[job_id, progress is None] = progress
            self._awake.notify()

    def show(self, job_id: UUID, picture: _Picture) -> None:
        with self._awake:
            self._pictures[job_id, picture.index] = picture
            if len(self._pictures) > PREVIEWS_WAITING:
                self._pictures.popitem(last=False)
            self._awake.notify()

    def _run(self) -> None:
        while True:
            with self._awake:
                self._awake.wait_for(lambda: self._news or self._pictures)
                news, self._news = self._news, OrderedDict()
                pictures, self._pictures = self._pictures, OrderedDict()
            try:
                with self._redis.pipeline(transaction=False) as pipeline:
                    # Before the news, which may be that the job has ended.
                    for (job_id, _), picture in pictures.items():
                        pipeline.publish(f"{PREVIEW_PREFIX}{job_id}", picture.encoded().model_dump_json())
                    for (job_id, _), progress in news.items():
                        pipeline.publish(channel(job_id), _message(progress))
                    pipeline.execute()
            except redis.RedisError as error:
                logger.warning("progress_not_published", extra={"cause": str(error)})
                time.sleep(PAUSE_S)


@once
def _publisher() -> _Publisher:
    return _Publisher(get_settings().queue)


def _message(progress: Progress | None) -> bytes:
    return orjson.dumps(None if progress is None else [progress.step, progress.total_steps])


# --- listening ----------------------------------------------------------------------------------------------------


class News(NamedTuple):
    """What a watch has heard since it was last asked."""

    changed: bool
    """The job's events are worth a look."""
    progress: Progress | None
    previews: list[Preview]
    """The newest of each image."""


class Watch:
    """One waiter's ear on one job."""

    def __init__(self, subscriber: "Subscriber") -> None:
        self._subscriber = subscriber
        self._news = threading.Condition()
        self._changed = False
        self._progress: Progress | None = None
        self._previews: dict[int, Preview] = {}

    def wait(self, timeout_s: float) -> News:
        """Wait for news, at most `timeout_s`.

        Without a subscription it says after a second at the latest that a look is worth it; with one, after five,
        because a message can be lost.
        """
        patience_s = 5.0 if self._subscriber.connected else 1.0
        with self._news:
            heard = self._news.wait_for(self._is_over, min(timeout_s, patience_s))
            changed = self._changed or (not heard and patience_s <= timeout_s)
            news = News(changed, self._progress, list(self._previews.values()))
            self._changed, self._progress, self._previews = False, None, {}
            return news

    def _is_over(self) -> bool:
        return self._changed or self._progress is not None or bool(self._previews) or self._subscriber.closing

    def hear(self, progress: Progress | None) -> None:
        with self._news:
            if progress is None:
                self._changed = True
            else:
                self._progress = progress
            self._news.notify_all()

    def see(self, preview: Preview) -> None:
        with self._news:
            self._previews[preview.index] = preview
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
            subscription.psubscribe(f"{CHANNEL_PREFIX}*", f"{PREVIEW_PREFIX}*")
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
                elif message["type"] == "pmessage" and message["channel"].startswith(PREVIEW_PREFIX.encode()):
                    self._see(message["channel"], message["data"])
                elif message["type"] == "pmessage":
                    self._hear(message["channel"], message["data"])

    def _see(self, where: bytes, data: bytes) -> None:
        try:
            job_id = UUID(where.decode().removeprefix(PREVIEW_PREFIX))
            with self._lock:
                watches = list(self._watches.get(job_id, ()))
            if not watches:
                return
            preview = Preview.model_validate_json(data)
        except ValueError:
            logger.warning("preview_not_understood")
            return
        for watch in watches:
            watch.see(preview)

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
"""One that is closed must not be started at the same time."""


@once
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
