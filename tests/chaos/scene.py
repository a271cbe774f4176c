"""The stack under test: the queries and the actions that faults and checks use."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import UUID
from xmlrpc.client import Fault

import httpx
import psutil
import redis
from pydantic import SecretStr
from sqlalchemy import Select, func, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.jobs import JobState
from shared.db.session import bound_waits, build_engine
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace, Image, Job, JobEvent, Owner, WebhookDelivery, Worker
from shared.errors import StorageError
from shared.messaging import queue
from shared.messaging.redis import connect
from shared.settings import DatabaseSettings
from tests.chaos.load import Load
from tests.chaos.mailbox import Mailbox
from tests.chaos.receiver import Receiver
from tests.chaos.servers import Servers
from tests.chaos.store import Store
from tests.stack import RunningStack, clean_environment, wait_until

FINAL = [state.value for state in JobState if state.is_final]
PATIENCE_S = 60.0
"""The limit for waits that take a second or two on a quiet machine."""
ANSWER_S = 15.0
"""The limit for one answer of the database."""
BURST = 6
"""Jobs that a fault submits at a time."""
SEARCH_TRIES = 3
"""A search fails for a moment where an earlier fault has just killed the embed worker that answers it."""

OWNERS = ("alice", "bob", "carol")
SCOPES = ("generate", "search", "corpus:write")

Position = dict[UUID, int]
"""The seq of the last event of each job, by job id."""


@dataclass
class Hit:
    """An injected fault: the Unix time from which its recovery counts, and the affected jobs."""

    since: float = field(default_factory=time.time)
    jobs: Position = field(default_factory=dict)
    """Healed when each has been claimed again, or has ended."""
    also: Callable[[], object] = lambda: True
    """One more condition of the recovery."""


@dataclass
class Scene:
    stack: RunningStack
    servers: Servers
    load: Load
    receiver: Receiver
    store: Store
    mailbox: Mailbox
    random: random.Random
    models: Sequence[str]
    lease_s: float
    webhook_timeout_s: float
    watchdog_s: float

    @cached_property
    def owner_ids(self) -> dict[str, UUID]:
        """The ids of the owners of the load, by name."""
        return {row.name: row.id for row in self.rows(select(Owner.id, Owner.name)) if row.name in OWNERS}

    def headers(self, owner_id: UUID) -> dict[str, str]:
        """The headers of an owner's requests."""
        names = {each: name for name, each in self.owner_ids.items()}
        return self.load.headers(names[owner_id])

    def get(self, path: str) -> httpx.Response:
        """Send one GET request of one of the owners."""
        headers = self.load.headers(self.random.choice(OWNERS))
        return httpx.get(f"{self.stack.url}/api/v1{path}", headers=headers, timeout=PATIENCE_S)

    @cached_property
    def engine(self) -> Any:
        url = self.stack.environment()["AFTERIMAGE_DATABASE__URL"]
        bound_waits(ANSWER_S)  # the sessions of a server that hangs, and is replaced, never end
        return build_engine(DatabaseSettings(url=SecretStr(url)))

    @cached_property
    def reader(self) -> Any:
        """The engine for checks that read many rows. They run outside a transaction, which would end after 5 s idle."""
        return self.engine.execution_options(isolation_level="AUTOCOMMIT")

    def rows(self, statement: Select[*tuple[Any, ...]]) -> list[Any]:
        """Return the rows of a query. Wait for a database that does not answer.

        Raises:
            AssertionError: the database has not answered for about `PATIENCE_S` seconds.
        """
        for _ in range(int(PATIENCE_S)):
            with suppress(OperationalError), Session(self.engine) as session:
                return list(session.execute(statement).all())
            time.sleep(1)
        raise AssertionError("the database did not come back")

    # --- jobs -----------------------------------------------------------------------------------------------------

    def held_by(self, pid: int) -> Position:
        """The jobs that a worker process has claimed."""
        return self._jobs(Job.state == JobState.PROCESSING, Job.worker.like(f"%-{pid}@%"))

    def unfinished(self) -> Position:
        return self._jobs(Job.state.not_in(FINAL))

    def waiting(self) -> Position:
        """Queued jobs that could run now."""
        return self._jobs(Job.state == JobState.QUEUED, func.coalesce(Job.run_after, func.now()) <= func.now())

    def _jobs(self, *where: Any) -> Position:
        return {row.id: row.last_seq for row in self.rows(select(Job.id, Job.last_seq).where(*where))}

    def recovered_at(self, jobs: Position) -> float | None:
        """The Unix time at which the last of these jobs was claimed again or ended. `None` until then."""
        events = self.rows(
            select(JobEvent.job_id, JobEvent.seq, func.extract("epoch", JobEvent.at).label("at"))
            .where(JobEvent.job_id.in_(jobs), JobEvent.type.in_(["started", *FINAL]))
            .order_by(JobEvent.seq)
        )
        recovered: dict[UUID, float] = {}
        for event in events:
            if event.seq > jobs[event.job_id]:
                recovered.setdefault(event.job_id, float(event.at))
        return max(recovered.values(), default=0.0) if len(recovered) == len(jobs) else None

    def were_sent_back(self, since: float) -> bool:
        """Whether a job has gone back to the queue after a storage error since this Unix time."""
        reason = JobEvent.data["reason"].astext
        sent_back = select(JobEvent.job_id).where(
            reason == StorageError.code, func.extract("epoch", JobEvent.at) > since
        )
        return bool(self.rows(sent_back.limit(1)))

    def wait_for_work(self, pid: int) -> None:
        wait_until(lambda: self.held_by(pid), timeout_s=PATIENCE_S, what=f"process {pid} to claim a job")

    def wait_until_recovered(self, jobs: Position, *, timeout_s: float) -> None:
        wait_until(
            lambda: self.recovered_at(jobs) is not None,
            timeout_s=timeout_s,
            what=f"{len(jobs)} jobs to be claimed again",
        )

    # --- uploads and deliveries -----------------------------------------------------------------------------------

    def leased_images(self) -> list[UUID]:
        """Images that an embed worker has leased."""
        leased = select(Image.id).where(Image.state == "pending", Image.lease_until > func.clock_timestamp())
        return [row.id for row in self.rows(leased)]

    def pending_images(self) -> list[UUID]:
        return [row.id for row in self.rows(select(Image.id).where(Image.state == "pending"))]

    def an_upload(self) -> tuple[str, Any]:
        """The token of an uploaded image, chosen by the seed, with its `id`, `blob_key` and `thumbnail_key`."""
        if not any(self.load.uploads.values()):
            self.load.upload(1)
            self.load.wait_until_sent()
        token, (image_id, *_) = self.random.choice([each for each in self.load.uploads.items() if each[1]])
        (image,) = self.rows(select(Image.id, Image.blob_key, Image.thumbnail_key).where(Image.id == image_id))
        return token, image

    def are_embedded(self, images: Iterable[UUID]) -> bool:
        return not self.rows(select(Image.id).where(Image.id.in_(images), Image.state == "pending"))

    def search_by_text(self, number: int) -> None:
        """Search for texts that no cache holds. Each search has to be answered, at the latest by its third try."""
        for _ in range(number):
            text = f"a picture {self.random.random()}"
            answers: list[int] = []
            while not answers or (answers[-1] != httpx.codes.OK and len(answers) < SEARCH_TRIES):
                answer = httpx.post(
                    f"{self.stack.url}/api/v1/search",
                    json={"query": text},
                    headers=self.load.headers(OWNERS[0]),
                    timeout=PATIENCE_S,
                )
                answers.append(answer.status_code)
            assert answers[-1] == httpx.codes.OK, f"searches got {answers}"

    def leased_deliveries(self) -> list[UUID]:
        leased = select(WebhookDelivery.id).where(WebhookDelivery.lease_until > func.clock_timestamp())
        return [row.id for row in self.rows(leased)]

    def pending_deliveries(self) -> list[UUID]:
        return [row.id for row in self.rows(select(WebhookDelivery.id).where(WebhookDelivery.state == "pending"))]

    def redeliver(self, deliveries: Iterable[UUID]) -> None:
        """Redeliver by the API, as an owner does who does not wait five minutes for the third try."""
        owners = select(WebhookDelivery.id, WebhookDelivery.owner_id).where(WebhookDelivery.id.in_(list(deliveries)))
        for delivery in self.rows(owners):
            url = f"{self.stack.url}/api/v1/webhooks/deliveries/{delivery.id}/redeliver"
            httpx.post(url, headers=self.headers(delivery.owner_id), timeout=PATIENCE_S).raise_for_status()

    def are_delivered(self, deliveries: Iterable[UUID]) -> bool:
        undelivered = select(WebhookDelivery.id)
        return not self.rows(
            undelivered.where(WebhookDelivery.id.in_(deliveries), WebhookDelivery.state != "delivered")
        )

    def sweep(self) -> None:
        """Delete the blobs that no row names, of any age. Call it only when no work is running."""
        command = [sys.executable, "-m", "scripts.admin", "sweep", "--older-than-s", "0"]
        environment = clean_environment() | self.stack.environment()
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def files(self) -> set[str]:
        """The keys of all files in the blob store, including partly written ones."""
        folder = self.store.folder
        return {
            str(path.relative_to(folder)) for kind in ("images", "thumbnails", "outputs")
            for path in (folder / kind).rglob("*") if path.is_file()
        }  # fmt: skip

    # --- processes ------------------------------------------------------------------------------------------------

    def ready(self, kind: str) -> dict[str, int]:
        """The ready worker processes of a kind: process id by name."""
        announced = {row.id for row in self.rows(select(Worker.id).where(Worker.state == "ready"))}
        pids = {worker_id.partition("@")[0].rpartition("-")[2] for worker_id in announced}
        return {
            name: process.pid
            for name, process in self.stack.control.states().items()
            if name.startswith(kind) and process.state == "RUNNING" and process.pid and str(process.pid) in pids
        }

    def pids(self) -> dict[str, int | None]:
        """The process ids of all processes, by name, once all run that were not stopped for good."""
        wait_until(
            lambda: all(each.state in ("RUNNING", "STOPPED") for each in self.stack.control.states().values()),
            timeout_s=PATIENCE_S * 2,
            what="all processes to run",
        )
        return {name: process.pid for name, process in self.stack.control.states().items()}

    def a_ready(self, kind: str) -> tuple[str, int]:
        """Wait until two workers of a kind (or its only one) are ready. Return the name and process id of one.

        The seed decides which.
        """
        number = sum(name.startswith(kind) for name in self.stack.control.states())
        wait_until(
            lambda: len(self.ready(kind)) >= min(2, number),
            timeout_s=PATIENCE_S * 2,
            what=f"{kind} workers to be ready",
        )
        return self.random.choice(sorted(self.ready(kind).items()))

    def kill(self, name: str) -> None:
        """Kill a process with SIGKILL and wait until it is gone."""
        pid = self.stack.control.pid(name)
        self.stack.control.kill(name)
        if pid is not None:
            self.wait_for_death(pid)

    def wait_for_death(self, pid: int, *, timeout_s: float = PATIENCE_S) -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            wait_until(
                lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE,
                timeout_s=timeout_s,
                what=f"process {pid} to be gone",
            )

    def start(self, name: str) -> None:
        """Start a process unless it has been started already, and wait until it runs."""
        with suppress(Fault):
            self.stack.control.start(name)
        wait_until(
            lambda: self.stack.control.states()[name].state == "RUNNING", timeout_s=PATIENCE_S, what=f"{name} to run"
        )

    def stop(self, name: str) -> None:
        """Stop a process if it runs. The supervisor does not start it again."""
        with suppress(Fault):
            self.stack.control.stop(name)

    def answers(self, api: str) -> bool:
        return self.is_ready(self.stack.api_url(api))

    def is_ready(self, url: str) -> bool:
        """Whether the API process at this URL is ready for requests."""
        try:
            return httpx.get(f"{url}/api/v1/health/ready", timeout=3).is_success
        except httpx.TransportError:
            return False

    # --- the broker -----------------------------------------------------------------------------------------------

    def broker(self) -> redis.Redis:
        return connect(self.stack.environment()["AFTERIMAGE_QUEUE__URL"], timeout_s=2)

    def broker_answers(self) -> bool:
        try:
            with self.broker() as broker:
                return bool(broker.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def active_spaces(self) -> list[Space]:
        """The active embedding space; empty before the first embed worker has started."""
        columns = (EmbeddingSpace.id, EmbeddingSpace.digest, EmbeddingSpace.model, EmbeddingSpace.dim)
        return [Space(*row) for row in self.rows(select(*columns).where(EmbeddingSpace.active))]

    def lists(self) -> list[str]:
        """The names of all lists of messages that a worker consumes."""
        return [
            *(name for model in self.models for name in queue.broker_lists(queue.generate_queue(model))),
            *(queue.embed_queries_queue(space) for space in self.active_spaces()),
            *(queue.EMBED_QUERIES_QUEUE, queue.EMBED_IMAGES_QUEUE, queue.IO_QUEUE),
        ]

    def messages(self) -> dict[str, int]:
        """The number of messages in the broker by list, without empty lists. `unacked`: unacknowledged messages."""
        with self.broker() as broker:
            held = {name: int(broker.llen(name)) for name in {*self.lists(), "generate.starter"}}
            held["unacked"] = int(broker.hlen("unacked"))
        return {name: number for name, number in held.items() if number}


def carried_out(scene: Scene, order: str) -> tuple[int, float]:
    """Place an order and submit jobs. Return the id of the process that carried it out, and the Unix time."""
    before = len(list(scene.mailbox.notes(order)))
    scene.mailbox.order(order)
    scene.load.jobs(BURST)
    wait_until(
        lambda: len(list(scene.mailbox.notes(order))) > before,
        timeout_s=PATIENCE_S,
        what=f"a worker to carry out {order}",
    )
    note = list(scene.mailbox.notes(order))[-1]
    return note["pid"], note["at"]
