"""The drill of a restore: an installation is backed up under load, wiped, restored, and draws from what it had."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest

from ops.local.stack import REPOSITORY, LocalStack
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.stack import running_stack, wait_until

COLOURS = ("crimson", "teal", "gold", "navy")


def backup(stack: LocalStack, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "ops.backup", *arguments, "--json"],
        cwd=REPOSITORY,
        env=os.environ | stack.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def load(api: Api) -> Iterator[None]:
    """Submit jobs, and add and delete images, until the block ends."""
    stopping = threading.Event()

    def work() -> None:
        for number in range(10_000):
            if stopping.is_set():
                return
            image = api.upload(disc(f"#{number:06x}"))
            api.submit(prompt=f"load {number}")
            api.http.delete(f"/images/{image['id']}").raise_for_status()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def digests(api: Api, image_ids: list[str], job: dict[str, Any]) -> dict[str, str]:
    """The sha256 of the bytes that the service gives for each image and output."""
    paths = [f"/images/{each}/content" for each in image_ids]
    paths += [f"/generations/{output['id']}/content" for output in job["outputs"]]
    answers = {path: api.http.get(path).raise_for_status().content for path in paths}
    return {path: sha256(content).hexdigest() for path, content in answers.items()}


def found(api: Api) -> list[tuple[str, float]]:
    answer = api.http.post("/search", json={"query": "a disc", "k": 4, "filter": {"tags": ["drill"]}})
    return [(each["image_id"], each["similarity"]) for each in answer.raise_for_status().json()["results"]]


def unfinished(api: Api) -> list[dict[str, Any]]:
    states = ("queued", "processing")
    pages = [api.http.get("/jobs", params={"state": state}).raise_for_status().json() for state in states]
    return [job for page in pages for job in page["items"]]


@pytest.mark.extended
@pytest.mark.timeout(1800)
def test_a_wiped_installation_is_restored_and_draws_from_what_it_had(tmp_path: Path) -> None:
    var, backups = tmp_path / "var", tmp_path / "backups"
    with running_stack(var, environment=TEST_ENVIRONMENT) as stack, Api(stack.url) as api:
        images = [api.upload(disc(colour), caption=colour, tags="drill")["id"] for colour in COLOURS]
        for image in images:
            api.searchable(image)
        job = api.ended(api.submit(prompt="before", reference_ids=images[:1], num_images=2)["id"])
        key = stack.new_key("team", "search")
        before, results = digests(api, images, job), found(api)
        with load(api):
            path = backup(stack, "create", str(backups))["path"]

    for folder in (stack.layout.postgres, stack.layout.blobs, stack.layout.queue):
        rmtree(folder)
    empty = LocalStack(var)
    empty.start(servers_only=True, attached=True)
    try:
        assert backup(empty, "verify", path)["problems"] == 0
        assert backup(empty, "restore", path)["problems"] == 0
    finally:
        empty.stop()

    with running_stack(var, environment=TEST_ENVIRONMENT) as stack, Api(stack.url) as api:
        assert digests(api, images, job) == before
        assert found(api) == results
        assert api.job(job["id"]) == job
        assert api.http.get("/collections", headers={"Authorization": f"Bearer {key}"}).is_success
        again = api.ended(api.submit(prompt="after", reference_ids=images[:1])["id"])
        assert again["state"] == "succeeded"
        assert [each["image_id"] for each in again["outputs"][0]["references"]] == images[:1]
        # Jobs that waited or ran at the moment of the backup are drawn now.
        wait_until(lambda: not unfinished(api), timeout_s=120, what="the jobs of the backup to end")
