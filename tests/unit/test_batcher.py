"""The batcher: who shares a call of the model, and who suffers when one fails."""

import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakSet

import pytest

from shared.errors import ModelOutOfMemoryError
from shared.settings import WatchdogSettings
from tests.stack import wait_until
from worker_service.execution.batcher import Batcher, CheckIn
from worker_service.execution.watchdog import Watchdog
from worker_service.models.interface import Interrupted, OnStep


class Model:
    """Doubles numbers. Holds its first batch until `go`, so that a line can form behind it; records every batch."""

    def __init__(self, steps: int = 1, largest: int = 100) -> None:
        self.batches: list[list[int]] = []
        self.started = threading.Event()
        self.go = threading.Event()
        self.steps = steps
        self.largest = largest

    def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
        self.batches.append(list(items))
        self.started.set()
        assert self.go.wait(10)
        for step in range(1, self.steps + 1):
            if not on_step(step, self.steps):
                raise Interrupted
        if len(items) > self.largest:
            raise ModelOutOfMemoryError
        if 13 in items:
            raise ValueError("thirteen")
        return [item * 2 for item in items]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def a_batcher(model: Model, *, max_batch_size: int = 4, starving_s: float = float("inf")) -> Batcher[int, int]:
    return Batcher(
        model.run,
        key=lambda item: item // 100,
        max_batch_size=max_batch_size,
        name="test",
        watchdog=Watchdog(WatchdogSettings()),
        starving_s=starving_s,
    )


def in_line(batcher: Batcher[int, int], waiting: int) -> None:
    wait_until(lambda: len(batcher._line) == waiting, timeout_s=10, what=f"{waiting} items in line")


def busy(pool: ThreadPoolExecutor, batcher: Batcher[int, int], model: Model, item: int = 0) -> Future[list[int]]:
    """Occupy the model with one item, so that what follows lines up."""
    first = pool.submit(batcher.submit, [item])
    assert model.started.wait(10)
    return first


def test_an_idle_model_starts_an_item_without_waiting_for_company(pool: ThreadPoolExecutor) -> None:
    model = Model()
    model.go.set()
    assert a_batcher(model).submit([7]) == [14]
    assert model.batches == [[7]]


def test_items_of_different_callers_that_line_up_share_a_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    first = busy(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 2, 3)]
    in_line(batcher, 3)
    model.go.set()
    assert [w.result(10) for w in waiting] == [[2], [4], [6]]
    assert first.result(10) == [0]
    assert [len(batch) for batch in model.batches] == [1, 3]


def test_items_with_different_keys_never_share_a_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    busy(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 101, 2, 102)]
    in_line(batcher, 4)
    model.go.set()
    for each in waiting:
        each.result(10)
    assert sorted(sorted(batch) for batch in model.batches[1:]) == [[1, 2], [101, 102]]


def test_a_better_lane_goes_first(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model, max_batch_size=1)
    busy(pool, batcher, model)
    bulk = pool.submit(batcher.submit, [1], lane=3)
    in_line(batcher, 1)
    urgent = pool.submit(batcher.submit, [2], lane=0)
    in_line(batcher, 2)
    model.go.set()
    bulk.result(10)
    urgent.result(10)
    assert model.batches == [[0], [2], [1]]


def test_what_waited_for_too_long_goes_before_a_better_lane_but_only_one_of_it(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model, max_batch_size=1, starving_s=0.2)
    busy(pool, batcher, model)
    bulk = [pool.submit(batcher.submit, [item], lane=3) for item in (1, 2)]
    in_line(batcher, 2)
    wait_until(lambda: batcher._line[1].submitted_at < time.monotonic() - 0.2, timeout_s=5, what="both to starve")
    urgent = pool.submit(batcher.submit, [7, 8], lane=0)
    in_line(batcher, 4)
    model.go.set()
    for future in (*bulk, urgent):
        future.result(10)
    assert model.batches[1][0] in (1, 2)
    assert model.batches[2:4] == [[7], [8]], "a lane that starves gets one seat, not the model"


def test_an_owner_with_many_items_does_not_delay_one_with_few(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model, max_batch_size=2)
    busy(pool, batcher, model)
    many = pool.submit(batcher.submit, [1, 2, 3, 4, 5, 6], owner="many")
    in_line(batcher, 6)
    few = pool.submit(batcher.submit, [9], owner="few")
    in_line(batcher, 7)
    model.go.set()
    few.result(10)
    many.result(10)
    assert 9 in model.batches[1]


def test_one_bad_item_fails_alone_and_its_batch_mates_get_their_results(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    busy(pool, batcher, model)
    waiting = {item: pool.submit(batcher.submit, [item]) for item in (1, 13, 2, 3)}
    in_line(batcher, 4)
    model.go.set()
    with pytest.raises(ValueError, match="thirteen"):
        waiting[13].result(10)
    assert [waiting[item].result(10) for item in (1, 2, 3)] == [[2], [4], [6]]


def test_a_batch_that_exceeds_memory_is_run_in_halves(pool: ThreadPoolExecutor) -> None:
    model = Model(largest=2)
    batcher = a_batcher(model)
    busy(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 2, 3, 4)]
    in_line(batcher, 4)
    model.go.set()
    assert sorted(w.result(10)[0] for w in waiting) == [2, 4, 6, 8]
    assert [len(batch) for batch in model.batches] == [1, 4, 2, 2]


def test_a_canceled_item_is_released_at_the_next_step_and_the_others_go_on(pool: ThreadPoolExecutor) -> None:
    model = Model(steps=3)
    batcher = a_batcher(model)
    busy(pool, batcher, model)
    canceled = pool.submit(batcher.submit, [1], check_in=lambda _index, _step, _total: False)
    others = pool.submit(batcher.submit, [2])
    in_line(batcher, 2)
    model.go.set()
    with pytest.raises(Interrupted):
        canceled.result(10)
    assert others.result(10) == [4]


def test_a_call_whose_every_item_is_canceled_stops(pool: ThreadPoolExecutor) -> None:
    model = Model(steps=1000)
    batcher = a_batcher(model)
    steps: list[int] = []

    def no_more(_index: int, step: int, _total: int) -> bool:
        steps.append(step)
        return step < 3

    model.go.set()
    with pytest.raises(Interrupted):
        batcher.submit([1], check_in=no_more)
    assert steps == [1, 2, 3]
    assert batcher.submit([2]) == [4], "the model serves the next one"


def test_an_item_that_must_be_alone_shares_no_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    busy(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item], alone=item == 2) for item in (1, 2, 3)]
    in_line(batcher, 3)
    model.go.set()
    for each in waiting:
        each.result(10)
    assert [2] in model.batches


def test_closing_refuses_what_is_in_line_and_lets_the_running_batch_end(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    first = busy(pool, batcher, model)
    late = pool.submit(batcher.submit, [1])
    in_line(batcher, 1)
    closing = pool.submit(batcher.close, 10)
    with pytest.raises(Interrupted):
        late.result(10)
    model.go.set()
    assert first.result(10) == [0]
    closing.result(10)
    with pytest.raises(Interrupted):
        batcher.submit([3])


def test_a_job_begins_when_its_turn_comes_and_once_for_all_its_items(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model, max_batch_size=1)
    busy(pool, batcher, model)
    begun: list[str] = []
    waiting = pool.submit(batcher.submit, [1, 2], begin=lambda: begun.append("waiting"))
    in_line(batcher, 2)
    assert begun == [], "waiting in line is not running"
    model.go.set()
    assert waiting.result(10) == [2, 4]
    assert begun == ["waiting"]


def test_a_job_that_may_not_begin_is_told_why_and_the_others_of_its_batch_run(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = a_batcher(model)
    busy(pool, batcher, model)

    asked: list[int] = []

    def refuse() -> None:
        asked.append(1)
        raise ConnectionError("no word from the database")

    refused = pool.submit(batcher.submit, [1, 2], begin=refuse)
    in_line(batcher, 2)
    other = pool.submit(batcher.submit, [3])
    in_line(batcher, 3)
    model.go.set()
    with pytest.raises(ConnectionError):
        refused.result(10)
    assert other.result(10) == [6]
    assert model.batches == [[0], [3]]
    assert asked == [1], "a database that is away costs its time-out once, not once per image"


def test_a_batch_that_returns_too_few_results_is_run_again_one_by_one(pool: ThreadPoolExecutor) -> None:
    class Forgetful(Model):
        def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
            results = super().run(items, on_step)
            return results[1:] if len(items) > 1 else results

    model = Forgetful()
    model.go.set()
    assert a_batcher(model).submit([1, 2, 3]) == [2, 4, 6]


def test_a_batch_is_no_larger_than_can_be_waited_for(pool: ThreadPoolExecutor) -> None:
    sizes: list[int] = []

    def run(items: Sequence[int], on_step: OnStep) -> Sequence[int]:
        sizes.append(len(items))
        time.sleep(0.05 * len(items))  # the model's work
        return items

    batcher: Batcher[int, int] = Batcher(
        run,
        key=lambda item: item // 100,
        max_batch_size=100,
        name="test",
        watchdog=Watchdog(WatchdogSettings()),
        longest_s=0.2,
    )
    assert batcher.submit(list(range(12))) == list(range(12))
    assert sizes[0] == 1, "nothing is known of its pace yet"
    assert 2 <= max(sizes) <= 4
    assert sizes.count(1) <= 2, "its pace is that of an item, not of a batch"


class Stepping(Model):
    """Tells of its steps and counts them, so that a test sees who ran between whose."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.told: list[tuple[int, int]] = []
        """(first item, step), as they began."""

    def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
        def noting(step: int, steps: int) -> bool:
            self.told.append((items[0], step))
            return on_step(step, steps)

        return super().run(items, noting)


def once_begun(submit: Callable[[], None], batcher: Batcher[int, int]) -> CheckIn:
    """A `check_in` under which another item is in line when the first step of its own has been done."""
    todo = [submit]

    def check_in(_index: int, _step: int, _steps: int) -> bool:
        if todo:
            todo.pop()()
            in_line(batcher, 1)
        return True

    return check_in


def test_a_better_lane_passes_between_two_steps_and_shares_no_batch_with_a_worse_one(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model)
    bulk = pool.submit(batcher.submit, [1, 2, 3, 4, 5], lane=2)
    assert model.started.wait(10)
    in_line(batcher, 1)
    urgent = pool.submit(batcher.submit, [8], lane=1)
    in_line(batcher, 2)
    most_urgent = pool.submit(batcher.submit, [9], lane=0)
    in_line(batcher, 3)
    model.go.set()
    assert urgent.result(10) + most_urgent.result(10) == [16, 18]
    assert bulk.result(10) == [2, 4, 6, 8, 10]
    assert model.batches == [[1, 2, 3, 4], [9], [8], [5]]
    assert model.told == [(1, 1), (9, 1), (9, 2), (8, 1), (8, 2), (1, 2), (5, 1), (5, 2)]


def test_what_runs_between_the_steps_of_another_is_passed_itself(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model)
    later: list[Future[list[int]]] = []
    meanwhile = once_begun(lambda: later.append(pool.submit(batcher.submit, [9], lane=0)), batcher)
    bulk = pool.submit(batcher.submit, [1], lane=2)
    assert model.started.wait(10)
    urgent = pool.submit(batcher.submit, [8], lane=1, check_in=meanwhile)
    in_line(batcher, 1)
    model.go.set()
    assert [*bulk.result(10), *urgent.result(10), *later[0].result(10)] == [2, 16, 18]
    assert model.told == [(1, 1), (8, 1), (9, 1), (9, 2), (8, 2), (1, 2)]


def test_its_own_lane_and_worse_ones_wait_for_a_batchs_end(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model)
    first = busy(pool, batcher, model)
    others = [pool.submit(batcher.submit, [5], lane=0), pool.submit(batcher.submit, [6], lane=1)]
    in_line(batcher, 2)
    model.go.set()
    for each in (first, *others):
        each.result(10)
    assert model.told == [(0, 1), (0, 2), (5, 1), (5, 2), (6, 1), (6, 2)]


def test_a_batch_is_held_up_for_so_long_and_told_how_long(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model, max_batch_size=1, starving_s=0.2)
    held_up: list[float] = []
    stop = threading.Event()

    def slow(_index: int, _step: int, _steps: int) -> bool:
        time.sleep(0.03)  # the work of a step
        return True

    def keep_coming() -> None:
        while not stop.is_set():
            batcher.submit([9], lane=0, check_in=slow)

    bulk = pool.submit(batcher.submit, [1], lane=1, held_up=held_up.append)
    assert model.started.wait(10)
    streams = [pool.submit(keep_coming) for _ in range(3)]  # there is always one in line
    in_line(batcher, 3)
    model.go.set()
    assert bulk.result(10) == [2]
    stop.set()
    for stream in streams:
        stream.result(10)
    assert 0.2 <= sum(held_up) < 2


def test_what_may_bring_its_process_down_passes_nobody_and_is_not_passed(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model)
    later: list[Future[list[int]]] = []
    meanwhile = once_begun(lambda: later.append(pool.submit(batcher.submit, [9], lane=0, alone=True)), batcher)
    suspect = pool.submit(batcher.submit, [1], lane=2, alone=True)
    assert model.started.wait(10)
    innocent = pool.submit(batcher.submit, [2], lane=1, check_in=meanwhile)
    in_line(batcher, 1)
    model.go.set()
    assert [*suspect.result(10), *innocent.result(10), *later[0].result(10)] == [2, 4, 18]
    assert model.told == [(1, 1), (1, 2), (2, 1), (2, 2), (9, 1), (9, 2)]


def test_what_fails_between_the_steps_of_another_harms_it_not(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = a_batcher(model)
    bulk = pool.submit(batcher.submit, [1, 2], lane=2)
    assert model.started.wait(10)
    bad = pool.submit(batcher.submit, [13], lane=1)
    in_line(batcher, 1)
    good = pool.submit(batcher.submit, [7], lane=1)
    in_line(batcher, 2)
    model.go.set()
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(10)
    assert good.result(10) == [14]
    assert bulk.result(10) == [2, 4]
    assert model.batches == [[1, 2], [13, 7], [13], [7]]


def test_what_was_canceled_between_the_steps_of_another_keeps_nothing_of_it(pool: ThreadPoolExecutor) -> None:
    class Tensor:
        """What a call holds while others pass it."""

    tensors: WeakSet[Tensor] = WeakSet()

    class Holding(Stepping):
        def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
            tensor = Tensor()
            tensors.add(tensor)
            return super().run(items, on_step)

    model = Holding(steps=2)
    batcher = a_batcher(model)
    gc.disable()
    try:
        bulk = pool.submit(batcher.submit, [1], lane=2)
        assert model.started.wait(10)
        canceled = pool.submit(batcher.submit, [7], lane=1, check_in=lambda _index, _step, _total: False)
        in_line(batcher, 1)
        model.go.set()
        assert bulk.result(10) == [2]
        with pytest.raises(Interrupted):
            canceled.result(10)
        wait_until(lambda: not tensors, timeout_s=5, what="what was held to be let go without the collector")
    finally:
        gc.enable()


def test_a_database_that_keeps_a_job_from_beginning_is_no_model_that_is_stuck(pool: ThreadPoolExecutor) -> None:
    watchdog = Watchdog(WatchdogSettings(step_s=0.8))
    model = Model()
    batcher: Batcher[int, int] = Batcher(
        model.run, key=lambda item: item // 100, max_batch_size=4, name="test", watchdog=watchdog
    )
    left: list[float] = []

    def away() -> None:
        time.sleep(0.3)  # its time-out
        left.append(min(watchdog._left_s(watch) for watch in watchdog._watches))
        raise ConnectionError

    bulk = pool.submit(batcher.submit, [1], lane=1)
    assert model.started.wait(10)
    refused = [pool.submit(batcher.submit, [item], lane=0, begin=away) for item in (2, 3, 4)]
    in_line(batcher, 3)
    model.go.set()
    assert bulk.result(10) == [2]
    for each in refused:
        with pytest.raises(ConnectionError):
            each.result(10)
    assert len(left) == 3
    assert min(left) > 0


def test_a_batch_that_is_held_up_is_not_stuck(pool: ThreadPoolExecutor) -> None:
    watchdog = Watchdog(WatchdogSettings(step_s=0.8))
    model = Stepping(steps=1)
    batcher: Batcher[int, int] = Batcher(
        model.run, key=lambda item: item // 100, max_batch_size=4, name="test", watchdog=watchdog
    )
    left: list[float] = []

    def look(_index: int, _step: int, _steps: int) -> bool:
        time.sleep(0.3)  # the work of a step
        left.append(min(watchdog._left_s(watch) for watch in watchdog._watches))
        return True

    bulk = pool.submit(batcher.submit, [1], lane=1)
    assert model.started.wait(10)
    better = [pool.submit(batcher.submit, [item], lane=0, check_in=look) for item in (100, 200, 300)]
    in_line(batcher, 3)
    model.go.set()
    for each in (bulk, *better):
        each.result(10)
    assert len(left) == 3
    assert min(left) > 0, "0.9 s of others are not 0.9 s without progress"


def test_as_many_batches_run_at_once_as_the_batcher_was_told(pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(2)

    def run(items: Sequence[int], _: OnStep) -> list[int]:
        together.wait(10)
        return [item * 2 for item in items]

    batcher: Batcher[int, int] = Batcher(
        run, key=int, max_batch_size=4, name="test", watchdog=Watchdog(WatchdogSettings()), at_once=2
    )
    assert sorted(pool.submit(batcher.submit, [1, 2]).result(15)) == [2, 4]
    batcher.close(10)
    assert not any(thread.is_alive() for thread in batcher._threads)
