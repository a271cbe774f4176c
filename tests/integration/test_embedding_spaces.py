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
from sqlalchemy import delete
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from scripts.admin import main as admin
from shared.contracts.images import ImageState
from shared.db import images, spaces
from shared.db.images import ImageClaim
from shared.db.tables import Image, Worker
from shared.settings import JobSettings, Settings
from tests.factories import DIM, make_image, make_space
from tests.integration.conftest import API, Client, picture
from tests.integration.test_api_images import uploaded
from tests.integration.test_worker_process import START_S, worker
from tests.small_pipelines import save_clip
from tests.stack import wait_until
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


def found(client: Client, query: str) -> set[str]:
    """The ids that a search by text finds. The fixture's searches are answered by a worker, not by the cache."""
    answer = client.post(f"{API}/search", json={"query": query, "k": 100})
    assert answer.status_code == 200, answer.text
    return {result["image_id"] for result in answer.json["results"]}


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
        with worker("embed", second_clip):
            wait_until(lambda: are_ready(client, known), timeout_s=30, what="all images")
            assert found(client, "a second heart") == set(known)
            wait_until(lambda: lacking(session, digest) == 0, timeout_s=START_S, what="the backlog to be empty")
            run_admin(monkeypatch, "activate-space", digest)
            assert first.wait(30) == 0, "the supervisor starts it again, and it works for its backlog"
            wait_until(lambda: ready_workers(session) == 1, timeout_s=START_S, what="the second CLIP to serve")
            known += upload_some(client, 3, width=32)
            wait_until(lambda: are_ready(client, known), timeout_s=30, what="the images of the new space")
            assert found(client, "a third heart") == set(known)


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
    assert [space.digest for space, _, _ in spaces.list_all(session)] == ["a"]


def states(session: Session, *rows: Image) -> list[str]:
    for row in rows:
        session.refresh(row)
    return [row.state for row in rows]
