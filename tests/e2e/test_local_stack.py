"""Processes and folder of the local stack. The other e2e tests show what the service does.

Most of these tests show nothing about the running service, so they are extended. `make test` runs those of start and
stop, data, ports, a killed supervisor, Ctrl-C, passwords, and both kinds of user.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg2
import pytest
import redis

from ops.local import programs
from ops.local.layout import MAX_SOCKET_PATH_BYTES, Layout, StackState
from ops.local.orphans import stack_processes
from ops.local.stack import REPOSITORY, LocalStack, StackError
from shared.messaging.redis import fail_fast
from shared.settings import Settings, WatchdogSettings
from tests.stack import RunningStack, clean_environment, running_stack, wait_until


@pytest.fixture
def servers_stack(tmp_path: Path) -> Iterator[LocalStack]:
    stack = LocalStack(tmp_path / "var")
    stack.start(servers_only=True, durable=False, attached=True)
    yield stack
    stack.stop()


def _write(stack: LocalStack, value: str) -> None:
    with _postgres(stack) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE kept AS SELECT %s AS value", (value,))
    connection.close()
    with redis.Redis.from_url(stack.environment()["AFTERIMAGE_QUEUE__URL"]) as client:
        client.set("kept", value)


def _read(stack: LocalStack) -> tuple[str, bytes]:
    with _postgres(stack) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT value FROM kept")
        (from_postgres,) = cursor.fetchone() or ("",)
    connection.close()
    with redis.Redis.from_url(stack.environment()["AFTERIMAGE_QUEUE__URL"]) as client:
        return from_postgres, client.get("kept")


def _postgres(stack: LocalStack) -> "psycopg2.extensions.connection":
    return psycopg2.connect(stack.environment()["AFTERIMAGE_DATABASE__URL"].replace("+psycopg2", ""))


def _nothing_is_left_of(stack: LocalStack) -> bool:
    return not list(stack_processes(stack.layout.var)) and not stack.layout.control_socket().exists()


def test_data_survives_a_stop_and_a_start_on_the_same_ports(servers_stack: LocalStack) -> None:
    before = servers_stack.environment()
    _write(servers_stack, "still here")
    servers_stack.stop()
    assert _nothing_is_left_of(servers_stack)
    servers_stack.start(servers_only=True, durable=False, attached=True)
    assert servers_stack.environment() == before
    assert _read(servers_stack) == ("still here", b"still here")


@pytest.mark.extended
def test_each_killed_server_is_started_again(servers_stack: LocalStack) -> None:
    for name in ("postgres", "queue", "cache"):
        killed = servers_stack.control.pid(name)
        servers_stack.control.kill(name)
        wait_until(
            lambda name=name, killed=killed: servers_stack.control.pid(name) not in (None, killed),  # type: ignore[misc]
            timeout_s=20,
            what=f"a new {name}",
        )


@pytest.mark.extended
def test_a_frozen_stack_is_stopped_at_once(servers_stack: LocalStack) -> None:
    with closing(_postgres(servers_stack)):
        for name in ("postgres", "queue", "cache"):
            servers_stack.control.freeze(name)
        started = time.monotonic()
        servers_stack.stop()
    assert time.monotonic() - started < 20  # with frozen sessions, the stop of Postgres alone would take 30 s
    assert _nothing_is_left_of(servers_stack)


@pytest.mark.extended
def test_a_stopped_process_cannot_be_frozen(servers_stack: LocalStack) -> None:
    servers_stack.control.stop("cache")
    with pytest.raises(ProcessLookupError):
        servers_stack.control.freeze("cache")


@pytest.mark.extended
def test_a_folder_has_one_stack_at_a_time(servers_stack: LocalStack) -> None:
    with pytest.raises(StackError, match="already runs"):
        LocalStack(servers_stack.layout.var).start(servers_only=True)


@pytest.mark.extended
def test_two_folders_have_stacks_side_by_side(servers_stack: LocalStack, tmp_path: Path) -> None:
    other = LocalStack(tmp_path / "other clone" / "var")
    other.start(servers_only=True, durable=False, attached=True)
    try:
        _write(other, "theirs")
        _write(servers_stack, "ours")
        assert (_read(other)[0], _read(servers_stack)[0]) == ("theirs", "ours")
    finally:
        other.stop()
    assert _read(servers_stack)[0] == "ours"


def test_a_taken_port_is_replaced_at_the_next_start(servers_stack: LocalStack) -> None:
    _write(servers_stack, "moved")
    before = StackState.load(servers_stack.layout).ports
    servers_stack.stop()
    with socket.create_server(("127.0.0.1", before["postgres"])):
        servers_stack.start(servers_only=True, durable=False, attached=True)
        after = StackState.load(servers_stack.layout).ports
    assert after["postgres"] != before["postgres"]
    assert after["queue"] == before["queue"]
    assert _read(servers_stack)[0] == "moved"


def test_the_next_start_ends_the_processes_of_a_killed_supervisor(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "var")
    stack.start(servers_only=True, durable=False)
    _write(stack, "kept through it")
    orphans = [process for process in stack.control.states().values() if process.pid]
    supervisor = psutil.Process(stack.control.supervisor_pid())
    supervisor.kill()
    supervisor.wait(10)
    assert all(psutil.pid_exists(process.pid) for process in orphans if process.pid)
    messages: list[str] = []
    stack.start(servers_only=True, durable=False, attached=True, on_message=messages.append)
    try:
        assert "postgres" in messages[0]
        assert "valkey-server" in messages[0]
        assert _read(stack) == ("kept through it", b"kept through it")
    finally:
        stack.stop()
    assert _nothing_is_left_of(stack)


@pytest.mark.extended
def test_an_interrupted_start_does_not_count_as_running(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "var")
    stack.start(servers_only=True, durable=False)
    stack.layout.shell_file.unlink()  # a start writes this file last, so without it the start was interrupted
    assert not stack.is_up
    stack.start(servers_only=True, durable=False, attached=True)
    try:
        assert stack.is_up
    finally:
        stack.stop()
    assert _nothing_is_left_of(stack)


@pytest.mark.extended
def test_a_stack_whose_folder_was_deleted_can_still_be_stopped(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "var")
    stack.start(servers_only=True, durable=False)
    assert list(stack_processes(stack.layout.var))
    shutil.rmtree(stack.layout.var)
    stack.stop()
    assert _nothing_is_left_of(stack)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)])
def test_interrupting_the_foreground_command_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with running_stack(tmp_path / "var", environment={}, options=("--servers-only",)) as stack:
        stack.command.send_signal(number)
        assert stack.command.wait(30) == 0
        assert _nothing_is_left_of(stack)


@pytest.mark.extended
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="the kernel's parent-death signal is set by setpriv")
def test_killing_the_foreground_command_ends_its_stack(tmp_path: Path) -> None:
    with running_stack(tmp_path / "var", environment={}, options=("--servers-only",)) as stack:
        stack.command.kill()
        wait_until(lambda: _nothing_is_left_of(stack), timeout_s=30, what="the servers to end with their command")


@pytest.mark.extended
def test_a_server_that_does_not_start_is_reported_with_its_log(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "var")
    stack.start(servers_only=True, durable=False, attached=True)
    stack.stop()
    (stack.layout.postgres / "global" / "pg_control").write_bytes(b"not a control file")
    with pytest.raises(StackError, match=r"postgres ended while starting(.|\n)*(FATAL|PANIC)(.|\n)*postgres\.log"):
        stack.start(servers_only=True, durable=False, attached=True)
    assert _nothing_is_left_of(stack)


@pytest.mark.extended
def test_a_large_model_may_load_as_long_as_its_watchdog_permits() -> None:
    settings = Settings(watchdog=WatchdogSettings(load_s=5000, warm_up_s=2000))
    started = programs.app(settings, StackState(), {})
    waits = {program.serves: program.start_wait_s for program in started if program.serves}
    assert waits[("generate", settings.model.default_generator)] == 7000
    assert waits[("embed", None)] == programs.APP_WAIT_S


def test_a_deep_folder_gets_a_control_socket_with_a_short_path(tmp_path: Path) -> None:
    deep = tmp_path / ("a-rather-deep-folder-" * 5) / "var"
    stack = LocalStack(deep)
    assert len(os.fsencode(deep / "supervisor.sock")) > MAX_SOCKET_PATH_BYTES
    stack.start(servers_only=True, durable=False, attached=True)
    try:
        assert len(os.fsencode(stack.layout.control_socket())) <= MAX_SOCKET_PATH_BYTES
        assert {state.state for state in stack.control.states().values()} <= {"STARTING", "RUNNING"}
    finally:
        stack.stop()
    assert _nothing_is_left_of(stack)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can close a folder to an ordinary user and become one")
def test_root_runs_the_stack_in_a_folder_that_only_root_may_enter() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        stack = LocalStack(Path(folder) / "clone" / "var")
        stack.start(servers_only=True, durable=False, attached=True)
        try:
            _write(stack, "as root")
        finally:
            stack.stop()
        assert Path(folder).stat().st_mode & 0o777 == 0o700


@pytest.mark.extended
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="the fallback for root needs setpriv")
def test_root_runs_the_stack_where_user_namespaces_are_forbidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden = tmp_path / "bin" / "unshare"
    forbidden.parent.mkdir()
    forbidden.write_text("#!/bin/sh\nexit 1\n")
    forbidden.chmod(0o755)
    tmp_path.chmod(0o700)
    stack = LocalStack(tmp_path / "var")
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(forbidden.parent), prepend=os.pathsep)
        stack.start(servers_only=True, durable=False, attached=True)
        _write(stack, "by nobody")
        server = psutil.Process(stack.control.pid("postgres"))
        assert server.username() == "nobody"
        stack.stop()
    stack.start(servers_only=True, durable=False, attached=True)
    try:
        assert _read(stack)[0] == "by nobody"
    finally:
        stack.stop()


def _user_nobody_may_run_the_stack() -> bool:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        return False
    tried = subprocess.run(
        _as_user_nobody(sys.executable, "-c", "import ops.local.stack"), cwd="/", capture_output=True
    )
    return tried.returncode == 0


def _as_user_nobody(*command: str) -> list[str]:
    nobody = pwd.getpwnam("nobody")
    return ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups", "--", *command]


@pytest.mark.skipif(not _user_nobody_may_run_the_stack(), reason="needs root, and a checkout that every user may read")
def test_an_ordinary_user_runs_the_stack() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, pwd.getpwnam("nobody").pw_uid, -1)
        var = Path(folder) / "var"
        command = [sys.executable, "-m", "ops.local", "--var", str(var), "--servers-only", "--volatile"]
        environment = {**clean_environment(), "HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        started = subprocess.run(
            _as_user_nobody(*command, "up"), cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert started.returncode == 0, started.stderr
        stack = LocalStack(var)
        try:
            supervisor = psutil.Process(stack.control.supervisor_pid())
            assert {process.uids().real for process in supervisor.children(recursive=True)} == {65534}
        finally:
            stopped = subprocess.run(_as_user_nobody(*command, "down"), cwd=REPOSITORY, env=environment)
        assert stopped.returncode == 0
        assert _nothing_is_left_of(stack)


def test_only_the_user_of_the_stack_may_read_its_passwords(servers: LocalStack) -> None:
    layout: Layout = servers.layout
    secrets = [layout.state_file, layout.shell_file, layout.supervisor_config, layout.queue / "valkey.conf"]
    assert {path.name: path.stat().st_mode & 0o077 for path in secrets} == {path.name: 0 for path in secrets}


def test_each_server_requires_its_password(servers: LocalStack) -> None:
    ports = StackState.load(servers.layout).ports
    with pytest.raises(psycopg2.OperationalError, match="password"):
        psycopg2.connect(host="127.0.0.1", port=ports["postgres"], user="postgres", dbname="postgres")
    with redis.Redis(port=ports["queue"], **fail_fast(1)) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


# --- the whole stack ----------------------------------------------------------------------------------------------

PRODUCT = ["api", "embed", "generate-cheap", "io", "reconciler", "flower"]


@pytest.mark.extended
@pytest.mark.parametrize("name", PRODUCT)
def test_a_killed_process_of_the_product_is_started_again(stack: RunningStack, name: str) -> None:
    killed = stack.control.pid(name)
    stack.control.kill(name)

    def runs_again() -> bool:
        process = stack.control.states()[name]
        return process.state == "RUNNING" and process.pid != killed

    wait_until(runs_again, timeout_s=30, what=f"{name} to run again")


def test_a_killed_api_takes_its_serving_processes_with_it(stack: RunningStack) -> None:
    wait_until(lambda: _status(f"{stack.url}/api/v1/health/live") == 200, timeout_s=30, what="the API")
    serving = psutil.Process(stack.control.pid("api")).children()
    assert serving
    stack.control.kill("api")
    _, alive = psutil.wait_procs(serving, timeout=30)
    assert alive == []
    wait_until(lambda: _status(f"{stack.url}/api/v1/health/live") == 200, timeout_s=30, what="the new API")


def _status(url: str, **options: Any) -> int:
    try:
        return httpx.get(url, timeout=5, **options).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize("name", ["embed", "generate-cheap", "io", "reconciler"])
def test_every_process_without_http_routes_serves_its_metrics(stack: RunningStack, name: str) -> None:
    url = f"http://127.0.0.1:{StackState.load(stack.layout).ports[f'metrics-{name}']}/metrics"
    wait_until(lambda: _status(url) == 200, timeout_s=60, what=f"the metrics of {name}")
    assert "process_cpu_seconds_total" in httpx.get(url).text


def test_flower_requires_its_password_and_controls_nothing(stack: RunningStack) -> None:
    wait_until(lambda: _status(f"{stack.flower_url}/healthcheck") == 200, timeout_s=30, what="flower")
    for path in ("workers", "metrics", "api/tasks", "broker"):
        assert _status(f"{stack.flower_url}/{path}") == 401, path
        assert _status(f"{stack.flower_url}/{path}", auth=("afterimage", "wrong")) == 401, path
    for path in ("workers", "metrics"):
        assert _status(f"{stack.flower_url}/{path}", auth=stack.flower_login) == 200, path
    for action in ("worker/shutdown/anything", "worker/pool/grow/anything", "task/revoke/anything"):
        answer = httpx.post(f"{stack.flower_url}/api/{action}", auth=stack.flower_login)
        assert answer.status_code == 403, action


def test_nothing_listens_beyond_loopback(stack: RunningStack) -> None:
    supervisor = psutil.Process(stack.control.supervisor_pid())
    family = [supervisor, *supervisor.children(recursive=True)]
    listening = [c.laddr.ip for process in family for c in process.net_connections() if c.status == "LISTEN"]
    assert len(listening) >= 6
    assert set(listening) == {"127.0.0.1"}


@pytest.mark.extended
def test_a_command_gets_the_running_stack_in_its_environment_and_leaves_it_running(stack: RunningStack) -> None:
    script = "import os, shared.settings as s; print(os.environ['AFTERIMAGE_URL'], s.get_settings().api.port)"
    command = [sys.executable, "-m", "ops.local", "run", "--var", str(stack.layout.var), "--"]
    done = subprocess.run([*command, sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == [stack.url, stack.url.rpartition(":")[2]]
    failed = subprocess.run([*command, "sh", "-c", "exit 7"], cwd=REPOSITORY)
    assert failed.returncode == 7
    assert stack.control.is_running()


@pytest.mark.extended
def test_a_command_without_a_running_stack_gets_a_temporary_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ops.local", "run", "--var", str(tmp_path), "--servers-only", "--volatile", "--"]
    done = subprocess.run(
        [*command, "sh", "-c", "echo $AFTERIMAGE_QUEUE__URL; exit 7"], cwd=REPOSITORY, capture_output=True
    )
    assert done.returncode == 7
    assert b"redis://" in done.stdout
    assert _nothing_is_left_of(LocalStack(tmp_path))
