"""The life of a worker process: its row in the database, its heartbeat, Celery's main loop, and the shutdown."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from celery import Celery, Task
from celery.signals import worker_ready, worker_shutdown, worker_shutting_down

from shared.db import workers
from shared.db.session import session_scope
from shared.errors import DatabaseConnectionError, DatabaseError
from shared.messaging import queue
from shared.settings import Settings
from worker_service.execution.watchdog import end_process
from worker_service.readiness import get_readiness
from worker_service.workers import revoke

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0
CONCURRENCY = 16
"""Jobs at a time, unless the settings name a number."""
BATCHES_AT_ONCE = 4
"""Batches whose jobs a generate worker holds at a time, at least: see `WorkerProcess.concurrency`."""
EXTRA_SHUTDOWN_S = 15
"""Seconds after the shutdown grace time at which a process that still runs is ended hard."""


class WorkerTask(Task[..., Any]):
    """A task that logs a temporary error of the database in one line. The reconciler notifies a worker again."""

    throws = (DatabaseConnectionError,)
    """Celery logs other errors with their traceback."""

    def on_failure(self, exc: Exception, *_: Any, **__: Any) -> None:
        if isinstance(exc, DatabaseConnectionError):
            fields = {"task": self.name, "cause": exc.code, "detail": exc.message}
            logger.warning("task_interrupted", extra=fields)


@dataclass
class WorkerProcess:
    """A worker process and its row in the database: `loading`, then `ready` or `standby`, and deleted at the end.

    A context manager around the life of the process. While it loads, SIGTERM or SIGINT end it at once, with exit
    status 0. When it serves, Celery's signal handlers take over.
    """

    kind: str
    model: str | None
    settings: Settings
    lane_headroom: int = 0
    """How many more jobs it takes from each lane than from the next lower-priority lane."""
    bulk_pause_s: float = 0.0
    """Seconds between two jobs of lane `bulk` while higher-priority lanes are in use, at least."""
    space: str | None = None
    """Digest of the embedding space of its CLIP, once that is loaded."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the process should stop."""
    standby: threading.Event = field(default_factory=threading.Event)
    """Set while another embedding space is active."""
    _row_lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the row is written or deleted, so that no heartbeat adds it again."""
    _consumer: Any = None
    """Celery's consumer, once it is ready."""

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end_on_signal)
        self.write_heartbeat("loading")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        self._withdraw()

    @property
    def id(self) -> str:
        """Unique name of the process, such as `generate.sdxl-4711@host`."""
        return f"{self.kind}{f'.{self.model}' if self.model else ''}-{os.getpid()}@{socket.gethostname()}"

    @property
    def serving_state(self) -> str:
        """The state of a process that has loaded its models."""
        return "standby" if self.standby.is_set() else "ready"

    @property
    def concurrency(self) -> int:
        """The number of jobs at a time, without headroom.

        While one batch is drawn, jobs of others are prepared and stored. With two batches in all, many were not full.
        """
        if self.settings.worker.concurrency is not None:
            return self.settings.worker.concurrency
        images = 0 if self.model is None else self.settings.model.generator(self.model).max_batch_size
        return max(CONCURRENCY, BATCHES_AT_ONCE * images)

    @property
    def lane_limits(self) -> list[int]:
        """For each lane, highest priority first: the number of unfinished jobs at which no more are taken from it."""
        return [self.concurrency + self.lane_headroom * lower_lanes for lower_lanes in reversed(queue.LANES)]

    def app(self) -> Celery:
        """A Celery application for this process's tasks."""
        app = queue.configure(Celery("afterimage", task_cls=WorkerTask), self.settings.queue)
        app.conf.worker_consumer = "worker_service.workers.consumer:Consumer"
        app.conf.broker_transport = "worker_service.workers.lane_transport:Transport"
        app.conf.broker_transport_options["lane_limits"] = self.lane_limits
        app.conf.broker_transport_options["bulk_pause_s"] = self.bulk_pause_s
        app.conf.worker_disable_prefetch = True
        return app

    def write_heartbeat(self, state: str) -> None:
        """Write the process's state and the time of this heartbeat, unless the process stops.

        A process that has loaded its models is ready as long as it writes heartbeats.

        Raises:
            DatabaseError: the database failed.
        """
        with self._row_lock:
            if not self.stopping.is_set():
                with session_scope() as session:
                    workers.heartbeat(session, self.id, kind=self.kind, model=self.model, state=state, space=self.space)
                if state != "loading":
                    get_readiness().confirm(for_s=workers.LIVE_S)

    def start_heartbeat(self) -> None:
        """Write `ready` or `standby` every `HEARTBEAT_S` seconds, in a thread, until the process stops."""

        def write_until_stopped() -> None:
            while not self.stopping.wait(HEARTBEAT_S):
                try:
                    self.write_heartbeat(self.serving_state)
                except DatabaseError as error:
                    logger.warning("heartbeat_failed", extra={"cause": error.code})

        threading.Thread(target=write_until_stopped, name="heartbeat", daemon=True).start()

    def read_queue(self, name: str, *, read: bool) -> None:
        """Let Celery begin or stop to read a queue, soon and in its own thread. Any thread may call it.

        The call has no effect while Celery starts or has no connection to the broker: repeat it.
        """
        consumer = self._consumer
        if consumer is None:
            return

        def begin_or_stop() -> None:
            tasks = consumer.task_consumer
            if tasks is None or tasks.consuming_from(name) == read:
                return
            if read:
                consumer.add_task_queue(name)
            else:
                consumer.cancel_task_queue(name)

        consumer.call_soon(begin_or_stop)

    def serve(
        self, app: Celery, queues: list[str], *, on_stop: Callable[[], Any], optional_queues: Sequence[str] = ()
    ) -> None:
        """Run the tasks of these queues until SIGTERM or SIGINT, then end within the grace time.

        optional_queues: more queues that `read_queue` may name.

        Celery's warm shutdown waits for running tasks without limit. `on_stop` therefore runs in another thread and
        must make the tasks end. A process that still runs `EXTRA_SHUTDOWN_S` after the grace time is ended hard, and
        its leases return its jobs to the queue.

        Raises:
            SystemExit: Celery ended because of an error that it does not recover from.
        """

        def stop(**_: object) -> None:
            self.stopping.set()
            get_readiness().withdraw()
            threading.Thread(target=on_stop, name="stop", daemon=True).start()
            limit_s = self.settings.jobs.shutdown_grace_s + EXTRA_SHUTDOWN_S
            hard_exit = threading.Timer(
                limit_s, end_process, args=("stop_took_too_long", {"seconds": limit_s}), kwargs={"status": 1}
            )
            hard_exit.daemon = True
            hard_exit.start()

        status: list[int] = []

        def keep_status(sender: Any, **_: object) -> None:
            status.append(sender.exitcode or 0)

        def keep_consumer(sender: Any, **_: object) -> None:
            self._consumer = sender

        worker_ready.connect(keep_consumer, weak=False)
        worker_shutting_down.connect(stop, weak=False)
        # `worker_main` does not return the exit status: a worker that failed would end with status 0.
        worker_shutdown.connect(keep_status, weak=False)
        app.conf.broker_transport_options["queues"] = [*queues, *optional_queues]
        revoke.cancel_revoked_jobs()
        self.write_heartbeat(self.serving_state)
        self.start_heartbeat()
        app.worker_main(
            [
                "--quiet",  # no banner between the log's lines
                "worker",
                "--pool=threads",
                f"--concurrency={max(self.lane_limits)}",
                f"--queues={','.join(queues)}",
                f"--hostname={self.id}",
                "--task-events",
                "--without-gossip",
                "--without-mingle",
                f"--loglevel={self.settings.logging.level}",
            ]
        )
        if any(status):
            raise SystemExit(max(status))

    def _end_on_signal(self, number: int, _frame: FrameType | None) -> None:
        """End the process, which has claimed nothing yet, from another thread.

        An exception would be raised inside a library that loads a model, and the library may catch it.
        """
        signal.signal(number, signal.SIG_DFL)  # a second signal ends the process at once
        self.stopping.set()
        threading.Thread(target=self._end, name="stop", daemon=True).start()

    def _end(self) -> NoReturn:
        logger.info("stopped_while_loading", extra={"worker": self.id})
        self._withdraw()
        os._exit(0)

    def _withdraw(self) -> None:
        """Delete the process's row. A database error is logged."""
        try:
            with self._row_lock, session_scope() as session:
                workers.remove(session, self.id)
        except DatabaseError as failure:
            # The row stays, but without heartbeats the worker soon does not count as live.
            logger.warning("worker_not_withdrawn", extra={"cause": failure.code})
