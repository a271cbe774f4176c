"""Which lanes a worker reads, by how much it has in hand: on a real broker."""

from collections.abc import Iterator
from typing import Any

import pytest
from celery.worker import state
from kombu import Connection, Consumer, Message, Producer, Queue

from shared import queue
from shared.contracts.jobs import Lane

NAME = "generate.any"
SEATS = [4, 3, 2, 1]


class InHand:
    """Stands for what Celery has taken and not ended; it keeps weak references only."""


@pytest.fixture
def in_hand() -> Iterator[list[InHand]]:
    jobs: list[InHand] = []
    yield jobs
    state.reserved_requests.clear()


@pytest.fixture
def connection(redis_url: str) -> Iterator[Connection]:
    options = {
        "priority_steps": list(queue.LANES),
        "sep": queue.LANE_SEPARATOR,
        "queue_order_strategy": "priority",
        "lane_seats": SEATS,
    }
    with Connection(redis_url, transport="worker_service.seats:Transport", transport_options=options) as connection:
        yield connection


def taken(connection: Connection) -> list[int]:
    """The lanes of the messages that a consumer takes now."""
    lanes: list[int] = []

    def take(lane: int, message: Message) -> None:
        lanes.append(lane)
        message.ack()

    with connection.channel() as channel, Consumer(channel, [Queue(NAME)], callbacks=[take]):
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


def test_a_message_that_is_given_back_goes_where_it_came_from(connection: Connection) -> None:
    channel: Any
    with connection.channel() as channel:
        channel.priority_steps = [0]  # as another thread sees it while only the best lane is read
        assert [channel.priority(lane) for lane in (-1, *queue.LANES, 99)] == [0, *queue.LANES, len(Lane) - 1]
