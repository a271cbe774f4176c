"""The migrations: upgrade from empty, downgrade to empty, and the same tables as in `shared.db.tables`."""

from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, inspect, make_url
from sqlalchemy.orm import Session

from ops.local.stack import LocalStack
from shared.db import spaces
from shared.db.tables import Base

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty_database_url(servers: LocalStack) -> Iterator[str]:
    server = make_url(servers.environment()["AFTERIMAGE_DATABASE__URL"])
    admin = psycopg2.connect(
        host=server.host, port=server.port, user=server.username, password=server.password, dbname="postgres"
    )
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute("create database migrations_test")
        yield server.set(database="migrations_test").render_as_string(hide_password=False)
        cursor.execute("drop database migrations_test with (force)")
    admin.close()


def alembic(url: str) -> Config:
    config = Config(REPOSITORY / "alembic.ini")
    config.cmd_opts = None
    config.attributes["url"] = url
    return config


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    try:
        return set(inspect(engine).get_table_names())
    finally:
        engine.dispose()


def test_upgrade_from_empty_and_downgrade_to_empty(empty_database_url: str) -> None:
    config = alembic(empty_database_url)
    command.upgrade(config, "head")
    assert tables(empty_database_url) == {*Base.metadata.tables, "alembic_version"}
    engine = create_engine(empty_database_url)
    with Session(engine) as session, session.begin():
        spaces.ensure(session, digest="d", model="m", dim=8)
    engine.dispose()
    command.downgrade(config, "base")
    assert tables(empty_database_url) == {"alembic_version"}
    command.upgrade(config, "head")


def test_migrations_create_the_declared_tables_also_with_a_vector_table(empty_database_url: str) -> None:
    config = alembic(empty_database_url)
    command.upgrade(config, "head")
    engine = create_engine(empty_database_url)
    with Session(engine) as session, session.begin():
        spaces.ensure(session, digest="d", model="m", dim=8)
    engine.dispose()
    command.check(config)  # raises when autogenerate would change anything
