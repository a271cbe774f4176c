"""Live updates of running jobs over Redis pub/sub, so that a client that waits for a job gets them at once.

A message may be lost, late or repeated. The table `job_events` is the record; a message only says that it is time to
read it. Previews are not stored.
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
from typing import NamedTuple, Protocol
from uuid import UUID

import numpy as np
import orjson
import redis
from PIL import Image

from shared.contracts.jobs import Preview, Progress
from shared.messaging import foreign
from shared.messaging.redis import connect
from shared.settings import QueueSettings, get_settings
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

CHANNEL_PREFIX = "afterimage:job:"
PREVIEW_PREFIX = "afterimage:preview:"
PREVIEW_INTERVAL_S = 0.4
"""The shortest time between two previews of the same image."""
PREVIEW_QUALITY = 70
MAX_QUEUED_PREVIEWS = 64
"""Of all jobs together: the limit on the memory that previews use while the broker is away."""
RETRY_PAUSE_S = 1.0
"""Pause after a failure, so that a broker in trouble does not get a call for every step."""
LOOK_AGAIN_S = {True: 5.0, False: 1.0}
"""A message can be lost. So a waiting caller looks at its job again after this time, by whether messages arrive."""
MAX_JOBS_WITH_PROGRESS = 4096
"""Jobs whose latest progress a subscriber keeps; the one updated longest ago is dropped first."""


def channel(job_id: UUID) -> str:
    return f"{CHANNEL_PREFIX}{job_id}"


# --- publishing ---------------------------------------------------------------------------------------------------


def publish_progress(job_id: UUID, step: int, total: int) -> None:
    """Publish that `step` of `total` steps are done. Does not wait: the publisher's thread sends it to Redis."""
    _publisher().add_update(job_id, Progress(step=step, total_steps=total))


def publish_job_update(job_id: UUID) -> None:
    """Publish that the job has a new event. Call it after the commit. Does not wait, as `publish_progress`."""
    _publisher().add_update(job_id, None)


class PreviewStream:
    """Publishes previews of image `index` of a job, every `every` steps and at most one per `PREVIEW_INTERVAL_S`."""

    def __init__(self, job_id: UUID, index: int, *, every: int) -> None:
        self._job_id = job_id
        self._index = index
        self._every = every
        self._not_before = 0.0

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether this step gets a preview. The last step does not: the image itself comes next."""
        return step % self._every == 0 and step < total_steps and time.monotonic() >= self._not_before

    def show(self, pixels: np.ndarray, step: int, total_steps: int) -> None:
        """Publish one preview. Does not wait: the publisher's thread encodes and sends it.

        pixels: uint8, shape (height, width, 3), RGB, small.

        Raises:
            ValueError: `pixels` has another dtype or shape.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(f"a preview is uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
        self._not_before = time.monotonic() + PREVIEW_INTERVAL_S
        _publisher().add_preview(self._job_id, _RawPreview(self._index, step, total_steps, pixels))


@dataclass(frozen=True)
class _RawPreview:
    """A preview that is not yet encoded as JPEG."""

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
    """Sends the latest update of each job from a thread.

    At most one update and one progress of each running job wait in memory. While Redis is away, they are dropped.
    """

    def __init__(self, settings: QueueSettings) -> None:
        self._redis = connect(settings.url.get_secret_value(), timeout_s=settings.socket_timeout_s)
        self._updates: OrderedDict[tuple[UUID, bool], Progress | None] = OrderedDict()
        self._previews: OrderedDict[tuple[UUID, int], _RawPreview] = OrderedDict()
        self._added = threading.Condition()
        threading.Thread(target=self._run, name="progress-publisher", daemon=True).start()

    def add_update(self, job_id: UUID, progress: Progress | None) -> None:
        """progress: None for a new event of the job."""
        with self._added:
            self._updates[job_id, progress is None] = progress
            self._added.notify()

    def add_preview(self, job_id: UUID, preview: _RawPreview) -> None:
        with self._added:
            self._previews[job_id, preview.index] = preview
            if len(self._previews) > MAX_QUEUED_PREVIEWS:
                self._previews.popitem(last=False)
            self._added.notify()

    def _run(self) -> None:
        while True:
            with self._added:
                self._added.wait_for(lambda: self._updates or self._previews)
                updates, self._updates = self._updates, OrderedDict()
                previews, self._previews = self._previews, OrderedDict()
            try:
                with self._redis.pipeline(transaction=False) as pipeline:
                    # Previews go before updates, because an update may say that the job has ended.
                    for (job_id, _), preview in previews.items():
                        pipeline.publish(f"{PREVIEW_PREFIX}{job_id}", preview.encoded().model_dump_json())
                    for (job_id, _), progress in updates.items():
                        pipeline.publish(channel(job_id), _message(progress))
                    pipeline.execute()
            except redis.RedisError as error:
                logger.warning("progress_not_published", extra={"cause": str(error)})
                time.sleep(RETRY_PAUSE_S)


@process_singleton
def _publisher() -> _Publisher:
    return _Publisher(get_settings().queue)


def _message(progress: Progress | None) -> bytes:
    return orjson.dumps(None if progress is None else [progress.step, progress.total_steps])


# --- subscribing --------------------------------------------------------------------------------------------------


class JobUpdate(NamedTuple):
    """The updates that a `JobWatch` received since the last `wait`."""

    changed: bool
    """The caller should read the job's events: there may be new ones."""
    progress: Progress | None
    previews: list[Preview]
    """The newest preview of each image."""


class JobWatch:
    """Collects the updates of one job for one thread that waits for them."""

    def __init__(self, subscriber: "Subscriber") -> None:
        self._subscriber = subscriber
        self._received = threading.Condition()
        self._changed = False
        self._progress: Progress | None = None
        self._previews: dict[int, Preview] = {}

    def wait(self, timeout_s: float) -> JobUpdate:
        """Wait up to `timeout_s` for an update.

        After `LOOK_AGAIN_S` without one, the result has `changed` set.
        """
        poll_s = LOOK_AGAIN_S[self._subscriber.connected]
        with self._received:
            received = self._received.wait_for(self._has_update, min(timeout_s, poll_s))
            changed = self._changed or (not received and poll_s <= timeout_s)
            update = JobUpdate(changed, self._progress, list(self._previews.values()))
            self._changed, self._progress, self._previews = False, None, {}
            return update

    def _has_update(self) -> bool:
        """Also true when the subscriber closes, so that `wait` returns."""
        return self._changed or self._progress is not None or bool(self._previews) or self._subscriber.closing

    def on_change(self) -> None:
        with self._received:
            self._changed = True
            self._received.notify_all()

    def on_progress(self, progress: Progress) -> None:
        with self._received:
            self._progress = progress
            self._received.notify_all()

    def on_preview(self, preview: Preview) -> None:
        with self._received:
            self._previews[preview.index] = preview
            self._received.notify_all()


class Listener(Protocol):
    """Gets the updates of one job in the subscriber's thread, so its methods must not wait."""

    def on_change(self) -> None:
        """The job may have new events, or the subscriber closes."""

    def on_progress(self, progress: Progress) -> None: ...

    def on_preview(self, preview: Preview) -> None: ...


class Subscriber:
    """One pub/sub subscription that serves every listener of a process. Safe to share between threads."""

    def __init__(self, settings: QueueSettings) -> None:
        self._redis = connect(settings.url.get_secret_value(), timeout_s=settings.socket_timeout_s)
        self._lock = threading.Lock()
        self._watches: dict[UUID, set[Listener]] = {}
        self._latest: OrderedDict[UUID, Progress] = OrderedDict()
        self._closed = threading.Event()
        self.connected = False
        """Whether messages arrive. While they do not, every watch reports a change once a second."""
        self.changes = 0
        """Number of changes of any job so far. It grows when a job has a new event or its first progress, and when
        messages may have been lost."""
        self._thread = threading.Thread(target=self._run, name="progress-subscriber", daemon=True)
        self._thread.start()

    @contextmanager
    def watch(self, job_id: UUID) -> Iterator[JobWatch]:
        """Collect the updates of `job_id` from here on. Read the job inside the block, so that no update is missed."""
        watch = JobWatch(self)
        with self.listen(job_id, watch):
            yield watch

    @contextmanager
    def listen(self, job_id: UUID, listener: Listener) -> Iterator[None]:
        """Pass the updates of `job_id` to `listener` until the block ends."""
        with self._lock:
            self._watches.setdefault(job_id, set()).add(listener)
        try:
            yield
        finally:
            with self._lock:
                remaining = self._watches[job_id]
                remaining.discard(listener)
                if not remaining:
                    del self._watches[job_id]

    def latest_progress(self, job_id: UUID) -> Progress | None:
        """The newest progress of a running job; None when no message has arrived."""
        with self._lock:
            return self._latest.get(job_id)

    @property
    def closing(self) -> bool:
        """Whether the subscription is closing: every waiting caller should stop, because no message will arrive."""
        return self._closed.is_set()

    def close(self) -> None:
        self._closed.set()
        self._notify_watches()
        self._thread.join()
        self._redis.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._listen()
            except (redis.RedisError, OSError) as error:
                logger.warning("progress_subscription_lost", extra={"cause": str(error)})
                self.connected = False
                self._notify_watches()
                self._closed.wait(RETRY_PAUSE_S)
        self.connected = False

    def _listen(self) -> None:
        with self._redis.pubsub() as subscription:  # type: ignore[no-untyped-call]
            subscription.psubscribe(f"{CHANNEL_PREFIX}*", f"{PREVIEW_PREFIX}*")
            silent_since = time.monotonic()
            while not self._closed.is_set():
                # The timeout also bounds how long close() waits.
                message = subscription.get_message(timeout=0.2)
                now = time.monotonic()
                if message is None:
                    # A frozen server keeps the connection open and sends nothing, so the client must ping it.
                    if now - silent_since > 2 * RETRY_PAUSE_S:
                        self.connected = False
                        raise redis.TimeoutError("the subscription does not answer")
                    subscription.ping()
                    continue
                silent_since = now
                if message["type"] == "psubscribe":
                    self.connected = True
                    self._notify_watches()
                elif message["type"] == "pmessage" and message["channel"].startswith(PREVIEW_PREFIX.encode()):
                    self._on_preview(message["channel"], message["data"])
                elif message["type"] == "pmessage":
                    self._on_update(message["channel"], message["data"])

    def _on_preview(self, channel_name: bytes, data: bytes) -> None:
        try:
            job_id = UUID(channel_name.decode().removeprefix(PREVIEW_PREFIX))
            with self._lock:
                watches = list(self._watches.get(job_id, ()))
            if not watches:
                return
            preview = Preview.model_validate_json(data)
        except ValueError as error:
            foreign.record_dropped("preview", error)
            return
        for watch in watches:
            watch.on_preview(preview)

    def _on_update(self, channel_name: bytes, data: bytes) -> None:
        try:
            job_id = UUID(channel_name.decode().removeprefix(CHANNEL_PREFIX))
            message = orjson.loads(data)
            progress = None if message is None else Progress(step=message[0], total_steps=message[1])
        except (ValueError, TypeError, LookupError) as error:
            foreign.record_dropped("job_update", error)
            return
        with self._lock:
            if progress is None:
                self._latest.pop(job_id, None)
                self.changes += 1
            else:
                self.changes += job_id not in self._latest
                self._latest[job_id] = progress
                self._latest.move_to_end(job_id)
                if len(self._latest) > MAX_JOBS_WITH_PROGRESS:
                    self._latest.popitem(last=False)
            watches = list(self._watches.get(job_id, ()))
        for watch in watches:
            if progress is None:
                watch.on_change()
            else:
                watch.on_progress(progress)

    def _notify_watches(self) -> None:
        """Make every watch report a change: messages may have been lost."""
        with self._lock:
            self.changes += 1
            watches = [watch for watches in self._watches.values() for watch in watches]
        for watch in watches:
            watch.on_change()


def subscriber() -> Subscriber:
    """The subscriber of this process, started at first use."""
    with _subscriber_lock:
        return _subscriber()


_subscriber_lock = threading.Lock()
"""Keeps `subscriber` from starting one while `close_subscriber` closes it."""


@process_singleton
def _subscriber() -> Subscriber:
    return Subscriber(get_settings().queue)


def close_subscriber() -> None:
    """Close the subscriber of this process, if it has one."""
    with _subscriber_lock:
        if _subscriber.cache_info().currsize:
            _subscriber().close()
