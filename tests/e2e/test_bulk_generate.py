"""The command `bulk_generate` on a whole stack: every item runs exactly once, also when processes are killed."""

import csv
import hashlib
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image

from afterimage_client import Afterimage, BulkState
from ops.local.stack import REPOSITORY
from tests.stack import RunningStack, wait_until


@pytest.fixture
def service(stack: RunningStack) -> Iterator[Afterimage]:
    with Afterimage(stack.url) as service:
        yield service


def command(stack: RunningStack, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.bulk_generate", *arguments, "--url", stack.url, "--json"]


def generate(stack: RunningStack, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Run the command. Return its exit code and its JSON events."""
    done = subprocess.run(command(stack, *arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def running(arguments: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def images(out: Path) -> list[Path]:
    return sorted(path for path in (out / "images").rglob("*") if path.is_file() and not path.name.startswith("."))


def manifest(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def has_bulk(out: Path) -> bool:
    """Whether the run has created its bulk. A run that was killed early has left only a plan."""
    run = out / ".run" / "run.json"
    return run.exists() and json.loads(run.read_text())["bulk_id"] is not None


def test_every_item_is_generated_once_and_every_file_is_complete_despite_kills(
    stack: RunningStack, service: Afterimage, tmp_path: Path
) -> None:
    out, marker, count = tmp_path / "out", uuid4().hex, 30
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"{marker} number {number}\n" for number in range(count)))
    arguments = command(stack, str(prompts), "--out", str(out), "--set", "num_images=2", "--concurrency", "3")
    turns: list[tuple[Callable[[], object], str | None]] = [
        (lambda: (out / ".run" / "plan.jsonl").exists(), None),
        (lambda: has_bulk(out), "api"),
        (lambda: len(images(out)) >= 5, "queue"),
        (lambda: len(images(out)) >= 30, None),
    ]
    for reached, also_killed in turns:
        with running(arguments) as script:
            wait_until(lambda: reached() or script.poll() is not None, timeout_s=90, what="a turn")  # noqa: B023
            if also_killed is not None:
                stack.control.kill(also_killed)
    code, events = generate(stack, *arguments[3:-3])
    assert code == 0
    assert events[-1] | {"event": "done", "succeeded": count, "failed": 0, "missing": 0} == events[-1]

    records = manifest(out)
    assert [record["row"] for record in records] == list(range(1, count + 1))
    checksums = {output["file"]: output["sha256"] for record in records for output in record["outputs"]}
    assert len(checksums) == 2 * count
    assert {str(path.relative_to(out)) for path in images(out)} == checksums.keys()
    for name, sha256 in checksums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256
    Image.open(out / random.choice([*checksums])).verify()
    with (out / "manifest.csv").open() as table:
        assert {row["file"]: row["sha256"] for row in csv.DictReader(table)} == checksums
    assert (out / "index.html").read_text().count("<figure>") == 2 * count
    assert not list(out.rglob("*.part")), "no partly written file is left"
    # The service, too, has one job for each item and two images for each job, and no more.
    made = Counter(
        str(each.job_id) for each in service.outputs.list() if marker in each.provenance["parameters"]["prompt"]
    )
    assert made == {record["job_id"]: 2 for record in records}
    assert sum(marker in job.prompt for job in service.jobs.list()) == count


def test_invalid_rows_are_reported_with_their_reasons_and_the_others_run(stack: RunningStack, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"good {number}"}) for number in range(20)]
    lines[3] = '{"prompt": '
    lines[9] = '{"prompt": "too wide", "width": 99999}'
    lines[15] = '{"prompt": "by nobody", "model": "there-is-none"}'
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(lines))
    out = tmp_path / "out"

    code, _ = generate(stack, str(prompts), "--out", str(out))
    assert code == 2, "errors that need no service stop the run first"
    lines[3], lines[9] = '{"prompt": "mended"}', '{"prompt": "mended too"}'
    prompts.write_text("\n".join(lines))
    code, events = generate(stack, str(prompts), "--out", str(out))
    assert code == 2, "errors that only the service can find stop it next"
    assert "row 16: model_not_found" in events[-1]["message"]
    assert not images(out)

    lines[3] = '{"prompt": '
    prompts.write_text("\n".join(lines))
    code, events = generate(stack, str(prompts), "--out", str(out), "--skip-invalid")
    assert code == 1
    rejected = {event["row"]: event["reason"] for event in events if event["event"] == "rejected"}
    assert rejected.keys() == {4, 16}
    assert "not valid JSON" in rejected[4]
    assert "model_not_found" in rejected[16]
    assert len(images(out)) == 18
    assert [json.loads(line)["row"] for line in (out / "rejected.jsonl").read_text().splitlines()] == [4, 16]


@pytest.mark.extended  # 997 jobs
def test_three_invalid_rows_of_a_thousand_are_reported_and_all_others_run(stack: RunningStack, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"of a thousand {number}", "width": 32, "height": 32}) for number in range(1, 1001)]
    lines[6] = '{"prompt": "cut off'
    lines[499] = json.dumps({"prompt": "far too wide", "width": 99_999})
    lines[999] = json.dumps({"prompt": "by nobody", "model": "there-is-none"})
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(lines))
    code, events = generate(stack, str(prompts), "--out", str(out), "--skip-invalid", "--kind", "generate")
    assert code == 1
    rejected = {event["row"]: event["reason"] for event in events if event["event"] == "rejected"}
    assert rejected.keys() == {7, 500, 1000}
    assert "not valid JSON" in rejected[7]
    assert "width" in rejected[500]
    assert "model_not_found" in rejected[1000]
    (done,) = (event for event in events if event["event"] == "done")
    assert (done["succeeded"], done["failed"], done["missing"], done["rejected"]) == (997, 0, 0, 3)
    assert [record["row"] for record in manifest(out)] == [row for row in range(1, 1001) if row not in rejected]
    assert len(images(out)) == 997


def test_an_output_folder_continues_only_its_own_run(stack: RunningStack, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _ = generate(stack, "--out", str(out))
    assert code == 2, "there is no run to continue"
    grid = ["--template", "a {color} cup", "--grid", "color=red,blue", "--out", str(out)]
    name = ["--name", "{color}/{custom_id}-{seed}.{ext}", "--first-seed", "1"]
    assert generate(stack, *grid, *name)[0] == 0
    assert [str(path.relative_to(out / "images")) for path in images(out)] == ["blue/000002-1.png", "red/000001-1.png"]
    before = {path: path.stat().st_mtime_ns for path in images(out)}
    (out / "images" / "red" / "000001-1.png").write_bytes(b"damaged")
    assert generate(stack, "--out", str(out))[0] == 0
    changed = [path for path in images(out) if path.stat().st_mtime_ns != before[path]]
    assert [path.name for path in changed] == ["000001-1.png"], "complete files are not downloaded again"
    Image.open(changed[0]).verify()
    code, events = generate(stack, *grid, *name, "--seeds", "2")
    assert code == 2
    assert "--seeds" in events[-1]["message"]


def test_a_canceled_run_keeps_its_images_and_reports_the_canceled_items(
    stack: RunningStack, service: Afterimage, tmp_path: Path
) -> None:
    out = tmp_path / "canceled"
    many = ["--template", "cup {n}", "--grid", "n=" + ",".join(map(str, range(30))), "--seeds", "10", "--out", str(out)]
    with running(command(stack, *many)) as script:
        wait_until(lambda: len(images(out)) >= 3, timeout_s=60, what="the first images")
        script.send_signal(signal.SIGINT)
        assert script.wait(30) == 130
    code, events = generate(stack, "--out", str(out), "--cancel")
    assert code == 1
    (bulk,) = [bulk for bulk in service.bulks.list(state=BulkState.CANCELED) if bulk.name == "canceled"]
    assert bulk.total == 300
    done = events[-1]
    assert done["succeeded"] + done["failed"] == 300
    assert done["succeeded"] == len(images(out)) >= 3
    states = Counter(record["state"] for record in manifest(out))
    assert states == {"succeeded": done["succeeded"], "canceled": done["failed"]}
