"""Postgres and the two Redis servers are killed, stopped, frozen, emptied or replaced, or refuse writes."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene
from tests.foreign_broker import REFUSALS, refusing_writes
from tests.stack import wait_until


def fail_over(scene: Scene) -> Hit:
    """Stop a server for good, in the middle of work. Its replica takes its place."""
    assert scene.servers.fail_over is not None
    scene.load.jobs(BURST)
    wait_until(scene.unfinished, timeout_s=PATIENCE_S, what="work in progress")
    scene.servers.fail_over(scene.stack)
    return Hit(jobs=scene.unfinished())


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


def read_only_broker(scene: Scene) -> Hit:
    """Let the broker refuse writes, as in a fail-over or when it is full. No process may end."""
    before = scene.pids()
    scene.load.jobs(BURST)
    with refusing_writes(scene.stack.environment()["AFTERIMAGE_QUEUE__URL"], scene.random.choice(REFUSALS)):
        scene.load.jobs(BURST)
        scene.load.upload(2)
        threading.Event().wait(scene.random.uniform(2, 8))
    hit = Hit(jobs=scene.waiting())
    assert scene.pids() == before, "a broker that refused writes ended a process"
    return hit


def freeze_limits(scene: Scene) -> Hit:
    """Freeze the Redis of the rate limits and of the cache. Every request has to be answered as before."""
    scene.stack.control.freeze("cache")
    try:
        scene.load.jobs(BURST)
        scene.load.wait_until_sent()
        hit = Hit(jobs=scene.unfinished())
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: scene.get("/jobs").status_code, range(64)))
    finally:
        scene.stack.control.thaw("cache")
    assert set(answers) == {httpx.codes.OK}, f"requests got {sorted(set(answers))}"
    return hit
