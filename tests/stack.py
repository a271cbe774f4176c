"""A whole local stack for end-to-end tests, started as a user starts it: by command."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import redis

from ops.local.stack import REPOSITORY, LocalStack, tail

START_WAIT_S = 240
STOP_WAIT_S = 60


class RunningStack(LocalStack):
    """A stack that runs, and the command that holds it.

    `url` is the API's address; `control` kills, freezes, thaws and restarts processes by name.
    """

    def __init__(self, var: Path, command: "subprocess.Popen[bytes]") -> None:
        super().__init__(var)
        self.command = command

    def log(self, name: str) -> str:
        """Everything a process has printed so far."""
        return self.layout.log(name).read_text(errors="replace")

    def metrics_url(self, name: str) -> str:
        """Where a worker or the reconciler shows its metrics."""
        return f"http://127.0.0.1:{self._memory.ports[f'metrics-{name}']}/metrics"

    def new_key(self, owner: str, *scopes: str) -> str:
        """The secret of an API key for an owner, who is made where there is none, as an operator makes them."""
        admin = [sys.executable, "-m", "scripts.admin"]
        environment = {**clean_environment(), **self.environment()}
        subprocess.run(
            [*admin, "create-owner", owner], cwd=REPOSITORY, env=environment, check=True, capture_output=True
        )
        made = subprocess.run(
            [*admin, "create-key", owner, "--name", "test", "--scopes", ",".join(scopes)],
            cwd=REPOSITORY,
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return made.stdout.split()[-1]

    def flush_queue(self) -> None:
        """Make the broker forget everything."""
        with redis.Redis.from_url(self.environment()["AFTERIMAGE_QUEUE__URL"]) as broker:
            broker.flushall()


@contextmanager
def running_stack(
    var: Path, *, environment: Mapping[str, str], options: tuple[str, ...] = (), durable: bool = False
) -> Iterator[RunningStack]:
    """Start `python -m ops.local run` and stop it with SIGTERM, whatever happens in between.

    Args:
        options: more arguments of the command, such as `("--api", "2", "--embed", "2")`.
        durable: Postgres keeps what it has committed even when it is killed; slower.
    """
    with tempfile.TemporaryFile() as output:
        command = subprocess.Popen(
            [
                *(sys.executable, "-m", "ops.local", "run", "--var", str(var)),
                *(() if durable else ("--volatile",)),
                *options,
            ],
            cwd=REPOSITORY,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack = RunningStack(var, command)
        try:
            wait_until(
                lambda: command.poll() is not None or stack.layout.shell_file.exists(),
                timeout_s=START_WAIT_S,
                what="the stack to be ready",
            )
            if command.poll() is not None:
                output.seek(0)
                raise AssertionError(f"the stack did not start:\n{output.read().decode(errors='replace')}")
            yield stack
        finally:
            command.terminate()
            command.wait(STOP_WAIT_S)


def clean_environment() -> dict[str, str]:
    """This process's environment without any setting of the product."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AFTERIMAGE_")}


def wait_until(condition: Callable[[], object], *, timeout_s: float, what: str) -> None:
    """Poll until `condition` is true.

    Raises:
        AssertionError: it was not within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


__all__ = ["RunningStack", "clean_environment", "running_stack", "tail", "wait_until"]
