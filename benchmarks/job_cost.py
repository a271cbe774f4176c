"""What does one job cost the servers behind the service?

    .venv/bin/python -m benchmarks.job_cost
    .venv/bin/python -m benchmarks.job_cost --jobs 2000 --clients 16

Starts a stack of its own with durable commits, API keys and one worker with the fake generator. Clients submit jobs of
one image, without references, and the benchmark waits until all have succeeded. It compares the counters of Postgres
and of the queue's Redis before and after, and subtracts what an idle stack adds in the same time. Counts hardly depend
on the load of the machine. Processor times do, and are those of the whole server.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import redis
from pydantic import SecretStr
from sqlalchemy import Engine, text

from benchmarks.conditions import report, save
from benchmarks.sampling import cpu_s
from benchmarks.submit import ENVIRONMENT, STATISTICS_S, closed_loop
from shared.db.session import build_engine
from shared.settings import DatabaseSettings
from tests.stack import RunningStack, running_stack

ONE_WORKER = ("--embed", "0", "--io", "0")
WARM_UP = 50
LIMIT_S = 1200
TABLES = ("jobs", "job_events", "generations")

COUNTERS = {
    "commits": "select xact_commit from pg_stat_database where datname = current_database()",
    "rows written": "select tup_inserted + tup_updated + tup_deleted from pg_stat_database"
    " where datname = current_database()",
    "WAL bytes": "select pg_current_wal_lsn() - '0/0'::pg_lsn",
}
"""A statement for each counter of Postgres."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="that submit at once (default: %(default)s)")
    parser.add_argument("--idle-s", type=float, default=20, help="seconds of the idle measurement (default: 20)")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_stack(Path(folder, "var"), environment=ENVIRONMENT, options=ONE_WORKER, durable=True) as stack,
    ):
        figures = measure(stack, options)
    report("One job", figures, **vars(options))
    print(f"wrote {save('job_cost', figures, **vars(options))}")


def measure(stack: RunningStack, options: argparse.Namespace) -> dict[str, object]:
    key = stack.new_key("benchmark", "generate")
    url = stack.environment()["AFTERIMAGE_DATABASE__URL"]
    engine = build_engine(DatabaseSettings(url=SecretStr(url)))
    with redis.Redis.from_url(stack.environment()["AFTERIMAGE_QUEUE__URL"]) as broker:
        closed_loop(stack.url, key, clients=2, requests=WARM_UP)
        wait_for_jobs(engine)
        idle, idle_s = _growth(stack, engine, broker, lambda: time.sleep(options.idle_s))
        size = _table_bytes(engine)

        def run() -> None:
            closed_loop(stack.url, key, clients=options.clients, requests=options.jobs)
            wait_for_jobs(engine)

        busy, busy_s = _growth(stack, engine, broker, run)
        size = _table_bytes(engine) - size
    engine.dispose()
    jobs = options.jobs // options.clients * options.clients
    per_job = {name: (busy[name] - idle[name] / idle_s * busy_s) / jobs for name in busy}
    return {
        "jobs per second": round(jobs / busy_s, 1),
        **{f"{name} per job": round(value, 2) for name, value in per_job.items()},
        "bytes in tables and indexes per job": round(size / jobs),
        **{f"{name} per idle second": round(value / idle_s, 2) for name, value in idle.items()},
    }


def _growth(
    stack: RunningStack, engine: Engine, broker: redis.Redis, run: Callable[[], None]
) -> tuple[dict[str, float], float]:
    """How much each counter grew while `run` ran, and the seconds that it took."""
    before, started = _counters(stack, engine, broker), time.perf_counter()
    run()
    elapsed_s = time.perf_counter() - started
    after = _counters(stack, engine, broker)
    return {name: after[name] - before[name] for name in before}, elapsed_s


def _counters(stack: RunningStack, engine: Engine, broker: redis.Redis) -> dict[str, float]:
    time.sleep(STATISTICS_S)
    with engine.connect() as connection:
        counters = {name: float(connection.scalar(text(query)) or 0) for name, query in COUNTERS.items()}
    stats = broker.info()
    counters["Redis commands"] = float(stats["total_commands_processed"])
    counters["Redis bytes"] = float(stats["total_net_input_bytes"] + stats["total_net_output_bytes"])
    spent = cpu_s({"postgres": stack.control.pid("postgres"), "queue": stack.control.pid("queue")})
    counters["Postgres CPU ms"], counters["Redis CPU ms"] = spent["postgres"] * 1000, spent["queue"] * 1000
    return counters


def wait_for_jobs(engine: Engine) -> None:
    """Wait until no job waits or runs.

    Raises:
        AssertionError: one did not succeed.
    """

    def unfinished() -> int:
        with engine.connect() as connection:
            return int(
                connection.scalar(text("select count(*) from jobs where state in ('queued', 'processing')")) or 0
            )

    deadline = time.monotonic() + LIMIT_S
    while unfinished():
        assert time.monotonic() < deadline, f"jobs still run after {LIMIT_S} s"
        time.sleep(0.5)  # seldom enough that it does not count
    with engine.connect() as connection:
        assert not connection.scalar(text("select count(*) from jobs where state <> 'succeeded'"))


def _table_bytes(engine: Engine) -> int:
    with engine.connect() as connection:
        sizes = (connection.scalar(text(f"select pg_total_relation_size('{name}')")) for name in TABLES)
        return sum(int(size or 0) for size in sizes)


if __name__ == "__main__":
    main()
