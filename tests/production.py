"""docker-compose.yml on a real engine, in a copy of its files, with the commands of docs/operations.md."""

import json
import os
import secrets
import shutil
import signal
import ssl
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from ops.local.layout import free_port
from ops.local.stack import REPOSITORY
from tests.e2e.conftest import Api
from tests.stack import clean_environment, wait_until

VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
IMAGES = {
    "POSTGRES_IMAGE": "stand-in-postgres",
    "REDIS_IMAGE": "stand-in-redis",
    "PROMETHEUS_IMAGE": "stand-in-prometheus",
    "ALERTMANAGER_IMAGE": "stand-in-alertmanager",
    "PROXY_IMAGE": "stand-in-caddy",
}
"""The images of others: stand-ins of `ops/stand_ins/build.sh`."""
OURS = [f"afterimage-{kind}:{VERSION}" for kind in ("api", "worker", "flower")]
"""The images of `docker compose build`."""
START_S = 900
LOADED_S = 600
"""The `start_period` of a worker with a model."""


def missing() -> str:
    """Name things that this machine lacks to start the compose file; empty if it lacks nothing."""
    if os.geteuid():
        return "needs root, to kill processes of containers"
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        return "no Docker engine answers"
    wanted = [*IMAGES.values(), *OURS]
    absent = [
        name for name in wanted if subprocess.run(["docker", "image", "inspect", name], capture_output=True).returncode
    ]
    return f"images are absent: {', '.join(absent)}" if absent else ""


class Production:
    """A copy of the deployment's files in `folder`, and the project that compose runs from it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port(excluding=set())
        self.key = ""
        for name in ("docker-compose.yml", ".env.example"):
            shutil.copy(REPOSITORY / name, folder / name)
        shutil.copytree(REPOSITORY / "ops", folder / "ops", ignore=shutil.ignore_patterns("secrets", "helm", "local"))
        self.run("ops/prepare.sh")
        self.set(
            COMPOSE_PROJECT_NAME=f"afterimage-{secrets.token_hex(3)}",
            PROXY_HTTPS=f"127.0.0.1:{self.port}",
            PROXY_HTTP="127.0.0.1:0",
            WORKER_MEMORY="3g",
            **IMAGES,
        )

    def set(self, **variables: str) -> None:
        """Add lines to .env. Later ones win."""
        with (self.folder / ".env").open("a") as env:
            env.writelines(f"{name}={value}\n" for name, value in variables.items())

    def override(self, text: str) -> None:
        """Write docker-compose.override.yml, which compose reads beside the other file."""
        (self.folder / "docker-compose.override.yml").write_text(text)

    def run(
        self, *command: str, timeout_s: float = START_S, text: str = "", variables: Mapping[str, str] | None = None
    ) -> str:
        """Run a command in the folder, and return what it prints."""
        environment = {**clean_environment(), **(variables or {})}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, input=text, capture_output=True, text=True, timeout=timeout_s
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def compose(self, *arguments: str, text: str = "") -> str:
        return self.run("docker", "compose", *arguments, text=text)

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--wait", *arguments)

    def containers(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.compose("ps", "--all", "--format", "json").splitlines()]

    def ids(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def state(self, container: str) -> dict[str, Any]:
        """The `State` of the container, with its `RestartCount`."""
        (found,) = json.loads(self.run("docker", "inspect", container))
        return {**found["State"], "RestartCount": found["RestartCount"]}

    def send(self, number: signal.Signals, container: str) -> None:
        """Send a signal to all processes of a container but the first, which is an init or has no others."""
        first = self.state(container)["Pid"]
        for pid in map(int, self.run("docker", "top", container, "-eo", "pid").split()[1:]):
            if pid != first:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def is_healthy(self, service: str) -> bool:
        states = [self.state(container) for container in self.ids(service)]
        return bool(states) and all(state["Running"] and state["Health"]["Status"] == "healthy" for state in states)

    def wait_for(self, service: str, *, timeout_s: float = LOADED_S) -> None:
        wait_until(lambda: self.is_healthy(service), timeout_s=timeout_s, what=f"{service} to be healthy")

    def new_key(self, owner: str = "team-a") -> None:
        """Make an owner with a key, as docs/operations.md says. `api` uses it."""
        admin = ("exec", "-T", "api", "python", "-m", "scripts.admin")
        self.compose(*admin, "create-owner", owner)
        made = self.compose(*admin, "create-key", owner, "--name", "first", "--scopes", "generate,search,corpus:write")
        self.key = made.split()[-1]

    def trust(self) -> ssl.SSLContext:
        """The authority of the proxy."""
        root = self.compose("exec", "-T", "proxy", "cat", "/data/caddy/pki/authorities/local/root.crt")
        return ssl.create_default_context(cadata=root)

    @contextmanager
    def api(self) -> Iterator[Api]:
        """A client that reaches the service through the proxy, by TLS."""
        with Api(f"https://localhost:{self.port}", self.key, verify=self.trust()) as api:
            yield api

    def queried(self, expression: str) -> list[dict[str, Any]]:
        """The answer of Prometheus, which only containers reach."""
        url = f"http://127.0.0.1:9090/api/v1/query?{httpx.QueryParams(query=expression)}"
        answer = json.loads(self.compose("exec", "-T", "prometheus", "wget", "-qO-", url))
        return list(answer["data"]["result"])

    def remove(self) -> None:
        self.compose("down", "--volumes", "--timeout", "5")
