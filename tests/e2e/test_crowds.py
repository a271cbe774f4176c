"""Thousands of waiting jobs of some owners, and what they mean for others."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import redis

from shared.messaging import queue
from shared.settings import QueueSettings
from tests.conftest import TEST_ENVIRONMENT
from tests.stack import RunningStack, running_stack, wait_until

BATCH_S = 0.3
LONG_BATCH_S = 4.0
BATCH_IMAGES = 4
WAITING = 2_500
"""Jobs of each of the two owners with many."""
SLACK_S = 1.5
"""For everything but model work, on a busy machine."""


class Owner:
    """The API as one owner sees it."""

    def __init__(self, stack: RunningStack, name: str) -> None:
        key = stack.new_key(name, "generate")
        self.http = httpx.Client(base_url=f"{stack.url}/api/v1", headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def start_bulk(self, items: int) -> str:
        header = {"bulk": {"defaults": {"kind": "generate"}}}
        lines = [header, *({"prompt": f"one of many {number}"} for number in range(items))]
        answer = self.http.post(
            "/bulks",
            content="".join(json.dumps(line) + "\n" for line in lines),
            headers={"Content-Type": "application/jsonl", "Idempotency-Key": f"crowd-{items}"},
        )
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def counts(self, bulk_id: str) -> dict[str, int]:
        counts: dict[str, int] = self.http.get(f"/bulks/{bulk_id}").raise_for_status().json()["counts"]
        return counts

    def done(self, bulk_id: str) -> int:
        return self.counts(bulk_id)["succeeded"]

    def drawn_within_s(self, **request: object) -> float:
        """Seconds from the acceptance of a job to its end, by the service's own clock."""
        job = self.http.post("/generate", json=request).raise_for_status().json()
        wait_until(
            lambda: self.http.get(f"/jobs/{job['id']}", params={"wait": 5}).json()["state"] == "succeeded",
            timeout_s=60,
            what="the interactive job to end",
        )
        timings = self.http.get(f"/jobs/{job['id']}").json()["timings"]
        return float(sum(timings.values()))


@contextmanager
def crowded(folder: Path, batch_s: float) -> Iterator[tuple[RunningStack, list[Owner]]]:
    """A stack whose one worker draws four images in `batch_s`, with keys, and three owners."""
    generator = {"kind": "cheap", "cost_ms": batch_s * 1000, "max_batch_size": BATCH_IMAGES}
    environment = TEST_ENVIRONMENT | {
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"cheap": generator}),
        "AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true",
    }
    with running_stack(folder, environment=environment) as stack, ExitStack() as opened:
        owners = [Owner(stack, name) for name in ("one", "other", "guest")]
        for owner in owners:
            opened.enter_context(owner.http)
        yield stack, owners


def listed_in_broker(stack: RunningStack) -> int:
    """Messages of generate jobs in the broker, taken by a worker or not."""
    with redis.Redis.from_url(stack.environment()["AFTERIMAGE_QUEUE__URL"]) as broker:
        lists = queue.broker_lists(queue.generate_queue("cheap"))
        return sum(int(broker.llen(name)) for name in lists)


def test_thousands_of_waiting_jobs_delay_nobody_and_share_the_worker_evenly(tmp_path: Path) -> None:
    with crowded(tmp_path, BATCH_S) as (stack, (one, other, guest)):
        bulks = {owner: owner.start_bulk(WAITING) for owner in (one, other)}
        wait_until(
            lambda: all(owner.done(bulk) for owner, bulk in bulks.items()), timeout_s=60, what="progress of both"
        )

        most_listed = 0
        for number in range(3):
            seconds = guest.drawn_within_s(prompt=f"now {number}")
            assert seconds <= BATCH_S + SLACK_S, "an interactive job waits for its own batch, not for thousands of jobs"
            most_listed = max(most_listed, listed_in_broker(stack))

        wait_until(
            lambda: sum(owner.done(bulk) for owner, bulk in bulks.items()) >= 160, timeout_s=90, what="work for both"
        )
        shares = [owner.done(bulk) for owner, bulk in bulks.items()]
        assert min(shares) >= 0.8 * max(shares), f"two owners progress side by side: {shares}"
        assert most_listed <= QueueSettings().window, "the broker holds a window, whatever waits behind it"


def test_an_interactive_job_waits_neither_for_a_seat_nor_for_the_end_of_a_bulks_batch(tmp_path: Path) -> None:
    with crowded(tmp_path, LONG_BATCH_S) as (_stack, (one, _other, guest)):
        bulk = one.start_bulk(60)
        wait_until(lambda: one.done(bulk), timeout_s=60, what="progress of the bulk")
        # The second one finds a worker whose seats the bulk has taken again, and a batch that has just begun.
        for number in range(2):
            assert guest.drawn_within_s(prompt=f"now {number}") <= LONG_BATCH_S + SLACK_S
        wait_until(lambda: one.done(bulk) >= 2 * BATCH_IMAGES, timeout_s=60, what="the batch that was passed")
        assert one.counts(bulk)["failed"] == 0
