"""The batcher: which items share a model call, in which order batches run, and what a failure affects."""

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
from worker_service.execution.batcher import Batcher, CheckIn, Submission
from worker_service.execution.steps import CallStopped, OnStep
from worker_service.execution.watchdog import Watchdog


class Model:
    """Doubles numbers and records every batch. It waits until `go` is set, so that a queue can form."""

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
                raise CallStopped
        if len(items) > self.largest:
            raise ModelOutOfMemoryError
        if 13 in items:
            raise ValueError("thirteen")
        return [item * 2 for item in items]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def make_batcher(
    model: Model,
    *,
    max_batch_size: int = 4,
    starvation_timeout_s: float = float("inf"),
    interruptible: bool = True,
) -> Batcher[int, int]:
    return Batcher(
        model.run,
        key=lambda item: item // 100,
        max_batch_size=max_batch_size,
        name="test",
        watchdog=Watchdog(WatchdogSettings()),
        starvation_timeout_s=starvation_timeout_s,
        interruptible=interruptible,
    )


def wait_for_queued(batcher: Batcher[int, int], count: int) -> None:
    wait_until(lambda: len(batcher._queue) == count, timeout_s=10, what=f"{count} queued items")


def occupy_model(
    pool: ThreadPoolExecutor, batcher: Batcher[int, int], model: Model, item: int = 0
) -> Future[list[int]]:
    """Occupy the model with one item, so that later items are queued."""
    first = pool.submit(batcher.submit, [item])
    assert model.started.wait(10)
    return first


def test_an_idle_model_starts_a_single_item_at_once(pool: ThreadPoolExecutor) -> None:
    model = Model()
    model.go.set()
    assert make_batcher(model).submit([7]) == [14]
    assert model.batches == [[7]]


def test_queued_items_of_different_callers_share_a_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    first = occupy_model(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 2, 3)]
    wait_for_queued(batcher, 3)
    model.go.set()
    assert [w.result(10) for w in waiting] == [[2], [4], [6]]
    assert first.result(10) == [0]
    assert [len(batch) for batch in model.batches] == [1, 3]


def test_items_with_different_keys_never_share_a_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 101, 2, 102)]
    wait_for_queued(batcher, 4)
    model.go.set()
    for each in waiting:
        each.result(10)
    assert sorted(sorted(batch) for batch in model.batches[1:]) == [[1, 2], [101, 102]]


def test_a_higher_priority_lane_runs_first(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model, max_batch_size=1)
    occupy_model(pool, batcher, model)
    bulk = pool.submit(batcher.submit, [1], Submission(lane=3))
    wait_for_queued(batcher, 1)
    urgent = pool.submit(batcher.submit, [2], Submission(lane=0))
    wait_for_queued(batcher, 2)
    model.go.set()
    bulk.result(10)
    urgent.result(10)
    assert model.batches == [[0], [2], [1]]


def test_one_starved_item_runs_before_a_higher_priority_lane(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model, max_batch_size=1, starvation_timeout_s=0.2)
    occupy_model(pool, batcher, model)
    bulk = [pool.submit(batcher.submit, [item], Submission(lane=3)) for item in (1, 2)]
    wait_for_queued(batcher, 2)
    wait_until(lambda: batcher._queue[1].submitted_at < time.monotonic() - 0.2, timeout_s=5, what="both to starve")
    urgent = pool.submit(batcher.submit, [7, 8], Submission(lane=0))
    wait_for_queued(batcher, 4)
    model.go.set()
    for future in (*bulk, urgent):
        future.result(10)
    assert model.batches[1][0] in (1, 2)
    assert model.batches[2:4] == [[7], [8]], "only one starved item runs first"


def test_an_owner_with_many_items_does_not_delay_one_with_few(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model, max_batch_size=2)
    occupy_model(pool, batcher, model)
    many = pool.submit(batcher.submit, [1, 2, 3, 4, 5, 6], Submission(owner="many"))
    wait_for_queued(batcher, 6)
    few = pool.submit(batcher.submit, [9], Submission(owner="few"))
    wait_for_queued(batcher, 7)
    model.go.set()
    few.result(10)
    many.result(10)
    assert 9 in model.batches[1]


def test_one_bad_item_fails_and_the_other_items_of_its_batch_succeed(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    waiting = {item: pool.submit(batcher.submit, [item]) for item in (1, 13, 2, 3)}
    wait_for_queued(batcher, 4)
    model.go.set()
    with pytest.raises(ValueError, match="thirteen"):
        waiting[13].result(10)
    assert [waiting[item].result(10) for item in (1, 2, 3)] == [[2], [4], [6]]


def test_a_batch_that_exceeds_memory_is_run_in_halves(pool: ThreadPoolExecutor) -> None:
    model = Model(largest=2)
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item]) for item in (1, 2, 3, 4)]
    wait_for_queued(batcher, 4)
    model.go.set()
    assert sorted(w.result(10)[0] for w in waiting) == [2, 4, 6, 8]
    assert [len(batch) for batch in model.batches] == [1, 4, 2, 2]


def test_a_canceled_item_ends_at_the_next_step_and_the_others_go_on(pool: ThreadPoolExecutor) -> None:
    model = Model(steps=3)
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    canceled = pool.submit(batcher.submit, [1], Submission(check_in=lambda _index, _step, _total: False))
    others = pool.submit(batcher.submit, [2])
    wait_for_queued(batcher, 2)
    model.go.set()
    with pytest.raises(CallStopped):
        canceled.result(10)
    assert others.result(10) == [4]


def test_a_batch_stops_when_all_its_items_are_canceled(pool: ThreadPoolExecutor) -> None:
    model = Model(steps=1000)
    batcher = make_batcher(model)
    steps: list[int] = []

    def stop_at_3(_index: int, step: int, _total: int) -> bool:
        steps.append(step)
        return step < 3

    model.go.set()
    with pytest.raises(CallStopped):
        batcher.submit([1], Submission(check_in=stop_at_3))
    assert steps == [1, 2, 3]
    assert batcher.submit([2]) == [4], "the model serves the next one"


def test_an_isolated_item_shares_no_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    waiting = [pool.submit(batcher.submit, [item], Submission(isolated=item == 2)) for item in (1, 2, 3)]
    wait_for_queued(batcher, 3)
    model.go.set()
    for each in waiting:
        each.result(10)
    assert [2] in model.batches


def test_closing_refuses_queued_items_and_finishes_the_running_batch(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    first = occupy_model(pool, batcher, model)
    late = pool.submit(batcher.submit, [1])
    wait_for_queued(batcher, 1)
    closing = pool.submit(batcher.close, 10)
    with pytest.raises(CallStopped):
        late.result(10)
    model.go.set()
    assert first.result(10) == [0]
    closing.result(10)
    with pytest.raises(CallStopped):
        batcher.submit([3])


def test_a_job_starts_once_when_its_first_item_runs(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model, max_batch_size=1)
    occupy_model(pool, batcher, model)
    started_jobs: list[str] = []
    waiting = pool.submit(batcher.submit, [1, 2], Submission(on_start=lambda: started_jobs.append("waiting")))
    wait_for_queued(batcher, 2)
    assert started_jobs == [], "a queued job has not started"
    model.go.set()
    assert waiting.result(10) == [2, 4]
    assert started_jobs == ["waiting"]


def test_a_job_that_cannot_start_gets_the_error_and_other_jobs_of_its_batch_run(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)

    attempts: list[int] = []

    def refuse() -> None:
        attempts.append(1)
        raise ConnectionError("no word from the database")

    refused = pool.submit(batcher.submit, [1, 2], Submission(on_start=refuse))
    wait_for_queued(batcher, 2)
    other = pool.submit(batcher.submit, [3])
    wait_for_queued(batcher, 3)
    model.go.set()
    with pytest.raises(ConnectionError):
        refused.result(10)
    assert other.result(10) == [6]
    assert model.batches == [[0], [3]]
    assert attempts == [1], "an unreachable database costs one time-out per job, not one per image"


def test_jobs_of_a_batch_start_together_and_those_left_out_start_alone(pool: ThreadPoolExecutor) -> None:
    model = Model()
    batcher = make_batcher(model)
    occupy_model(pool, batcher, model)
    together: list[list[str]] = []
    alone: list[str] = []

    def start_together(submissions: Sequence[Submission]) -> list[Submission]:
        together.append([submission.job for submission in submissions])
        return [submission for submission in submissions if submission.job != "locked"]

    def start_alone(job: str) -> Callable[[], None]:
        return lambda: alone.append(job)

    waiting = []
    for number, job in enumerate(["first", "locked", "third"], start=1):
        submission = Submission(job=job, on_start=start_alone(job), start_together=start_together)
        waiting.append(pool.submit(batcher.submit, [number], submission))
        wait_for_queued(batcher, number)
    model.go.set()
    assert [each.result(10) for each in waiting] == [[2], [4], [6]]
    assert together == [["first", "locked", "third"]]
    assert alone == ["locked"]


def test_a_batch_that_returns_too_few_results_runs_again_item_by_item(pool: ThreadPoolExecutor) -> None:
    class DroppingModel(Model):
        def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
            results = super().run(items, on_step)
            return results[1:] if len(items) > 1 else results

    model = DroppingModel()
    model.go.set()
    assert make_batcher(model).submit([1, 2, 3]) == [2, 4, 6]


def test_max_batch_s_limits_the_batch_size_by_the_measured_rate(pool: ThreadPoolExecutor) -> None:
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
        max_batch_s=0.2,
    )
    assert batcher.submit(list(range(12))) == list(range(12))
    assert sizes[0] == 1, "the rate is unknown before the first batch"
    assert 2 <= max(sizes) <= 4
    assert sizes.count(1) <= 2, "the rate is measured per item, not per batch"


class Stepping(Model):
    """Reports and records its steps, so that a test sees in which order batches ran."""

    def __init__(self, steps: int) -> None:
        super().__init__(steps)
        self.reported: list[tuple[int, int]] = []
        """(first item of the batch, step), in the order of the reports."""

    def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
        def record(step: int, steps: int) -> bool:
            self.reported.append((items[0], step))
            return on_step(step, steps)

        return super().run(items, record)


def submit_after_first_step(submit: Callable[[], None], batcher: Batcher[int, int]) -> CheckIn:
    """A `check_in` that calls `submit` after its first step, and waits until that item is queued."""
    todo = [submit]

    def check_in(_index: int, _step: int, _steps: int) -> bool:
        if todo:
            todo.pop()()
            wait_for_queued(batcher, 1)
        return True

    return check_in


def test_a_higher_priority_lane_runs_between_two_steps_in_batches_of_its_own(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model)
    bulk = pool.submit(batcher.submit, [1, 2, 3, 4, 5], Submission(lane=2))
    assert model.started.wait(10)
    wait_for_queued(batcher, 1)
    urgent = pool.submit(batcher.submit, [8], Submission(lane=1))
    wait_for_queued(batcher, 2)
    most_urgent = pool.submit(batcher.submit, [9], Submission(lane=0))
    wait_for_queued(batcher, 3)
    model.go.set()
    assert urgent.result(10) + most_urgent.result(10) == [16, 18]
    assert bulk.result(10) == [2, 4, 6, 8, 10]
    assert model.batches == [[1, 2, 3, 4], [9], [8], [5]]
    assert model.reported == [(1, 1), (9, 1), (9, 2), (8, 1), (8, 2), (1, 2), (5, 1), (5, 2)]


def test_a_model_whose_calls_cannot_be_nested_ends_a_batch_before_a_higher_priority_lane_runs(
    pool: ThreadPoolExecutor,
) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model, interruptible=False)
    bulk = pool.submit(batcher.submit, [1, 2, 3, 4, 5], Submission(lane=2))
    assert model.started.wait(10)
    wait_for_queued(batcher, 1)
    urgent = pool.submit(batcher.submit, [9], Submission(lane=0))
    wait_for_queued(batcher, 2)
    model.go.set()
    assert urgent.result(10) + bulk.result(10) == [18, 2, 4, 6, 8, 10]
    assert model.reported == [(1, 1), (1, 2), (9, 1), (9, 2), (5, 1), (5, 2)]


def test_an_interrupting_batch_can_be_interrupted_itself(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model)
    later: list[Future[list[int]]] = []
    submit_urgent = submit_after_first_step(
        lambda: later.append(pool.submit(batcher.submit, [9], Submission(lane=0))), batcher
    )
    bulk = pool.submit(batcher.submit, [1], Submission(lane=2))
    assert model.started.wait(10)
    urgent = pool.submit(batcher.submit, [8], Submission(lane=1, check_in=submit_urgent))
    wait_for_queued(batcher, 1)
    model.go.set()
    assert [*bulk.result(10), *urgent.result(10), *later[0].result(10)] == [2, 16, 18]
    assert model.reported == [(1, 1), (8, 1), (9, 1), (9, 2), (8, 2), (1, 2)]


def test_equal_and_lower_priority_lanes_wait_for_the_end_of_a_batch(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model)
    first = occupy_model(pool, batcher, model)
    others = [
        pool.submit(batcher.submit, [5], Submission(lane=0)),
        pool.submit(batcher.submit, [6], Submission(lane=1)),
    ]
    wait_for_queued(batcher, 2)
    model.go.set()
    for each in (first, *others):
        each.result(10)
    assert model.reported == [(0, 1), (0, 2), (5, 1), (5, 2), (6, 1), (6, 2)]


def test_the_delay_of_a_batch_is_limited_and_reported(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model, max_batch_size=1, starvation_timeout_s=0.2)
    delays_s: list[float] = []
    stop = threading.Event()

    def slow(_index: int, _step: int, _steps: int) -> bool:
        time.sleep(0.03)  # the work of a step
        return True

    def submit_repeatedly() -> None:
        while not stop.is_set():
            batcher.submit([9], Submission(lane=0, check_in=slow))

    bulk = pool.submit(batcher.submit, [1], Submission(lane=1, add_delay=delays_s.append))
    assert model.started.wait(10)
    streams = [pool.submit(submit_repeatedly) for _ in range(3)]  # so that an item is always queued
    wait_for_queued(batcher, 3)
    model.go.set()
    assert bulk.result(10) == [2]
    stop.set()
    for stream in streams:
        stream.result(10)
    assert 0.2 <= sum(delays_s) < 2


def test_an_isolated_item_neither_interrupts_a_batch_nor_is_interrupted(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model)
    later: list[Future[list[int]]] = []
    submit_isolated = submit_after_first_step(
        lambda: later.append(pool.submit(batcher.submit, [9], Submission(lane=0, isolated=True))), batcher
    )
    isolated_item = pool.submit(batcher.submit, [1], Submission(lane=2, isolated=True))
    assert model.started.wait(10)
    plain_item = pool.submit(batcher.submit, [2], Submission(lane=1, check_in=submit_isolated))
    wait_for_queued(batcher, 1)
    model.go.set()
    assert [*isolated_item.result(10), *plain_item.result(10), *later[0].result(10)] == [2, 4, 18]
    assert model.reported == [(1, 1), (1, 2), (2, 1), (2, 2), (9, 1), (9, 2)]


def test_a_failing_interrupting_batch_does_not_fail_the_interrupted_batch(pool: ThreadPoolExecutor) -> None:
    model = Stepping(steps=2)
    batcher = make_batcher(model)
    bulk = pool.submit(batcher.submit, [1, 2], Submission(lane=2))
    assert model.started.wait(10)
    bad = pool.submit(batcher.submit, [13], Submission(lane=1))
    wait_for_queued(batcher, 1)
    good = pool.submit(batcher.submit, [7], Submission(lane=1))
    wait_for_queued(batcher, 2)
    model.go.set()
    with pytest.raises(ValueError, match="thirteen"):
        bad.result(10)
    assert good.result(10) == [14]
    assert bulk.result(10) == [2, 4]
    assert model.batches == [[1, 2], [13, 7], [13], [7]]


def test_a_canceled_interrupting_batch_keeps_no_tensors_alive(pool: ThreadPoolExecutor) -> None:
    class Tensor:
        """Memory that a model call holds while other batches interrupt it."""

    tensors: WeakSet[Tensor] = WeakSet()

    class Holding(Stepping):
        def run(self, items: Sequence[int], on_step: OnStep) -> list[int]:
            tensor = Tensor()
            tensors.add(tensor)
            return super().run(items, on_step)

    model = Holding(steps=2)
    batcher = make_batcher(model)
    gc.disable()
    try:
        bulk = pool.submit(batcher.submit, [1], Submission(lane=2))
        assert model.started.wait(10)
        canceled = pool.submit(batcher.submit, [7], Submission(lane=1, check_in=lambda _index, _step, _total: False))
        wait_for_queued(batcher, 1)
        model.go.set()
        assert bulk.result(10) == [2]
        with pytest.raises(CallStopped):
            canceled.result(10)
        wait_until(lambda: not tensors, timeout_s=5, what="the tensors to be freed without the garbage collector")
    finally:
        gc.enable()


def test_a_slow_database_at_the_start_of_a_job_does_not_count_as_a_stuck_model(pool: ThreadPoolExecutor) -> None:
    watchdog = Watchdog(WatchdogSettings(step_s=0.8))
    model = Model()
    batcher: Batcher[int, int] = Batcher(
        model.run, key=lambda item: item // 100, max_batch_size=4, name="test", watchdog=watchdog
    )
    remaining_s: list[float] = []

    def fail_to_start() -> None:
        time.sleep(0.3)  # the database's time-out
        remaining_s.append(min(watchdog._remaining_s(watch) for watch in watchdog._watches))
        raise ConnectionError

    bulk = pool.submit(batcher.submit, [1], Submission(lane=1))
    assert model.started.wait(10)
    refused = [pool.submit(batcher.submit, [item], Submission(lane=0, on_start=fail_to_start)) for item in (2, 3, 4)]
    wait_for_queued(batcher, 3)
    model.go.set()
    assert bulk.result(10) == [2]
    for each in refused:
        with pytest.raises(ConnectionError):
            each.result(10)
    assert len(remaining_s) == 3
    assert min(remaining_s) > 0


def test_an_interrupted_batch_does_not_count_as_stuck(pool: ThreadPoolExecutor) -> None:
    watchdog = Watchdog(WatchdogSettings(step_s=0.8))
    model = Stepping(steps=1)
    batcher: Batcher[int, int] = Batcher(
        model.run, key=lambda item: item // 100, max_batch_size=4, name="test", watchdog=watchdog
    )
    remaining_s: list[float] = []

    def record_remaining(_index: int, _step: int, _steps: int) -> bool:
        time.sleep(0.3)  # the work of a step
        remaining_s.append(min(watchdog._remaining_s(watch) for watch in watchdog._watches))
        return True

    bulk = pool.submit(batcher.submit, [1], Submission(lane=1))
    assert model.started.wait(10)
    higher_priority = [
        pool.submit(batcher.submit, [item], Submission(lane=0, check_in=record_remaining)) for item in (100, 200, 300)
    ]
    wait_for_queued(batcher, 3)
    model.go.set()
    for each in (bulk, *higher_priority):
        each.result(10)
    assert len(remaining_s) == 3
    assert min(remaining_s) > 0, "0.9 s in other batches are not 0.9 s without progress"


def test_concurrency_sets_how_many_batches_run_at_once(pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(2)

    def run(items: Sequence[int], _: OnStep) -> list[int]:
        together.wait(10)
        return [item * 2 for item in items]

    batcher: Batcher[int, int] = Batcher(
        run, key=int, max_batch_size=4, name="test", watchdog=Watchdog(WatchdogSettings()), concurrency=2
    )
    assert sorted(pool.submit(batcher.submit, [1, 2]).result(15)) == [2, 4]
    batcher.close(10)
    assert not any(thread.is_alive() for thread in batcher._threads)
