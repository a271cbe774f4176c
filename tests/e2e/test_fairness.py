"""Fair scheduling: how long jobs wait while other owners have thousands of waiting jobs."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
import redis

from shared.messaging import queue
from shared.settings import QueueSettings
from tests.e2e.conftest import BATCH_IMAGES, BATCH_S
from tests.stack import RunningStack, wait_until

WAITING = 2_500
"""Jobs in each of two bulks."""
SLACK_S = 1.5
"""Seconds for everything but the batch of the model, on a busy machine."""


class Owner:
    """A client of the API with the key of one owner."""

    def __init__(self, stack: RunningStack, name: str) -> None:
        key = stack.new_key(name, "generate")
        self.http = httpx.Client(base_url=f"{stack.url}/api/v1", headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def start_bulk(self, items: int, *, model: str) -> str:
        header = {"bulk": {"defaults": {"kind": "generate", "model": model}}}
        lines = [header, *({"prompt": f"one of many {number}"} for number in range(items))]
        answer = self.http.post(
            "/bulks",
            content="".join(json.dumps(line) + "\n" for line in lines),
            headers={"Content-Type": "application/jsonl", "Idempotency-Key": f"crowd-{model}"},
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def counts(self, bulk_id: str) -> dict[str, int]:
        counts: dict[str, int] = self.http.get(f"/bulks/{bulk_id}").raise_for_status().json()["counts"]
        return counts

    def done(self, bulk_id: str) -> int:
        return self.counts(bulk_id)["succeeded"]

    def cancel(self, bulk_id: str) -> None:
        self.http.post(f"/bulks/{bulk_id}/cancel").raise_for_status()

    def generated_within_s(self, **request: object) -> float:
        """Submit a job. Return the seconds from its acceptance to its end, by the clock of the service."""
        job = self.http.post("/generate", json=request).raise_for_status().json()
        wait_until(
            lambda: self.http.get(f"/jobs/{job['id']}", params={"wait": 5}).json()["state"] == "succeeded",
            timeout_s=60,
            what="the interactive job to end",
        )
        timings = self.http.get(f"/jobs/{job['id']}").json()["timings"]
        return float(sum(timings.values()))


@pytest.fixture(scope="module")
def owners(guarded_stack: RunningStack) -> Iterator[list[Owner]]:
    with ExitStack() as opened:
        owners = [Owner(guarded_stack, name) for name in ("first", "second", "guest")]
        for owner in owners:
            opened.enter_context(owner.http)
        yield owners


def listed_in_broker(stack: RunningStack) -> int:
    """The number of messages in the broker for jobs of the quick generator, fetched by a worker or not."""
    with redis.Redis.from_url(stack.environment()["AFTERIMAGE_QUEUE__URL"]) as broker:
        lists = queue.broker_lists(queue.generate_queue("quick"))
        return sum(int(broker.llen(name)) for name in lists)


def test_an_interactive_job_needs_no_free_slot_and_interrupts_the_batch_of_a_bulk(owners: list[Owner]) -> None:
    first, _, guest = owners
    bulk = first.start_bulk(60, model="slow")
    wait_until(lambda: first.done(bulk), timeout_s=60, what="progress of the bulk")
    # Before the second job, the bulk has taken all slots of the worker again and a new batch has begun.
    for number in range(2):
        seconds = guest.generated_within_s(prompt=f"now {number}", model="slow")
        assert seconds <= BATCH_S["slow"] + SLACK_S
    wait_until(lambda: first.done(bulk) >= 2 * BATCH_IMAGES, timeout_s=60, what="the interrupted batch")
    assert first.counts(bulk)["failed"] == 0
    first.cancel(bulk)


def test_thousands_of_waiting_jobs_delay_no_other_owner_and_share_the_worker_evenly(
    guarded_stack: RunningStack, owners: list[Owner]
) -> None:
    first, second, guest = owners
    bulks = {owner: owner.start_bulk(WAITING, model="quick") for owner in (first, second)}
    wait_until(lambda: all(owner.done(bulk) for owner, bulk in bulks.items()), timeout_s=60, what="progress of both")

    most_listed = 0
    for number in range(3):
        seconds = guest.generated_within_s(prompt=f"now {number}")
        assert seconds <= BATCH_S["quick"] + SLACK_S, (
            "an interactive job waits for one batch, not for thousands of jobs"
        )
        most_listed = max(most_listed, listed_in_broker(guarded_stack))

    wait_until(
        lambda: sum(owner.done(bulk) for owner, bulk in bulks.items()) >= 120, timeout_s=90, what="work for both"
    )
    shares = [owner.done(bulk) for owner, bulk in bulks.items()]
    assert min(shares) >= 0.8 * max(shares), f"two owners progress side by side: {shares}"
    window = QueueSettings().published_jobs_per_lane
    assert most_listed <= window, "the broker holds one window, however many jobs wait in Postgres"
