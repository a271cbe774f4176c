"""`make soak`: run thousands of jobs and requests, and find processes that leak.

Cheap jobs go through one worker with requests of every kind beside them, then jobs of the starter model. Every few
seconds each process is measured (memory, open files, threads, connections). The command writes summary.json and the
stack's logs into `out/soak/`. Its exit code is 1 when a job or request failed, or when a process died or grew. It is
also 1 when jobs did not run at a steady rate.

SOAK="--cheap 1000 --requests 500 --starter 30" makes it short.
"""

import argparse
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import orjson

from ops.local.stack import REPOSITORY
from tests.soak.run import Plan, soak


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it stops the stack
    plan = Plan(
        cheap=arguments.cheap,
        requests=arguments.requests,
        starter=arguments.starter,
        sample_s=arguments.sample_s,
    )
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    outcome = soak(plan, out / "stack", say=partial(print, flush=True))
    (out / "summary.json").write_bytes(
        orjson.dumps(outcome.summary(), option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS)
    )
    for part in outcome.parts:
        print(f"{part.name}: {part.succeeded} of {part.jobs} jobs in {part.took_s} s, requests {part.statuses}")
        if part.flow is not None:
            print(f"  jobs/s by tenth: {part.flow.per_s}")
            print(f"  end to next start: median {part.flow.gap_median_s} s, p99 {part.flow.gap_p99_s} s")
        for name, trends in sorted(part.trends.items()):
            print(f"  {name:<24}" + ", ".join(f"{what} {each.first} -> {each.last}" for what, each in trends.items()))
    for line in outcome.wrong:
        print(line)
    print(out / "summary.json")
    return 1 if outcome.wrong else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cheap", type=int, default=10_000, help="cheap jobs (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=5_000, help="requests beside them (default: %(default)s)")
    parser.add_argument("--starter", type=int, default=300, help="starter-model jobs (default: %(default)s)")
    parser.add_argument("--sample-s", type=float, default=5, help="seconds between measurements (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out" / "soak", help="emptied, then filled")
    return parser


if __name__ == "__main__":
    sys.exit(main())
