"""Many threads, one model: a batcher gathers compatible items from all of them and runs each batch on its own thread.

It never waits for company. While the model is idle, an item starts at once; while it is busy, the next batch forms.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shared.errors import ModelError, ModelOutOfMemoryError
from shared.metrics import GENERATION_BATCH_SIZE, GENERATION_MEMORY_SAVED
from worker_service.image_request import Interrupted, OnStep
from worker_service.watchdog import Stage, Watchdog

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

CheckIn = Callable[[int, int, int], bool]
"""A job's word on a step of one of its items (index, steps done, steps in all): False when it is no longer wanted.
Called on the model's thread, so it touches memory only."""


@dataclass(eq=False)
class Asker:
    """Who waits for the items of one `submit`."""

    lane: int
    owner: Hashable
    check_in: CheckIn
    begin: Callable[[], None]
    alone: bool
    job: str
    begun: bool = False


@dataclass(eq=False)
class Ticket(Generic[Item, Result]):
    """One item in line."""

    item: Item
    index: int
    key: Hashable
    asker: Asker
    submitted_at: float = field(default_factory=time.monotonic)
    result: Future[Result] = field(default_factory=Future)

    def wanted(self, step: int, total_steps: int) -> bool:
        """Ask the job; the first no ends the wait for this item, while its batch goes on for the others."""
        if not self.result.done() and not self.asker.check_in(self.index, step, total_steps):
            self.result.set_exception(Interrupted())
        return not self.result.done()


class Batcher(Generic[Item, Result]):
    """Runs `run(items, on_step)` for batches of at most `max_batch_size` items with equal `key(item)`.

    Which items go next is decided by lane, then by how much their owner was served lately, then by age. Once in
    `starving_s` what has been in line for that long goes first, so that no lane waits for ever under those above it.
    A batch that fails is run again in halves, down to single items, so that one bad item harms only itself.

    With `longest_s` a batch is as large as the latest pace lets it end in about that time, one item at least: nothing
    interrupts it, so the next item of a better lane waits for its end.
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
        starving_s: float = float("inf"),
        longest_s: float = float("inf"),
    ) -> None:
        """stage: what a call of `run` begins with; after the last step that `run` tells of comes the decoding."""
        self._run = run
        self._key = key
        self._max_batch_size = max_batch_size
        self._name = name
        self._watchdog = watchdog
        self._stage = stage
        self._starving_s = starving_s
        self._longest_s = longest_s
        self._item_s: dict[Hashable, float] = {}
        """Seconds per item of the latest batch, by key."""
        self._starving_served_at = float("-inf")
        self._line: list[Ticket[Item, Result]] = []
        self._served: defaultdict[Hashable, int] = defaultdict(int)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"model-{name}", daemon=True)
        self._thread.start()

    def submit(
        self,
        items: Sequence[Item],
        *,
        lane: int = 0,
        owner: Hashable = None,
        check_in: CheckIn = lambda _index, _step, _total: True,
        begin: Callable[[], None] = lambda: None,
        alone: bool = False,
        job: str = "",
    ) -> list[Result]:
        """Run these items, each in whatever batch it fits, and wait for all of them.

        begin: called once, on the model's thread, right before the first of the items runs: waiting in line is not
            running. What it raises ends the submit.
        alone: never share a batch, for items that may bring their process down.
        job: who this is, for the log of the watchdog.

        Raises:
            Interrupted: `check_in` said no, or the batcher was closed.
            Exception: whatever the model raised for the first item that failed.
        """
        asker = Asker(lane, owner, check_in, begin, alone, job)
        tickets = [Ticket[Item, Result](item, index, self._key(item), asker) for index, item in enumerate(items)]
        with self._changed:
            if self._closed:
                raise Interrupted
            self._line.extend(tickets)
            self._changed.notify()
        try:
            return [ticket.result.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.result.cancel()  # after a failure the rest of this job is not wanted any more

    def close(self, timeout_s: float) -> None:
        """Refuse what is in line, wait up to `timeout_s` for the running batch."""
        with self._changed:
            self._closed = True
            for ticket in self._line:
                if not ticket.result.done():
                    ticket.result.set_exception(Interrupted())
            self._line.clear()
            self._changed.notify()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            batch = self._begin(batch)
            if batch:
                GENERATION_BATCH_SIZE.labels(self._name).observe(len(batch))
                self._run_batch(batch)

    def _begin(self, batch: Sequence[Ticket[Item, Result]]) -> list[Ticket[Item, Result]]:
        """Tell those whose first turn this is; the tickets of the others, and of those who still want theirs."""
        refused: dict[Asker, Exception] = {}
        for ticket in batch:
            asker = ticket.asker
            if not asker.begun and asker not in refused:
                try:
                    asker.begin()
                    asker.begun = True
                except Exception as error:
                    refused[asker] = error
            if asker in refused:
                ticket.result.set_exception(refused[asker])
        return [ticket for ticket in batch if not ticket.result.done()]

    def _next_batch(self) -> list[Ticket[Item, Result]] | None:
        with self._changed:
            while True:
                self._line = [ticket for ticket in self._line if not ticket.result.done()]
                if self._line:
                    break
                self._served.clear()
                if self._closed:
                    return None
                self._changed.wait()
            batch: list[Ticket[Item, Result]] = []
            while not batch or len(batch) < self._largest(batch[0].key):
                fitting = [t for t in self._line if not batch or (t.key == batch[0].key and not t.asker.alone)]
                if not fitting:
                    break
                ticket = None if batch else self._starving()
                if ticket is None:
                    ticket = min(fitting, key=lambda t: (t.asker.lane, self._served[t.asker.owner], t.submitted_at))
                self._line.remove(ticket)
                # From here on only this thread settles the ticket: its job can no longer withdraw it.
                if not ticket.result.set_running_or_notify_cancel():
                    continue
                self._served[ticket.asker.owner] += 1
                batch.append(ticket)
                if ticket.asker.alone:
                    break
            return batch

    def _largest(self, key: Hashable) -> int:
        if self._longest_s == float("inf"):
            return self._max_batch_size
        fitting = self._longest_s / self._item_s.get(key, self._longest_s)  # the first batch, of one item, sets a pace
        return max(1, min(self._max_batch_size, round(fitting)))

    def _starving(self) -> Ticket[Item, Result] | None:
        """The oldest in line, if it has waited for too long and none like it was served lately."""
        oldest = min(self._line, key=lambda t: t.submitted_at)
        now = time.monotonic()
        if min(now - oldest.submitted_at, now - self._starving_served_at) < self._starving_s:
            return None
        self._starving_served_at = now
        return oldest

    def _run_batch(self, batch: Sequence[Ticket[Item, Result]]) -> None:
        def on_step(step: int, total_steps: int) -> bool:
            watch.progress(Stage.STEP if step < total_steps else Stage.DECODE)
            wanted = [ticket.wanted(step, total_steps) for ticket in batch]  # every job hears of every step
            return any(wanted)

        batch = [ticket for ticket in batch if not ticket.result.done()]
        if not batch:
            return
        failure: BaseException | None = None
        try:
            jobs = sorted({ticket.asker.job for ticket in batch if ticket.asker.job})
            started = time.monotonic()
            with self._watchdog.watch(self._stage, model=self._name, jobs=jobs) as watch:
                results = self._run([ticket.item for ticket in batch], on_step)
            if self._longest_s < float("inf"):  # nobody else asks, and of some models there are very many keys
                self._item_s[batch[0].key] = (time.monotonic() - started) / len(batch)
            if len(results) != len(batch):
                raise ModelError(f"The model returned {len(results)} results for {len(batch)} items.")
        except Exception as error:
            failure = error
        # Outside of the handler: its traceback would keep the failed batch's tensors alive through the retry.
        if failure is None:
            for ticket, result in zip(batch, results, strict=True):
                if not ticket.result.done():
                    ticket.result.set_result(result)
        elif isinstance(failure, Interrupted) or len(batch) == 1:
            for ticket in batch:
                if not ticket.result.done():
                    ticket.result.set_exception(failure)
        else:
            cause = "out_of_memory" if isinstance(failure, ModelOutOfMemoryError) else type(failure).__name__
            if cause == "out_of_memory":
                GENERATION_MEMORY_SAVED.labels(self._name, "smaller_batch").inc()
            logger.warning("batch_split", extra={"model": self._name, "size": len(batch), "cause": cause})
            failure = None
            middle = len(batch) // 2
            self._run_batch(batch[:middle])
            self._run_batch(batch[middle:])
