"""The faults: each function injects one fault and returns which jobs it affected.

Each submits jobs and waits until the target process has claimed some, so that the fault affects something.
"""

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from celery import Celery
from pydantic import SecretStr
from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.jobs import EventType, JobState, Lane
from shared.db import spaces
from shared.db.tables import Job, JobEvent
from shared.messaging import queue
from shared.settings import QueueSettings
from tests.chaos import orders
from tests.chaos.scene import PATIENCE_S, Hit, Scene
from tests.stack import clean_environment, wait_until

BURST = 6
TRIES = 5


# --- processes are killed -----------------------------------------------------------------------------------------


def kill_api(scene: Scene) -> Hit:
    name = scene.random.choice(["api", "api-2"])
    scene.load.jobs(BURST)
    scene.load.upload(1)
    hit = Hit(also=lambda: scene.answers(name))
    scene.kill(name)
    return hit


def kill_generate(scene: Scene) -> Hit:
    for _ in range(TRIES):
        name, pid = scene.a_ready("generate-cheap")
        scene.load.jobs(BURST)
        scene.wait_for_work(pid)
        hit = Hit()
        scene.kill(name)
        hit.jobs = scene.held_by(pid)
        if hit.jobs:
            return hit
    raise AssertionError("no worker was killed while it held a job")


def restart_generate(scene: Scene) -> Hit:
    """Stop a worker as a release does. It finishes or returns its jobs, so no job waits for a lease to expire."""
    name, pid = scene.a_ready("generate-cheap")
    scene.load.jobs(BURST)
    scene.wait_for_work(pid)
    hit = Hit(jobs=scene.held_by(pid))
    scene.stop(name)
    scene.start(name)
    return hit


def kill_embed(scene: Scene) -> Hit:
    name, _ = scene.a_ready("embed")
    scene.load.upload(8)
    wait_until(scene.leased_images, timeout_s=PATIENCE_S, what="images that a worker has leased")
    hit = Hit()
    scene.kill(name)
    images = scene.leased_images()
    hit.also = lambda: scene.are_embedded(images)
    return hit


def kill_io(scene: Scene) -> Hit:
    name, _ = scene.a_ready("io")
    scene.receiver.pause_s = scene.webhook_timeout_s / 3
    try:
        scene.load.jobs(BURST)
        wait_until(scene.leased_deliveries, timeout_s=PATIENCE_S, what="deliveries that a worker has leased")
        hit = Hit()
        scene.kill(name)
        deliveries = scene.leased_deliveries()
    finally:
        scene.receiver.pause_s = 0
    hit.also = lambda: scene.are_delivered(deliveries)
    return hit


def kill_reconciler(scene: Scene) -> Hit:
    before = scene.stack.control.pid("reconciler")
    scene.load.jobs(BURST)
    hit = Hit()
    scene.kill("reconciler")
    hit.also = lambda: scene.stack.control.pid("reconciler") not in (None, before)
    return hit


def power_cut(scene: Scene) -> Hit:
    """Kill all processes at once, including the servers."""
    _, pid = scene.a_ready("generate-cheap")
    scene.load.jobs(BURST)
    scene.load.upload(2)
    scene.wait_for_work(pid)
    hit = Hit()
    for name, process in scene.stack.control.states().items():
        if process.pid is not None:
            scene.stack.control.kill(name)
    wait_until(scene.broker_answers, timeout_s=PATIENCE_S, what="the broker to be back")
    hit.jobs = scene.unfinished()
    hit.also = lambda: scene.answers("api") and scene.answers("api-2")
    return hit


# --- a worker dies at a certain point ------------------------------------------------------------------------------


def kill_mid_batch(scene: Scene) -> Hit:
    return _kill_at(scene, orders.MID_BATCH)


def kill_before_commit(scene: Scene) -> Hit:
    return _kill_at(scene, orders.BEFORE_COMMIT)


def kill_after_commit(scene: Scene) -> Hit:
    return _kill_at(scene, orders.AFTER_COMMIT)


def _kill_at(scene: Scene, order: str) -> Hit:
    pid, at = _carried_out(scene, order)
    scene.wait_for_death(pid)
    return Hit(since=at, jobs=scene.held_by(pid))


def _carried_out(scene: Scene, order: str) -> tuple[int, float]:
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


# --- servers ------------------------------------------------------------------------------------------------------


def wipe_broker(scene: Scene) -> Hit:
    scene.load.jobs(BURST * 2)
    wait_until(scene.unfinished, timeout_s=PATIENCE_S, what="work in progress")
    scene.kill("queue")
    scene.stop("queue")
    for path in scene.stack.layout.queue.glob("*"):
        if path.name != "valkey.conf":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    scene.load.jobs(BURST)
    threading.Event().wait(scene.random.uniform(0.5, 4))
    hit = Hit(jobs=scene.waiting())
    scene.start("queue")
    hit.also = scene.broker_answers
    return hit


def freeze_broker(scene: Scene) -> Hit:
    scene.load.jobs(BURST)
    scene.stack.control.freeze("queue")
    try:
        scene.load.jobs(BURST)
        scene.load.upload(2)
        threading.Event().wait(scene.random.uniform(2, 8))
    finally:
        scene.stack.control.thaw("queue")
    return Hit(jobs=scene.waiting())


def broker_away(scene: Scene) -> Hit:
    """Stop the broker for one lease, as a move to another host does. It returns with its data."""
    scene.load.jobs(BURST)
    scene.stop("queue")
    scene.load.jobs(BURST)
    threading.Event().wait(scene.lease_s)
    hit = Hit(jobs=scene.waiting())
    scene.start("queue")
    hit.also = scene.broker_answers
    return hit


def restart_postgres(scene: Scene) -> Hit:
    scene.load.jobs(BURST)
    scene.stop("postgres")
    scene.start("postgres")
    return Hit(jobs=scene.unfinished())


def kill_postgres(scene: Scene) -> Hit:
    scene.load.jobs(BURST)
    scene.kill("postgres")
    hit = Hit()
    hit.jobs = scene.unfinished()
    return hit


def postgres_away_longer_than_a_lease(scene: Scene) -> Hit:
    scene.load.jobs(BURST)
    wait_until(scene.unfinished, timeout_s=PATIENCE_S, what="work in progress")
    scene.stop("postgres")
    threading.Event().wait(scene.lease_s * 1.2)
    scene.start("postgres")
    return Hit(jobs=scene.unfinished())


# --- messages and leases ------------------------------------------------------------------------------------------


def deliver_twice(scene: Scene) -> Hit:
    """Send every message of some jobs again and again for 5 s, also after the jobs have started or ended."""
    app = queue.configure(
        Celery("chaos"), QueueSettings(url=SecretStr(scene.stack.environment()["AFTERIMAGE_QUEUE__URL"]))
    )
    submitted = scene.load.jobs(BURST * 2)
    until = time.monotonic() + 5
    try:
        while time.monotonic() < until:
            for each in submitted:
                for job_id in each.ids:
                    app.send_task(
                        queue.GENERATE,
                        args=[str(job_id)],
                        task_id=str(job_id),
                        queue=queue.generate_queue(each.body["model"]),
                        priority=Lane(each.body["lane"]).rank,
                    )
            app.send_task(queue.EMBED_PENDING, queue=queue.EMBED_IMAGES_QUEUE)
            app.send_task(queue.DELIVER_WEBHOOKS, queue=queue.IO_QUEUE)
            threading.Event().wait(0.3)
    finally:
        app.close()
    return Hit(jobs=scene.unfinished())


def steal_lease(scene: Scene) -> Hit:
    """Claim the jobs of a worker for a process that does not exist, and let that lease expire."""
    for _ in range(TRIES):
        _, pid = scene.a_ready("generate-cheap")
        scene.load.jobs(BURST)
        scene.wait_for_work(pid)
        hit = Hit(jobs=_stolen(scene, pid))
        if hit.jobs:
            return hit
    raise AssertionError("no lease was stolen")


def _stolen(scene: Scene, pid: int) -> dict[UUID, int]:
    statement = (
        update(Job)
        .where(Job.state == JobState.PROCESSING, Job.worker.like(f"%-{pid}@%"))
        .values(
            attempt=Job.attempt + 1,
            worker=orders.THIEF,
            model_started=False,
            lease_until=func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, scene.lease_s / 2),
            last_seq=Job.last_seq + 1,
        )
        .returning(Job.id, Job.last_seq)
        .execution_options(synchronize_session=False)
    )
    with Session(scene.engine) as session, session.begin():
        stolen = {row.id: row.last_seq for row in session.execute(statement)}
        events = [
            {"job_id": job_id, "seq": seq, "type": EventType.STARTED, "data": {"worker": orders.THIEF}}
            for job_id, seq in stolen.items()
        ]
        if events:
            session.execute(insert(JobEvent), events)
    return stolen


def freeze_worker_past_its_lease(scene: Scene) -> Hit:
    for _ in range(TRIES):
        name, pid = scene.a_ready("generate-cheap")
        scene.load.jobs(BURST)
        scene.wait_for_work(pid)
        hit = Hit()
        scene.stack.control.freeze(name)
        try:
            hit.jobs = scene.held_by(pid)
            if hit.jobs:
                scene.wait_until_recovered(hit.jobs, timeout_s=scene.lease_s * 2 + PATIENCE_S)
                return hit
        finally:
            scene.stack.control.thaw(name)
    raise AssertionError("no worker was frozen while it held a job")


# --- models -------------------------------------------------------------------------------------------------------


def poison(scene: Scene) -> Hit:
    """Submit a prompt that kills every process that runs it. Every job beside it must succeed."""
    hit = Hit()
    scene.load.jobs(2)
    poisonous = scene.load.job(
        words=orders.POISON, ends=JobState.DEAD, code="job_crashed", model="cheap", lane=Lane.HIGH
    )
    scene.load.jobs(BURST)
    wait_until(
        lambda: poisonous.ids and not _is_unfinished(scene, poisonous.id),
        timeout_s=(scene.lease_s * 1.5 + PATIENCE_S) * 3,
        what="the poisonous job to be declared dead",
    )
    hit.jobs = scene.unfinished()
    return hit


def _is_unfinished(scene: Scene, job_id: UUID) -> bool:
    return job_id in scene.unfinished()


def out_of_memory(scene: Scene) -> Hit:
    scene.mailbox.order(orders.OUT_OF_MEMORY)
    scene.load.job(words=orders.TOO_LARGE, ends=JobState.FAILED, code="out_of_memory", model="cheap")
    scene.load.jobs(BURST, num_images=4, model="cheap")
    wait_until(lambda: not scene.mailbox.is_open(orders.OUT_OF_MEMORY), timeout_s=PATIENCE_S, what="a full batch")
    return Hit(jobs=scene.unfinished())


def garbage(scene: Scene) -> Hit:
    scene.mailbox.order(orders.WRONG_COUNT)
    scene.load.job(words=orders.GARBAGE, ends=JobState.FAILED, code="invalid_output", model="cheap")
    scene.load.jobs(BURST, num_images=4, model="cheap")
    wait_until(lambda: not scene.mailbox.is_open(orders.WRONG_COUNT), timeout_s=PATIENCE_S, what="a full batch")
    return Hit(jobs=scene.unfinished())


def hang(scene: Scene) -> Hit:
    """Let a model call never return. The watchdog has to end its process."""
    pid, at = _carried_out(scene, orders.HANG)
    hit = Hit(since=at, jobs=scene.held_by(pid))
    scene.wait_for_death(pid, timeout_s=scene.watchdog_s + PATIENCE_S)
    return hit


def second_clip(scene: Scene) -> Hit:
    """Start embed workers with another CLIP: one of an unknown space, then one of a known space, which is killed."""
    folder = scene.mailbox.folder.parent / f"clip-{time.monotonic_ns()}"
    _run_python(
        "import sys, pathlib; from tests.small_pipelines import save_clip\n"
        "save_clip(pathlib.Path(sys.argv[1]), seed=int(sys.argv[2]))",
        *(str(folder), str(time.monotonic_ns() % 2**31)),
    )
    command = [sys.executable, "-m", "worker_service", "embed"]
    environment = clean_environment() | scene.stack.environment()
    environment |= {"AFTERIMAGE_MODEL__CLIP__MODEL": f"local-dir:{folder}", "AFTERIMAGE_METRICS__PORT": "0"}
    hit = Hit()
    scene.load.upload(4)
    refused = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_S * 2, check=False
    )
    added = re.search(r"add-space (\w+) --model \S+ --dim (\d+)", refused.stderr)
    assert (refused.returncode, added is not None) == (2, True), refused.stderr
    with Session(scene.engine) as session, session.begin():
        space = spaces.ensure(session, digest=added[1], model="second", dim=int(added[2]))  # type: ignore[index]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            scene.load.upload(4)
            wait_until(
                lambda: scene.rows(select(space.table.c.image_id).limit(1)),
                timeout_s=PATIENCE_S * 2,
                what="the second CLIP to embed an image for its own space",
            )
            scene.load.upload(4)
            scene.search_by_text(10)
        finally:
            process.kill()
    uploaded = scene.pending_images()
    hit.also = lambda: scene.are_embedded(uploaded)
    return hit


def _run_python(code: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=REPOSITORY, check=True)


# --- the blob store -----------------------------------------------------------------------------------------------


def full_store(scene: Scene) -> Hit:
    with scene.store.full():
        since = time.time()
        scene.load.jobs(BURST)
        scene.load.upload(2)
        wait_until(lambda: scene.were_sent_back(since), timeout_s=PATIENCE_S, what="a job to meet the full store")
    return Hit(jobs=scene.unfinished())


# --- receivers ----------------------------------------------------------------------------------------------------


def hang_receivers(scene: Scene) -> Hit:
    """Let receivers accept every delivery and never answer. Jobs still have to run."""
    hit = Hit()
    scene.receiver.answers.clear()
    try:
        scene.load.jobs(BURST)
        wait_until(scene.leased_deliveries, timeout_s=PATIENCE_S, what="deliveries that hang")
        hit.jobs = scene.unfinished()
        threading.Event().wait(scene.webhook_timeout_s + 1)
    finally:
        scene.receiver.answers.set()
    deliveries = scene.pending_deliveries()
    scene.redeliver(deliveries)
    hit.also = lambda: scene.are_delivered(deliveries)
    return hit


# --- all of them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    inject: Callable[[Scene], Hit]
    bound_s: Callable[[Scene], float] | None = None
    """Seconds that recovery may take. `None`: there is no bound."""


def _after_a_lease(scene: Scene) -> float:
    return scene.lease_s * 1.5


def _after_the_watchdog_and_a_lease(scene: Scene) -> float:
    return scene.watchdog_s + scene.lease_s * 1.5


def _soon(_scene: Scene) -> float:
    return 15.0


KINDS = {
    "kill_api": Kind(kill_api, _after_a_lease),
    "kill_embed": Kind(kill_embed, _after_a_lease),
    "kill_generate": Kind(kill_generate, _after_a_lease),
    "kill_io": Kind(kill_io, _after_a_lease),
    "kill_reconciler": Kind(kill_reconciler, _after_a_lease),
    "power_cut": Kind(power_cut),
    "kill_mid_batch": Kind(kill_mid_batch, _after_a_lease),
    "kill_before_commit": Kind(kill_before_commit, _after_a_lease),
    "kill_after_commit": Kind(kill_after_commit, _after_a_lease),
    "restart_generate": Kind(restart_generate, _soon),
    "wipe_broker": Kind(wipe_broker, _soon),
    "broker_away": Kind(broker_away, _soon),
    "freeze_broker": Kind(freeze_broker, _soon),
    "restart_postgres": Kind(restart_postgres),
    "kill_postgres": Kind(kill_postgres),
    "postgres_away": Kind(postgres_away_longer_than_a_lease),
    "deliver_twice": Kind(deliver_twice),
    "steal_lease": Kind(steal_lease, _after_a_lease),
    "freeze_worker": Kind(freeze_worker_past_its_lease, _after_a_lease),
    "poison": Kind(poison),
    "hang": Kind(hang, _after_the_watchdog_and_a_lease),
    "out_of_memory": Kind(out_of_memory),
    "garbage": Kind(garbage),
    "second_clip": Kind(second_clip),
    "full_store": Kind(full_store),
    "hang_receivers": Kind(hang_receivers),
}
