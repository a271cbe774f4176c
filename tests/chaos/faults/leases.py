"""Leases and locks belong to processes that are frozen or do not exist."""

import subprocess
import sys
from uuid import UUID

from sqlalchemy import func, insert, update
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.jobs import EventType, JobState
from shared.db.tables import Job, JobEvent
from tests.chaos import orders
from tests.chaos.scene import BURST, PATIENCE_S, Hit, Scene
from tests.stack import clean_environment
from worker_service.maintenance.reconciler import LOCK

TRIES = 5
HOLDER = """
import contextlib, os, signal, sys
from sqlalchemy import text
from shared.db.session import session_scope
with contextlib.ExitStack() as transactions:
    for key in sys.argv[1:]:
        session = transactions.enter_context(session_scope())
        session.execute(text("select pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": key})
    print("holds", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
"""
"""A process that holds each lock in a transaction of its own, and freezes itself."""


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


def freeze_lock_holder(scene: Scene) -> Hit:
    """Freeze a process that holds every advisory lock of the service. Its transactions have to end within seconds."""
    owners = scene.owner_ids.values()
    token, image = scene.an_upload()
    keys = [
        *(f"feed:{model}" for model in scene.models),
        *("embedding_spaces", "webhook_deliveries", "queued", LOCK),
        *(f"{name}:{owner_id}" for name in ("queued", "bulks") for owner_id in owners),
        *sorted((image.blob_key, image.thumbnail_key)),
    ]
    environment = clean_environment() | scene.stack.environment()
    command = [sys.executable, "-c", HOLDER, *keys]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"holds\n"
            hit = Hit()
            scene.load.jobs(BURST)
            scene.load.upload_again(token)
            scene.load.upload(2)
            scene.load.wait_until_sent()
            hit.jobs = scene.unfinished()
            scene.wait_until_recovered(hit.jobs, timeout_s=PATIENCE_S)
        finally:
            holder.kill()
    return hit
