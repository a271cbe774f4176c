"""The database of the settings: a consistent view of it, `pg_dump` and `pg_restore`."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psycopg2.extensions import make_dsn
from sqlalchemy import Connection, Engine, inspect, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from ops.backup.backup_folder import BackupError
from ops.postgres_programs import program
from shared.db import blobs
from shared.db.session import build_engine, database_url, unbounded_waits
from shared.settings import get_settings

LOCK_WAIT_S = 60
"""Longest wait for a sweeper or another backup."""
LOCK_NOT_AVAILABLE = "55P03"
SCHEMA_REVISION = text("select version_num from alembic_version")


@dataclass(frozen=True)
class Snapshot:
    """The database at one moment. id: `pg_dump` and other sessions read the same moment by it."""

    session: Session
    id: str


@contextmanager
def deletions_paused() -> Iterator[Connection]:
    """Keep the blobs of deleted rows until the block ends. The connection that comes holds the lock.

    Raises:
        BackupError: another backup runs, or the connection was lost in the block.
        DBAPIError: the database cannot be reached.
    """
    with _engine() as engine, engine.connect() as connection:
        holder = connection.execution_options(isolation_level="AUTOCOMMIT")
        holder.execute(text(f"set lock_timeout = '{LOCK_WAIT_S}s'"))
        holder.execute(text("set statement_timeout = 0"))
        try:
            blobs.pause_deletions(holder)
        except DBAPIError as error:
            if getattr(error.orig, "pgcode", None) != LOCK_NOT_AVAILABLE:
                raise
            raise BackupError("Another backup of this database runs.") from error
        yield holder
        try:
            holder.execute(text("select 1"))
        except DBAPIError as error:
            raise BackupError(
                "The connection to the database was lost, so blobs may be missing. Start again."
            ) from error


@contextmanager
def snapshot() -> Iterator[Snapshot]:
    """Read the database as it is now, however long the block takes."""
    with _engine() as engine, engine.connect() as connection:
        connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        for name in ("idle_in_transaction_session_timeout", "statement_timeout"):
            connection.execute(text(f"set {name} = 0"))
        exported = connection.scalar(text("select pg_export_snapshot()"))
        with Session(connection) as session:
            yield Snapshot(session, str(exported))


def count_rows(session: Session) -> dict[str, int]:
    """The number of rows of each table."""
    tables = inspect(session.connection()).get_table_names()
    return {name: int(session.scalar(text(f'select count(*) from "{name}"')) or 0) for name in sorted(tables)}


def is_empty() -> bool:
    """Whether the database has no table."""
    with _engine() as engine:
        return not inspect(engine).get_table_names()


@contextmanager
def open_session() -> Iterator[Session]:
    with _engine() as engine, Session(engine) as session:
        yield session


def dump(target: Path, *, snapshot_id: str, programs: Path | None) -> None:
    """Write the database, as the snapshot sees it, to a file that `load` reads.

    Raises:
        BackupError: `pg_dump` failed.
    """
    options = ("--format=custom", "--no-owner", "--no-privileges", f"--snapshot={snapshot_id}", f"--file={target}")
    _run(program("pg_dump", programs), *options, f"--dbname={_address()}")


def load(source: Path, *, programs: Path | None) -> None:
    """Read a dump into the database, all of it or nothing.

    Raises:
        BackupError: `pg_restore` failed.
    """
    options = ("--no-owner", "--no-privileges", "--single-transaction", "--exit-on-error")
    _run(program("pg_restore", programs), *options, f"--dbname={_address()}", str(source))


def check_dump(source: Path, *, programs: Path | None) -> None:
    """Read the table of contents of a dump.

    Raises:
        BackupError: `pg_restore` cannot read it.
    """
    _run(program("pg_restore", programs), "--list", str(source))


def _run(*command: str) -> None:
    password = database_url(get_settings().database).password
    # In the environment, because every user of the machine sees the arguments of a process.
    environment = os.environ | ({} if password is None else {"PGPASSWORD": str(password)})
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BackupError(f"{command[0]} cannot be started: {error.strerror}.") from error
    if done.returncode:
        raise BackupError(f"{Path(command[0]).name} failed: {done.stderr.strip()}")


def _address() -> str:
    """The connection string without the password."""
    url = database_url(get_settings().database)
    _, options = url.get_dialect()().create_connect_args(url)
    options.pop("password", None)
    return make_dsn(**options)


@contextmanager
def _engine() -> Iterator[Engine]:
    engine = build_engine(get_settings().database)
    with unbounded_waits():
        yield engine
    engine.dispose()
