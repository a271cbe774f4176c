"""Watching a folder again after a pause. No embed worker is needed to compare the files."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from afterimage_client import Afterimage, ImageFile, UploadFields
from ops.local.stack import REPOSITORY
from tests.integration.conftest import Server, picture
from tests.stack import wait_until


@pytest.fixture
def service(server: Server) -> Iterator[Afterimage]:
    with Afterimage(server.url) as service:
        yield service


def test_files_deleted_or_changed_between_two_runs_are_deleted_at_the_next_start(
    server: Server, service: Afterimage, tmp_path: Path
) -> None:
    folder, report, log = tmp_path / "watched", tmp_path / "report.jsonl", tmp_path / "log"
    folder.mkdir()
    for name in ("stays", "goes", "changes", "twin", "other twin"):
        (folder / f"{name}.png").write_bytes(picture("navy" if "twin" in name else f"#{len(name)}0{len(name)}0f0"))
    # An image that is not from the folder stays.
    upload = [ImageFile("foreign.png", picture("orange"))]
    service.images.upload(upload, UploadFields(collection="watched"))
    options = ["--watch", "--delete", "--report", str(report), "--collection", "watched", "--url", server.url, "--json"]
    command = [sys.executable, "-m", "scripts.index_images", str(folder), *options]

    def watch_once() -> set[str]:
        with log.open("w") as output, subprocess.Popen(command, cwd=REPOSITORY, stdout=output) as watching:
            try:
                wait_until(
                    lambda: "watching" in log.read_text() or watching.poll() is not None,
                    timeout_s=60,
                    what="a first pass",
                )
                watching.send_signal(signal.SIGINT)
                assert watching.wait(60) in (0, 2)
            finally:
                watching.kill()
        return {image.sha256 for image in service.images.list(collection="watched")}

    def sha256(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    first = watch_once()
    assert len(first) == 5
    gone = {sha256((folder / name).read_bytes()) for name in ("goes.png", "changes.png")}
    (folder / "goes.png").unlink()
    (folder / "twin.png").unlink()
    (folder / "changes.png").write_bytes(picture("olive"))
    assert watch_once() == first - gone | {sha256(picture("olive"))}, (
        "content of a twin file and of other sources stays"
    )
    (folder / "other twin.png").unlink()
    assert watch_once() == first - gone - {sha256(picture("navy"))} | {sha256(picture("olive"))}
    # The command takes an empty folder for one that is not mounted, and deletes nothing.
    before = watch_once()
    for path in folder.iterdir():
        path.unlink()
    assert watch_once() == before
    assert "all 2 files of the report are missing" in log.read_text()
