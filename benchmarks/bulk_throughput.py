"""Ten thousand generations from a file: how fast are submit, run and download, and how are other clients affected?

    .venv/bin/python -m benchmarks.bulk_throughput
    .venv/bin/python -m benchmarks.bulk_throughput --items 500 --real-items 20

Starts its own stack and sends the items with `scripts.bulk_generate` as one owner. A second owner submits one job after
the other, first alone, then during the bulk. At the end every item must be in the manifest and on the service exactly
once, and every file complete. It runs once with the fake generator, to measure everything except model work. It runs
once more with the starter model and its corpus. Figures and conditions are printed and written to
`out/bench/bulk_throughput.json`.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from afterimage_client import Afterimage, GenerateRequest
from benchmarks.conditions import report, save
from benchmarks.sampling import Sampler, latency_summary, load_average, resident_mib, time_call_s
from ops.local.stack import REPOSITORY
from tests.stack import RunningStack, running_stack

FAKE = {"kind": "fake", "cost_ms": 5, "max_batch_size": 8, "defaults": {"width": 64, "height": 64}}
FAKE_ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"fake": FAKE}),
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "fake",
}
WITH_KEYS = {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
MIN_ITEMS_PER_S = 2000
MAX_GROWTH_MIB = 48
"""Most memory growth of an API process by a bulk of any size: the reserve of its allocator."""
PAUSE_S = 0.2
"""Pause between two jobs of the second owner."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000, help="for the fake generator (default: %(default)s)")
    parser.add_argument("--real-items", type=int, default=300, help="for the starter model; 0: skip it (default: 300)")
    parser.add_argument(
        "--alone", type=int, default=30, help="jobs of the second owner before the bulk (default: %(default)s)"
    )
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    if arguments.items:
        figures["fake"] = measure(arguments.items, arguments.alone, FAKE_ENVIRONMENT, kind="generate")
    if arguments.real_items:
        figures["starter"] = measure(arguments.real_items, arguments.alone, {}, kind="rag_generate", corpus=True)
    measured_with = {"items": arguments.items, "real items": arguments.real_items}
    for name, part in figures.items():
        assert isinstance(part, dict)
        report(f"A bulk, {name}", part, **measured_with)
    print(f"wrote {save('bulk_throughput', figures, **measured_with)}")
    if not all(part["exact"] for part in figures.values() if isinstance(part, dict)):
        raise SystemExit("the results are not exact")


def measure(
    items: int, alone: int, environment: Mapping[str, str], *, kind: str, corpus: bool = False
) -> dict[str, object]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder, "var"), environment={**environment, **WITH_KEYS}, durable=True) as stack,
    ):
        bulk_key = stack.new_key("many", "generate", "search", "corpus:write")
        other_key = stack.new_key("interactive", "generate", "search")
        if corpus:
            run_script(stack, bulk_key, "scripts.index_images", "starter/corpus.tar.gz", "--quiet")
        with Afterimage(stack.url, api_key=bulk_key) as many, Afterimage(stack.url, api_key=other_key) as other:
            return run(stack, many, other, bulk_key, Path(folder), items, alone, kind)


def run(
    stack: RunningStack,
    many: Afterimage,
    other: Afterimage,
    key: str,
    folder: Path,
    items: int,
    alone: int,
    kind: str,
) -> dict[str, object]:
    """Run one bulk and return its figures."""

    def interactive() -> float:
        request = GenerateRequest(prompt="an interactive job")
        return time_call_s(lambda: other.jobs.wait(other.jobs.submit(request)))

    api = stack.control.pid("api")
    assert api is not None
    before = [interactive() for _ in range(alone)]
    load_before = load_average()
    prompts, out = folder / "prompts.txt", folder / "out"
    prompts.write_text("".join(f"one of many, number {number}\n" for number in range(items)))
    with Sampler(lambda: resident_mib(api)) as memory:
        times, done = bulk_run(stack, key, prompts, out, kind, interactive)
        during = times.pop("interactive")
        load_after = load_average()
        time.sleep(2)  # one more sample of the memory of the idle API
    started, sent, ended = times["created"], times["sent"], times["done"]
    before_mib = ([mib for at, mib in memory.samples if at <= started] or memory.values[:1])[-1]
    rate = items / (sent - started)
    grown = memory.values[-1] - before_mib
    return {
        "exact": exact(many, out, items) and done["succeeded"] == items,
        "submit items/s": round(rate),
        f"minimum of {MIN_ITEMS_PER_S}": "reached" if rate >= MIN_ITEMS_PER_S else "missed",
        "run and downloaded items/s": round(items / (ended - sent), 1),
        "seconds in all": round(ended - started, 1),
        "API MiB before": round(before_mib),
        "API MiB at most": round(max(memory.values)),
        "API MiB after": round(memory.values[-1]),
        "API memory": "flat" if grown <= MAX_GROWTH_MIB else f"grew by {grown:.0f} MiB",
        "interactive alone": latency_summary(before),
        "interactive during the bulk": latency_summary(during),
        "load average before, after": (load_before, load_after),
    }


def bulk_run(
    stack: RunningStack, key: str, prompts: Path, out: Path, kind: str, interactive: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the script; return the time of each event with the latencies of the second owner, and the last event."""
    command = command_of("scripts.bulk_generate", str(prompts), "--out", str(out), "--kind", kind, "--json")
    environment = script_environment(stack, key)
    times: dict[str, Any] = {}
    event: dict[str, Any] = {}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            times.setdefault(event["event"], time.monotonic())
            if event["event"] == "sent":
                break
        with Sampler(interactive, pause_s=PAUSE_S) as waits:
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "item":
                    times["last"] = time.monotonic()
    times["done"] = time.monotonic()
    if process.returncode:
        raise SystemExit(f"the script ended with {process.returncode}: {event}")
    times["interactive"] = waits.between(times["sent"], times.get("last", times["done"]))
    return times, event


def exact(service: Afterimage, out: Path, items: int) -> bool:
    """Return whether manifest and service have each item once, and every file is complete."""
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    manifest = {output["file"]: output["sha256"] for record in records for output in record["outputs"]}
    files = {str(path.relative_to(out)) for path in (out / "images").rglob("*") if path.is_file()}
    made = Counter(str(job.id) for job in service.jobs.list())
    checks = {
        "rows of the manifest": [record["row"] for record in records] == list(range(1, items + 1)),
        "files": files == manifest.keys() and len(manifest) == items,
        "digests": all(hashlib.sha256((out / name).read_bytes()).hexdigest() == sha for name, sha in manifest.items()),
        "jobs": made == Counter(record["job_id"] for record in records),
        "outputs": sum(1 for _ in service.outputs.list()) == items,
    }
    for name, holds in checks.items():
        if not holds:
            print(f"not exact: {name}", file=sys.stderr)
    return all(checks.values())


def run_script(stack: RunningStack, key: str, module: str, *arguments: str) -> None:
    subprocess.run(command_of(module, *arguments), cwd=REPOSITORY, env=script_environment(stack, key), check=True)


def command_of(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def script_environment(stack: RunningStack, key: str) -> dict[str, str]:
    return os.environ | {"AFTERIMAGE_URL": stack.url, "AFTERIMAGE_API_KEY": key}


if __name__ == "__main__":
    main()
