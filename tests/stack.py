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
from pydantic import SecretStr
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY, LocalStack, tail
from shared.db import keys, owners
from shared.db.session import build_engine
from shared.settings import DatabaseSettings

START_WAIT_S = 240
STOP_WAIT_S = 60


class RunningStack(LocalStack):
    """A running stack, and the command that runs it.

    `url` is the API's address; `control` kills, freezes, thaws and restarts processes by name.
    """

    def __init__(self, var: Path, command: "subprocess.Popen[bytes]", settings: Mapping[str, str]) -> None:
        super().__init__(var)
        self.command = command
        self._settings = settings

    def environment(self) -> dict[str, str]:
        return super().environment() | dict(self._settings)

    def log(self, name: str) -> str:
        """Everything a process has printed so far."""
        return self.layout.log(name).read_text(errors="replace")

    def metrics_url(self, name: str) -> str:
        """The URL of the metrics of a worker or the reconciler."""
        return f"http://127.0.0.1:{self._state.ports[f'metrics-{name}']}/metrics"

    def new_key(self, owner: str, *scopes: str) -> str:
        """Create an API key, and its owner if absent. Return the secret of the key."""
        engine = build_engine(DatabaseSettings(url=SecretStr(self.environment()["AFTERIMAGE_DATABASE__URL"])))
        with Session(engine) as session, session.begin():
            _, secret = keys.create(session, owners.ensure(session, owner), name="test", scopes=frozenset(scopes))
        engine.dispose()
        return secret

    @contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        """Freeze these processes until the block ends. A frozen worker keeps its models, unlike a stopped one."""
        try:
            for name in names:
                self.control.freeze(name)
            yield
        finally:
            for name in names:
                self.control.thaw(name)

    def flush_queue(self) -> None:
        """Delete everything in the broker."""
        with redis.Redis.from_url(self.environment()["AFTERIMAGE_QUEUE__URL"]) as broker:
            broker.flushall()


@contextmanager
def running_stack(
    var: Path,
    *,
    environment: Mapping[str, str],
    options: tuple[str, ...] = (),
    settings: Mapping[str, str] | None = None,
    durable: bool = False,
) -> Iterator[RunningStack]:
    """Start `python -m ops.local run` and stop it with SIGTERM at the end, also after an error.

    Args:
        options: more arguments of the command, such as `("--api", "2", "--embed", "2")`.
        settings: variables of the product's processes, which win, such as the address of a connection pooler.
        durable: Postgres keeps committed data even when it is killed, but is slower.
    """
    settings = settings or {}
    chosen = [word for name, value in settings.items() for word in ("--setting", f"{name}={value}")]
    with tempfile.TemporaryFile() as output:
        command = subprocess.Popen(
            [
                *(sys.executable, "-m", "ops.local", "run", "--var", str(var)),
                *(() if durable else ("--volatile",)),
                *options,
                *chosen,
            ],
            cwd=REPOSITORY,
            env={**clean_environment(), **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        stack = RunningStack(var, command, settings)
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
        AssertionError: `condition` is still false after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


__all__ = ["RunningStack", "clean_environment", "running_stack", "tail", "wait_until"]
