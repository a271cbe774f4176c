"""A rolling upgrade under load loses no job.

Old workers and an old reconciler run beside the new schema and API. Then they are replaced one at a time.
"""

import hashlib
import json
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.db.session import build_engine
from shared.db.tables import Job, JobEvent
from shared.settings import DatabaseSettings
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.release_worker import NEW_SETTINGS, PREVIOUS, REPLACED
from tests.stack import RunningStack, clean_environment, running_stack, wait_until

PREVIOUS_RELEASE = "1752a8aa5095390671fea2df26c094ec468c7cc6"
"""The release in production when this code is deployed. After each release, put its commit here.

The tests then run the next migrations, API and messages beside the workers of that release.
"""
NEEDED = ("worker_service", "shared", "starter/__init__.py", "starter/models")
GENERATORS = ("generate-cheap", "generate-cheap-2")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def previous_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the code of the old release, from git."""
    found = subprocess.run(
        ["git", "cat-file", "-e", f"{PREVIOUS_RELEASE}^{{commit}}"], cwd=REPOSITORY, capture_output=True, check=False
    )
    if found.returncode:
        pytest.skip(f"the previous release {PREVIOUS_RELEASE[:9]} is not in this copy's git history")
    folder = tmp_path_factory.mktemp("previous")
    with subprocess.Popen(
        ["git", "archive", PREVIOUS_RELEASE, *NEEDED], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as archive:
        assert archive.stdout is not None
        with tarfile.open(fileobj=archive.stdout, mode="r|") as tar:
            tar.extractall(folder, filter="data")
    assert archive.returncode == 0
    return folder


@contextmanager
def old_reconciler(
    stack: RunningStack, release: Path, environment: dict[str, str]
) -> Iterator["subprocess.Popen[bytes]"]:
    """Stop the reconciler of the stack and run the old release's in its place until the block ends."""
    stack.control.stop("reconciler")
    with (release / "reconciler.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker_service.reconciler"],
            cwd=release,
            env={
                name: value
                for name, value in (clean_environment() | environment | stack.environment()).items()
                if name not in NEW_SETTINGS
            },
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


class Load:
    """Submit jobs of every kind and uploads, one after the other, until the block ends."""

    def __init__(self, api: Api) -> None:
        self.jobs: dict[str, int] = {}
        """The number of requested images, by job id."""
        self.uploads: list[str] = []
        self.bulks: list[str] = []
        self._api = api
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._error: BaseException | None = None

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def wait_for_more(self, number: int) -> None:
        """Wait until `number` more jobs have been accepted."""
        goal = len(self.jobs) + number
        wait_until(lambda: len(self.jobs) >= goal or self._error, timeout_s=120, what=f"{number} more jobs")

    def _run(self) -> None:
        turn = 0
        try:
            while not self._over.wait(0.15):
                self._submit(turn)
                turn += 1
        except BaseException as error:
            self._error = error

    def _submit(self, turn: int) -> None:
        images = 1 + turn % 3
        request: dict[str, Any] = {"prompt": f"a {COLOURS[turn % 6]} disc {turn}", "num_images": images}
        match turn % 6:
            case 0:
                made = self._api.http.post("/generate", json=request | {"preview_every": 2})
            case 1:
                made = self._api.http.post("/rag/generate", json=request | {"reference_ids": self.uploads[:1]})
            case 2 if turn == 2:
                made = self._bulk()
                self.bulks.append(made.raise_for_status().json()["id"])
                return
            case 3:
                self.uploads.append(self._api.upload(disc(COLOURS[turn % 6], radius=5 + turn % 55))["id"])
                return
            case _:
                made = self._api.http.post("/rag/generate", json=request)
        self.jobs[made.raise_for_status().json()["id"]] = images

    def _bulk(self) -> httpx.Response:
        lines = [{"bulk": {"defaults": {"num_images": 2}}}, *({"prompt": f"one of {n}"} for n in range(40))]
        return self._api.http.post(
            "/bulks",
            content="".join(json.dumps(line) + "\n" for line in lines),
            headers={"Content-Type": "application/jsonl"},
        )


def runs_in(stack: RunningStack, name: str) -> Path:
    """The working directory of a process, which is the folder of its release."""
    pid = stack.control.pid(name)
    assert pid is not None
    return Path(psutil.Process(pid).cwd())


def test_old_workers_serve_beside_the_new_api_and_are_replaced_without_losing_a_job(
    previous_release: Path, tmp_path: Path
) -> None:
    replaced = tmp_path / "replaced"
    replaced.mkdir()
    environment = TEST_ENVIRONMENT | {
        # `cheap` is the former name of `fake`. The previous release knows only that name.
        "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "cheap", "cost_ms": 200, "max_batch_size": 4}}',
        PREVIOUS: str(previous_release),
        REPLACED: str(replaced),
    }
    options = ("--worker-module", "tests.release_worker", "--generate", "2")
    with (
        running_stack(tmp_path / "stack", environment=environment, options=options) as stack,
        Api(stack.url) as api,
    ):
        workers = ("embed", *GENERATORS, "io")
        assert {runs_in(stack, name) for name in workers} == {previous_release}
        first = api.upload(disc("white", background="black"))["id"]
        api.searchable(first)
        load = Load(api)
        load.uploads.append(first)
        with load:
            with old_reconciler(stack, previous_release, environment) as reconciler:
                load.wait_for_more(10)
                for name in workers:
                    stack.control.stop(name)
                    load.wait_for_more(2)
                    (replaced / name).touch()
                    stack.control.start(name)
                    load.wait_for_more(2)
                    assert runs_in(stack, name) == REPOSITORY
                assert reconciler.poll() is None
            stack.control.start("reconciler")
            load.wait_for_more(5)

        for bulk in load.bulks:
            wait_until(
                lambda bulk=bulk: api.http.get(f"/bulks/{bulk}").json()["state"] == "completed",  # type: ignore[misc]
                timeout_s=180,
                what="the bulk to end",
            )
            counts = api.http.get(f"/bulks/{bulk}").json()["counts"]
            assert counts["succeeded"] == 40, counts
        for job_id, images in load.jobs.items():
            job = api.ended(job_id, timeout_s=180)
            assert job["state"] == "succeeded", job
            assert [output["index"] for output in job["outputs"]] == list(range(images))
            for output in job["outputs"]:
                content = httpx.get(api.url + output["content_url"]).raise_for_status().content
                assert hashlib.sha256(content).hexdigest() == output["sha256"]
        for image in load.uploads:
            api.searchable(image, timeout_s=120)
        assert ends_of_jobs(stack) == {1: len(load.jobs) + 40 * len(load.bulks)}


def ends_of_jobs(stack: RunningStack) -> Counter[int]:
    """How many jobs have each number of `succeeded` events, by that number."""
    engine = build_engine(DatabaseSettings(url=SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])))
    with Session(engine) as session:
        ends = func.count().filter(JobEvent.type == "succeeded")
        counts = session.scalars(select(ends).select_from(Job).outerjoin(JobEvent).group_by(Job.id)).all()
    engine.dispose()
    return Counter(counts)
