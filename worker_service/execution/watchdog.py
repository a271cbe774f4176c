"""The watchdog ends the process when a model call makes no progress. The leases then return its jobs to the queue.

Python cannot stop a thread that hangs inside a library, so the whole process has to end. The watchdog touches memory
only: it also works while the database, the broker or the log hang.
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
"""Exit status of a process that the watchdog ended: EX_SOFTWARE of sysexits.h."""
POLL_S = 0.5
"""How often the time limits are checked."""
HELD_GIL_GRACE_S = 30.0
"""Extra time for a call that holds the interpreter lock (GIL), so that the watchdog's thread cannot run."""
LOG_TIMEOUT_S = 2.0
"""How long `end_process` waits for its line of log."""


class Stage(StrEnum):
    """Stage of a model call. Each has its own time limit in the settings, in seconds."""

    LOAD = "load"
    WARM_UP = "warm_up"
    EMBED = "embed"
    STEP = "step"
    DECODE = "decode"


class AcceleratorLostError(Exception):
    """The accelerator no longer responds to this process; only a new process can use it again."""


class CallWatch:
    """One model call that is watched. The thread that makes the call reports its progress."""

    def __init__(self, stage: Stage, model: str, jobs: Sequence[str], outer: Self | None) -> None:
        self.model = model
        self.jobs = jobs
        self.outer = outer
        self.thread_id = threading.get_ident()
        self.progress(stage)

    def progress(self, stage: Stage) -> None:
        """Restart the time limit, now that of `stage`, for this call and for the calls that it interrupts."""
        self.stage_started = (stage, time.monotonic())  # one assignment: the watchdog reads both or neither
        if self.outer is not None:
            self.outer.progress(stage)


class Watchdog:
    """Ends the process when a watched model call makes no progress; a context manager around the life of the process.

    Outside of its block no time limit applies: tests and tools use it that way.
    """

    def __init__(self, settings: WatchdogSettings) -> None:
        self._limits_s = {
            Stage.LOAD: settings.load_s,
            Stage.WARM_UP: settings.warm_up_s,
            Stage.EMBED: settings.embed_s,
            Stage.STEP: settings.step_s,
            Stage.DECODE: settings.decode_s,
        }
        self._watches: set[CallWatch] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    @contextmanager
    def watch(
        self, stage: Stage, *, model: str, jobs: Sequence[str] = (), outer: CallWatch | None = None
    ) -> Iterator[CallWatch]:
        """Watch one model call of this thread. An `AcceleratorLostError` inside the block ends the process too.

        jobs: ids of the jobs in the call, for the log. outer: watch of the model call that this one interrupts.
        """
        watch = CallWatch(stage, model, jobs, outer)
        with self._lock:
            self._watches.add(watch)
            if self._thread.is_alive():
                self._schedule_hard_exit()  # at once: from here on the call may hold the interpreter lock
        try:
            yield watch
        except AcceleratorLostError as error:
            end_process("accelerator_lost", {**_log_fields(watch), "cause": str(error)}, status=EXIT_CODE)
        finally:
            with self._lock:
                self._watches.discard(watch)

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            self._check()
        faulthandler.cancel_dump_traceback_later()

    def _check(self) -> None:
        with self._lock:
            watches = list(self._watches)
            self._schedule_hard_exit()
        interrupted = {watch.outer for watch in watches}
        for watch in set(watches) - interrupted:
            if self._remaining_s(watch) < 0:
                end_process(
                    "model_stuck", {**_log_fields(watch), "stack": _stack_of_thread(watch.thread_id)}, status=EXIT_CODE
                )

    def _schedule_hard_exit(self) -> None:
        """Schedule the end of the process for a call that never releases the interpreter lock.

        `faulthandler` does it in a thread of C code, with exit status 1 and every thread's stack on stderr.
        """
        if self._watches and sys.__stderr__ is not None:
            remaining_s = max(0.0, min(map(self._remaining_s, self._watches)))
            faulthandler.dump_traceback_later(remaining_s + HELD_GIL_GRACE_S, exit=True, file=sys.__stderr__)
        else:
            faulthandler.cancel_dump_traceback_later()

    def _remaining_s(self, watch: CallWatch) -> float:
        stage, since = watch.stage_started
        return since + self._limits_s[stage] - time.monotonic()


def _log_fields(watch: CallWatch) -> dict[str, Any]:
    stage, since = watch.stage_started
    return {
        "model": watch.model,
        "stage": stage.value,
        "seconds": round(time.monotonic() - since, 1),
        "jobs": list(watch.jobs),
    }


def _stack_of_thread(thread_id: int) -> str:
    return "".join(traceback.format_stack(sys._current_frames().get(thread_id)))


def end_process(event: str, fields: dict[str, Any], *, status: int) -> NoReturn:
    """Log one line, then end this process at once, whatever its threads do.

    event, fields: the log event and its fields. status: the exit status.
    """
    # In a thread, because a hanging thread may hold the lock of the log.
    line = threading.Thread(
        target=logger.critical, args=(event,), kwargs={"extra": {**fields, "exit_status": status}}, daemon=True
    )
    line.start()
    line.join(LOG_TIMEOUT_S)
    os._exit(status)
