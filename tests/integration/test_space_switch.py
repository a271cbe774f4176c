"""Switches of the embedding space under load, while processes are killed: no search fails, and no spaces are mixed."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import numpy as np
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.jobs import JobState
from shared.db import space_backlog, spaces, workers
from shared.db.spaces import Space
from shared.db.tables import Image, Job
from shared.settings import ClipSettings, ModelSettings, Settings
from shared.vectors import l2_normalised
from tests.integration.conftest import API, picture
from tests.integration.test_embedding_spaces import run_admin
from tests.small_pipelines import save_clip
from tests.stack import wait_until
from worker_service.models.clip import Clip

START_S = 240
SWITCHES = 6
SEARCHES_PER_SWITCH = 15
SEED = 17
TOLERANCE = 0.005
"""Largest error of a similarity: vectors are stored in half precision."""


@dataclass
class Supervised:
    """A process that is started again whenever it ends, as a supervisor does it."""

    arguments: list[str]
    environment: dict[str, str]
    process: "subprocess.Popen[bytes]" = field(init=False)
    _closed: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._start()
        self._thread = threading.Thread(target=self._supervise)
        self._thread.start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *self.arguments],
            cwd=REPOSITORY,
            env=self.environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _supervise(self) -> None:
        while not self._closed.wait(0.1):
            if self.process.poll() is not None:
                self._start()

    def kill(self) -> int:
        """Kill the process with its children, and return its id."""
        pid = self.process.pid
        os.killpg(pid, signal.SIGKILL)
        return pid

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.kill()
        self.process.wait()


@dataclass
class Load:
    """Searches, uploads and jobs, each in a thread of its own, with what came back."""

    url: str
    answers: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    job_ids: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    """Answers other than success. While the API is killed, there is no answer at all."""

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()

        def repeat(act: Callable[[httpx.Client, int], None], pause_s: float) -> None:
            number = 0
            with httpx.Client(base_url=self.url + API, timeout=60) as http:
                while not stop.wait(pause_s):
                    try:
                        act(http, number := number + 1)
                    except httpx.TransportError:
                        continue

        acts = ((self.search, 0.05), (self.search_by_picture, 0.2), (self.upload, 0.5), (self.submit, 1.0))
        threads = [threading.Thread(target=repeat, args=act) for act in acts]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def wait_for_answers(self, count: int) -> None:
        """Wait for `count` more answers to searches."""
        wanted = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= wanted, timeout_s=60, what=f"{count} more answers")

    def search(self, http: httpx.Client, number: int) -> None:
        query = f"thing number {number}"  # a new text each time, so that no cache answers
        if answer := self._accepted(http.post("/search", json={"query": query, "k": 5, "mode": "vector"})):
            self.answers.append((query, answer))

    def search_by_picture(self, http: httpx.Client, number: int) -> None:
        file = picture("teal", size=(40, 20 + number))
        self._accepted(http.post("/search", files={"image": file}, data={"k": "3"}))

    def upload(self, http: httpx.Client, number: int) -> None:
        file = picture(f"hsl({number * 37 % 360}, 80%, 50%)", size=(30 + number, 31))
        if answer := self._accepted(http.post("/upload", files={"file": ("a.png", file)})):
            self.image_ids.append(answer["images"][0]["id"])

    def submit(self, http: httpx.Client, number: int) -> None:
        request = {"prompt": f"a picture {number}", "min_similarity": -1}
        if answer := self._accepted(http.post("/rag/generate", json=request)):
            self.job_ids.append(answer["id"])

    def _accepted(self, answer: httpx.Response) -> dict[str, Any] | None:
        if not answer.is_success:
            self.refused.append(f"{answer.request.url.path}: {answer.status_code} {answer.text}")
            return None
        return dict(answer.json())


@pytest.mark.extended  # it loads eight models, and some of them again
@pytest.mark.timeout(900)
def test_switches_under_load_and_kills_fail_no_search_and_mix_no_spaces(
    session: Session, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, known, environments = [], [], []
    for seed in range(2):
        save_clip(tmp_path / f"clip-{seed}", seed=seed)
        model = f"local-dir:{tmp_path / f'clip-{seed}'}"
        clip = Clip.load(ModelSettings(clip=ClipSettings(model=model)))
        clips.append(clip)
        known.append(spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim))
        environments.append(small_environment() | {"AFTERIMAGE_MODEL__CLIP__MODEL": model})
    session.commit()
    port = free_port()
    load = Load(f"http://127.0.0.1:{port}")
    chance, killed = random.Random(SEED), set[int]()
    with ExitStack() as stack:

        def start(*arguments: str, environment: dict[str, str]) -> Supervised:
            process = Supervised(list(arguments), environment)
            stack.callback(process.close)
            return process

        api = start("api_service", environment=small_environment() | {"AFTERIMAGE_API__PORT": str(port)})
        start("worker_service", "reconciler", environment=small_environment())
        kinds: dict[tuple[str, int], list[Supervised]] = {
            (kind, number): [] for kind in ("embed", "generate") for number in range(2)
        }
        for (kind, number), processes in kinds.items():
            # Two embed workers per space: one answers while the other is killed.
            for _ in range(2 if kind == "embed" else 1):
                processes.append(start("worker_service", kind, environment=environments[number]))
        wait_until(lambda: serving(session, killed) == 6, timeout_s=START_S, what="all workers to serve")
        wait_until(lambda: answers(load.url), timeout_s=START_S, what="the API to answer")

        with load.running():
            wait_until(lambda: len(load.image_ids) >= 10, timeout_s=60, what="the first uploads")
            victims = [api, *(chance.choice(processes) for processes in kinds.values()), api]
            chance.shuffle(victims)
            for number, victim in enumerate(victims[:SWITCHES]):
                active = known[(number + 1) % 2]
                wait_until_complete(session, active)
                run_admin(monkeypatch, "activate-space", active.digest)
                load.wait_for_answers(5)
                killed.add(victim.kill())
                load.wait_for_answers(SEARCHES_PER_SWITCH)
                assert load.answers[-1][1]["embedding_space"] == active.digest
                if victim is not api:
                    wait_until(lambda: serving(session, killed) == 6, timeout_s=START_S, what="a restart")

        assert load.refused == []
        wait_until(lambda: all_ready(session, load.image_ids), timeout_s=60, what="every upload to be searchable")
        for space in known:
            wait_until_complete(session, space, also_recent=True)
        wait_until(lambda: not unfinished(session), timeout_s=120, what="every job to end")
    assert set(job_states(session, load.job_ids)) == {JobState.SUCCEEDED}
    answered = Counter(answer["embedding_space"] for _, answer in load.answers)
    assert set(answered) == {space.digest for space in known}
    assert min(answered.values()) > SEARCHES_PER_SWITCH
    check_similarities(session, load.answers, dict(zip(known, clips, strict=True)))


def check_similarities(session: Session, answers: list[tuple[str, dict[str, Any]]], clips: dict[Space, Clip]) -> None:
    """Compare each answer with the vectors of its space. A vector of the other space would give other similarities."""
    stored = {
        space.digest: {
            row.image_id: np.asarray(row.embedding, np.float32) for row in session.execute(select(space.table))
        }
        for space in clips
    }
    queries = [query for query, _ in answers]
    asked = {space.digest: l2_normalised(clip.encode_text(queries)) for space, clip in clips.items()}
    told_apart = 0
    for number, (query, answer) in enumerate(answers):
        right = answer["embedding_space"]
        (wrong,) = asked.keys() - {right}
        for result in answer["results"]:
            image_id = UUID(result["image_id"])
            similarity = {digest: float(asked[digest][number] @ stored[digest][image_id]) for digest in asked}
            assert result["similarity"] == pytest.approx(similarity[right], abs=TOLERANCE), query
            told_apart += abs(similarity[right] - similarity[wrong]) > 2 * TOLERANCE
    assert told_apart > len(answers), "the two encoders differ, so that a mix would be seen"


def small_environment() -> dict[str, str]:
    """The settings of this test for all processes: short leases, and long waits for a slow machine."""
    return {
        **os.environ,
        "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"cheap": {"kind": "fake"}}),
        "AFTERIMAGE_RETRIEVAL__TEXT_TIMEOUT_S": "20",
        "AFTERIMAGE_JOBS__LEASE_S": "8",
        "AFTERIMAGE_JOBS__HEARTBEAT_S": "2",
        "AFTERIMAGE_JOBS__RECONCILE_S": "1",
        "AFTERIMAGE_METRICS__PORT": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health/live", timeout=2).is_success
    except httpx.TransportError:
        return False


def serving(session: Session, killed: set[int]) -> int:
    """The live workers that have loaded their models. The row of a killed one stays for a while."""
    session.rollback()
    session.expire_all()
    pids = {
        int(each.id.partition("@")[0].rpartition("-")[2])
        for each in workers.list_live(session)
        if each.state != "loading"
    }
    return len(pids - killed)


def wait_until_complete(session: Session, space: Space, *, also_recent: bool = False) -> None:
    """Wait until the space lacks no image, except those of the last minute."""

    def is_complete() -> bool:
        session.rollback()
        progress = space_backlog.get_progress(session, space)
        return progress.missing == (0 if also_recent else progress.recent)

    wait_until(is_complete, timeout_s=60, what="a space to be complete")


def all_ready(session: Session, ids: list[str]) -> bool:
    session.rollback()
    return set(session.scalars(select(Image.state).where(Image.id.in_(ids)))) == {"ready"}


def unfinished(session: Session) -> bool:
    session.rollback()
    ended = [state for state in JobState if state.is_final]
    return session.scalar(select(Job.id).where(Job.state.not_in(ended)).limit(1)) is not None


def job_states(session: Session, ids: list[str]) -> list[str]:
    return list(session.scalars(select(Job.state).where(Job.id.in_(ids))))
