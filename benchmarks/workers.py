"""How many workers does one Postgres carry?

    .venv/bin/python -m benchmarks.workers
    .venv/bin/python -m benchmarks.workers --workers 400 --job-s 30 --lease-s 60

Starts a Postgres of its own with durable commits. Simulated workers claim jobs, renew their leases, look for cancels
and finish, by the functions of the real ones. They draw nothing: a job sleeps for `--job-s`. The broker, dispatch and
files are left out. The workers are threads of a few processes. Those of one process share a pool of connections, as
they would share PgBouncer.

Every job must end `succeeded` in its first attempt. Expired leases, lost jobs and failed calls are counted. The workers
are simulated in Python, which takes more processor time than Postgres does: compare both before you name a limit.
"""

import argparse
import logging
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import TypeVar
from uuid import UUID, uuid4

from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from benchmarks.conditions import report, save
from benchmarks.sampling import Sampler, cpu_s, latency_summary
from ops.local.stack import LocalStack
from shared.contracts.jobs import JobState
from shared.db import attempts
from shared.db.attempts import ClaimedJob, Resolution, StoredOutput, Success
from shared.db.session import build_engine, session_scope
from shared.db.tables import Output
from shared.errors import DatabaseError
from shared.settings import DatabaseSettings, JobSettings
from tests.factories import make_job
from worker_service.jobs.group_commit import GroupCommit
from worker_service.jobs.leases import JobLease, JobLeases

Result = TypeVar("Result")

START_LIMIT_S = 600
"""Longest start of the processes. Their jobs begin together afterwards."""


@dataclass(frozen=True)
class Load:
    """workers: in this process. in_flight: jobs that each of them runs at once."""

    workers: int
    in_flight: int
    job_s: float
    seconds: float
    lease_s: float
    heartbeat_s: float


@dataclass
class Record:
    """Results of the workers of one process. seconds: the durations of each kind of call."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    finished: int = 0
    lost: int = 0
    failed_calls: int = 0


class TimedLeases(JobLeases):
    """The leases of a worker, which note how long each renewal and each look for cancels takes."""

    def __init__(self, settings: JobSettings, record: Record) -> None:
        super().__init__(settings)
        self._record = record

    def _renew_due(self, held: Sequence[JobLease]) -> None:
        if not held:
            return
        renewed, started = self._renew_at, time.perf_counter()
        try:
            super()._renew_due(held)
        except DatabaseError:
            self._record.failed_calls += 1
            raise
        kind = "look for cancels" if self._renew_at == renewed else "renewal"
        self._record.seconds[kind].append(time.perf_counter() - started)


class SimulatedWorker:
    """One worker: its leases, its group commit, and a thread for each job that it runs at once."""

    def __init__(self, name: str, load: Load, job_ids: Iterator[UUID], record: Record) -> None:
        settings = JobSettings(lease_s=load.lease_s, heartbeat_s=load.heartbeat_s)
        self._leases = TimedLeases(settings, record)
        self._group_commit = GroupCommit(name, load.lease_s)
        self._load, self._job_ids, self._record = load, job_ids, record

    def run(self) -> None:
        """Run jobs until the time is over or no job is left."""
        with self._leases:
            threads = [threading.Thread(target=self._run_slot, daemon=True) for _ in range(self._load.in_flight)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def _run_slot(self) -> None:
        ends_at = time.monotonic() + self._load.seconds
        time.sleep(self._load.job_s * random.random())  # real jobs do not all begin at once
        while time.monotonic() < ends_at and (job_id := next(self._job_ids, None)) is not None:
            self._run_job(job_id)

    def _run_job(self, job_id: UUID) -> None:
        claimed = self._timed("claim", lambda: self._group_commit.claim(job_id))
        assert claimed is not None
        claim, job = claimed
        lease = self._leases.hold(claim)
        resolution = {"mode": "none", "reason": "no references", "references": [], "concepts": [], "warnings": []}
        self._timed("resolution", lambda: self._group_commit.write(Resolution(claim, resolution)))
        self._timed("start of the model", lambda: self._mark_started(lease))
        ends_at = time.monotonic() + self._load.job_s
        while not lease.lost and (left_s := ends_at - time.monotonic()) > 0:
            time.sleep(min(left_s, 1))
        success = Success(claim, [StoredOutput(output_of(job), [])], {"wait": 0.1, "generate": self._load.job_s})
        owned = self._timed("finish", lambda: self._group_commit.write(success))
        self._leases.release(lease)
        self._record.finished += owned
        self._record.lost += not owned

    def _mark_started(self, lease: JobLease) -> bool:
        with session_scope() as session:
            return bool(attempts.mark_models_started(session, [lease.claim], wait=False))

    def _timed(self, kind: str, call: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = call()
        self._record.seconds[kind].append(time.perf_counter() - started)
        return result


def output_of(job: ClaimedJob) -> Output:
    """The row of an image with a provenance of usual size."""
    return Output(
        id=uuid4(),
        job_id=job.id,
        owner_id=job.owner_id,
        index=0,
        seed=1,
        format="png",
        blob_key=f"outputs/{job.id}/1/0.png",
        thumbnail_key=f"outputs/{job.id}/1/0.webp",
        width=512,
        height=512,
        size_bytes=400_000,
        sha256="0" * 64,
        pixels_sha256="0" * 64,
        provenance={"parameters": job.parameters, "versions": dict.fromkeys("abcdef", "1.2.3"), "model": "0" * 64},
    )


def run_workers(
    number: int,
    load: Load,
    job_ids: list[UUID],
    environment: dict[str, str],
    begin: Barrier,
    results: "multiprocessing.Queue[Record]",
) -> None:
    """One process: run its workers to the end, and send what they saw."""
    os.environ.update(environment)
    logging.disable(logging.WARNING)
    record, left = Record(), iter(job_ids)
    workers = [SimulatedWorker(f"worker-{number}-{each}", load, left, record) for each in range(load.workers)]
    threads = [threading.Thread(target=worker.run) for worker in workers]
    begin.wait()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(record)


def insert_jobs(engine: Engine, number: int) -> list[UUID]:
    """Queued jobs, inserted as the API inserts them."""
    ids = []
    with Session(engine) as session:
        for done in range(number):
            ids.append(make_job(session, timeout_s=3600).id)
            if done % 500 == 499:
                session.commit()
        session.commit()
    return ids


def read_number(engine: Engine, statement: str) -> float:
    with engine.connect() as connection:
        return float(connection.scalar(text(statement)) or 0)


CONNECTIONS = "select count(*) from pg_stat_activity where application_name = 'afterimage'"
EXPIRED = "select count(*) from jobs where state = 'processing' and lease_until < clock_timestamp()"
COMMITS = "select xact_commit from pg_stat_database where datname = current_database()"
WAL_BYTES = "select pg_current_wal_lsn() - '0/0'::pg_lsn"
WRONG = f"select count(*) from jobs where state not in ('queued', '{JobState.SUCCEEDED}') or attempt > 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=200, help="simulated workers (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=2, help="jobs that each runs at once (default: %(default)s)")
    parser.add_argument("--job-s", type=float, default=10, help="seconds of one job (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="of the measurement (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=4, help="that hold the workers (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=160, help="of all processes (default: %(default)s)")
    parser.add_argument("--lease-s", type=float, default=JobSettings().lease_s, help="(default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stack = LocalStack(Path(folder, "var"))
        stack.start(servers_only=True, durable=True, attached=True)
        try:
            stack.migrate()
            figures = measure(stack, options)
        finally:
            stack.stop()
    conditions = {name: value for name, value in vars(options).items() if name != "seconds"}
    report(f"{options.workers} workers", figures, **conditions)
    print(f"wrote {save('workers', figures, **conditions)}")


def measure(stack: LocalStack, options: argparse.Namespace) -> dict[str, object]:
    environment = stack.environment() | {
        "AFTERIMAGE_DATABASE__POOL_SIZE": str(options.connections // options.processes),
        "AFTERIMAGE_DATABASE__MAX_OVERFLOW": "0",
        "AFTERIMAGE_DATABASE__POOL_TIMEOUT_S": "10",
    }
    engine = build_engine(DatabaseSettings(url=SecretStr(environment["AFTERIMAGE_DATABASE__URL"])))
    ids = insert_jobs(engine, int(options.workers * options.in_flight * (options.seconds / options.job_s + 2)))
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[Record] = context.Queue()
    load = Load(
        workers=options.workers // options.processes,
        in_flight=options.in_flight,
        job_s=options.job_s,
        seconds=options.seconds,
        lease_s=options.lease_s,
        heartbeat_s=options.lease_s / 3,
    )
    begin = context.Barrier(options.processes + 1, timeout=START_LIMIT_S)
    processes = [
        context.Process(target=run_workers, args=(n, load, ids[n :: options.processes], environment, begin, results))
        for n in range(options.processes)
    ]
    for process in processes:
        process.start()
    begin.wait()
    pids = {"postgres": stack.control.pid("postgres"), "workers": os.getpid()}
    commits, wal, spent = read_number(engine, COMMITS), read_number(engine, WAL_BYTES), cpu_s(pids)
    with (
        Sampler(lambda: read_number(engine, CONNECTIONS), pause_s=1) as connections,
        Sampler(lambda: read_number(engine, EXPIRED), pause_s=1) as expired,
    ):
        time.sleep(options.seconds)
        spent_after, load_average = cpu_s(pids), os.getloadavg()[0]
        commits = read_number(engine, COMMITS) - commits
        wal = read_number(engine, WAL_BYTES) - wal
        records = [results.get(timeout=options.job_s + START_LIMIT_S) for _ in processes]
    for process in processes:
        process.join()
    wrong = read_number(engine, WRONG)
    engine.dispose()
    calls: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for kind, seconds in record.seconds.items():
            calls[kind] += seconds
    finished, elapsed_s = sum(record.finished for record in records), options.seconds + options.job_s
    return {
        **{
            kind: {"per second": round(len(seconds) / elapsed_s, 1), **latency_summary(seconds)}
            for kind, seconds in calls.items()
        },
        "jobs finished": finished,
        "jobs lost": sum(record.lost for record in records),
        "jobs wrong in the database": int(wrong),
        "expired leases seen": int(max(expired.values)),
        "failed calls": sum(record.failed_calls for record in records),
        "connections": int(max(connections.values)),
        "commits per second": round(commits / options.seconds, 1),
        "WAL bytes per finished job": round(wal / max(finished, 1)),
        "cores used by Postgres": round((spent_after["postgres"] - spent["postgres"]) / options.seconds, 2),
        "cores used by the workers": round((spent_after["workers"] - spent["workers"]) / options.seconds, 2),
        "load average of the machine": round(load_average, 1),
    }


if __name__ == "__main__":
    main()
