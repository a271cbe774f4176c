"""The engine of this process and `session_scope`, the only place that commits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import Session, sessionmaker

from shared.errors import DatabaseConnectionError, DatabaseQueryError
from shared.settings import DatabaseSettings, get_settings


def build_engine(settings: DatabaseSettings) -> Engine:
    """An engine with a bounded, pre-pinged, recycled pool; every wait it can cause has a limit."""
    server_settings = {
        "statement_timeout": f"{settings.statement_timeout_s * 1000:.0f}",
        "idle_in_transaction_session_timeout": "60000",
        "timezone": "UTC",
    }
    return create_engine(
        database_url(settings),
        pool_size=settings.pool_size,
        max_overflow=settings.max_overflow,
        pool_timeout=settings.pool_timeout_s,
        pool_recycle=settings.pool_recycle_s,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": settings.connect_timeout_s,
            "application_name": "afterimage",
            "options": " ".join(f"-c {name}={value}" for name, value in server_settings.items()),
            # A peer that vanished without a word is noticed in about 10 s instead of hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )


def database_url(settings: DatabaseSettings) -> URL:
    return make_url(settings.url.get_secret_value())


@cache
def get_engine() -> Engine:
    """The engine of this process. Never used before a fork: every process of the product is started, not forked."""
    return build_engine(get_settings().database)


@cache
def _factory() -> sessionmaker[Session]:
    # Views are built after the commit, from rows already loaded: expiring them would reopen a transaction.
    return sessionmaker(get_engine(), expire_on_commit=False)


@contextmanager
def session_scope() -> Iterator[Session]:
    """One short transaction: commits at the end, rolls back on any exception.

    Raises:
        DatabaseConnectionError: the database cannot be reached or has no free connection.
        DatabaseQueryError: a statement failed for any other reason.
    """
    try:
        with _factory().begin() as session:
            yield session
    except PoolTimeoutError as error:
        raise DatabaseConnectionError from error
    except OperationalError as error:
        raise DatabaseConnectionError from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise DatabaseConnectionError from error
        raise DatabaseQueryError from error
