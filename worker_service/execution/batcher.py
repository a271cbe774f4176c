"""Many threads, one model: a batcher gathers compatible items from all of them and runs each batch on its own thread.

It never waits for company. While the model is idle, an item starts at once; while it is busy, the next batch forms. A
batch whose model tells of its steps lets better lanes pass between two of them: what they wait for is a step, not a
batch.
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
from worker_service.execution.watchdog import Stage, Watch, Watchdog
from worker_service.models.interface import Interrupted, OnStep

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
    held_up: Callable[[float], None]
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


@dataclass(eq=False)
class Batch(Generic[Item, Result]):
    """Items that share a call of the model."""

    tickets: Sequence[Ticket[Item, Result]]
    lane: float
    """Better ones pass between its steps; -inf: none is better."""
    held_up_s: float = 0.0
    """How long it has been, or the one between whose steps it runs."""


class Batcher(Generic[Item, Result]):
    """Runs `run(items, on_step)` for batches of at most `max_batch_size` items with equal lanes and `key(item)`.

    Which items go next is decided by lane, then by how much their owner was served lately, then by age. Once in
    `starving_s` what has been in line for that long goes first, so that no lane waits for ever under those above it.
    A batch that fails is run again in halves, down to single items, so that one bad item harms only itself.

    Whenever `run` tells of a step, batches of better lanes run before that call returns: `run` is entered again inside
    of itself, and must not mind. After it was held up for `starving_s` in all, a batch lets nothing more pass.

    With `longest_s` a batch is as large as the latest pace lets it end in about that time, one item at least: nothing
    interrupts it, so the next item of a better lane waits for its end.

    With `at_once` above 1 that many batches run side by side, each on its own thread: `run` must not mind that either.
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
        at_once: int = 1,
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
        self._threads = [threading.Thread(target=self._work, name=f"model-{name}", daemon=True) for _ in range(at_once)]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        items: Sequence[Item],
        *,
        lane: int = 0,
        owner: Hashable = None,
        check_in: CheckIn = lambda _index, _step, _total: True,
        begin: Callable[[], None] = lambda: None,
        held_up: Callable[[float], None] = lambda _seconds: None,
        alone: bool = False,
        job: str = "",
    ) -> list[Result]:
        """Run these items, each in whatever batch it fits, and wait for all of them.

        begin: called once, on the model's thread, right before the first of the items runs: waiting in line is not
            running. What it raises ends the submit.
        held_up: told on the model's thread for how many seconds better lanes have just passed one of the items.
        alone: never share a batch, nor pass one or let one pass, for items that may bring their process down.
        job: who this is, for the log of the watchdog.

        Raises:
            Interrupted: `check_in` said no, or the batcher was closed.
            Exception: whatever the model raised for the first item that failed.
        """
        asker = Asker(lane, owner, check_in, begin, held_up, alone, job)
        tickets = [Ticket[Item, Result](item, index, self._key(item), asker) for index, item in enumerate(items)]
        with self._changed:
            if self._closed:
                raise Interrupted
            self._line.extend(tickets)
            self._changed.notify_all()
        try:
            return [ticket.result.result() for ticket in tickets]
        finally:
            for ticket in tickets:
                ticket.result.cancel()  # after a failure the rest of this job is not wanted any more

    def close(self, timeout_s: float) -> None:
        """Refuse what is in line, wait up to `timeout_s` for the batches that run."""
        ends_at = time.monotonic() + timeout_s
        with self._changed:
            self._closed = True
            for ticket in self._line:
                if not ticket.result.done():
                    ticket.result.set_exception(Interrupted())
            self._line.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0, ends_at - time.monotonic()))

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._serve(batch)

    def _serve(self, batch: Batch[Item, Result], within: Watch | None = None) -> None:
        batch.tickets = self._begin(batch.tickets, within)
        if batch.tickets:
            GENERATION_BATCH_SIZE.labels(self._name).observe(len(batch.tickets))
            self._run_batch(batch, batch.tickets, within)

    def _let_one_pass(self, batch: Batch[Item, Result], watch: Watch) -> bool:
        """Run a batch of a better lane than that of `batch`, whose call is between two steps; False: there is none."""
        if batch.held_up_s >= self._starving_s or (better := self._choose(batch.lane)) is None:
            return False
        started = time.monotonic()
        better.held_up_s = batch.held_up_s  # whoever passes it holds up both
        self._serve(better, within=watch)
        held_up_s = time.monotonic() - started
        batch.held_up_s += held_up_s
        for asker in {ticket.asker for ticket in batch.tickets}:
            asker.held_up(held_up_s)
        return True

    def _begin(self, batch: Sequence[Ticket[Item, Result]], within: Watch | None) -> list[Ticket[Item, Result]]:
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
                if within is not None:  # a database that keeps it waiting is no model that is stuck
                    within.progress(self._stage)
            if asker in refused:
                ticket.result.set_exception(refused[asker])
        return [ticket for ticket in batch if not ticket.result.done()]

    def _next_batch(self) -> Batch[Item, Result] | None:
        """What goes next, waited for; None when the batcher is closed and nothing is left in line."""
        with self._changed:
            while (batch := self._choose()) is None:
                self._served.clear()
                if self._closed:
                    return None
                self._changed.wait()
            return batch

    def _choose(self, passed: float = float("inf")) -> Batch[Item, Result] | None:
        """Take out of line what goes next; None when nobody waits in a lane better than `passed`."""
        with self._changed:
            self._line = [ticket for ticket in self._line if not ticket.result.done()]
            starving = self._starving() if passed == float("inf") else None
            batch: list[Ticket[Item, Result]] = []
            while fitting := [ticket for ticket in self._line if _fits(ticket, batch, passed)]:
                best = min(fitting, key=lambda t: (t.asker.lane, self._served[t.asker.owner], t.submitted_at))
                ticket = starving if starving in fitting else best
                self._line.remove(ticket)
                # From here on only the model's thread settles the ticket: its job can no longer withdraw it.
                if not ticket.result.set_running_or_notify_cancel():
                    continue
                self._served[ticket.asker.owner] += 1
                batch.append(ticket)
                if ticket.asker.alone or ticket is starving:
                    return Batch(batch, lane=float("-inf"))
                if len(batch) == self._largest(ticket.key):
                    break
            return Batch(batch, batch[0].asker.lane) if batch else None

    def _largest(self, key: Hashable) -> int:
        if self._longest_s == float("inf"):
            return self._max_batch_size
        fitting = self._longest_s / self._item_s.get(key, self._longest_s)  # the first batch, of one item, sets a pace
        return max(1, min(self._max_batch_size, round(fitting)))

    def _starving(self) -> Ticket[Item, Result] | None:
        """The oldest in line, if it has waited for too long and none like it was served lately."""
        if not self._line:
            return None
        oldest = min(self._line, key=lambda t: t.submitted_at)
        now = time.monotonic()
        if min(now - oldest.submitted_at, now - self._starving_served_at) < self._starving_s:
            return None
        self._starving_served_at = now
        return oldest

    def _run_batch(
        self, batch: Batch[Item, Result], tickets: Sequence[Ticket[Item, Result]], within: Watch | None
    ) -> None:
        """Run these tickets of `batch` in one call, and in halves if it fails. within: the call between whose steps."""

        def on_step(step: int, total_steps: int) -> bool:
            while True:
                wanted = [ticket.wanted(step, total_steps) for ticket in tickets]  # every job hears of every step
                if not any(wanted) or not self._let_one_pass(batch, watch):
                    break
            watch.progress(Stage.STEP if step < total_steps else Stage.DECODE)
            return any(wanted)

        tickets = [ticket for ticket in tickets if not ticket.result.done()]
        if not tickets:
            return
        failure: BaseException | None = None
        try:
            jobs = sorted({ticket.asker.job for ticket in tickets if ticket.asker.job})
            started = time.monotonic()
            with self._watchdog.watch(self._stage, model=self._name, jobs=jobs, within=within) as watch:
                results = self._run([ticket.item for ticket in tickets], on_step)
            if self._longest_s < float("inf"):  # nobody else asks, and of some models there are very many keys
                self._item_s[tickets[0].key] = (time.monotonic() - started) / len(tickets)
            if len(results) != len(tickets):
                raise ModelError(f"The model returned {len(results)} results for {len(tickets)} items.")
        except Exception as error:
            failure = error
        # Outside of the handler: its traceback would keep the failed batch's tensors alive through the retry.
        if failure is None:
            for ticket, result in zip(tickets, results, strict=True):
                if not ticket.result.done():
                    ticket.result.set_result(result)
        elif isinstance(failure, Interrupted) or len(tickets) == 1:
            for ticket in tickets:
                if not ticket.result.done():
                    ticket.result.set_exception(failure)
            failure = None  # it knows this frame, and those below it what they hold
        else:
            cause = "out_of_memory" if isinstance(failure, ModelOutOfMemoryError) else type(failure).__name__
            if cause == "out_of_memory":
                GENERATION_MEMORY_SAVED.labels(self._name, "smaller_batch").inc()
            logger.warning("batch_split", extra={"model": self._name, "size": len(tickets), "cause": cause})
            failure = None
            middle = len(tickets) // 2
            self._run_batch(batch, tickets[:middle], within)
            self._run_batch(batch, tickets[middle:], within)


def _fits(ticket: Ticket[Item, Result], batch: Sequence[Ticket[Item, Result]], passed: float) -> bool:
    """May it be the first of a batch that passes the lane `passed`, or share the batch that others have begun?"""
    asker = ticket.asker
    if batch:
        return (ticket.key, asker.lane) == (batch[0].key, batch[0].asker.lane) and not asker.alone
    return asker.lane < passed and not (asker.alone and passed < float("inf"))
