"""Workers with two CLIPs on one database: only those of the active space serve, and no image is mislaid."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from scripts.admin.__main__ import main as admin
from shared.contracts.images import ImageState
from shared.db import images, spaces, workers
from shared.db.images import ImageClaim
from shared.db.tables import Image, JobEvent, Worker
from shared.settings import JobSettings, Settings
from tests.factories import DIM, make_image, make_job, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_images import uploaded
from tests.integration.test_worker_process import START_S, worker
from tests.small_pipelines import save_clip
from tests.stack import wait_until
from worker_service.jobs.attempt import Outcome, SpaceInactiveError, claimed
from worker_service.jobs.leases import JobLeases
from worker_service.maintenance.reconciler import Reconciler

ONE = np.ones(1, np.float32)
UNIT = np.eye(1, DIM, dtype=np.float32)


@pytest.fixture
def clips(settings: Settings, tmp_path: Path) -> list[dict[str, str]]:
    """The environments of workers with two CLIPs of the same size and different weights."""
    environments = []
    for seed in range(2):
        save_clip(tmp_path / f"clip-{seed}", seed=seed)
        model = f"local-dir:{tmp_path / f'clip-{seed}'}"
        environments.append({**os.environ, "AFTERIMAGE_MODEL__CLIP__MODEL": model, "PYTHONWARNINGS": "ignore"})
    return environments


def ready_workers(session: Session) -> int:
    session.rollback()
    return session.query(Worker).filter(Worker.state == "ready").count()


def upload_some(client: Client, count: int, *, width: int) -> list[str]:
    return [uploaded(client, picture("teal", size=(width, 20 + n)))["id"] for n in range(count)]


def are_ready(client: Client, ids: list[str]) -> bool:
    return all(client.get(f"{API}/images/{each}").json["state"] == "ready" for each in ids)


def answered(client: Client, query: str, **more: str) -> Any:
    """The answer to a search by text. Each query is new, so a worker answers it, and not the cache."""
    answer = client.post(f"{API}/search", json={"query": query, "k": 100, "mode": "vector", **more})
    assert answer.status_code == 200, answer.text
    return answer.json


def found(client: Client, query: str, **more: str) -> set[str]:
    """The ids that a search by text finds."""
    return {result["image_id"] for result in answered(client, query, **more)["results"]}


def live_workers(session: Session) -> set[str | None]:
    """The digests of the spaces that have a live worker."""
    session.rollback()
    return {each.space for each in workers.list_live(session)}


def run_admin(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["admin", *arguments])
        admin()


def test_a_second_clip_is_refused_until_it_is_added_and_serves_only_when_it_is_active(
    client: Client, clips: list[dict[str, str]], session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_clip, second_clip = clips
    with worker("embed", first_clip) as first:
        wait_until(lambda: ready_workers(session) == 1, timeout_s=START_S, what="the first CLIP to be ready")
        known = upload_some(client, 12, width=30)
        refused = subprocess.run(
            [sys.executable, "-m", "worker_service", "embed"],
            cwd=REPOSITORY, env=second_clip, capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert refused.returncode == 2
        assert "unknown embedding space" in refused.stderr
        wait_until(lambda: are_ready(client, known), timeout_s=30, what="the first images")
        active = spaces.find_active(session)
        assert active is not None
        old = active.digest
        assert found(client, "a heart") == set(known)

        added = re.search(r"scripts\.admin (add-space \w+) --model (\S+) --dim (\d+)", refused.stderr)
        assert added is not None, "the message says what the operator can do"
        digest = added[1].split()[1]
        run_admin(monkeypatch, "add-space", digest, "--model", added[2], "--dim", added[3])
        with pytest.raises(SystemExit):
            run_admin(monkeypatch, "activate-space", digest)

        with worker("embed", second_clip) as killed:
            wait_until(lambda: lacking(session, digest) == 0, timeout_s=START_S, what="the backlog of the new space")
            known += upload_some(client, 12, width=31)
            for number in range(8):
                found(client, f"a number {number}")
            killed.send_signal(signal.SIGKILL)
        with worker("embed", second_clip) as second:
            wait_until(lambda: are_ready(client, known), timeout_s=30, what="all images")
            assert found(client, "a second heart") == set(known)
            wait_until(lambda: lacking(session, digest) == 0, timeout_s=START_S, what="the backlog to be empty")
            run_admin(monkeypatch, "activate-space", digest)
            assert answered(client, "a third heart")["embedding_space"] == digest, "at once, without a pause"
            known += upload_some(client, 3, width=32)
            wait_until(lambda: are_ready(client, known), timeout_s=30, what="the images of the new space")
            assert found(client, "a fourth heart") == set(known)
            wait_until(lambda: lacking(session, old) == 0, timeout_s=30, what="the old space to keep up")
            assert answered(client, "a fifth heart", space=old[:12])["embedding_space"] == old
            assert found(client, "a fifth heart", space=old) == set(known), "both answer"

            run_admin(monkeypatch, "activate-space", old)
            assert answered(client, "a sixth heart")["embedding_space"] == old, "the roll-back is as quick"
            assert found(client, "a seventh heart") == set(known)
            assert first.poll() is None, "no worker has to load its model again"
            wait_until(lambda: ready_workers(session) == 1, timeout_s=30, what="one worker to be on standby")
            with pytest.raises(SystemExit):
                run_admin(monkeypatch, "drop-space", digest)
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0
        wait_until(lambda: live_workers(session) == {old}, timeout_s=60, what="the killed worker to count as dead")
        run_admin(monkeypatch, "drop-space", digest)
        assert found(client, "an eighth heart") == set(known)
        assert client.post(f"{API}/search", json={"query": "x", "space": digest}).status_code == 422


def lacking(session: Session, digest: str) -> int:
    session.rollback()
    space = spaces.find(session, digest)
    assert space is not None
    return images.count_without_vector(session, space)


def test_a_generate_worker_of_another_space_takes_no_job(
    clips: list[dict[str, str]], session: Session, settings: Settings
) -> None:
    make_space(session)
    session.commit()
    generators = {"AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake"}}'}
    with worker("generate", clips[0] | generators) as process:
        assert process.wait(START_S) == 2


def test_a_job_that_meets_a_switch_goes_back_to_the_queue_and_never_fails_by_it(
    session: Session, settings: Settings
) -> None:
    job = make_job(session)
    session.commit()
    jobs_settings = JobSettings(max_transient_retries=0)
    with JobLeases(jobs_settings) as leases:
        for _ in range(5):
            with claimed(job.id, leases=leases, settings=jobs_settings, worker="old") as attempt:
                assert attempt is not None
                raise SpaceInactiveError
            assert attempt.outcome is Outcome.REQUEUED
            with claimed(job.id, leases=leases, settings=jobs_settings, worker="old") as too_soon:
                assert too_soon is None, "the old worker has time to leave the queue"
            session.refresh(job)
            assert (job.state, job.transient_retries) == ("queued", 0)
            job.run_after = None
            session.commit()
        last = session.scalars(select(JobEvent).where(JobEvent.job_id == job.id).order_by(JobEvent.seq.desc())).first()
        assert last is not None
        assert (last.type, last.data["reason"]) == ("requeued", "embedding_space_inactive")


def test_an_image_that_is_ready_without_a_vector_is_embedded_again(session: Session, settings: Settings) -> None:
    space = make_space(session)
    mislaid, kept = make_image(session, vector=UNIT[0]), make_image(session, vector=UNIT[0])
    failed = make_image(session)
    session.execute(delete(space.table).where(space.table.c.image_id == mislaid.id))
    failed.state = ImageState.FAILED
    session.commit()
    Reconciler(JobSettings()).tick()
    assert states(session, mislaid, kept, failed) == ["pending", "ready", "failed"]


def test_the_reconciler_looks_at_a_large_corpus_in_steps(session: Session, settings: Settings) -> None:
    space = make_space(session)
    for _ in range(5):
        make_image(session, vector=UNIT[0])
    session.execute(delete(space.table))
    reopened: list[Any] = []
    page = images.reopen_without_vector(session, space, limit=2)
    while page.next_after is not None:
        reopened += page.image_ids
        page = images.reopen_without_vector(session, space, after=page.next_after, limit=2)
    assert len(reopened + page.image_ids) == 5


def test_an_image_claimed_before_the_space_changed_is_not_ready_without_a_vector_there(
    session: Session, settings: Settings
) -> None:
    old, new = make_space(session), make_space(session, dim=DIM + 1)
    image = make_image(session)
    (row,) = images.claim_pending(session, limit=1, lease_s=30, space=old)
    spaces.activate(session, new)
    images.store_embeddings(session, old, [ImageClaim.of(row)], UNIT, ONE)
    session.commit()
    assert states(session, image) == ["pending"]
    assert images.find_vector(session, old, image.id) is not None
    assert images.claim_pending(session, limit=1, lease_s=30, space=old) == []
    assert len(images.claim_pending(session, limit=1, lease_s=30, space=new)) == 1


def test_the_first_space_of_a_database_is_added_and_a_second_one_is_not(session: Session) -> None:
    first = spaces.find_or_add_first(session, digest="a", model="m", dim=8)
    assert first is not None
    assert spaces.find_active(session) == first
    assert spaces.find_or_add_first(session, digest="a", model="m", dim=8) == first
    assert spaces.find_or_add_first(session, digest="b", model="m", dim=8) is None
    assert [space.digest for space, _ in spaces.list_all(session)] == ["a"]


def states(session: Session, *rows: Image) -> list[str]:
    for row in rows:
        session.refresh(row)
    return [row.state for row in rows]
