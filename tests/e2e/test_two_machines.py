"""Workers on a second machine, which reach Postgres, Redis and the bucket over a cable, and lose it under load."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import boto3
import orjson
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from ops.local.layout import free_port
from shared.contracts.jobs import JobState
from shared.db.session import build_engine
from shared.db.tables import Job, JobEvent, Worker
from shared.settings import DatabaseSettings
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.e2e.steady_load import QUICK, Load, everything_ran_once
from tests.other_machine import OtherMachine, can_be_made
from tests.other_servers import listen_also, listens, running
from tests.stack import RunningStack, running_stack, wait_until

pytestmark = [
    pytest.mark.extended,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not can_be_made(), reason="needs root and `ip netns`"),
]

SLOW = {"AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake", "cost_ms": 1000, "max_batch_size": 4}}'}
"""One second per batch, so that the workers always hold jobs. It is more than the load needs."""
SUBMIT_EVERY_S = 0.5
READY_S = 180
RECOVERED_S = 30
"""Longest time from the return of the network to the next claim of a job or image."""
HERE = "generate-cheap"
"""The generate worker of the first machine."""
BUCKET = "images"
LOGIN = {"region": "us-east-1", "access_key_id": "test", "secret_access_key": "test"}


@contextmanager
def bucket(machine: OtherMachine, folder: Path) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Run an object store that both machines reach. Yields the settings with the URL of a bucket, and its options."""
    port = free_port(excluding=set())
    endpoint = f"http://{machine.here}:{port}"
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", machine.here, "-p", str(port)]
    with (
        running(command, folder / "bucket.log"),
        closing(
            boto3.client(
                "s3",
                endpoint_url=endpoint,
                region_name=LOGIN["region"],
                aws_access_key_id=LOGIN["access_key_id"],
                aws_secret_access_key=LOGIN["secret_access_key"],
            )
        ) as client,
    ):
        wait_until(lambda: listens(port, machine.here), timeout_s=READY_S, what="the object store to listen")
        client.create_bucket(Bucket=BUCKET)
        yield (
            {"AFTERIMAGE_STORAGE__URL": f"s3://{BUCKET}"},
            {"AFTERIMAGE_STORAGE__OPTIONS": orjson.dumps({**LOGIN, "endpoint": endpoint}).decode()},
        )


@contextmanager
def workers_on(
    machine: OtherMachine, stack: RunningStack, environment: dict[str, str], folder: Path
) -> Iterator["Workers"]:
    """Let the stack's servers listen for the machine. Yields its workers, which do not run yet."""
    listen_also(stack, machine.here)
    urls = {name: url for name, url in stack.environment().items() if name.endswith("__URL")}
    there = {name: url.replace("127.0.0.1", machine.here) for name, url in urls.items()}
    database = build_engine(DatabaseSettings(url=SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])))
    yield Workers(machine, environment | there | {"AFTERIMAGE_METRICS__PORT": "0"}, folder, database)
    database.dispose()


class Workers:
    """The workers of the second machine, by kind."""

    def __init__(self, machine: OtherMachine, environment: dict[str, str], folder: Path, database: Engine) -> None:
        self._machine, self._environment, self._folder, self._database = machine, environment, folder, database
        self._processes: dict[str, Popen[bytes]] = {}

    @contextmanager
    def running(self, *kinds: str) -> Iterator[None]:
        with ExitStack() as processes:
            for kind in kinds:
                command = [sys.executable, "-m", "worker_service", kind]
                process = self._machine.running(command, self._environment, self._folder / f"{kind}.log")
                self._processes[kind] = processes.enter_context(process)
            for kind in kinds:
                wait_until(
                    lambda kind=kind: self._is_ready(kind) or not self.still_run(),  # type: ignore[misc]
                    timeout_s=READY_S,
                    what=f"the {kind} worker to be ready",
                )
            assert self.still_run(), "a worker ended while it started"
            yield

    def _is_ready(self, kind: str) -> bool:
        with Session(self._database) as session:
            state = session.scalar(select(Worker.state).where(Worker.id.like(self._name(kind))))
        return state == "ready"

    def _name(self, kind: str) -> str:
        """A pattern of the worker's id."""
        return f"{kind}%-{self._processes[kind].pid}@%"

    def held_jobs(self) -> set[str]:
        with Session(self._database) as session:
            held = select(Job.id).where(Job.state == JobState.PROCESSING, Job.worker.like(self._name("generate")))
            return {str(job_id) for job_id in session.scalars(held)}

    def claims(self) -> int:
        """How many jobs the generate worker has claimed so far."""
        worker = JobEvent.data["worker"].astext
        with Session(self._database) as session:
            claims = select(func.count()).where(JobEvent.type == "started", worker.like(self._name("generate")))
            return session.scalar(claims) or 0

    def still_run(self) -> bool:
        return all(process.poll() is None for process in self._processes.values())


class Machines(NamedTuple):
    cable: OtherMachine
    stack: RunningStack
    api: Api
    there: Workers


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A stack with one generate worker, and a machine with one generate and the only embed worker."""
    folder = tmp_path_factory.mktemp("machines")
    with OtherMachine().connected() as machine, bucket(machine, folder) as (url, options):
        environment = TEST_ENVIRONMENT | QUICK | SLOW | options
        with (
            running_stack(folder / "var", environment=environment, options=("--embed", "0"), settings=url) as stack,
            Api(stack.url) as api,
            workers_on(machine, stack, environment, folder) as there,
            there.running("embed", "generate"),
        ):
            yield Machines(machine, stack, api, there)


@pytest.mark.parametrize(("cut", "away_s"), [(OtherMachine.unplugged, 15), (OtherMachine.silent, 60)])
def test_workers_that_lose_their_network_lose_no_job_and_work_again(
    cut: Callable[[OtherMachine], AbstractContextManager[None]], away_s: float, machines: Machines
) -> None:
    cable, stack, api, there = machines
    stack.control.freeze(HERE)
    api.searchable(api.upload(disc("gold", radius=int(away_s)))["id"], timeout_s=RECOVERED_S)
    with Load(api, every_s=SUBMIT_EVERY_S) as load:
        wait_until(there.held_jobs, timeout_s=RECOVERED_S, what="the second machine to take jobs")
        with cut(cable):
            held = there.held_jobs()
            assert held, "the network is lost in the middle of jobs"
            stack.control.thaw(HERE)
            load.wait_for(int(away_s / SUBMIT_EVERY_S))
            ended = [api.ended(job_id, timeout_s=120) for job_id in held]
            assert all(job["state"] == "succeeded" and job["attempt"] > 1 for job in ended)
        claims, back_at = there.claims(), time.monotonic()
        wait_until(lambda: there.claims() > claims, timeout_s=RECOVERED_S, what="it to take jobs again")
        print(f"{len(held)} jobs were interrupted; jobs were taken again after {time.monotonic() - back_at:.1f} s")
        api.searchable(api.upload(disc("silver", radius=int(away_s)))["id"], timeout_s=RECOVERED_S)
    everything_ran_once(stack, api, load.submitted)
    assert there.still_run(), "no worker was started again"
