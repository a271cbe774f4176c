"""docker-compose.yml as written, on a real engine: every container, faults, an upgrade, a restore, and alerts.

It needs an engine, the images of `ops/stand_ins/build.sh`, and those of `docker compose build`. Grafana has no
stand-in.
The tests share one project and run in their order.
"""

import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.conftest import Api, disc
from tests.e2e.test_alerts import rules
from tests.production import OURS, Production, missing
from tests.stack import wait_until

WITHOUT = missing()
pytestmark = [
    pytest.mark.extended,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(WITHOUT), reason=WITHOUT),
]

OVERRIDE = f"""\
services:
  grafana: {{profiles: [without-a-stand-in]}}
  receiver:
    image: {OURS[0]}
    init: true
    command: ["python", "-u", "-c", {
    json.dumps(
        '''
import http.server

class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        print(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

http.server.HTTPServer(("", 8080), Receiver).serve_forever()
'''
    )
}]
    networks: [outside]
  generate-second:
    extends: {{file: docker-compose.yml, service: generate}}
    profiles: !override [second]
    command: ["python", "-m", "worker_service", "generate", "--model", "second"]
volumes:
  blobs: {{driver_opts: {{type: none, o: bind, device: %s}}}}
"""
"""A receiver of alerts, a second image model, and a small disk for the blobs."""

MODEL = """
source = "starter/models/generator"
native_side = 128
any_size = false
max_batch_size = 8
max_sequence_length = 24
text_encoder_out_layers = [3]
reference_side = 128
reference_side_of_several = 64
defaults = {width = 128, height = 128, num_inference_steps = 14, guidance_scale = 1.0}
"""
"""The starter model, as shared/settings/models.py has it."""
DISK_MB = 256
PAUSED_REQUESTS = 100
"""Requests during a pause, at least five seconds."""
RESTARTED = ("api", "embed", "generate", "io", "reconciler", "flower")
"""Containers whose health check ends a process that gives no answer."""


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Production]:
    folder = tmp_path_factory.mktemp("production")
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "blobs", str(disk)], check=True)
    (disk / "blobs").mkdir()
    shutil.chown(disk / "blobs", 10001, 10001)
    shutil.chown(disk, 10001, 10001)
    production = Production(folder)
    production.override(OVERRIDE % disk)
    production.set(ALERT_WEBHOOK_URL="http://receiver:8080/")
    try:
        production.up()
        production.new_key()
        yield production
    finally:
        production.remove()
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def api(production: Production) -> Iterator[Api]:
    with production.api() as api:
        yield api


class Load:
    """Jobs at a steady rate through the proxy, and a request on a new connection every 50 ms, until the block ends."""

    def __init__(self, production: Production, *, every_s: float = 3.0) -> None:
        self.submitted: list[str] = []
        self.refused: list[str] = []
        """Answers other than the expected one, and errors of the connection."""
        self.answered = 0
        self._production, self._every_s = production, every_s
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._submit), threading.Thread(target=self._ask)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int, *, timeout_s: float = 240) -> None:
        goal = len(self.submitted) + more
        wait_until(lambda: len(self.submitted) >= goal, timeout_s=timeout_s, what=f"{more} more jobs")

    def wait_for_requests(self, more: int) -> None:
        """Wait until `more` requests have been answered or refused."""
        goal = self.answered + len(self.refused) + more
        wait_until(lambda: self.answered + len(self.refused) >= goal, timeout_s=240, what=f"{more} more requests")

    def _submit(self) -> None:
        with self._production.api() as api:
            number = 0
            while not self._over.wait(self._every_s):
                request = {"prompt": f"a red apple {number}", "num_inference_steps": 2}
                headers = {"Idempotency-Key": f"{id(self)}-{number}"}
                answer = self._answer(api.http, "POST", "/rag/generate", json=request, headers=headers)
                if answer is not None:
                    self.submitted.append(answer.json()["id"])
                    number += 1

    def _ask(self) -> None:
        trust = self._production.trust()
        url = f"https://localhost:{self._production.port}/api/v1"
        while not self._over.wait(0.05):
            with httpx.Client(base_url=url, verify=trust, timeout=30) as http:
                self._answer(http, "GET", "/health/live")

    def _answer(self, http: httpx.Client, method: str, path: str, **request: Any) -> httpx.Response | None:
        try:
            answer = http.request(method, path, **request)
        except httpx.TransportError as error:
            problem = f"{path}: {error!r}"
        else:
            if answer.is_success:
                self.answered += 1
                return answer
            problem = f"{path}: {answer.status_code} {answer.text[:200]}"
        self.refused.append(problem)
        return None


def all_succeed(api: Api, jobs: list[str]) -> None:
    states = {job: api.ended(job, timeout_s=600)["state"] for job in jobs}
    assert {job: state for job, state in states.items() if state != "succeeded"} == {}


def test_every_container_is_healthy_and_runs_with_what_the_file_gives_it(production: Production) -> None:
    states = {each["Service"]: (each["State"], each["Health"]) for each in production.containers()}
    ended = {name for name, (state, _) in states.items() if state == "exited"}
    assert ended == {"migrate"}
    assert {state for name, state in states.items() if name not in ("migrate", "receiver")} == {("running", "healthy")}
    assert {"proxy", "api", "embed", "generate", "io", "reconciler", "flower", "postgres"} <= states.keys()


def test_the_main_job_runs_through_the_proxy(production: Production, api: Api) -> None:
    image = api.upload(disc("red"), caption="a red disc")
    api.searchable(image["id"])
    job = api.ended(api.submit(prompt="a red disc", reference_ids=[image["id"]])["id"], timeout_s=240)
    assert job["state"] == "succeeded"
    content = api.http.get(f"/generations/{job['outputs'][0]['id']}/content").raise_for_status().content
    assert content.startswith(b"\x89PNG")
    with httpx.Client(verify=production.trust()) as http:
        assert http.get(f"{api.url}/metrics").status_code == 404
        page = http.get(f"{api.url}/", follow_redirects=True)
        assert page.is_success
        assert page.headers["Strict-Transport-Security"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{api.url}/", verify=ssl.create_default_context())


def test_three_api_processes_share_the_requests(production: Production, api: Api) -> None:
    production.up("--no-recreate", "--scale", "api=3")
    wait_until(lambda: len(production.queried('up{job="api"} == 1')) == 3, timeout_s=90, what="Prometheus to see three")
    for number in range(60):
        with production.api() as client:
            assert client.http.get("/jobs", params={"limit": 1 + number % 5}).is_success
    answered = production.queried('sum by (instance) (api_requests_total{route=~".*/jobs"}) > 0')
    wait_until(
        lambda: len(production.queried('sum by (instance) (api_requests_total{route=~".*/jobs"}) > 0')) == 3,
        timeout_s=60,
        what=f"each process to have answered: {answered}",
    )


def test_a_second_generate_service_draws_for_its_model(production: Production, api: Api) -> None:
    models = production.folder / "ops" / "config" / "afterimage.toml"
    models.write_text(
        models.read_text() + "".join(f"\n[model.generators.{name}]{MODEL}" for name in ("starter", "second"))
    )
    production.up("--force-recreate", "--no-deps", "--scale", "api=3", "api", "embed", "generate")
    production.compose("--profile", "second", "up", "-d", "--wait", "--no-deps", "generate-second")
    jobs = [api.submit(prompt="a green pear", model=model)["id"] for model in ("starter", "second")]
    all_succeed(api, jobs)
    workers = {str(api.job(job)["worker"]) for job in jobs if "worker" in api.job(job)}
    assert len(workers) in (0, 2)
    production.compose("--profile", "second", "rm", "--stop", "--force", "generate-second")


@pytest.mark.parametrize("service", [*RESTARTED, "proxy", "queue", "cache", "postgres", "prometheus", "alertmanager"])
def test_a_killed_container_starts_again_and_no_job_is_lost(service: str, production: Production, api: Api) -> None:
    with Load(production) as load:
        load.wait_for(2)
        container = production.ids(service)[0]
        restarts = production.state(container)["RestartCount"]
        os.kill(production.state(container)["Pid"], signal.SIGKILL)
        wait_until(
            lambda: production.state(container)["RestartCount"] > restarts, timeout_s=60, what=f"{service} to restart"
        )
        production.wait_for(service)
        load.wait_for(2)
    all_succeed(api, load.submitted)


def test_frozen_processes_are_ended_and_start_again(production: Production, api: Api) -> None:
    with Load(production) as load:
        load.wait_for(2)
        containers = {service: production.ids(service)[0] for service in RESTARTED}
        before = {service: production.state(container)["RestartCount"] for service, container in containers.items()}
        for container in containers.values():
            production.send(signal.SIGSTOP, container)
        for service, container in containers.items():
            wait_until(
                lambda container=container, service=service: (  # type: ignore[misc]
                    production.state(container)["RestartCount"] > before[service]
                ),
                timeout_s=300,
                what=f"the health check to end {service}",
            )
            production.wait_for(service)
        load.wait_for(2)
    all_succeed(api, load.submitted)


@pytest.mark.parametrize("service", ["api", "generate", "embed", "io", "reconciler", "queue", "cache", "postgres"])
def test_a_paused_container_continues_and_no_job_is_lost(service: str, production: Production, api: Api) -> None:
    with Load(production) as load:
        load.wait_for(2)
        container = production.ids(service)[0]
        production.run("docker", "pause", container)
        wait_until(lambda: production.state(container)["Paused"], timeout_s=10, what="the pause")
        load.wait_for_requests(PAUSED_REQUESTS)
        production.run("docker", "unpause", container)
        production.wait_for(service)
        load.wait_for(2)
    all_succeed(api, load.submitted)


def test_a_container_over_its_memory_is_ended_and_its_jobs_run_later(production: Production, api: Api) -> None:
    with Load(production) as load:
        load.wait_for(2)
        production.run("docker", "compose", "up", "-d", "--no-deps", "generate", variables={"WORKER_MEMORY": "300m"})
        container = production.ids("generate")[0]
        wait_until(
            lambda: production.state(container)["RestartCount"] >= 2,
            timeout_s=180,
            what="the container to be ended twice",
        )
        load.wait_for(2)
        production.up("--no-deps", "generate")
    all_succeed(api, load.submitted)


def test_an_upgrade_and_its_way_back_refuse_no_request(production: Production, api: Api) -> None:
    # Another name is enough for compose to replace a container.
    for image in OURS:
        production.run("docker", "tag", image, f"{image}-next")
    names = dict(zip(("API_IMAGE", "WORKER_IMAGE", "FLOWER_IMAGE"), OURS, strict=True))
    with Load(production) as load:
        for images in ({name: f"{image}-next" for name, image in names.items()}, names):
            production.set(**images)
            load.wait_for(2)
            production.run("ops/rolling_update.sh")
            load.wait_for(2)
            running = {each["Service"]: each["Image"] for each in production.containers() if each["State"] == "running"}
            assert (running["api"], running["generate"]) == (images["API_IMAGE"], images["WORKER_IMAGE"])
    assert load.refused == []
    all_succeed(api, load.submitted)


def test_a_wiped_service_is_restored_from_its_backup(production: Production, api: Api) -> None:
    images = [api.upload(disc(colour), caption=colour)["id"] for colour in ("teal", "gold")]
    for image in images:
        api.searchable(image)
    job = api.ended(api.submit(prompt="before", reference_ids=images[:1])["id"], timeout_s=240)
    paths = [f"/images/{each}/content" for each in images] + [f"/generations/{job['outputs'][0]['id']}/content"]
    before = {path: sha256(api.http.get(path).raise_for_status().content).digest() for path in paths}
    production.run("install", "-d", "-m", "700", "-o", "10001", "backups")
    with Load(production) as load:
        load.wait_for(3)
        production.compose(
            *("run", "--rm", "-T", "-v", "./backups:/backups", "tools"),
            *("python", "-m", "ops.backup", "create", "/backups"),
        )
    (backup,) = [each.name for each in (production.folder / "backups").glob("*T*Z")]

    production.remove()
    for each in (production.folder / "disk" / "blobs").iterdir():
        shutil.rmtree(each)
    production.up("postgres", "cache")
    production.compose(
        *("run", "--rm", "-T", "--no-deps", "-v", "./backups:/backups:ro", "tools"),
        *("python", "-m", "ops.backup", "restore", f"/backups/{backup}"),
    )
    production.up()

    with production.api() as again:
        assert {path: sha256(again.http.get(path).raise_for_status().content).digest() for path in paths} == before
        assert again.job(job["id"]) == job
        after = again.ended(again.submit(prompt="after", reference_ids=images[:1])["id"], timeout_s=240)
        assert after["state"] == "succeeded"


class Alerts:
    """The alerts that the receiver prints from now on."""

    def __init__(self, production: Production) -> None:
        self._production = production
        self._before = len(self._bodies())

    def _bodies(self) -> list[dict[str, Any]]:
        lines = self._production.compose("logs", "--no-log-prefix", "receiver").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, alert: str, status: str, *, timeout_s: float = 300) -> None:
        wait_until(
            lambda: (
                (alert, status)
                in {
                    (each["labels"]["alertname"], each["status"])
                    for body in self._bodies()[self._before :]
                    for each in body["alerts"]
                }
            ),
            timeout_s=timeout_s,
            what=f"{alert} to be {status}",
        )


def test_alerts_arrive_at_a_receiver_and_end(production: Production, api: Api) -> None:
    """With the rules and the scrapes of production, but with short times."""
    prometheus = production.folder / "ops" / "prometheus"
    (prometheus / "alerts.yml").write_text(rules())
    scrapes = yaml.safe_load((prometheus / "prometheus.yml").read_text())
    scrapes["global"] = {"scrape_interval": "3s", "evaluation_interval": "3s"}
    (prometheus / "prometheus.yml").write_text(yaml.safe_dump(scrapes))
    (production.folder / "ops" / "config" / "settings.env").write_text(
        "AFTERIMAGE_JOBS__MAX_CRASHES=1\nAFTERIMAGE_JOBS__LEASE_S=10\nAFTERIMAGE_JOBS__HEARTBEAT_S=2\n"
    )
    production.up("--force-recreate")
    alerts = Alerts(production)
    with production.api() as api:
        # A job kills its worker.
        killer = api.submit(prompt="a killer", num_images=16, num_inference_steps=50)["id"]
        wait_until(lambda: (api.job(killer).get("progress") or 0) != 0, timeout_s=120, what="the model to start")
        production.send(signal.SIGKILL, production.ids("generate")[0])
        assert api.ended(killer, timeout_s=300)["state"] == "dead"
        alerts.wait_for("JobDead", "firing")
        production.wait_for("generate")

        # A whole service has stopped, the disk is nearly full, and the queue stands still.
        production.compose("stop", "io")
        filler = production.folder / "disk" / "filler"
        usage = shutil.disk_usage(filler.parent)
        filler.write_bytes(bytes(usage.free - usage.total // 20))
        frozen = production.ids("generate")[0]
        production.run("docker", "pause", frozen)
        waiting = [api.submit(prompt=f"waits {number}")["id"] for number in range(3)]
        for alert in ("NoIoWorker", "DiskNearlyFull", "QueueStuck"):
            alerts.wait_for(alert, "firing")

        filler.unlink()
        production.run("docker", "unpause", frozen)
        production.compose("start", "io")
        for alert in ("NoIoWorker", "DiskNearlyFull", "JobDead"):
            alerts.wait_for(alert, "resolved")
        all_succeed(api, waiting)
        alerts.wait_for("QueueStuck", "resolved")
