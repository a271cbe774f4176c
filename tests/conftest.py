"""Fixtures for all tests: real servers, an empty migrated database for each test, and whole stacks.

Servers start when the first test needs them. Each test with `postgres_url` gets a copy of one migrated database. A copy
takes about 10 ms. So the code under test commits as it does in production.
"""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import _lru_cache_wrapper
from itertools import count
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

import psutil
import psycopg2
import pytest
import redis
from hypothesis import settings as hypothesis_settings
from sqlalchemy import URL, event, make_url
from sqlalchemy.orm import Session

from ops.local.stack import DATABASE, LocalStack
from shared.db.session import build_engine, get_engine, unbounded_waits
from shared.messaging import queue
from shared.messaging.coalesce import close_notifiers
from shared.settings import Settings, get_settings
from shared.singleton import process_singleton
from tests.stack import RunningStack, running_stack

LEAST_MEMORY_BYTES = 2**30
"""Free memory for the data of the servers. `make test` uses an eighth of it."""

_copies = count(1)

# Property tests take the number of their examples from these profiles. `make test-all` runs them again with `full`.
hypothesis_settings.register_profile("quick", max_examples=20, stateful_step_count=30, deadline=None)
hypothesis_settings.register_profile("full", max_examples=300, stateful_step_count=30, deadline=None)
hypothesis_settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run quick tests first: a mistake shows in seconds, and whole stacks do not idle beside the rest of the run."""
    folders = ["unit", "integration"]
    items.sort(key=lambda item: folders.index(item.path.parent.name) if item.path.parent.name in folders else 2)


def pytest_collection_finish() -> None:
    """Keep the imported libraries out of every later garbage collection, which then takes a tenth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Postgres with a migrated database, and two Valkeys. `servers.control` kills, freezes and thaws them."""
    with _folder_in_memory() as in_memory:
        stack = LocalStack(in_memory or tmp_path_factory.mktemp("servers"))
        stack.start(servers_only=True, durable=False, attached=True)
        try:
            stack.migrate()
            yield stack
        finally:
            stack.stop()


@contextmanager
def _folder_in_memory() -> Iterator[Path | None]:
    """A folder in memory, where copying a database takes a third of the time; None without room for it."""
    parent = Path("/dev/shm")
    if not parent.is_dir() or not os.access(parent, os.W_OK) or disk_usage(parent).free < LEAST_MEMORY_BYTES:
        yield None
        return
    for folder in parent.glob("afterimage-tests-*"):
        if not psutil.pid_exists(int(folder.name.rpartition("-")[2])):
            rmtree(folder, ignore_errors=True)  # of a killed run
    folder = parent / f"afterimage-tests-{os.getpid()}"
    folder.mkdir(mode=0o700)
    yield folder
    rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(servers: LocalStack) -> Iterator[str]:
    """The SQLAlchemy URL of an empty, migrated database that only this test uses."""
    with fresh_database(servers) as url:
        yield url


@contextmanager
def fresh_database(servers: LocalStack) -> Iterator[str]:
    """The SQLAlchemy URL of one more empty, migrated database."""
    template = make_url(servers.environment()["AFTERIMAGE_DATABASE__URL"])
    name = f"test_{next(_copies)}"
    _administer(template, f"CREATE DATABASE {name} TEMPLATE {DATABASE} STRATEGY FILE_COPY")
    yield template.set(database=name).render_as_string(hide_password=False)
    _administer(template, f"DROP DATABASE {name} WITH (FORCE)")


def _administer(server: URL, statement: str) -> None:
    # The API limits the time of a statement in its process. A copy of a database may take longer. A connection for
    # each statement: a test may have restarted the server in between.
    with unbounded_waits():
        admin = psycopg2.connect(
            host=server.host, port=server.port, user=server.username, password=server.password, dbname="postgres"
        )
        try:
            admin.autocommit = True
            with admin.cursor() as cursor:
                cursor.execute(statement)
        finally:
            admin.close()


@pytest.fixture
def redis_url(servers: LocalStack) -> str:
    """The URL of the queue's server, empty."""
    return emptied(servers.environment()["AFTERIMAGE_QUEUE__URL"])


@pytest.fixture
def cache_url(servers: LocalStack) -> str:
    """The URL of the cache's server, empty."""
    return emptied(servers.environment()["AFTERIMAGE_CACHE__URL"])


def emptied(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def settings(
    postgres_url: str, redis_url: str, cache_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """The settings of this process for one test: real servers, nothing in them, and the fake generator."""
    with process_settings(monkeypatch, postgres_url, redis_url, cache_url, tmp_path / "blobs") as settings:
        yield settings


@contextmanager
def process_settings(
    patch: pytest.MonkeyPatch, postgres_url: str, redis_url: str, cache_url: str, blobs: Path
) -> Iterator[Settings]:
    """Let this process use these servers and this blob store until the block ends."""
    environment = TEST_ENVIRONMENT | {
        "AFTERIMAGE_DATABASE__URL": postgres_url,
        "AFTERIMAGE_QUEUE__URL": redis_url,
        "AFTERIMAGE_CACHE__URL": cache_url,
        "AFTERIMAGE_STORAGE__URL": f"file://{blobs}",
    }
    for name, value in environment.items():
        patch.setenv(name, value)
    forget_process_resources()
    yield get_settings()
    forget_process_resources()


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    """A session on this test's database. Commit what other sessions (`session_scope`) have to see.

    It may idle in a transaction. The server ends such sessions of the product.
    """
    engine = build_engine(settings.database)
    event.listen(engine, "connect", _allow_idle_transactions)
    with Session(engine, expire_on_commit=False) as session:
        yield session
    engine.dispose()


def _allow_idle_transactions(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("set idle_in_transaction_session_timeout = 0")
    connection.commit()


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The whole local stack with the fake generator, shared by the e2e tests; leave every process running."""
    with running_stack(tmp_path_factory.mktemp("stack"), environment=TEST_ENVIRONMENT) as stack:
        yield stack


@pytest.fixture(scope="session")
def starter_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The stack exactly as `make up` runs it, shared by the tests that need the models that ship."""
    with running_stack(tmp_path_factory.mktemp("starter"), environment={}) as stack:
        yield stack


TEST_ENVIRONMENT = {
    "AFTERIMAGE_ENVIRONMENT": "test",
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake"}}',
    "AFTERIMAGE_MODEL__DEFAULT_GENERATOR": "cheap",
}


def forget_process_resources() -> None:
    """Close and drop the resources that this process has built from its settings, so that new settings apply."""
    close_notifiers()
    if get_engine.cache_info().currsize:
        get_engine().dispose()
    if queue.broker.cache_info().currsize:
        queue.broker().close()
    if queue.celery_app.cache_info().currsize:
        queue.celery_app().close()
    for cached in _cached_functions():
        cached.cache_clear()


def _cached_functions() -> Iterator["_lru_cache_wrapper[Any] | process_singleton[..., Any]"]:
    ours = ("shared.", "api_service.", "worker_service.")
    for name, module in list(sys.modules.items()):
        if name.startswith(ours):
            yield from (
                value for value in vars(module).values() if isinstance(value, _lru_cache_wrapper | process_singleton)
            )
