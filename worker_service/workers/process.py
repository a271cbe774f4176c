"""A worker process as Celery and the other processes see it, from start to a clean end."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from celery import Celery
from celery.signals import worker_shutting_down

from shared.db import workers
from shared.db.session import session_scope
from shared.errors import DatabaseError
from shared.messaging import queue
from shared.settings import Settings
from worker_service.execution.watchdog import end_process
from worker_service.workers import revoke

logger = logging.getLogger(__name__)

HEARTBEAT_S = 5.0


@dataclass
class WorkerProcess:
    """This process as others see it: announced while it loads, ready when it serves, gone when it ends.

    A context manager around the life of the process. SIGTERM or SIGINT while it loads end it in order; Celery's own
    handlers take their place when it serves.
    """

    kind: str
    model: str | None
    settings: Settings
    spare_seats: int = 0
    """How many more jobs it takes of each lane than of the next worse one."""
    bulk_pause_s: float = 0.0
    """How far apart it takes a bulk's jobs while better lanes are in use."""
    stopping: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _leave)
        self.announce("loading")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopping.set()
        try:
            with session_scope() as session:
                workers.gone(session, self.id)
        except DatabaseError as missed:
            logger.warning("worker_not_withdrawn", extra={"cause": missed.code})  # silent, it is soon not counted

    @property
    def id(self) -> str:
        return f"{self.kind}{f'.{self.model}' if self.model else ''}-{os.getpid()}@{socket.gethostname()}"

    @property
    def lane_seats(self) -> list[int]:
        """With how many jobs in hand it takes no more of a lane, best lane first."""
        return [self.settings.worker.concurrency + self.spare_seats * worse for worse in reversed(queue.LANES)]

    def app(self) -> Celery:
        """A Celery application for this process's tasks."""
        app = queue.configure(Celery("afterimage"), self.settings.queue)
        app.conf.worker_consumer = "worker_service.workers.consumer:Consumer"
        app.conf.broker_transport = "worker_service.workers.lane_transport:Transport"
        app.conf.broker_transport_options["lane_seats"] = self.lane_seats
        app.conf.broker_transport_options["bulk_pause_s"] = self.bulk_pause_s
        app.conf.worker_disable_prefetch = True
        return app

    def announce(self, state: str) -> None:
        with session_scope() as session:
            workers.heartbeat(session, self.id, kind=self.kind, model=self.model, state=state)

    def keep_announcing(self) -> None:
        """Say `ready` from a side thread until the process stops."""

        def beat() -> None:
            while not self.stopping.wait(HEARTBEAT_S):
                try:
                    self.announce("ready")
                except DatabaseError as error:
                    logger.warning("heartbeat_failed", extra={"cause": error.code})

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def serve(self, app: Celery, queues: list[str], *, on_stop: Callable[[], Any]) -> None:
        """Consume until SIGTERM or SIGINT, then end within the grace time.

        Celery's warm shutdown waits for running tasks without limit, so `on_stop` runs in a thread beside it and must
        make them end; a process that still hangs afterwards is ended hard: leases bring its jobs back.
        """

        def stop(**_: object) -> None:
            self.stopping.set()
            threading.Thread(target=on_stop, name="stop", daemon=True).start()
            patience_s = self.settings.jobs.shutdown_grace_s + 15
            hard_end = threading.Timer(
                patience_s, end_process, args=("stop_took_too_long", {"seconds": patience_s}), kwargs={"status": 1}
            )
            hard_end.daemon = True
            hard_end.start()

        worker_shutting_down.connect(stop, weak=False)
        revoke.treat_as_cancel()
        self.announce("ready")
        self.keep_announcing()
        app.worker_main(
            [
                "--quiet",  # no banner between the log's lines
                "worker",
                "--pool=threads",
                f"--concurrency={max(self.lane_seats)}",
                f"--queues={','.join(queues)}",
                f"--hostname={self.id}",
                "--task-events",
                "--without-gossip",
                "--without-mingle",
                f"--loglevel={self.settings.logging.level}",
            ]
        )


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_DFL)  # who asks twice does not want to wait
    raise SystemExit(0)
