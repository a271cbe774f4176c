"""Processes are killed or stopped: at any moment, or at a certain point of a job."""

from tests.chaos import orders
from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene, carried_out
from tests.stack import wait_until

TRIES = 5


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


def kill_mid_batch(scene: Scene) -> Hit:
    return _kill_at(scene, orders.MID_BATCH)


def kill_before_commit(scene: Scene) -> Hit:
    return _kill_at(scene, orders.BEFORE_COMMIT)


def kill_after_commit(scene: Scene) -> Hit:
    return _kill_at(scene, orders.AFTER_COMMIT)


def _kill_at(scene: Scene, order: str) -> Hit:
    pid, at = carried_out(scene, order)
    scene.wait_for_death(pid)
    return Hit(since=at, jobs=scene.held_by(pid))
