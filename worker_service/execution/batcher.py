"""One model for many threads: the batcher gathers their items into batches and runs these on the model's thread.

An item starts at once while the model is idle. While the model is busy, the next batch forms.

Interruption: after every step that the model reports, waiting batches of higher-priority lanes run before the current
batch goes on. A high-priority item therefore usually waits for one step, not for a whole batch. It waits longer while
images are decoded, and while the running batch is isolated, starving, or already delayed for `starvation_timeout_s`.
"""

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from shared import tracing
from shared.errors import ModelError, ModelOutOfMemoryError
from shared.metrics import GENERATION_BATCH_SIZE, GENERATION_MEMORY_SAVED
from shared.tracing import TraceContext
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.execution.watchdog import CallWatch, Stage, Watchdog

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CheckIn = Callable[[int, int, int], bool]
"""Called with (index of the item, steps done, steps in total); False when the job no longer wants the item."""

UNINTERRUPTIBLE = float("-inf")
"""Lane of a batch that no other batch may interrupt."""


@dataclass(eq=False)
class Submission:
    """How a job's items are queued, and what the batcher reports to the job. One per call of `Batcher.submit`.

    All callbacks run on the model's thread.
    """

    lane: int = 0
    """Rank; 0 runs first."""
    owner: Hashable = None
    """In one lane, the owner with the fewest items run since the queue was last empty goes first."""
    isolated: bool = False
    """Each item runs in a batch of its own, which neither interrupts another batch nor is interrupted. For items that
    may crash the process: see "Crash isolation" in `worker_service.jobs.attempt`."""
    job: str = ""
    """Id of the job, for the watchdog's log."""
    check_in: CheckIn = lambda _index, _step, _total_steps: True
    """Called after every step. It must touch memory only."""
    on_start: Callable[[], None] = lambda: None
    """Called once, right before the first item runs. An exception ends the submission."""
    start_together: Callable[[Sequence[Any]], Collection[Any]] = lambda _submissions: ()
    """Called first, with all submissions of a batch that start and have the same function. It returns those that it
    has started. `on_start` is called for the others only. It must not raise."""
    add_delay: Callable[[float], None] = lambda _seconds: None
    """Called with the seconds that a higher-priority batch has just delayed a running item."""
    started: bool = field(default=False, init=False)
    trace: TraceContext | None = field(default_factory=tracing.current, init=False)
    """The span of the job's stage, to which the spans of its batches belong."""


@dataclass(eq=False)
class QueuedItem(Generic[Item, Result]):
    """One item, from its submission to its result."""

    item: Item
    index: int
    """Position in its submission."""
    key: Hashable
    submission: Submission
    submitted_at: float = field(default_factory=time.monotonic)
    result: Future[Result] = field(default_factory=Future)

    def report_step(self, step: int, total_steps: int) -> bool:
        """Report a step to the job. False: it no longer wants this item, and `submit` raises `CallStopped`."""
        if not self.result.done() and not self.submission.check_in(self.index, step, total_steps):
            self.result.set_exception(CallStopped())
        return not self.result.done()


@dataclass(eq=False)
class Batch(Generic[Item, Result]):
    """Items that share one call of the model."""

    items: Sequence[QueuedItem[Item, Result]]
    lane: float
    """Rank. Batches of higher-priority lanes may interrupt this one. With `UNINTERRUPTIBLE`, no batch may."""
    delayed_s: float = 0.0
    """Seconds this batch, or the batch it interrupts, was delayed by higher-priority batches."""


class Batcher(Generic[Item, Result]):
    """Runs `run(items, on_step)` for batches of at most `max_batch_size` items with equal lane and equal `key(item)`.

    Order: by lane, then by how few items of the owner ran since the queue was last empty, then by age. At most once
    per `starvation_timeout_s`, the oldest item runs next if it has waited that long: alone, and not interrupted. So
    every lane makes progress.

    Failure: a batch that fails runs again in halves, down to single items, so that one bad item fails alone.

    Interruption: when `run` reports a step, waiting batches of higher-priority lanes run before `on_step` returns.
    `run` is then called from within itself, and must allow that. A batch that was delayed by `starvation_timeout_s` in
    total is not interrupted again.

    Batch time: with `max_batch_s`, a batch has as many items as the model runs in that time at its latest rate, but at
    least one. This is for models that report no steps and therefore cannot be interrupted.

    Concurrency: with `concurrency` above 1, that many batches run at once, each on its own thread. `run` must allow
    that too.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item], OnStep], Sequence[Result]],
        *,
        key: Callable[[Item], Hashable],
        max_batch_size: int,
        name: str,
        watchdog: Watchdog,
        stage: Stage = Stage.STEP,
        starvation_timeout_s: float = float("inf"),
        max_batch_s: float = float("inf"),
        concurrency: int = 1,
        interruptible: bool = True,
    ) -> None:
        """Start the model threads.

        run: returns one result per item, in order; it calls its `OnStep` after every step and stops if that is False.
        name: of the model, for logs and metrics.
        stage: the first stage of a call, for the watchdog. After the last reported step it is `Stage.DECODE`.
        interruptible: False if a call within a call changes the results. Then no batch interrupts another.
        """
        self._run = run
        self._key = key
        self._max_batch_size = max_batch_size
        self._name = name
        self._watchdog = watchdog
        self._stage = stage
        self._span_name = "embed batch" if stage is Stage.EMBED else "generate batch"
        self._starvation_timeout_s = starvation_timeout_s
        self._max_batch_s = max_batch_s
        self._interruptible = interruptible
        self._seconds_per_item: dict[Hashable, float] = {}
        """Measured in the latest batch, by key."""
        self._last_starving_at = float("-inf")
        self._queue: list[QueuedItem[Item, Result]] = []
        self._items_run: defaultdict[Hashable, int] = defaultdict(int)
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"model-{name}", daemon=True) for _ in range(concurrency)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, items: Sequence[Item], submission: Submission | None = None) -> list[Result]:
        """Queue these items and wait for their results, in order. They may run in different batches. Thread-safe.

        Raises:
            CallStopped: `check_in` returned False, or the batcher was closed.
            Exception: `on_start` raised it, or the model raised it for the first item that failed.
        """
        submission = submission or Submission()
        queued = [
            QueuedItem[Item, Result](item, index, self._key(item), submission) for index, item in enumerate(items)
        ]
        with self._changed:
            if self._closed:
                raise CallStopped
            self._queue.extend(queued)
            self._changed.notify_all()
        try:
            return [each.result.result() for each in queued]
        finally:
            for each in queued:
                each.result.cancel()  # after a failure the job does not want its other items

    def close(self, timeout_s: float) -> None:
        """Drop the waiting items, then wait up to `timeout_s` for the running batches.

        `submit` raises `CallStopped` for a dropped item.
        """
        ends_at = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            for queued in self._queue:
                if not queued.result.done():
                    queued.result.set_exception(CallStopped())
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0, ends_at - time.monotonic()))

    def _work(self) -> None:
        while (batch := self._wait_for_batch()) is not None:
            self._start_and_run(batch)

    def _start_and_run(self, batch: Batch[Item, Result], outer: CallWatch | None = None) -> None:
        """Start the batch and run it. outer: watch of the model call that this batch interrupts, if any."""
        with tracing.shared_span("start batch", {"items": len(batch.items)}, _traces(batch.items)):
            batch.items = self._start_submissions(batch.items, outer)
        if batch.items:
            GENERATION_BATCH_SIZE.labels(self._name).observe(len(batch.items))
            self._run_batch(batch, batch.items, outer)

    def _run_higher_priority_batch(self, batch: Batch[Item, Result], watch: CallWatch) -> bool:
        """Run one batch of a higher-priority lane while `batch` is between two steps; False when none waits."""
        if batch.delayed_s >= self._starvation_timeout_s or (urgent := self._take_batch(batch.lane)) is None:
            return False
        started = time.monotonic()
        urgent.delayed_s = batch.delayed_s  # a batch that interrupts `urgent` delays `batch` too
        self._start_and_run(urgent, outer=watch)
        delay_s = time.monotonic() - started
        batch.delayed_s += delay_s
        for submission in {queued.submission for queued in batch.items}:
            submission.add_delay(delay_s)
        return True

    def _start_submissions(
        self, items: Sequence[QueuedItem[Item, Result]], outer: CallWatch | None
    ) -> list[QueuedItem[Item, Result]]:
        """Start the submissions that have not started; return the items that are still wanted afterwards."""
        errors: dict[Submission, Exception] = {}
        starting = [each for each in dict.fromkeys(queued.submission for queued in items) if not each.started]
        for start_together in {submission.start_together for submission in starting}:
            for started in start_together([each for each in starting if each.start_together == start_together]):
                started.started = True
        for submission in starting:
            if not submission.started:
                try:
                    submission.on_start()
                    submission.started = True
                except Exception as error:
                    errors[submission] = error
            if outer is not None:  # a slow database is not a stuck model
                outer.progress(self._stage)
        for queued in items:
            if queued.submission in errors:
                queued.result.set_exception(errors[queued.submission])
        return [queued for queued in items if not queued.result.done()]

    def _wait_for_batch(self) -> Batch[Item, Result] | None:
        """Wait for the next batch; None when the batcher is closed and the queue is empty."""
        with self._changed:
            while (batch := self._take_batch()) is None:
                self._items_run.clear()
                if self._closed:
                    return None
                self._changed.wait()
            return batch

    def _take_batch(self, interrupted_lane: float = float("inf")) -> Batch[Item, Result] | None:
        """Remove the next batch from the queue; None when no item may interrupt `interrupted_lane`."""
        with self._changed:
            self._queue = [queued for queued in self._queue if not queued.result.done()]
            starving = self._starving_item() if interrupted_lane == float("inf") else None
            batch: list[QueuedItem[Item, Result]] = []
            while candidates := [queued for queued in self._queue if _can_join(queued, batch, interrupted_lane)]:
                best = min(
                    candidates, key=lambda q: (q.submission.lane, self._items_run[q.submission.owner], q.submitted_at)
                )
                chosen = starving if starving in candidates else best
                self._queue.remove(chosen)
                # From here on only the model's thread sets the item's result: `submit` can no longer cancel the future.
                if not chosen.result.set_running_or_notify_cancel():
                    continue
                self._items_run[chosen.submission.owner] += 1
                batch.append(chosen)
                if chosen.submission.isolated or chosen is starving:
                    return Batch(batch, lane=UNINTERRUPTIBLE)
                if len(batch) == self._batch_size(chosen.key):
                    break
            if not batch:
                return None
            return Batch(batch, batch[0].submission.lane if self._interruptible else UNINTERRUPTIBLE)

    def _batch_size(self, key: Hashable) -> int:
        if self._max_batch_s == float("inf"):
            return self._max_batch_size
        # The first batch has one item, to measure the rate.
        items = self._max_batch_s / self._seconds_per_item.get(key, self._max_batch_s)
        return max(1, min(self._max_batch_size, round(items)))

    def _starving_item(self) -> QueuedItem[Item, Result] | None:
        """The oldest item if it has waited `starvation_timeout_s`, at most one in that time; otherwise None."""
        if not self._queue:
            return None
        oldest = min(self._queue, key=lambda queued: queued.submitted_at)
        now = time.monotonic()
        if min(now - oldest.submitted_at, now - self._last_starving_at) < self._starvation_timeout_s:
            return None
        self._last_starving_at = now
        return oldest

    def _run_batch(
        self, batch: Batch[Item, Result], items: Sequence[QueuedItem[Item, Result]], outer: CallWatch | None
    ) -> None:
        """Run these items of `batch` in one call, and in halves if the call fails."""

        def on_step(step: int, total_steps: int) -> bool:
            while True:
                # A list, not a generator: every job gets a report of every step.
                wanted = [queued.report_step(step, total_steps) for queued in items]
                if not any(wanted) or not self._run_higher_priority_batch(batch, watch):
                    break
            watch.progress(Stage.STEP if step < total_steps else Stage.DECODE)
            return any(wanted)

        items = [queued for queued in items if not queued.result.done()]
        if not items:
            return
        failure: BaseException | None = None
        try:
            jobs = sorted({queued.submission.job for queued in items if queued.submission.job})
            started = time.monotonic()
            with (
                tracing.shared_span(self._span_name, {"model": self._name, "items": len(items)}, _traces(items)),
                self._watchdog.watch(self._stage, model=self._name, jobs=jobs, outer=outer) as watch,
            ):
                results = self._run([queued.item for queued in items], on_step)
            if self._max_batch_s < float("inf"):  # otherwise unused, and a model can have very many keys
                self._seconds_per_item[items[0].key] = (time.monotonic() - started) / len(items)
            if len(results) != len(items):
                raise ModelError(f"The model returned {len(results)} results for {len(items)} items.")
        except Exception as error:
            failure = error
        # Outside of the handler, whose traceback would keep the failed batch's tensors alive through the retry.
        if failure is None:
            for queued, result in zip(items, results, strict=True):
                if not queued.result.done():
                    queued.result.set_result(result)
        elif isinstance(failure, CallStopped) or len(items) == 1:
            for queued in items:
                if not queued.result.done():
                    queued.result.set_exception(failure)
            failure = None  # its traceback refers to this frame, and so to the tensors of the frames below
        else:
            cause = "out_of_memory" if isinstance(failure, ModelOutOfMemoryError) else type(failure).__name__
            if cause == "out_of_memory":
                GENERATION_MEMORY_SAVED.labels(self._name, "smaller_batch").inc()
            logger.warning("batch_split", extra={"model": self._name, "size": len(items), "cause": cause})
            failure = None
            middle = len(items) // 2
            self._run_batch(batch, items[:middle], outer)
            self._run_batch(batch, items[middle:], outer)


def _traces(items: Sequence[QueuedItem[Any, Any]]) -> Iterator[tuple[TraceContext | None, dict[str, Any]]]:
    """The traces of the jobs in a batch, each with its share of the items."""
    for submission, share in Counter(queued.submission for queued in items).items():
        yield submission.trace, {"items_of_job": share}


def _can_join(
    queued: QueuedItem[Item, Result], batch: Sequence[QueuedItem[Item, Result]], interrupted_lane: float
) -> bool:
    """Whether the item can join `batch`, or, when `batch` is empty, start one that interrupts `interrupted_lane`."""
    submission = queued.submission
    if batch:
        first = batch[0]
        return (queued.key, submission.lane) == (first.key, first.submission.lane) and not submission.isolated
    return submission.lane < interrupted_lane and not (submission.isolated and interrupted_lane < float("inf"))
