"""The command `afterimage` on a whole stack: its results, its files, its errors and its exit codes."""

import json
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from afterimage_client import Afterimage, GenerateRequest, JobState
from afterimage_client.command.__main__ import run
from ops.local.stack import REPOSITORY
from tests.e2e.conftest import disc
from tests.stack import RunningStack, wait_until
from tests.unit.test_client import closed_address

COMMAND = [sys.executable, "-m", "afterimage_client.command"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working folder of this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AFTERIMAGE_URL", "AFTERIMAGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def address(stack: RunningStack, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AFTERIMAGE_URL", stack.url)
    return stack.url


Run = Callable[..., tuple[int, list[Any], str]]


@pytest.fixture
def afterimage(capsys: pytest.CaptureFixture[str]) -> Run:
    """`afterimage(argument, ...)` gives the exit code, the lines or JSON documents of the output, and the errors."""

    def call(*arguments: object) -> tuple[int, list[Any], str]:
        capsys.readouterr()
        code = run([str(each) for each in arguments])
        shown = capsys.readouterr()
        lines = shown.out.splitlines()
        return code, [json.loads(line) for line in lines] if "--json" in arguments else lines, shown.err

    return call


def test_a_picture_of_ones_own_is_drawn_from_and_saved(address: str, afterimage: Run, folder: Path) -> None:
    (folder / "a.png").write_bytes(disc("crimson"))
    given = ["a green heart", "--references", "a.png", "--seed", 7, "--num-images", 2, "--out", "out/"]
    code, lines, errors = afterimage("generate", *given)
    assert (code, errors) == (0, "")
    assert sorted(lines) == sorted(str(path.relative_to(folder)) for path in (folder / "out").iterdir())
    assert [line.startswith(f"out/a-green-heart-{seed}-") for line, seed in zip(lines, (7, 8), strict=True)] == [
        True
    ] * 2
    code, ((result),), _ = afterimage("generate", "a heart", "-r", "a.png", "-o", "heart.jpg", "--width", 64, "--json")
    assert (code, result["files"], result["job"]["state"]) == (0, ["heart.jpg"], "succeeded")
    assert result["job"]["outputs"][0]["references"][0]["kind"] == "request"
    with Image.open("heart.jpg") as image:
        assert (image.format, image.width) == ("JPEG", 64)


def test_an_image_is_uploaded_found_and_drawn_from_by_its_id(address: str, afterimage: Run, folder: Path) -> None:
    (folder / "ring.png").write_bytes(disc("orchid"))
    (folder / "no.png").write_bytes(b"no image")
    code, lines, _ = afterimage("upload", "ring.png", "no.png", "--collection", "of-command", "--tag", "ring", "--wait")
    assert code == 1, "a file was skipped"
    assert lines[0].split()[::2] == ["created", "ring.png"]
    assert lines[1].startswith("skipped   no.png: unsupported_image_type")
    image = lines[0].split()[1]
    code, ((found),), _ = afterimage("search", "--image", "ring.png", "--collection", "of-command", "--json")
    assert (code, [each["image_id"] for each in found["results"]]) == (0, [image])
    code, lines, _ = afterimage("search", "-i", image, "--collection", "of-command", "--out", "found")
    assert lines[0].startswith(f"1.000  {image}") or lines[0].startswith(f"0.999  {image}")
    assert [path.name for path in (folder / "found").iterdir()] == [f"{image}.png"]
    code, ((result),), _ = afterimage("generate", "a ring", "-r", image, "-o", "ring2.png", "--json")
    assert [each["image_id"] for each in result["job"]["outputs"][0]["references"]] == [image]
    nothing = afterimage("search", "thing", "--collection", "of-command", "--tag", "absent")
    assert nothing == (0, ["nothing was found"], "")


def test_a_job_is_submitted_listed_shown_and_waited_for(address: str, afterimage: Run, folder: Path) -> None:
    code, (job,), _ = afterimage("generate", "a patient fox", "--no-wait", "--set", 'metadata={"by": "command"}')
    assert code == 0
    assert afterimage("jobs", "wait", job, "--out", "fox.png") == (0, ["fox.png"], "")
    assert Path("fox.png").read_bytes().startswith(b"\x89PNG")
    assert any(line.startswith(f"{job}  succeeded") for line in afterimage("jobs", "list", "-n", 5)[1])
    (shown,) = afterimage("jobs", "show", job, "--json")[1]
    assert shown["metadata"] == {"by": "command"}
    assert "a patient fox" in "\n".join(afterimage("jobs", "show", job)[1])
    code, _, errors = afterimage("jobs", "cancel", job)
    assert (code, "Traceback" in errors) == (3, False)
    assert f"[POST {address}/api/v1/jobs/{job}/cancel]" in errors


def test_a_canceled_job_is_a_failure(stack: RunningStack, address: str, afterimage: Run) -> None:
    with stack.frozen("generate-cheap"), Afterimage() as service:
        job = service.jobs.submit(GenerateRequest(prompt="never"))
        assert afterimage("jobs", "cancel", job.id)[:2] == (0, [f"{job.id} canceled"])
    code, _, errors = afterimage("jobs", "wait", job.id, "--json")
    assert code == 1
    assert json.loads(errors)["error"]["job"] == str(job.id)


def test_a_bulk_is_run_shown_and_listed(address: str, afterimage: Run, folder: Path) -> None:
    (folder / "prompts.txt").write_text("a cup\na jug\n")
    # The script ends its process, so it gets one of its own.
    command = [*COMMAND, "bulk", "run", "prompts.txt", "--out", "cups", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    bulk = json.loads(done.stdout.splitlines()[-1])["bulk_id"]
    assert len(list((folder / "cups" / "images").iterdir())) == 2
    assert any(bulk in line for line in afterimage("bulk", "list")[1])
    assert "2 succeeded" in "\n".join(afterimage("bulk", "show", bulk)[1])
    assert afterimage("bulk", "wait", bulk)[0] == 0
    assert afterimage("bulk", "pause", bulk)[0] == 3, "it has ended"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "a cat", "--width", "wide"], "width: Input should be a valid integer"),
        (["generate", " "], "prompt: Value should have at least 1 item"),
        (["generate", "a cat", "-r", "absent.png"], "cannot read absent.png: No such file"),
        (["generate", "a cat", "--set", "colour=red"], "write FIELD=VALUE"),
        (["generate", "a cat", "--num-images", "2", "-o", "cat.png"], "name a folder"),
        (["generate", "a cat", "--format", "webp", "-o", "cat.png"], "name a folder"),
        (["generate", "a cat", "--numimages", "2"], "No such option"),
        (["generate", "a cat", "--url", "localhost:8000"], "localhost:8000 is not an address"),
        (["search"], "one of query, image_id, image and mix is needed"),
        (["jobs", "show", "latest"], "'latest' is not an id"),
        (["upload", "absent.png"], "cannot read absent.png"),
    ],
)
def test_wrong_input_is_named_in_one_message_before_anything_is_sent(
    afterimage: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setenv("AFTERIMAGE_URL", "http://127.0.0.1:9")  # nothing listens there
    code, _, errors = afterimage(*arguments)
    assert code == 2
    assert said in errors
    assert "Traceback" not in errors


def test_a_refusal_names_the_address_and_the_field(address: str, afterimage: Run) -> None:
    code, _, errors = afterimage("generate", "a cat", "--num-inference-steps", "3", "--model", "absent", "--json")
    (error,) = [json.loads(line)["error"] for line in errors.splitlines()]
    assert code == 3
    assert (error["code"], error["request"]) == ("model_not_found", f"POST {address}/api/v1/rag/generate")


def test_an_address_without_a_service_is_named(afterimage: Run) -> None:
    url = closed_address()
    code, _, errors = afterimage("jobs", "list", "--url", url)
    assert code == 3
    assert f"cannot connect to http://{url.rpartition('@')[2]}" in errors
    assert "secret" not in errors


def test_a_login_is_stored_for_its_user_only_and_used_for_its_address_only(
    guarded_stack: RunningStack, stack: RunningStack, afterimage: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = guarded_stack.new_key("command", "generate")
    (folder / "key").write_text(key + "\n")
    (folder / "wrong").write_text("ai_wrong")
    login = ["login", guarded_stack.url, "--api-key-file"]
    code, _, errors = afterimage(*login, "wrong")
    assert code == 3
    assert "authentication_required" in errors or "invalid" in errors
    assert not (folder / "config").exists(), "a refused key is not stored"
    code, _, errors = afterimage(*login, "key")
    assert code == 0
    assert key not in errors
    (stored,) = (folder / "config").rglob("*.json")
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    assert stat.S_IMODE(stored.parent.stat().st_mode) == 0o700
    assert afterimage("jobs", "list")[0] == 0
    with Afterimage() as service:
        assert service.url == guarded_stack.url
        assert service.jobs.dry_run(GenerateRequest(prompt="p")).parameters.prompt == "p"
    with Afterimage(stack.url) as other:
        assert other._connection.http.auth is None, "the key belongs to another address"
    monkeypatch.setenv("AFTERIMAGE_API_KEY", "ai_from_the_environment")
    assert afterimage("jobs", "list")[0] == 3
    monkeypatch.delenv("AFTERIMAGE_API_KEY")
    assert afterimage("logout")[0] == 0
    assert not stored.exists()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_progress_is_shown_on_a_terminal_only(address: str, folder: Path, terminal: tuple[int, int]) -> None:
    command = [*COMMAND, "generate", "a kite", "-o", "kite.png"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    controller, side = terminal
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=side, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "kite.png\n")
    assert b"100%" in os.read(controller, 100_000)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "kite.png\n", "")


def test_an_interrupted_wait_says_how_to_continue(
    stack: RunningStack, address: str, folder: Path, terminal: tuple[int, int]
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
    controller, side = terminal
    shown = ""

    def shows(text: str) -> bool:
        nonlocal shown
        shown += os.read(controller, 100_000).decode()
        return text in shown

    with stack.frozen("generate-cheap"), Afterimage() as service:
        command = [*COMMAND, "generate", "an interrupted kite", "-o", "kite.png"]
        process = subprocess.Popen(command, env=environment, stderr=side)
        wait_until(lambda: shows("waiting"), timeout_s=60, what="the command to wait for its job")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        (job,) = [job for job in service.jobs.list(state=JobState.QUEUED) if "interrupted" in job.prompt]
        assert shows(f"afterimage jobs wait {job.id}")
        assert "Traceback" not in shown
        service.jobs.cancel(job)
