"""Start and stop a whole stack, in order and with a time limit for every step."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import httpx
import psutil
from pydantic import SecretStr
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from ops.local import postgres, programs, valkey
from ops.local.control import Control
from ops.local.layout import Layout, StackState, write_private
from ops.local.orphans import STACK_VARIABLE, end_orphans
from ops.local.programs import Program
from shared.db import workers
from shared.db.session import build_engine
from shared.settings import DatabaseSettings, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
DATABASE = "afterimage"
SERVER_WAIT_S = 60
MIGRATION_WAIT_S = 120
STOP_WAIT_S = 120


class StackError(Exception):
    """The stack could not be started or stopped; the message shows the end of the log."""


class AlreadyRunningError(StackError):
    """A stack runs in this folder."""


class LocalStack:
    """One stack in one folder: Postgres, two Valkeys, the API, the workers, the reconciler and Flower.

    The constructor changes nothing. Two objects for the same folder control the same stack.
    """

    def __init__(self, var: Path) -> None:
        self.layout = Layout(var)
        self.control = Control(self.layout)
        self._supervisor: subprocess.Popen[bytes] | None = None

    @property
    def is_up(self) -> bool:
        """Whether the stack was started completely and not stopped since."""
        return self.layout.shell_file.exists() and self.control.is_running()

    @property
    def url(self) -> str:
        """Address of the API, without a slash at the end."""
        return self.api_url("api")

    def api_url(self, name: str) -> str:
        """Return the address of one API process: `api`, or `api-2` and so on if several run."""
        return f"http://127.0.0.1:{self._state.ports[name]}"

    @property
    def flower_url(self) -> str:
        return f"http://127.0.0.1:{self._state.ports['flower']}"

    @property
    def flower_login(self) -> tuple[str, str]:
        return "afterimage", self._state.passwords["flower"]

    @property
    def _state(self) -> StackState:
        return StackState.load(self.layout)

    def environment(self) -> dict[str, str]:
        """Return the settings, as environment variables, with which a process uses this stack."""
        state = self._state
        port, password = state.ports, state.passwords
        return {
            "AFTERIMAGE_DATABASE__URL": f"postgresql+psycopg2://{postgres.SUPERUSER}:{password['postgres']}"
            f"@127.0.0.1:{port['postgres']}/{DATABASE}",
            "AFTERIMAGE_QUEUE__URL": valkey.url(port["queue"], password["queue"]),
            "AFTERIMAGE_CACHE__URL": valkey.url(port["cache"], password["cache"]),
            "AFTERIMAGE_STORAGE__URL": self.layout.blobs.as_uri(),
            "AFTERIMAGE_API__HOST": "127.0.0.1",
            "AFTERIMAGE_API__PORT": str(port["api"]),
            "AFTERIMAGE_SECURITY__SIGNING_KEYS": json.dumps([password["signing"]] if "signing" in password else []),
        }

    def start(
        self,
        *,
        durable: bool = True,
        attached: bool = False,
        servers_only: bool = False,
        instances: Mapping[str, int] | None = None,
        worker_module: str = "worker_service",
        settings: Mapping[str, str] | None = None,
        on_message: Callable[[str], None] = print,
    ) -> None:
        """Start all processes and return when they are ready. On failure all of them are stopped.

        Args:
            durable: False is faster, but data may be lost in a power cut; for tests.
            attached: the stack ends when the calling process does, even by SIGKILL (Linux with util-linux).
            servers_only: start only Postgres and the two Valkeys, with an empty database.
            instances: number of `api`, `embed`, `generate` and `io` processes; 1 by default.
            worker_module: runs in place of `worker_service`; for tests that make workers fail from inside.
            settings: more environment variables of the product's processes, which win; for tests.
            on_message: called with each progress message, one line.

        Raises:
            AlreadyRunningError: a stack already runs in this folder.
            StackError: a process did not become ready in time.
            ConfigurationError: the settings are not valid.
        """
        with self._exclusive_lock():
            if self.is_up:
                raise AlreadyRunningError(f"a stack already runs in {self.layout.var}")
            if self.control.is_running():
                on_message("Stopping the processes of an interrupted start ...")
                self._stop()
            self._clear_leftovers(on_message)
            try:
                state = self._state
                state.drop_taken_ports()
                app = (
                    []
                    if servers_only
                    else programs.app(load_settings(), state, instances or {}, worker_module=worker_module)
                )
                app = [replace(each, environment={**each.environment, **(settings or {})}) for each in app]
                self._start_servers(app, state, durable=durable, attached=attached, on_message=on_message)
                if app:
                    self.migrate()
                    self._start_app(app, on_message)
            except BaseException:
                self._stop()
                raise
            exports = self.environment() | {"AFTERIMAGE_URL": self.url}
            write_private(
                self.layout.shell_file, "".join(f"{key}={shlex.quote(value)}\n" for key, value in exports.items())
            )

    def stop(self) -> None:
        """Stop all processes of this folder; without processes it does nothing."""
        with self._exclusive_lock():
            self._stop()

    def wait_until_stopped(self) -> None:
        """Wait until another process stops the stack."""
        with suppress(ConnectionError, FileNotFoundError, psutil.NoSuchProcess):
            psutil.Process(self.control.supervisor_pid()).wait()

    # --- the steps of `start` -----------------------------------------------------------------------------------

    def _clear_leftovers(self, on_message: Callable[[str], None]) -> None:
        orphans = end_orphans(self.layout.var)
        if orphans:
            on_message(f"Ended the processes of a killed supervisor: {', '.join(sorted(orphans))}")
        self._remove_runtime_files()

    def _start_servers(
        self, app: list[Program], state: StackState, *, durable: bool, attached: bool, on_message: Callable[[str], None]
    ) -> None:
        layout = self.layout
        ports = {name: state.port(name) for name in ("postgres", "queue", "cache", "api", "flower")}
        passwords = {name: state.password(name) for name in ("postgres", "queue", "cache", "flower", "signing")}
        state.save(layout)
        postgres.prepare(layout.postgres, port=ports["postgres"], password=passwords["postgres"], durable=durable)
        valkey.prepare(layout.queue, port=ports["queue"], password=passwords["queue"], keeps_data=True)
        valkey.prepare(layout.cache, port=ports["cache"], password=passwords["cache"], keeps_data=False)
        config = programs.supervisor_config(layout, [*programs.servers(layout), *app], folder=str(REPOSITORY))
        write_private(layout.supervisor_config, config)
        on_message("Starting Postgres and two Valkeys ...")
        self._launch_supervisor(attached=attached)
        self.control.start_group("servers")
        self._wait_for("postgres", partial(postgres.is_ready, ports["postgres"], passwords["postgres"]), SERVER_WAIT_S)
        for name in ("queue", "cache"):
            self._wait_for(name, partial(valkey.is_ready, ports[name], passwords[name]), SERVER_WAIT_S)
        postgres.ensure_database(ports["postgres"], passwords["postgres"], DATABASE)

    def _launch_supervisor(self, *, attached: bool) -> None:
        command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(self.layout.supervisor_config)]
        if attached:
            command.append("--nodaemon")
            if shutil.which("setpriv"):
                # The kernel signals supervisor when its parent exits, so `kill -9` of a test run also ends the stack.
                command = ["setpriv", "--pdeathsig", "TERM", "--", *command]
        log = self.layout.log("supervisord-start")
        with log.open("w") as output:
            supervisor = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=os.environ | self.environment() | {STACK_VARIABLE: str(self.layout.var)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C must not reach supervisor: this process stops the stack in order
            )
        deadline = time.monotonic() + SERVER_WAIT_S
        while not self.control.is_running():
            if supervisor.poll() not in (None, 0) or time.monotonic() > deadline:
                raise StackError(f"supervisor did not start:\n{tail(log)}")
            time.sleep(0.02)
        if attached:
            self._supervisor = supervisor
        else:
            supervisor.wait()  # it has forked into the background

    def migrate(self) -> None:
        """Migrate the database to the newest revision, in a child process.

        Raises:
            StackError: the migrations failed, or took longer than `MIGRATION_WAIT_S`.
        """
        log = self.layout.log("migrate")
        with log.open("w") as output:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "alembic", "upgrade", "head"],
                    cwd=REPOSITORY,
                    env=os.environ | self.environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=MIGRATION_WAIT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise StackError(f"the migrations took longer than {MIGRATION_WAIT_S} s:\n{tail(log)}") from None
        if done.returncode:
            raise StackError(f"the migrations failed:\n{tail(log)}")

    def _start_app(self, app: list[Program], on_message: Callable[[str], None]) -> None:
        database = build_engine(DatabaseSettings(url=SecretStr(self.environment()["AFTERIMAGE_DATABASE__URL"])))
        with Session(database) as session:
            start = session.scalars(select(func.clock_timestamp())).one()
        on_message(f"Starting {', '.join(program.name for program in app)}; loading models takes longest ...")
        self.control.start_group("app")
        for program in app:
            if program.name in self._state.ports and program.name.startswith("api"):
                ready = partial(_responds, f"{self.api_url(program.name)}/api/v1/health/ready")
            elif program.name == "flower":
                ready = partial(_responds, f"{self.flower_url}/healthcheck")
            elif program.serves:
                expected = sum(other.serves == program.serves for other in app)
                ready = partial(_workers_ready, database, program.serves, expected, since=start)
            else:
                continue
            self._wait_for(program.name, ready, program.start_wait_s)
        database.dispose()

    def _wait_for(self, name: str, is_ready: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            state = self.control.states()[name].state
            if state in ("BACKOFF", "FATAL", "EXITED"):
                raise StackError(f"{name} ended while starting:\n{tail(self.layout.log(name))}")
            if time.monotonic() > deadline:
                raise StackError(f"{name} was not ready within {timeout_s:.0f} s:\n{tail(self.layout.log(name))}")
            time.sleep(0.05)

    # --- the end --------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if self.control.is_running():
            pid = self.control.shut_down()
            if not _wait_for_exit(pid, timeout_s=STOP_WAIT_S):
                psutil.Process(pid).kill()
            if self._supervisor is not None:
                self._supervisor.wait()
        end_orphans(self.layout.var)
        self._remove_runtime_files()

    def _remove_runtime_files(self) -> None:
        for file in (self.layout.control_socket(), self.layout.supervisor_pid, self.layout.shell_file):
            file.unlink(missing_ok=True)

    @contextmanager
    def _exclusive_lock(self) -> Iterator[None]:
        """Lock the folder for one start or stop at a time; the kernel releases the lock when the process ends."""
        self.layout.create()
        with self.layout.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def tail(log: Path, lines: int = 25) -> str:
    """Return the end of a log and its path, for an error message."""
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join([*(f"  | {line}" for line in text[-lines:]), f"  (whole log: {log})"])


def _responds(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.TransportError:
        return False


def _workers_ready(database: Engine, serves: tuple[str, str | None], expected: int, *, since: datetime) -> bool:
    """Return whether `expected` workers of a kind are ready. Rows of an earlier, killed stack do not count."""
    with Session(database) as session:
        ready = [w for w in workers.list_live(session) if w.state == "ready" and w.started_at >= since]
    return sum((worker.kind, worker.model) == serves for worker in ready) >= expected


def _wait_for_exit(pid: int, *, timeout_s: float) -> bool:
    try:
        psutil.Process(pid).wait(timeout_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
