"""The lanes that a worker reads depend on the number and the lanes of its unfinished jobs. On a real broker."""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from celery.worker import state
from kombu import Connection, Consumer, Message, Producer, Queue

from shared.contracts.jobs import Lane
from shared.messaging import queue
from worker_service.workers import lane_transport

NAME = "generate.any"
LIMITS = [4, 3, 2, 1]
PAUSE_S = 0.2
QUIET_S = 0.4
"""When no message arrives for this long, the consumer has taken all messages that it may take."""


class UnfinishedJob:
    """Stands for a job that Celery has received and not finished. Celery's set has only weak references to it."""

    def __init__(self, lane: Lane = Lane.BULK) -> None:
        self.delivery_info = {"priority": lane.rank}


@pytest.fixture
def unfinished() -> Iterator[list[UnfinishedJob]]:
    jobs: list[UnfinishedJob] = []
    yield jobs
    state.reserved_requests.clear()
    state.requests.clear()


@pytest.fixture
def connection(redis_url: str) -> Iterator[Connection]:
    options = {
        "priority_steps": list(queue.LANES),
        "sep": queue.LANE_SEPARATOR,
        "queue_order_strategy": "priority",
        "lane_limits": LIMITS,
        "bulk_pause_s": PAUSE_S,
    }
    with Connection(
        redis_url, transport="worker_service.workers.lane_transport:Transport", transport_options=options
    ) as connection:
        transport: Any = connection.transport
        transport.brpop_timeout = 0.2  # closing a channel waits for the end of its BRPOP
        yield connection


def publish(producer: Producer, lane: int) -> None:
    """Publish a message of a task, as Celery does."""
    task = {"task": "any", "id": "any"}
    producer.publish([[], {}, {}], headers=task, routing_key=NAME, priority=lane, declare=[Queue(NAME)])


def taken(connection: Connection) -> list[int]:
    """The lanes of the messages that a consumer takes at present."""
    with connection.channel() as channel:
        return [lane for lane, _ in taken_at(connection, channel)]


def taken_at(connection: Connection, channel: Any) -> list[tuple[int, float]]:
    """The lane of each message that a consumer takes, and its time on the monotonic clock."""
    lanes: list[tuple[int, float]] = []

    def take(_: Any, message: Message) -> None:
        lanes.append((int(message.properties["priority"]), time.monotonic()))
        message.ack()

    with Consumer(channel, [Queue(NAME)], callbacks=[take]):
        try:
            while True:
                connection.drain_events(timeout=QUIET_S)
        except TimeoutError:
            return lanes


def test_a_lane_is_read_while_it_is_below_its_limit_and_the_highest_first(
    connection: Connection, unfinished: list[UnfinishedJob]
) -> None:
    producer = Producer(connection)
    for jobs in range(5):
        unfinished[:] = [UnfinishedJob() for _ in range(jobs)]
        for job in unfinished:
            state.reserved_requests.add(job)
        for lane in reversed(range(len(Lane))):
            publish(producer, lane)
        expected = [lane for lane, limit in enumerate(LIMITS) if jobs < limit]
        assert taken(connection) == expected
        state.reserved_requests.clear()
        assert len(taken(connection)) == len(Lane) - len(expected), (
            "the other messages wait until their lane is below its limit"
        )


def pauses_of_a_bulk(connection: Connection, channel: Any) -> list[float]:
    """Seconds between five jobs of a bulk, without the first pause: a read that began earlier takes one job at once."""
    for _ in range(5):
        publish(Producer(connection), lane_transport.BULK)
    times = [at for _, at in taken_at(connection, channel)]
    assert len(times) == 5, "each job is taken in the end"
    return [after - before for before, after in pairwise(times[1:])]


def test_a_bulk_pauses_between_jobs_while_a_higher_priority_lane_is_in_use(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, unfinished: list[UnfinishedJob]
) -> None:
    with connection.channel() as channel:
        state.requests["a job of another bulk"] = UnfinishedJob()
        assert max(pauses_of_a_bulk(connection, channel)) < PAUSE_S / 2

        state.requests["an interactive job"] = UnfinishedJob(Lane.LOW)
        assert min(pauses_of_a_bulk(connection, channel)) > PAUSE_S * 0.9
        state.requests.clear()
        assert min(pauses_of_a_bulk(connection, channel)) > PAUSE_S * 0.9, "its lane counts as in use for a while"

        monkeypatch.setattr(lane_transport, "LANE_IN_USE_S", 0.0)
        assert max(pauses_of_a_bulk(connection, channel)) < PAUSE_S / 2


def test_higher_priority_lanes_are_read_while_a_bulk_pauses(
    connection: Connection, unfinished: list[UnfinishedJob]
) -> None:
    state.requests["an interactive job"] = UnfinishedJob(Lane.HIGH)
    higher, bulk = [Lane.NORMAL.rank] * 5, [Lane.BULK.rank] * 2
    for lane in bulk + higher:
        publish(Producer(connection), lane)
    began = time.monotonic()
    with connection.channel() as channel:
        messages = taken_at(connection, channel)
    assert [lane for lane, _ in messages] == higher + bulk
    assert messages[4][1] - began < PAUSE_S


def test_a_returned_message_goes_back_to_its_own_lane(connection: Connection) -> None:
    channel: Any
    with connection.channel() as channel:
        channel.priority_steps = [0]  # as another thread sees it while only the highest lane is read
        assert [channel.priority(lane) for lane in (-1, *queue.LANES, 99)] == [0, *queue.LANES, len(Lane) - 1]
