"""The command `index_images` on a whole stack: which files it uploads or skips, and how it continues after a kill.

All tests share the stack, so each uses a collection of its own.
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from afterimage_client import Afterimage, ImagePatch
from ops.local.stack import REPOSITORY
from scripts.index_images.upload import FILES_PER_REQUEST
from tests.integration.conftest import picture
from tests.stack import RunningStack, wait_until


@pytest.fixture
def service(stack: RunningStack) -> Iterator[Afterimage]:
    with Afterimage(stack.url) as service:
        yield service


@pytest.fixture
def collection(request: pytest.FixtureRequest) -> str:
    return f"index-{zlib.crc32(request.node.name.encode()):x}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of good, broken, duplicate, huge, mislabelled and animated files, with and without sidecars."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "plain.png").write_bytes(picture("red"))
    (folder / "deep" / "captioned.jpg").write_bytes(picture("green", kind="JPEG"))
    (folder / "deep" / "captioned.txt").write_text("a green field\n")
    (folder / "deep" / "er" / "described.WEBP").write_bytes(picture("blue", kind="WEBP"))
    described = {"caption": "the sea", "tags": ["water", "photo"], "attributes": {"depth": 3}, "licence": "CC0"}
    (folder / "deep" / "er" / "described.json").write_text(json.dumps(described))
    (folder / "jpeg inside.png").write_bytes(picture("purple", kind="JPEG"))
    (folder / "same as plain.png").write_bytes(picture("red"))
    (folder / "broken.png").write_bytes(picture("cyan", size=(500, 500))[:200])
    (folder / "text.jpg").write_text("not an image at all")
    (folder / "empty.png").write_bytes(b"")
    (folder / "huge.png").write_bytes(b"\0" * 1_500_000)
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "badly described.png").write_bytes(picture("pink"))
    (folder / "badly described.json").write_text("{")
    (folder / "wrongly tagged.png").write_bytes(picture("pink", size=(50, 40)))
    (folder / "wrongly tagged.json").write_text('{"tags": 5}')
    (folder / "deep.png").write_bytes(picture("pink", size=(50, 41)))
    (folder / "deep.json").write_text("[" * 200_000)
    os.mkfifo(folder / "pipe.png")
    moving = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(moving, "WEBP", save_all=True, append_images=frames[1:])
    (folder / "moving.webp").write_bytes(moving.getvalue())
    (folder / ".hidden.png").write_bytes(picture("black"))
    return folder


SKIPPED = {
    "broken.png": "invalid_image",
    "text.jpg": "unsupported_image_type",
    "empty.png": "empty_file",
    "huge.png": "image_too_large",
    "drawing.svg": "not_an_image",
    "badly described.png": "sidecar_unreadable",
    "wrongly tagged.png": "invalid_description",
    "deep.png": "sidecar_unreadable",
    "pipe.png": "not_an_image",
    "moving.webp": "animated_image",
}


def index(stack: RunningStack, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command. Return its exit code and its JSON events."""
    done = subprocess.run(command(stack, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def command(stack: RunningStack, *arguments: str) -> list[str]:
    common = ["--url", stack.url, "--json", "--wait", "60"]
    return [sys.executable, "-m", "scripts.index_images", *arguments, *common]


def outcomes(events: list[dict[str, Any]]) -> dict[str, str]:
    return {event["file"]: event["code"] or event["outcome"] for event in events if event["event"] == "file"}


def test_files_that_are_not_images_are_reported_and_do_not_fail_the_run(
    stack: RunningStack, collection: str, tmp_path: Path
) -> None:
    (tmp_path / "good.png").write_bytes(picture("teal"))
    (tmp_path / "Thumbs.db").write_bytes(b"what a file manager leaves")
    code, events = index(stack, str(tmp_path), "--collection", collection)
    assert (code, outcomes(events)) == (0, {"good.png": "created", "Thumbs.db": "not_an_image"})


@pytest.mark.parametrize(
    ("strict", "code", "said"),
    [([], 0, "which --strict makes an error"), (["--strict"], 1, "so the exit code is 1")],
    ids=["lenient", "strict"],
)
def test_the_summary_says_what_failed(
    stack: RunningStack, collection: str, tmp_path: Path, strict: list[str], code: int, said: str
) -> None:
    (tmp_path / "good.png").write_bytes(picture("teal"))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "Thumbs.db").write_bytes(b"what a file manager leaves")
    done = subprocess.run(
        [each for each in command(stack, str(tmp_path), *strict, "--collection", collection) if each != "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert "1 created, 2 skipped" in lines
    assert f"1 of the skipped files failed, {said}" in lines
    assert any(line.startswith("failed broken.png: ") for line in lines)
    assert any(line.startswith("skipped Thumbs.db: not_an_image") for line in lines)


def test_an_empty_folder_is_told_as_such(stack: RunningStack, collection: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [each for each in command(stack, str(tmp_path), "--collection", collection) if each != "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, f"nothing to index: {tmp_path} has no files, or only hidden ones\n")


def test_a_folder_is_indexed_and_each_skipped_file_is_reported_with_its_reason(
    stack: RunningStack, service: Afterimage, collection: str, folder: Path
) -> None:
    code, events = index(
        stack, str(folder), "--tag", "photo", "--source", "holidays", "--max-file-mb", "1", "--collection", collection
    )
    assert code == 0, "without --strict"
    reported = outcomes(events)
    assert {name: reported[name] for name in SKIPPED} == SKIPPED
    assert sorted(reported[name] for name in ("plain.png", "same as plain.png")) == ["created", "duplicate"]
    assert events[-1] | {"event": "done", "created": 4, "duplicate": 1, "skipped": 10, "existing": 0} == events[-1]
    images = {image.filename: image for image in service.images.list(collection=collection)}
    assert len(images) == 4
    sea, field = images["described.WEBP"], images["captioned.jpg"]
    assert (sea.caption, sea.tags, sea.licence) == ("the sea", ["water", "photo"], "CC0")
    assert (sea.attributes, sea.source) == ({"depth": "3"}, "holidays")
    assert (field.caption, field.tags, field.licence) == ("a green field", ["photo"], None)


def test_a_second_run_uploads_only_files_that_are_new_changed_or_now_allowed(
    stack: RunningStack, service: Afterimage, collection: str, folder: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.jsonl"
    index(stack, str(folder), "--report", str(report), "--collection", collection)
    first = report.read_text()
    assert Counter(json.loads(line)["outcome"] for line in first.splitlines()) == {
        "created": 4,
        "duplicate": 1,
        "skipped": 10,
    }
    with uploads_counted(stack) as uploads:
        _, events = index(stack, str(folder), "--report", str(report), "--collection", collection)
        assert uploads() == 0
    assert Counter(outcomes(events).values())["existing"] == 5
    assert sorted(report.read_text().splitlines()) == sorted(first.splitlines())
    # Names with unusual characters are reported like others.
    (folder / "a\u2028b\x85.png").write_bytes(picture("navy"))
    Path(os.fsdecode(os.fsencode(folder) + b"/no \xff text.png")).write_bytes(picture("maroon"))
    for _ in range(2):
        _, events = index(stack, str(folder), "--report", str(report), "--collection", collection)
    reported = outcomes(events)
    assert (reported["a\u2028b\x85.png"], reported["no \\udcff text.png"]) == ("existing", "existing")
    # A run with a higher limit takes the files that the limit of an earlier run skipped.
    lenient = ("--report", str(tmp_path / "another.jsonl"), "--collection", collection)
    _, events = index(stack, str(folder), *lenient, "--max-file-mb", "0.00001")
    assert outcomes(events)["plain.png"] == "image_too_large"
    _, events = index(stack, str(folder), *lenient)
    assert outcomes(events)["plain.png"] in ("existing", "duplicate")
    # A changed file is read again, also when it was skipped before.
    (folder / "broken.png").write_bytes(picture("cyan"))
    _, events = index(stack, str(folder), "--report", str(report), "--collection", collection)
    assert outcomes(events)["broken.png"] == "created"


@contextmanager
def uploads_counted(stack: RunningStack) -> Iterator[Any]:
    def total() -> float:
        lines = httpx.get(f"{stack.url}/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("uploads_total{"))

    before = total()
    yield lambda: total() - before


def test_a_killed_run_continues_where_it_stopped(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    count = 240
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(picture(f"#{number:02x}{number:02x}30", size=(160, 120)))
    report = tmp_path / "report.jsonl"
    arguments = command(stack, str(folder), "--report", str(report), "--collection", collection)
    with uploads_counted(stack) as uploads:
        with running(arguments, tmp_path / "log"):
            wait_until(lambda: uploads() >= 20, timeout_s=30, what="some uploads")
        done = uploads()
        assert done < count
        code, _ = index(stack, str(folder), "--report", str(report), "--collection", collection)
        assert code == 0
        # Only the requests that were in flight at the kill may have been sent twice.
        assert count <= uploads() <= count + 4 * FILES_PER_REQUEST
    assert len(list(service.images.list(collection=collection))) == count
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    assert sorted(entry["file"] for entry in entries) == sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_lists_files_and_their_descriptions(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.png").write_bytes(picture("olive"))
    table = tmp_path / f"list.{kind}"
    if kind == "csv":
        cells = 'files/a.png,olives,"green, food","{""shelf"": 4}"\nfiles/gone.png,nothing,,\n,no file,,\n'
        table.write_text("image_path,title,tags,attributes\n" + cells)
    else:
        rows = [
            {"image_path": "files/a.png", "title": "olives", "tags": ["green", "food"], "attributes": {"shelf": 4}},
            {"image_path": "files/gone.png", "title": "nothing", "tags": None, "attributes": None},
            {"image_path": None, "title": "no file", "tags": None, "attributes": None},
        ]
        parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    columns = ["--column", "file=image_path", "--column", "caption=title"]
    code, events = index(stack, str(table), *columns, "--strict", "--collection", collection)
    assert code == 1
    assert sorted(outcomes(events).values()) == ["created", "file_unreadable", "invalid_row"]
    (image,) = service.images.list(collection=collection)
    assert (image.caption, image.tags, image.attributes) == ("olives", ["green", "food"], {"shelf": "4"})


def test_a_tar_is_indexed_with_and_without_descriptions(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path
) -> None:
    members = {
        "a/1.png": picture("teal"),
        "a/1.json": b'{"caption": "teal", "key": "unknown fields are no matter"}',
        "a/2.txt": b"gold",
        "a/2.jpg": picture("gold", kind="JPEG"),
        "b/2.jpg": picture("navy", kind="JPEG"),
        "b/3.cls": b"7",
    }
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    whole = (tmp_path / "set.tar").read_bytes()
    _, events = index(stack, str(tmp_path / "set.tar"), "--collection", collection)
    assert outcomes(events) == {
        "a/1.png": "created",
        "a/2.jpg": "created",
        "b/2.jpg": "created",
        "b/3.cls": "not_an_image",
    }
    assert {image.caption for image in service.images.list(collection=collection)} == {"teal", "gold", None}
    (tmp_path / "cut.tar").write_bytes(whole[:600])
    code, _ = index(stack, str(tmp_path / "cut.tar"), "--collection", collection)
    assert code == 2


def test_update_sends_changed_descriptions(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(picture("lime"))
    index(stack, str(tmp_path / "photos"), "--collection", collection)
    (tmp_path / "photos" / "a.txt").write_text("a lime")
    _, events = index(stack, str(tmp_path / "photos"), "--collection", collection)
    assert outcomes(events) == {"a.png": "existing"}
    _, events = index(stack, str(tmp_path / "photos"), "--update", "--collection", collection)
    assert outcomes(events) == {"a.png": "updated"}
    (image,) = service.images.list(collection=collection)
    assert image.caption == "a lime"


def test_update_and_watch_keep_what_people_changed_and_apply_what_the_sidecar_changed(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture("plum"))
    (folder / "a.json").write_text(json.dumps({"caption": "a plum", "tags": ["fruit", "ripe"]}))
    arguments = (str(folder), "--collection", collection, "--report", str(tmp_path / "report.jsonl"))
    index(stack, *arguments)

    def image() -> Any:
        (only,) = service.images.list(collection=collection)
        return only

    service.images.change(image().id, ImagePatch(tags=["fruit", "ripe", "mine"], attributes={"shelf": "3"}))
    _, events = index(stack, *arguments, "--update")
    assert outcomes(events) == {"a.png": "existing"}
    assert (image().tags, image().attributes) == (["fruit", "ripe", "mine"], {"shelf": "3"})
    (folder / "a.json").write_text(json.dumps({"tags": ["fruit", "new"]}))
    (tmp_path / "report.jsonl").unlink()  # as on another machine
    _, events = index(stack, *arguments, "--update")
    assert outcomes(events) == {"a.png": "updated"}
    assert (image().caption, image().tags) == (None, ["fruit", "mine", "new"])

    with running(command(stack, str(folder), "--watch", "--collection", collection), tmp_path / "log"):
        wait_until(lambda: "watching" in (tmp_path / "log").read_text(), timeout_s=30, what="the first pass")
        assert image().tags == ["fruit", "mine", "new"]
        service.images.change(image().id, ImagePatch(tags=["fruit", "new", "watched"]))
        (folder / "a.json").write_text(json.dumps({"caption": "plums", "tags": ["fruit"]}))
        wait_until(lambda: image().caption == "plums", timeout_s=20, what="the new caption")
        assert image().tags == ["fruit", "watched"]


def test_watching_mirrors_the_folder_until_it_is_interrupted(
    stack: RunningStack, service: Afterimage, collection: str, tmp_path: Path
) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "first.png").write_bytes(picture("red"))

    def captions() -> dict[str | None, str | None]:
        return {image.filename: image.caption for image in service.images.list(collection=collection)}

    report = tmp_path / "report.jsonl"
    arguments = command(stack, str(folder), "--watch", "--delete", "--report", str(report), "--collection", collection)
    with running(arguments, tmp_path / "log") as watching:
        wait_until(lambda: "watching" in (tmp_path / "log").read_text(), timeout_s=30, what="the first pass")
        assert captions() == {"first.png": None}
        (folder / "new").mkdir()
        (folder / "new" / "second.png").write_bytes(picture("green"))
        wait_until(lambda: len(captions()) == 2, timeout_s=20, what="the new file")
        (folder / "first.txt").write_text("now with words")
        wait_until(lambda: captions()["first.png"] == "now with words", timeout_s=20, what="the new caption")
        os.rename(folder / "first.png", folder / "moved.png")
        os.rename(folder / "new", folder / "newer")
        (folder / "third.png").write_bytes(picture("blue"))
        wait_until(lambda: "third.png" in captions(), timeout_s=20, what="the third file")
        assert {"first.png", "second.png"} <= captions().keys(), "moved files are still in the collection"
        (folder / "third.png").write_bytes(picture("white"))
        (folder / "newer" / "second.png").unlink()
        wait_until(lambda: "second.png" not in captions(), timeout_s=20, what="the deletion")
        wait_until(lambda: len(captions()) == 2, timeout_s=20, what="the other content instead of the old")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(20) == 0


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with log.open("w") as output, subprocess.Popen(arguments, cwd=REPOSITORY, stdout=output) as process:
        try:
            yield process
        finally:
            process.kill()


def test_an_unreachable_service_stops_the_run_with_its_own_exit_code(folder: Path) -> None:
    arguments = ["--url", "http://127.0.0.1:9", "--retry-for", "0", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.index_images", str(folder), *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert "continues from here" in done.stderr
