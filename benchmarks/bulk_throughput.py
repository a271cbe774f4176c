"""Ten thousand generations from a file: how fast do they go in, through and out, and what do others notice?

    .venv/bin/python -m benchmarks.bulk_throughput
    .venv/bin/python -m benchmarks.bulk_throughput --items 500 --real-items 20

Starts a whole stack of its own, sends the items with `scripts.bulk_generate` as one owner, and lets a second owner
submit one job after the other, first alone, then beside the bulk. Then counts: each item once in the manifest and once
on the service, every file whole. Once with the cheap generator, which leaves everything but model work, and once with
the starter model and its corpus. Figures and conditions are printed and written to `out/bench/bulk_throughput.json`.
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
from benchmarks.conditions import keep, report
from benchmarks.watching import Watch, in_ms, load_average, resident_mib, seconds_of
from ops.local.stack import REPOSITORY
from tests.stack import RunningStack, running_stack

CHEAP = {"kind": "cheap", "cost_ms": 5, "max_batch_size": 8, "defaults": {"width": 64, "height": 64}}
CHEAP_ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": json.dumps({"cheap": CHEAP}),
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
}
WITH_KEYS = {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
BAR_ITEMS_PER_S = 2000
FLAT_MIB = 48
"""What an API process may hold more after a bulk than before: its allocator's reserve, no matter how many items."""
PAUSE_S = 0.2
"""Between two jobs of the second owner."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000, help="for the cheap generator (default: %(default)s)")
    parser.add_argument("--real-items", type=int, default=300, help="for the starter model; 0: none (default: 300)")
    parser.add_argument("--alone", type=int, default=30, help="jobs of the second owner alone (default: %(default)s)")
    arguments = parser.parse_args()
    figures: dict[str, object] = {}
    if arguments.items:
        figures["cheap"] = measured(arguments.items, arguments.alone, CHEAP_ENVIRONMENT, kind="generate")
    if arguments.real_items:
        figures["starter"] = measured(arguments.real_items, arguments.alone, {}, kind="rag_generate", corpus=True)
    measured_with = {"items": arguments.items, "real items": arguments.real_items}
    for name, part in figures.items():
        assert isinstance(part, dict)
        report(f"A bulk, {name}", part, **measured_with)
    print(f"wrote {keep('bulk_throughput', figures, **measured_with)}")
    if not all(part["exact"] for part in figures.values() if isinstance(part, dict)):
        raise SystemExit("the counts are not exact")


def measured(
    items: int, alone: int, environment: Mapping[str, str], *, kind: str, corpus: bool = False
) -> dict[str, object]:
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder, "var"), environment={**environment, **WITH_KEYS}, durable=True) as stack,
    ):
        bulk_key = stack.new_key("many", "generate", "search", "corpus:write")
        other_key = stack.new_key("interactive", "generate", "search")
        if corpus:
            script(stack, bulk_key, "scripts.index_images", "starter/corpus.tar", "--quiet")
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
    """The figures of one bulk."""

    def interactive() -> float:
        request = GenerateRequest(prompt="somebody waits for this")
        return seconds_of(lambda: other.jobs.wait(other.jobs.submit(request)))

    api = stack.control.pid("api")
    assert api is not None
    before = [interactive() for _ in range(alone)]
    load_before = load_average()
    prompts, out = folder / "prompts.txt", folder / "out"
    prompts.write_text("".join(f"one of many, number {number}\n" for number in range(items)))
    with Watch(lambda: resident_mib(api)) as memory:
        times, done = bulk_run(stack, key, prompts, out, kind, interactive)
        meanwhile = times.pop("interactive")
        load_after = load_average()
        time.sleep(2)  # one more look at the memory of an API that rests
    begun, sent, ended = times["created"], times["sent"], times["done"]
    settled = [mib for at, mib in memory.seen if at <= begun] or memory.values[:1]
    rate = items / (sent - begun)
    grown = memory.values[-1] - settled[-1]
    return {
        "exact": exact(many, out, items) and done["succeeded"] == items,
        "submit items/s": round(rate),
        f"bar of {BAR_ITEMS_PER_S}": "held" if rate >= BAR_ITEMS_PER_S else "missed",
        "run and downloaded items/s": round(items / (ended - sent), 1),
        "seconds in all": round(ended - begun, 1),
        "API MiB before": round(settled[-1]),
        "API MiB at most": round(max(memory.values)),
        "API MiB after": round(memory.values[-1]),
        "API memory": "flat" if grown <= FLAT_MIB else f"grew by {grown:.0f} MiB",
        "interactive alone": in_ms(before),
        "interactive beside": in_ms(meanwhile),
        "load average before, after": (load_before, load_after),
    }


def bulk_run(
    stack: RunningStack, key: str, prompts: Path, out: Path, kind: str, interactive: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """When the script said what, what others waited from then on until it was done, and what it said last."""
    command = command_of("scripts.bulk_generate", str(prompts), "--out", str(out), "--kind", kind, "--json")
    environment = reaching(stack, key)
    times: dict[str, Any] = {}
    event: dict[str, Any] = {}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            times.setdefault(event["event"], time.monotonic())
            if event["event"] == "sent":
                break
        with Watch(interactive, pause_s=PAUSE_S) as waits:
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
    """Whether each item is there once on both sides, and every file whole."""
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    told = {output["file"]: output["sha256"] for record in records for output in record["outputs"]}
    files = {str(path.relative_to(out)) for path in (out / "images").rglob("*") if path.is_file()}
    made = Counter(str(job.id) for job in service.jobs.list())
    checks = {
        "rows of the manifest": [record["row"] for record in records] == list(range(1, items + 1)),
        "files": files == told.keys() and len(told) == items,
        "digests": all(hashlib.sha256((out / name).read_bytes()).hexdigest() == sha for name, sha in told.items()),
        "jobs": made == Counter(record["job_id"] for record in records),
        "outputs": sum(1 for _ in service.outputs.list()) == items,
    }
    for name, holds in checks.items():
        if not holds:
            print(f"not exact: {name}", file=sys.stderr)
    return all(checks.values())


def script(stack: RunningStack, key: str, module: str, *arguments: str) -> None:
    subprocess.run(command_of(module, *arguments), cwd=REPOSITORY, env=reaching(stack, key), check=True)


def command_of(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def reaching(stack: RunningStack, key: str) -> dict[str, str]:
    return os.environ | {"AFTERIMAGE_URL": stack.url, "AFTERIMAGE_API_KEY": key}


if __name__ == "__main__":
    main()
