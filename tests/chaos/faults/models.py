"""Models crash, hang, run out of memory or return wrong images, and a second CLIP joins."""

import re
import subprocess
import sys
import time
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.jobs import JobState, Lane
from shared.db import spaces
from tests.chaos import orders
from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene, carried_out
from tests.stack import clean_environment, wait_until


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
    pid, at = carried_out(scene, orders.HANG)
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
