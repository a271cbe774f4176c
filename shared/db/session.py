"""The engine of this process and `session_scope`, the only place that commits."""

import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psycopg2
from psycopg2 import extensions
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError, ResourceClosedError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from shared.errors import DatabaseConflictError, DatabaseConnectionError, DatabaseError, DatabaseQueryError
from shared.metrics import observe_database
from shared.settings import DatabaseSettings, get_settings
from shared.singleton import process_singleton

IDLE_LIMIT_S = 5
"""The server ends a transaction that runs no statement so long: its process is frozen, and others need its locks."""


def build_engine(settings: DatabaseSettings) -> Engine:
    """An engine with a bounded pool. Its connections are checked before use and recycled. Every wait has a timeout."""
    server_settings = {
        "statement_timeout": f"{settings.statement_timeout_s * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{IDLE_LIMIT_S * 1000}",
        # A frozen client may also stop reading a large result, and a vanished one never confirms it.
        "tcp_user_timeout": f"{IDLE_LIMIT_S * 1000}",
        "timezone": "UTC",
    }
    engine = create_engine(
        database_url(settings),
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout_s,
        pool_recycle=settings.pool_recycle_s,
        connect_args={
            "connect_timeout": settings.connect_timeout_s,
            "application_name": "afterimage",
            "options": " ".join(f"-c {name}={value}" for name, value in server_settings.items()),
            # A server that vanished without closing the connection is noticed in about 10 s instead of hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
    event.listen(engine, "checkout", _refuse_closed)
    return engine


def _refuse_closed(connection: Any, _record: object, _proxy: object) -> None:
    """Make the pool replace a connection that the server has closed.

    A ping costs every transaction a round trip. The socket of an idle connection has something to read only when the
    server closed it, or sent its last message before that. A server that vanished silently is the case of keepalives.
    """
    idle = select.poll()
    idle.register(connection.fileno(), select.POLLIN)
    if idle.poll(0):
        raise DisconnectionError


def database_url(settings: DatabaseSettings) -> URL:
    return make_url(settings.url.get_secret_value())


IDLE_IN_TRANSACTION = "25P03"
"""The error code of a statement in a transaction that the server has ended after `IDLE_LIMIT_S`."""
CONFLICTS = {"40001", "40P01", "55P03"}
"""The error codes of a serialization failure, a deadlock, and a lock that was not free in time."""
DROPPED_VECTORS = "42P01", 'relation "vectors_'
"""The error code and a part of the server's message for a table of vectors that an operator has dropped."""
QUERY_CANCELED, TOO_MANY_CONNECTIONS = "57014", "53300"
CONNECTION_LOST = ("08", "57P")
"""Beginnings of the error codes when the connection fails, or when the server stops."""
NO_CONNECTION = "The database has no free connection."
REFUSED_CONNECTIONS = ("too many clients", "too many connections", "remaining connection slots")
"""Parts of the server's message when it refuses a connection. psycopg2 gives no error code then."""


class BoundedWait:
    """A wait callback for psycopg2 that raises when the server sends nothing for `limit_s`.

    No timeout of libpq covers a frozen server, because its kernel still acknowledges the packets that it receives.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._thread = threading.local()

    def __call__(self, connection: Any) -> None:
        until = getattr(self._thread, "until", None) or time.monotonic() + self._limit_s
        while (state := connection.poll()) != extensions.POLL_OK:
            socket = select.poll()
            socket.register(connection.fileno(), select.POLLIN if state == extensions.POLL_READ else select.POLLOUT)
            if not socket.poll(max(until - time.monotonic(), 0) * 1000):
                raise psycopg2.OperationalError("the database does not answer")

    @contextmanager
    def connecting(self) -> Iterator[None]:
        """Apply one limit to the whole block, in this thread: waiting for a connection, checking and replacing it."""
        self._thread.until = time.monotonic() + self._limit_s
        try:
            yield
        finally:
            self._thread.until = None


def bound_waits(limit_s: float) -> BoundedWait:
    """Bound every wait for the database in this process: psycopg2 has one wait callback per process."""
    wait = BoundedWait(limit_s)
    extensions.set_wait_callback(wait)
    return wait


@contextmanager
def unbounded_waits() -> Iterator[None]:
    """Let the statements of this process take any time in the block, and let it use COPY. For commands alone."""
    callback = extensions.get_wait_callback()
    extensions.set_wait_callback(None)
    try:
        yield
    finally:
        extensions.set_wait_callback(callback)


def _bounded_wait() -> BoundedWait:
    installed = extensions.get_wait_callback()
    return (
        installed
        if isinstance(installed, BoundedWait)
        else bound_waits(get_settings().database.statement_timeout_s + 2)
    )


@process_singleton
def get_engine() -> Engine:
    """The engine of this process. Processes of the product are spawned, not forked, so no two share a connection."""
    engine = build_engine(get_settings().database)
    observe_database(engine)
    return engine


@process_singleton
def _factory() -> sessionmaker[Session]:
    # Responses are built from the loaded rows after the commit. Expired rows would open another transaction then.
    return sessionmaker(get_engine(), expire_on_commit=False)


@contextmanager
def session_scope(*, single_read: bool = False) -> Iterator[Session]:
    """One short transaction: commits at the end, rolls back on any exception.

    single_read: the block reads with one statement, which then needs neither BEGIN nor COMMIT: two round trips less.

    Raises:
        DatabaseConflictError: another transaction has locked or changed the same rows.
        DatabaseConnectionError: the database cannot be reached, has no free connection, or took too long.
        DatabaseQueryError: a statement failed for any other reason.
    """
    try:
        with _factory().begin() as session:
            with _bounded_wait().connecting():
                connection = _connect(session)
            with _without_transaction(connection) if single_read else nullcontext():
                yield session
    except PoolTimeoutError as error:
        raise DatabaseConnectionError(NO_CONNECTION) from error
    except DBAPIError as error:
        raise _named(error) from error
    except psycopg2.Error as error:  # outside of a statement, where SQLAlchemy does not wrap it
        raise DatabaseConnectionError from error


def _connect(session: Session) -> Any:
    """The connection of psycopg2 that the session uses."""
    try:
        return session.connection().connection.driver_connection
    except ResourceClosedError as error:  # the process stalled, and the server ended the new connection meanwhile
        raise DatabaseConnectionError from error


@contextmanager
def _without_transaction(connection: Any) -> Iterator[None]:
    """Let psycopg2 send no BEGIN before the statements in the block.

    SQLAlchemy's own option sends a ROLLBACK when it gives the connection back. If that fails, the pool loses the
    connection's place for ever.
    """
    connection.autocommit = True
    try:
        yield
    finally:
        with suppress(psycopg2.InterfaceError):  # it is closed
            connection.autocommit = False


def _named(error: DBAPIError) -> DatabaseError:
    """The error of the product for an error of the driver. It names the cause."""
    code = getattr(error.orig, "pgcode", None)
    if code in CONFLICTS or (code == DROPPED_VECTORS[0] and DROPPED_VECTORS[1] in str(error.orig)):
        return DatabaseConflictError()
    if code == QUERY_CANCELED:
        return DatabaseConnectionError("A database statement took too long.")
    if code == TOO_MANY_CONNECTIONS or any(part in str(error.orig) for part in REFUSED_CONNECTIONS):
        return DatabaseConnectionError(NO_CONNECTION)
    if code == IDLE_IN_TRANSACTION:
        return DatabaseConnectionError("The database ended a transaction that ran no statement for too long.")
    if isinstance(error, OperationalError) and code is not None and not code.startswith(CONNECTION_LOST):
        return DatabaseConnectionError(f"The database could not execute a statement: error code {code}.")
    if isinstance(error, OperationalError) or error.connection_invalidated:
        return DatabaseConnectionError()
    return DatabaseQueryError()
