"""Twenty thousand files of mixed quality into a corpus: is each told right, how fast is it, who waits meanwhile?

    .venv/bin/python -m benchmarks.indexing_throughput
    .venv/bin/python -m benchmarks.indexing_throughput --files 400 --timed 200 --vit 64

Three parts, each on a whole stack of its own:
  exact   the files indexed by `scripts.index_images`, which is killed in the middle together with the embed worker,
          and started again; what it says of each, and what the corpus has, against what was generated
  timed   some of these files from start to searchable, against `benchmarks.plain_loop` on the same Postgres and the
          same kind of store; then other files, and how long a text search takes alone and beside
  vit     the same with a ViT-B/32 of random weights, against the bare model
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
from benchmarks.conditions import keep, report
from benchmarks.mixed_files import Made, good_files, mixed_files
from benchmarks.watching import Watch, cpu_s, in_ms, load_average, seconds_of
from ops.local.stack import REPOSITORY, LocalStack
from scripts.index_images.upload import BY_CIRCUMSTANCE, FILES_AT_ONCE, Report
from tests.stack import RunningStack, running_stack, wait_until

ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "cheap"}}',
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
}
BAR = 0.9
VIT = "ViT-B-32"
COLLECTION = "measured"
SEARCHES_ALONE = 50
PAUSE_S = 0.5
"""Between two searches: a person's pace, so that they do not become the load."""
PATIENCE_S = 24 * 3600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=20_000, help="of mixed quality; 0: none (default: %(default)s)")
    parser.add_argument("--timed", type=int, default=4000, help="files for the ratio; 0: none (default: %(default)s)")
    parser.add_argument("--vit", type=int, default=1000, help="images for the ViT; 0: none (default: %(default)s)")
    parser.add_argument("--parallel", type=int, default=4, help="uploads at a time (default: %(default)s)")
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
    print(f"wrote {keep('indexing_throughput', figures, **measured_with)}")
    if isinstance(whole := figures.get("exact"), dict) and whole["wrong"]:
        raise SystemExit(f"not as generated: {whole['wrong']}")


# --- is each told right? ------------------------------------------------------------------------------------------


def exact(folder: Path, count: int, parallel: int) -> dict[str, object]:
    files, told = folder / "files", folder / "report.jsonl"
    made = list(mixed_files(files, count))
    command = [str(files), "--report", str(told), "--collection", COLLECTION, "--parallel", str(parallel)]
    with (
        running_stack(folder / "var", environment=ENVIRONMENT, durable=True) as stack,
        Afterimage(stack.url) as service,
    ):
        load, started = load_average(), time.monotonic()
        with indexing(stack, *command) as script:
            third = len(made) // 3
            wait_until(lambda: lines(told) >= third, timeout_s=PATIENCE_S, what="a third of the files")
            stack.control.kill("embed")
            script.kill()
        sent_before = uploads(stack)
        at_kill = lines(told)
        # What a limit kept out is looked at again by every run: the limit may be another by then.
        again = sum(each.code in BY_CIRCUMSTANCE for each in Report(told).entries)
        with indexing(stack, *command, "--wait", str(PATIENCE_S)) as script:
            script.wait()
        seconds = time.monotonic() - started
        entries = [json.loads(line) for line in told.read_text().splitlines()]
        states = Counter(image.state for image in service.images.list(collection=COLLECTION))
        return {
            "files": len(made),
            "told": dict(Counter(entry["code"] or entry["outcome"] for entry in entries)),
            "wrong": wrong(made, entries, states, uploads(stack) - again, parallel),
            "searchable": states[ImageState.READY],
            "killed after": f"{at_kill} files told, {sent_before:.0f} sent; {again} of them looked at again",
            "files sent in all": uploads(stack),
            "exit code": script.returncode,
            "seconds, killed and resumed": round(seconds, 1),
            "load average before, after": (load, load_average()),
        }


def wrong(
    made: list[Made], entries: list[dict[str, Any]], states: Counter[ImageState], sent: float, parallel: int
) -> list[str]:
    """Everything that is not as it was generated."""
    expected = {each.name: each.expected for each in made}
    said = {entry["file"]: entry["code"] or entry["outcome"] for entry in entries}
    mistakes = []
    if Counter(entry["file"] for entry in entries) != Counter(expected.keys()):
        mistakes.append("not every file is told once")
    # Of files with the same bytes any may come first; and one whose report the kill cut off is `existing` after it.
    alike = {"created", "duplicate", "existing"}
    for name, outcome in expected.items():
        got = said.get(name)
        if got != outcome and not {got, outcome} <= alike:
            mistakes.append(f"{name}: {got}, not {outcome}")
    contents = sum(outcome == "created" for outcome in expected.values())
    if states != {ImageState.READY: contents}:
        mistakes.append(f"{dict(states)} images, not {contents} that are searchable")
    # What goes to the service once: good contents, and what only it can tell from images.
    by_service = {"invalid_image", "unsupported_image_type", "image_too_large", "animated_image"}
    once = contents + sum(outcome in by_service for outcome in expected.values())
    if not once <= sent <= once + parallel * FILES_AT_ONCE:
        mistakes.append(f"{sent:.0f} files sent, where {once} and what was on its way at the kill are needed")
    return mistakes


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def uploads(stack: RunningStack) -> float:
    """Files that the service was sent so far."""
    metrics = httpx.get(f"{stack.url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.split()[-1]) for line in metrics if line.startswith("uploads_total{"))


# --- how fast, and who waits? -------------------------------------------------------------------------------------


def timed(
    folder: Path, files: Path, others: Path, environment: Mapping[str, str], parallel: int, *, bare: bool
) -> dict[str, object]:
    """Images per second of the service and of a loop, which runs before it and after it: its better run counts.

    And how long searches take, alone and beside `others`.
    """
    before = looped(folder / "loop-before", files, environment, bare=bare)
    options = ["--collection", COLLECTION, "--parallel", str(parallel), "--wait", str(PATIENCE_S)]
    with (
        running_stack(folder / "var", environment=environment, durable=True) as stack,
        Afterimage(stack.url) as service,
    ):

        def search() -> float:
            request = SearchRequest(query=f"a {secrets.token_hex(4)} thing")  # never asked before
            return seconds_of(lambda: service.search(request))

        load, spent, started = load_average(), spent_s(stack), time.monotonic()
        with indexing(stack, str(files), *options) as script:
            script.wait()
        seconds = time.monotonic() - started
        spent = {name: after - spent[name] for name, after in spent_s(stack).items()}
        states = Counter(image.state for image in service.images.list(collection=COLLECTION))
        search()
        alone = [search() for _ in range(SEARCHES_ALONE)]
        with Watch(search, pause_s=PAUSE_S) as waits, indexing(stack, str(others), *options) as script:
            script.wait()
    loops = [before, looped(folder / "loop-after", files, environment, bare=bare)]
    loop_rates = [loop["images"] / loop["seconds"] for loop in loops]
    count = states[ImageState.READY]
    rate, loop_rate = count / seconds, max(loop_rates)
    return {
        "images": count,
        "images of the loop": [loop["images"] for loop in loops],
        "images/s": round(rate, 1),
        "images/s of the bare model" if bare else "images/s of the plain loop": [round(each, 1) for each in loop_rates],
        "ratio": round(rate / loop_rate, 2),
        f"bar of {BAR}": "held" if rate / loop_rate >= BAR else "missed",
        "processor ms an image": {
            **{name: round(each * 1000 / count, 1) for name, each in spent.items()},
            "in all": round(sum(spent.values()) * 1000 / count, 1),
            "loop": [round(loop["processor_seconds"] * 1000 / loop["images"], 1) for loop in loops],
        },
        "text search alone": in_ms(alone),
        "text search beside": in_ms(waits.values),
        "load average before, after": (load, load_average()),
    }


def spent_s(stack: RunningStack) -> dict[str, float]:
    """Processor time so far of what indexing needs, in seconds; of scripts, of those that have ended."""
    names = ("api", "embed", "postgres", "queue", "cache", "reconciler")
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {**cpu_s({name: stack.control.pid(name) for name in names}), "script": ended.ru_utime + ended.ru_stime}


def looped(var: Path, files: Path, environment: Mapping[str, str], *, bare: bool) -> dict[str, Any]:
    """What `benchmarks.plain_loop` says, on servers as the service had them and with nothing else running."""
    servers = LocalStack(var)
    servers.start(servers_only=True, attached=True, say=lambda _: None)
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
    """`scripts.index_images` with these arguments; killed where the block ends before it."""
    command = [sys.executable, "-m", "scripts.index_images", *arguments, "--url", stack.url, "--quiet"]
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        try:
            yield process
        finally:
            process.kill()


def save_random_vit(folder: Path) -> None:
    """An open_clip folder with the architecture of a ViT-B/32 and weights that mean nothing."""
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.create_model(VIT)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = open_clip.get_model_preprocess_cfg(model)
    config = {"model_cfg": open_clip.get_model_config(VIT), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
