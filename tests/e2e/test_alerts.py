"""Alerts of a running service: each fires when its cause is made, arrives at a webhook, and ends with the cause.

Prometheus and Alertmanager run beside a local stack, with the rules and the start script of production. Only times are
shorter: those of rules, of scrapes and of rate windows.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from sqlalchemy import create_engine, select
from sqlalchemy.orm import Session

from ops.local.layout import free_port
from ops.local.stack import REPOSITORY
from shared.db.tables import Job
from tests.chaos.store import small_store
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api
from tests.integration.conftest import Receiver
from tests.integration.conftest import receiver as receiver
from tests.stack import RunningStack, running_stack, wait_until

PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
WORKER = "generate-cheap"
PROCESSES = {"api": "api", "embed": "embed", "generate": WORKER, "io": "io", "reconciler": "reconciler"}
"""The process of each scrape job."""
ARRIVE_S = 240
"""An end is sent with the next group, at the latest `group_interval` later, which is a minute."""

pytestmark = [
    pytest.mark.extended,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PROMETHEUS or not ALERTMANAGER, reason="Prometheus and Alertmanager are not installed"),
]


class Watched:
    """A stack with Prometheus and Alertmanager, and the alerts that the webhook has received."""

    def __init__(self, stack: RunningStack, targets: Path, receiver: Receiver) -> None:
        self.stack = stack
        self._targets = targets
        self._receiver = receiver
        for name in PROCESSES:
            self.find(name)

    def find(self, job: str) -> None:
        """Let the name server know the processes of a service."""
        process = PROCESSES[job]
        address = self.stack.api_url(process) if job == "api" else self.stack.metrics_url(process)
        self._write(job, [httpx.URL(address).netloc.decode()])

    def forget(self, job: str) -> None:
        """Let the name server forget a service, as Docker's does when its containers have stopped."""
        self._write(job, [])

    def _write(self, job: str, addresses: list[str]) -> None:
        new = self._targets / f"{job}.new"
        new.write_text(json.dumps([{"targets": addresses}]))
        new.rename(self._targets / f"{job}.json")

    def received(self, alert: str) -> list[str]:
        """The status of each notification of this alert: `firing` or `resolved`."""
        bodies = [json.loads(body) for _, body in self._receiver.got]
        return [each["status"] for body in bodies for each in body["alerts"] if each["labels"]["alertname"] == alert]

    def wait_for(self, alert: str, status: str) -> None:
        wait_until(lambda: self.received(alert)[-1:] == [status], timeout_s=ARRIVE_S, what=f"{alert} to be {status}")


def rules() -> str:
    """The rules of production, with short times."""
    text = (REPOSITORY / "ops" / "prometheus" / "alerts.yml").read_text()
    text = re.sub(r"for: \d+[mh]", "for: 3s", text)
    return re.sub(r"\[\d+[mh]\]", "[40s]", text)


def configuration(folder: Path, alertmanager: int) -> dict[str, Any]:
    """The configuration of production, with files in place of Docker's name server."""
    loaded: dict[str, Any] = yaml.safe_load((REPOSITORY / "ops" / "prometheus" / "prometheus.yml").read_text())
    assert {job["job_name"] for job in loaded["scrape_configs"]} == set(PROCESSES)
    loaded["global"] = {"scrape_interval": "3s", "evaluation_interval": "3s"}
    loaded["rule_files"] = [str(folder / "alerts.yml")]
    loaded["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}]
    for job in loaded["scrape_configs"]:
        del job["dns_sd_configs"]
        files = [str(folder / f"{job['job_name']}.json")]
        job["file_sd_configs"] = [{"files": files, "refresh_interval": "3s"}]
    return loaded


@contextmanager
def running(command: list[str], *, log: Path, environment: dict[str, str] | None = None) -> Iterator[None]:
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | (environment or {}), stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture
def watched(tmp_path: Path, receiver: Receiver) -> Iterator[Watched]:
    environment = TEST_ENVIRONMENT | {
        "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake", "cost_ms": 10000, "max_batch_size": 1}}',
        "AFTERIMAGE_JOBS__MAX_CRASHES": "1",
        "AFTERIMAGE_JOBS__LEASE_S": "10",
        "AFTERIMAGE_JOBS__HEARTBEAT_S": "2",
    }
    folder = tmp_path / "prometheus"
    folder.mkdir()
    ports = {free_port(excluding=set())}
    ports.add(free_port(excluding=ports))
    alertmanager, prometheus = sorted(ports)
    (folder / "alerts.yml").write_text(rules())
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration(folder, alertmanager)))
    with ExitStack() as everything:
        store = everything.enter_context(small_store(tmp_path / "var" / "blobs"))
        if not store.is_small:
            pytest.skip("this user may not mount a file system")
        stack = everything.enter_context(running_stack(tmp_path / "var", environment=environment))
        watched = Watched(stack, folder, receiver)
        everything.enter_context(
            running(
                [
                    *("sh", str(REPOSITORY / "ops" / "alertmanager" / "start.sh")),
                    *(f"--web.listen-address=127.0.0.1:{alertmanager}", "--cluster.listen-address="),
                ],
                log=tmp_path / "alertmanager.log",
                environment={
                    "ALERTMANAGER": str(ALERTMANAGER),
                    "ALERTMANAGER_DATA": str(tmp_path / "alertmanager"),
                    "ALERT_WEBHOOK_URL": receiver.url,
                    "TMPDIR": str(folder),
                },
            )
        )
        everything.enter_context(
            running(
                [
                    *(str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"),
                    f"--web.listen-address=127.0.0.1:{prometheus}",
                ],
                log=tmp_path / "prometheus.log",
            )
        )
        url = f"http://127.0.0.1:{prometheus}/api/v1/query"
        wait_until(lambda: scraped(url) == set(PROCESSES), timeout_s=120, what="every process to be scraped")
        yield watched


def scraped(url: str) -> set[str]:
    """The scrape jobs with a process that answers."""
    try:
        answer = httpx.get(url, params={"query": "up == 1"}).json()
    except httpx.TransportError:
        return set()
    return {each["metric"]["job"] for each in answer["data"]["result"]}


def has_started_its_model(stack: RunningStack, job_id: str) -> bool:
    engine = create_engine(stack.environment()["AFTERIMAGE_DATABASE__URL"])
    with Session(engine) as session:
        started = session.scalar(select(Job.model_started).where(Job.id == job_id))
    engine.dispose()
    return bool(started)


def test_alerts_arrive_when_their_cause_is_made_and_end_with_it(watched: Watched) -> None:
    stack = watched.stack
    with Api(stack.url) as api:
        # A job kills its worker.
        killer = api.submit(prompt="a killer")["id"]
        wait_until(lambda: has_started_its_model(stack, killer), timeout_s=120, what="the model to start")
        stack.control.kill(WORKER)
        assert api.ended(killer, timeout_s=300)["state"] == "dead"
        watched.wait_for("JobDead", "firing")

        # A whole service has stopped.
        stack.control.stop("io")
        watched.forget("io")
        # The disk of the blobs is nearly full.
        filler = stack.layout.blobs / "filler"
        usage = shutil.disk_usage(stack.layout.blobs)
        filler.write_bytes(bytes(usage.free - usage.total // 20))
        # The queue stands still.
        stack.control.freeze(WORKER)
        waiting = [api.submit(prompt=f"waits {number}")["id"] for number in range(3)]
        for alert in ("NoIoWorker", "DiskNearlyFull", "QueueStuck"):
            watched.wait_for(alert, "firing")

        stack.control.start("io")
        watched.find("io")
        filler.unlink()
        stack.control.thaw(WORKER)
        for alert in ("NoIoWorker", "DiskNearlyFull", "JobDead"):
            watched.wait_for(alert, "resolved")
        assert {api.ended(each, timeout_s=600)["state"] for each in waiting} == {"succeeded"}
        watched.wait_for("QueueStuck", "resolved")
