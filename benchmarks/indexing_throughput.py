"""Index twenty thousand files of mixed quality: are the results correct, how fast is it, how long do searches take?

    .venv/bin/python -m benchmarks.indexing_throughput
    .venv/bin/python -m benchmarks.indexing_throughput --files 400 --timed 200 --vit 64

Three parts, each on its own stack:

exact: index the files with `scripts.index_images`; kill it and the embed worker in the middle, and start it again. Then
compare its report and the corpus with the generated files.

timed: index some of these files until they are searchable, and compare with `benchmarks.plain_loop` on the same kind of
servers. Then time text searches alone, and while other files are indexed.

vit: the same as timed with a ViT-B/32 of random weights, compared with the model alone.

Figures and conditions are printed and written to `out/bench/indexing_throughput.json`.
"""

import argparse
import json
import os
import resource
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import open_clip
import torch
from safetensors.torch import save_file

from afterimage_client import Afterimage, ImageState, SearchRequest
from benchmarks.conditions import report, save
from benchmarks.mixed_files import GeneratedFile, good_files, mixed_files
from benchmarks.sampling import Sampler, cpu_s, latency_summary, load_average, time_call_s
from ops.local.stack import REPOSITORY, LocalStack
from scripts.index_images.report import RETRIED_CODES, Report
from scripts.index_images.upload import FILES_PER_REQUEST
from tests.stack import RunningStack, running_stack, wait_until

ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": '{"fake": {"kind": "fake"}}',
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "fake",
}
MIN_RATIO = 0.9
VIT = "ViT-B-32"
COLLECTION = "measured"
SEARCHES_ALONE = 50
PAUSE_S = 0.5
"""Between two searches, so that the searches themselves are not a load."""
TIMEOUT_S = 24 * 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--files", type=int, default=20_000, help="files of part exact; 0: skip it (default: %(default)s)"
    )
    parser.add_argument(
        "--timed", type=int, default=4000, help="files of part timed; 0: skip it (default: %(default)s)"
    )
    parser.add_argument("--vit", type=int, default=1000, help="images of part vit; 0: skip it (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=4, help="simultaneous uploads (default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    parallel: int = arguments.parallel
    with tempfile.TemporaryDirectory() as name:
        if arguments.files:
            figures["exact"] = exact(Path(name, "exact"), arguments.files, parallel)
        if arguments.timed:
            files, others = Path(name, "timed-files"), Path(name, "timed-others")
            for _ in (*mixed_files(files, arguments.timed, seed=3), *mixed_files(others, arguments.timed // 2, seed=4)):
                pass
            figures["timed"] = timed(Path(name, "timed"), files, others, ENVIRONMENT, parallel, bare=False)
        if arguments.vit:
            files, others, clip = Path(name, "vit-files"), Path(name, "vit-others"), Path(name, "clip")
            good_files(files, arguments.vit)
            good_files(others, arguments.vit // 2, seed=4)
            save_random_vit(clip)
            environment = ENVIRONMENT | {"AFTERIMAGE_MODEL__CLIP__MODEL": f"local-dir:{clip}"}
            figures["vit"] = timed(Path(name, "vit"), files, others, environment, parallel, bare=True)
    measured_with = vars(arguments)
    for title, part in figures.items():
        assert isinstance(part, dict)
        report(f"Indexing, {title}", part, **measured_with)
    print(f"wrote {save('indexing_throughput', figures, **measured_with)}")
    if isinstance(whole := figures.get("exact"), dict) and whole["wrong"]:
        raise SystemExit(f"differs from the generated files: {whole['wrong']}")


# --- exact --------------------------------------------------------------------------------------------------------


def exact(folder: Path, count: int, parallel: int) -> dict[str, object]:
    files, report_file = folder / "files", folder / "report.jsonl"
    made = list(mixed_files(files, count))
    command = [str(files), "--report", str(report_file), "--collection", COLLECTION, "--parallel", str(parallel)]
    with (
        running_stack(folder / "var", environment=ENVIRONMENT, durable=True) as stack,
        Afterimage(stack.url) as service,
    ):
        load, started = load_average(), time.monotonic()
        with indexing(stack, *command) as script:
            third = len(made) // 3
            wait_until(lambda: count_lines(report_file) >= third, timeout_s=TIMEOUT_S, what="a third of the files")
            stack.control.kill("embed")
            script.kill()
        sent_before = uploads(stack)
        at_kill = count_lines(report_file)
        # Every run reads files again that a limit had excluded, because the limit may have changed.
        retried = sum(entry.code in RETRIED_CODES for entry in Report(report_file).entries)
        with indexing(stack, *command, "--wait", str(TIMEOUT_S)) as script:
            script.wait()
        seconds = time.monotonic() - started
        entries = [json.loads(line) for line in report_file.read_text().splitlines()]
        states = Counter(image.state for image in service.images.list(collection=COLLECTION))
        return {
            "files": len(made),
            "reported": dict(Counter(entry["code"] or entry["outcome"] for entry in entries)),
            "wrong": find_mistakes(made, entries, states, uploads(stack) - retried, parallel),
            "searchable": states[ImageState.READY],
            "killed after": f"{at_kill} files reported, {sent_before:.0f} sent; {retried} of them read again",
            "files sent in all": uploads(stack),
            "exit code": script.returncode,
            "seconds, killed and resumed": round(seconds, 1),
            "load average before, after": (load, load_average()),
        }


def find_mistakes(
    made: list[GeneratedFile], entries: list[dict[str, Any]], states: Counter[ImageState], sent: float, parallel: int
) -> list[str]:
    """Return all differences between the report or the corpus and the generated files."""
    expected = {file.name: file.expected for file in made}
    reported = {entry["file"]: entry["code"] or entry["outcome"] for entry in entries}
    mistakes = []
    if Counter(entry["file"] for entry in entries) != Counter(expected.keys()):
        mistakes.append("not every file is reported once")
    # Any of the files with the same bytes may come first. A file whose entry was lost at the kill is `existing` later.
    equivalent = {"created", "duplicate", "existing"}
    for name, outcome in expected.items():
        got = reported.get(name)
        if got != outcome and not {got, outcome} <= equivalent:
            mistakes.append(f"{name}: {got}, not {outcome}")
    contents = sum(outcome == "created" for outcome in expected.values())
    if states != {ImageState.READY: contents}:
        mistakes.append(f"{dict(states)} images, not {contents} searchable ones")
    # Sent to the service once: valid images, and files that only the service recognises as invalid.
    checked_by_service = {"invalid_image", "unsupported_image_type", "image_too_large", "animated_image"}
    once = contents + sum(outcome in checked_by_service for outcome in expected.values())
    if not once <= sent <= once + parallel * FILES_PER_REQUEST:
        mistakes.append(f"{sent:.0f} files sent instead of {once} and those in flight at the kill")
    return mistakes


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def uploads(stack: RunningStack) -> float:
    """Return the number of files sent to the service so far."""
    metrics = httpx.get(f"{stack.url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.split()[-1]) for line in metrics if line.startswith("uploads_total{"))


# --- timed and vit ------------------------------------------------------------------------------------------------


def timed(
    folder: Path, files: Path, others: Path, environment: Mapping[str, str], parallel: int, *, bare: bool
) -> dict[str, object]:
    """Measure images per second of the service and of the loop, and search times alone and while `others` are indexed.

    The loop runs before and after the service; its better run counts.
    """
    before = run_plain_loop(folder / "loop-before", files, environment, bare=bare)
    options = ["--collection", COLLECTION, "--parallel", str(parallel), "--wait", str(TIMEOUT_S)]
    with (
        running_stack(folder / "var", environment=environment, durable=True) as stack,
        Afterimage(stack.url) as service,
    ):

        def search() -> float:
            request = SearchRequest(query=f"a {secrets.token_hex(4)} thing")  # never searched before
            return time_call_s(lambda: service.search(request))

        load, spent, started = load_average(), spent_s(stack), time.monotonic()
        with indexing(stack, str(files), *options) as script:
            script.wait()
        seconds = time.monotonic() - started
        spent = {name: after - spent[name] for name, after in spent_s(stack).items()}
        states = Counter(image.state for image in service.images.list(collection=COLLECTION))
        search()
        alone = [search() for _ in range(SEARCHES_ALONE)]
        with Sampler(search, pause_s=PAUSE_S) as waits, indexing(stack, str(others), *options) as script:
            script.wait()
    loops = [before, run_plain_loop(folder / "loop-after", files, environment, bare=bare)]
    loop_rates = [loop["images"] / loop["seconds"] for loop in loops]
    count = states[ImageState.READY]
    rate, loop_rate = count / seconds, max(loop_rates)
    return {
        "images": count,
        "images of the loop": [loop["images"] for loop in loops],
        "images/s": round(rate, 1),
        "images/s of the bare model" if bare else "images/s of the plain loop": [round(each, 1) for each in loop_rates],
        "ratio": round(rate / loop_rate, 2),
        f"minimum of {MIN_RATIO}": "reached" if rate / loop_rate >= MIN_RATIO else "missed",
        "processor ms an image": {
            **{name: round(each * 1000 / count, 1) for name, each in spent.items()},
            "in all": round(sum(spent.values()) * 1000 / count, 1),
            "loop": [round(loop["processor_seconds"] * 1000 / loop["images"], 1) for loop in loops],
        },
        "text search alone": latency_summary(alone),
        "text search during indexing": latency_summary(waits.values),
        "load average before, after": (load, load_average()),
    }


def spent_s(stack: RunningStack) -> dict[str, float]:
    """Return the processor time so far of the processes that index, in seconds; for scripts only of ended ones."""
    names = ("api", "embed", "postgres", "queue", "cache", "reconciler")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {**cpu_s({name: stack.control.pid(name) for name in names}), "script": ended.ru_utime + ended.ru_stime}


def run_plain_loop(var: Path, files: Path, environment: Mapping[str, str], *, bare: bool) -> dict[str, Any]:
    """Run `benchmarks.plain_loop` on servers like those of the service, without other processes; return its figures."""
    servers = LocalStack(var)
    servers.start(servers_only=True, attached=True, on_message=lambda _: None)
    try:
        servers.migrate()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plain_loop", str(files), *(["--model"] if bare else [])],
            cwd=REPOSITORY,
            env={**os.environ, **environment, **servers.environment()},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    finally:
        servers.stop()
    return dict(json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def indexing(stack: RunningStack, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `scripts.index_images` with these arguments; kill it if it still runs at the end of the block."""
    command = [sys.executable, "-m", "scripts.index_images", *arguments, "--url", stack.url, "--quiet"]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            yield process
        finally:
            process.kill()


def save_random_vit(folder: Path) -> None:
    """Write an open_clip folder with the architecture of a ViT-B/32 and random weights."""
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model(VIT)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {"model_cfg": open_clip.get_model_config(VIT), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
