"""Which lanes a worker reads, by how much it has in hand and of what: on a real broker."""

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
SEATS = [4, 3, 2, 1]
PAUSE_S = 0.2


class InHand:
    """Stands for what Celery has taken and not ended; of its set it keeps weak references only."""

    def __init__(self, lane: Lane = Lane.BULK) -> None:
        self.delivery_info = {"priority": lane.rank}


@pytest.fixture
def in_hand() -> Iterator[list[InHand]]:
    jobs: list[InHand] = []
    yield jobs
    state.reserved_requests.clear()
    state.requests.clear()


@pytest.fixture
def connection(redis_url: str) -> Iterator[Connection]:
    options = {
        "priority_steps": list(queue.LANES),
        "sep": queue.LANE_SEPARATOR,
        "queue_order_strategy": "priority",
        "lane_seats": SEATS,
        "bulk_pause_s": PAUSE_S,
    }
    with Connection(
        redis_url, transport="worker_service.workers.lane_transport:Transport", transport_options=options
    ) as connection:
        yield connection


def taken(connection: Connection) -> list[int]:
    """The lanes of the messages that a consumer takes now."""
    with connection.channel() as channel:
        return [lane for lane, _ in taken_at(connection, channel)]


def taken_at(connection: Connection, channel: Any) -> list[tuple[int, float]]:
    """The same, each with its time."""
    lanes: list[tuple[int, float]] = []

    def take(lane: int, message: Message) -> None:
        lanes.append((lane, time.monotonic()))
        message.ack()

    with Consumer(channel, [Queue(NAME)], callbacks=[take]):
        try:
            while True:
                connection.drain_events(timeout=0.5)
        except TimeoutError:
            return lanes


def test_a_lane_is_read_while_it_has_a_seat_and_the_best_first(connection: Connection, in_hand: list[InHand]) -> None:
    producer = Producer(connection)
    for jobs in range(5):
        in_hand[:] = [InHand() for _ in range(jobs)]
        for job in in_hand:
            state.reserved_requests.add(job)
        for lane in reversed(range(len(Lane))):
            producer.publish(lane, routing_key=NAME, priority=lane, declare=[Queue(NAME)])
        expected = [lane for lane, seats in enumerate(SEATS) if jobs < seats]
        assert taken(connection) == expected
        state.reserved_requests.clear()
        assert len(taken(connection)) == len(Lane) - len(expected), "what was left waits for a seat"


def pauses_of_a_bulk(connection: Connection, channel: Any) -> list[float]:
    """Between five of its jobs, but for the first pause: a read that has waited for long takes one ahead of it."""
    for _ in range(5):
        Producer(connection).publish(
            lane_transport.BULK, routing_key=NAME, priority=lane_transport.BULK, declare=[Queue(NAME)]
        )
    times = [at for _, at in taken_at(connection, channel)]
    assert len(times) == 5, "whatever it waits for, it is taken in the end"
    return [after - before for before, after in pairwise(times[1:])]


def test_a_bulk_pauses_between_its_jobs_while_a_better_lane_is_in_use(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, in_hand: list[InHand]
) -> None:
    with connection.channel() as channel:
        state.requests["of another bulk"] = InHand()
        assert max(pauses_of_a_bulk(connection, channel)) < PAUSE_S / 2

        state.requests["somebody waits"] = InHand(Lane.LOW)
        assert min(pauses_of_a_bulk(connection, channel)) > PAUSE_S * 0.9
        state.requests.clear()
        assert min(pauses_of_a_bulk(connection, channel)) > PAUSE_S * 0.9, "who has waited will want another"

        monkeypatch.setattr(lane_transport, "IN_USE_S", 0.0)
        assert max(pauses_of_a_bulk(connection, channel)) < PAUSE_S / 2


def test_better_lanes_are_read_while_a_bulk_pauses(connection: Connection, in_hand: list[InHand]) -> None:
    state.requests["somebody waits"] = InHand(Lane.HIGH)
    better, bulk = [Lane.NORMAL.rank] * 5, [Lane.BULK.rank] * 2
    for lane in bulk + better:
        Producer(connection).publish(lane, routing_key=NAME, priority=lane, declare=[Queue(NAME)])
    began = time.monotonic()
    with connection.channel() as channel:
        messages = taken_at(connection, channel)
    assert [lane for lane, _ in messages] == better + bulk
    assert messages[4][1] - began < PAUSE_S


def test_a_message_that_is_given_back_goes_where_it_came_from(connection: Connection) -> None:
    channel: Any
    with connection.channel() as channel:
        channel.priority_steps = [0]  # as another thread sees it while only the best lane is read
        assert [channel.priority(lane) for lane in (-1, *queue.LANES, 99)] == [0, *queue.LANES, len(Lane) - 1]
