"""The watchdog: a model call without progress ends its process, so that leases bring the process's jobs back.

A thread that hangs inside a library cannot be stopped, only left behind with its whole process. The watchdog touches
memory only: it fires also while the database, the broker or the log hang.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import Any, NoReturn, Self

from shared.settings import WatchdogSettings

logger = logging.getLogger(__name__)

EXIT_CODE = 70
"""What a process ends with that was given up: EX_SOFTWARE of sysexits.h."""
LOOK_S = 0.5
BLOCKED_S = 30.0
"""How much later a call is ended that holds the interpreter, so that not even the watchdog's thread can run."""
LOG_S = 2.0


class Stage(StrEnum):
    """What a model is doing; each has a limit of its own in the settings."""

    LOAD = "load"
    WARM_UP = "warm_up"
    EMBED = "embed"
    STEP = "step"
    DECODE = "decode"


class AcceleratorLostError(Exception):
    """The accelerator answers this process no more; only a new process can use it again."""


class Watch:
    """One model at work. Its own thread says how far it is."""

    def __init__(self, stage: Stage, model: str, jobs: Sequence[str], within: Self | None) -> None:
        self.model = model
        self.jobs = jobs
        self.within = within
        self.thread_id = threading.get_ident()
        self.progress(stage)

    def progress(self, stage: Stage) -> None:
        """Something was done, also for the call that this one is within; from now on the limit of `stage` counts."""
        self.at = (stage, time.monotonic())  # one assignment: the watchdog sees both or neither
        if self.within is not None:
            self.within.progress(stage)


class Watchdog:
    """Ends the process when what it watches stands still; a context manager around the life of the process.

    Outside of that block it only listens, which is what tests and tools want.
    """

    def __init__(self, settings: WatchdogSettings) -> None:
        self._limits_s = {
            Stage.LOAD: settings.load_s,
            Stage.WARM_UP: settings.warm_up_s,
            Stage.EMBED: settings.embed_s,
            Stage.STEP: settings.step_s,
            Stage.DECODE: settings.decode_s,
        }
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    @contextmanager
    def watch(
        self, stage: Stage, *, model: str, jobs: Sequence[str] = (), within: Watch | None = None
    ) -> Iterator[Watch]:
        """Around one model call of this thread. jobs: whom the call works for, for the log. within: the call that
        waits meanwhile.

        An AcceleratorLostError inside ends the process too.
        """
        watch = Watch(stage, model, jobs, within)
        with self._lock:
            self._watches.add(watch)
            if self._thread.is_alive():
                self._arm()  # at once: from here on the call may hold the interpreter
        try:
            yield watch
        except AcceleratorLostError as error:
            end_process("accelerator_lost", {**_described(watch), "cause": str(error)}, status=EXIT_CODE)
        finally:
            with self._lock:
                self._watches.discard(watch)

    def _work(self) -> None:
        while not self._over.wait(LOOK_S):
            self._look()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        with self._lock:
            watches = list(self._watches)
            self._arm()
        waiting = {watch.within for watch in watches}
        for watch in set(watches) - waiting:
            if self._left_s(watch) < 0:
                end_process("model_stuck", {**_described(watch), "stack": _stack(watch.thread_id)}, status=EXIT_CODE)

    def _arm(self) -> None:
        """Have a call ended that never lets go of the interpreter, so that this module's thread cannot run.

        By a thread of C code: exit status 1, and every thread's stack on stderr.
        """
        if self._watches and sys.__stderr__ is not None:
            left_s = max(0.0, min(map(self._left_s, self._watches)))
            faulthandler.dump_traceback_later(left_s + BLOCKED_S, exit=True, file=sys.__stderr__)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _left_s(self, watch: Watch) -> float:
        stage, since = watch.at
        return since + self._limits_s[stage] - time.monotonic()


def _described(watch: Watch) -> dict[str, Any]:
    stage, since = watch.at
    return {
        "model": watch.model,
        "stage": stage.value,
        "seconds": round(time.monotonic() - since, 1),
        "jobs": list(watch.jobs),
    }


def _stack(thread_id: int) -> str:
    return "".join(traceback.format_stack(sys._current_frames().get(thread_id)))


def end_process(event: str, fields: dict[str, Any], *, status: int) -> NoReturn:
    """End this process now, whatever its threads do, after one line of log."""
    # In a thread, because what hangs may hold the lock of the log.
    line = threading.Thread(
        target=logger.critical, args=(event,), kwargs={"extra": {**fields, "exit_status": status}}, daemon=True
    )
    line.start()
    line.join(LOG_S)
    os._exit(status)
