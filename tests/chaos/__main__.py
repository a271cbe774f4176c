"""`make chaos`: inject faults at random moments under load, then check every promise of the service.

CHAOS="--jobs 500 --faults 10 --seed 7" sets the load and the faults. The seed repeats a failed run.
"""

import argparse
import secrets
import shutil
import signal
import sys
from pathlib import Path

import orjson

from ops.local.stack import REPOSITORY
from tests.chaos.faults import KINDS
from tests.chaos.servers import SERVERS
from tests.chaos.storm import Plan, storm


def main() -> int:
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: it stops the stack
    plan = Plan(
        seed=secrets.randbelow(10**6) if arguments.seed is None else arguments.seed,
        jobs=arguments.jobs,
        faults=arguments.faults,
        kinds=arguments.kinds or tuple(KINDS),
        lease_s=arguments.lease_s,
        starter_share=arguments.starter_share,
        servers=arguments.servers,
    )
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    with storm(plan, out) as (_, outcome):
        summary = outcome.summary()
    (out / "summary.json").write_bytes(orjson.dumps(summary, option=orjson.OPT_INDENT_2))
    for line in [*outcome.failures, *(f"{each.breach}: {each.what}" for each in outcome.broken)]:
        print(line)
    print(
        f"seed {plan.seed}: {outcome.jobs} jobs, {outcome.uploads} uploads, {summary['faults']} faults of "
        f"{summary['kinds']} kinds: {summary['lost']} lost, {summary['doubled']} doubled, {summary['stuck']} stuck; "
        f"{out / 'summary.json'}"
    )
    return 0 if outcome.kept else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=500, help="the least number of jobs (default: 500)")
    parser.add_argument("--faults", type=int, default=len(KINDS), help="the number of faults (default: each kind once)")
    parser.add_argument("--seed", type=int, help="repeats the order of faults and requests of a run")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"only these of {', '.join(KINDS)}")
    parser.add_argument("--lease-s", type=float, default=30, help="the lease of a job in seconds (default: 30)")
    parser.add_argument(
        "--starter-share", type=float, default=0.03, help="the share of jobs for the starter model (default: 0.03)"
    )
    parser.add_argument(
        "--servers", choices=SERVERS, default="local", help="behind PgBouncer, or with a fail-over to a replica"
    )
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out" / "chaos", help="emptied, then filled")
    return parser


if __name__ == "__main__":
    sys.exit(main())
