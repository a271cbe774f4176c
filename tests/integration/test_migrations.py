"""The migrations: upgrade from empty, downgrade to empty, and the same tables as in `shared.db.tables`."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psycopg2
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, make_url, text
from sqlalchemy.orm import Session

from ops.local.stack import LocalStack
from shared.db import collections, keys, owners, spaces
from shared.db.tables import Base
from shared.settings import get_settings
from tests.factories import make_image, make_job
from tests.integration.test_jobs import an_output

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def empty_database_url(servers: LocalStack) -> Iterator[str]:
    with new_database(servers) as url:
        yield url


@contextmanager
def new_database(servers: LocalStack, options: str = "") -> Iterator[str]:
    server = make_url(servers.environment()["AFTERIMAGE_DATABASE__URL"])
    admin = psycopg2.connect(
        host=server.host, port=server.port, user=server.username, password=server.password, dbname="postgres"
    )
    admin.autocommit = True
    with admin.cursor() as cursor:
        cursor.execute(f"create database migrations_test {options}")
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


def test_texts_that_filters_compare_are_composed_by_the_upgrade(empty_database_url: str) -> None:
    config = alembic(empty_database_url)
    command.upgrade(config, "0007")
    engine = create_engine(empty_database_url)
    one, two = "caf\u00e9", "cafe\u0301"
    with engine.begin() as connection:
        collection = connection.scalar(text("select id from collections where shared"))
        for number, (tags, word) in enumerate([([two, "b"], two), ([], "plain"), ([one], one), ([], two)]):
            connection.execute(
                text(
                    "insert into images (id, collection_id, sha256, blob_key, thumbnail_key, format, width, height, "
                    "size_bytes, perceptual_hash, tags, source, licence, attributes) values (gen_random_uuid(), "
                    ":collection, :sha256, '', '', 'png', 1, 1, 1, 0, :tags, :word, null, "
                    "jsonb_build_object(:word, :word))"
                ),
                {"collection": collection, "sha256": str(number), "tags": tags, "word": word},
            )
        before = connection.scalar(text("select version from collections where id = :id"), {"id": collection})
    command.upgrade(config, "head")
    with engine.begin() as connection:
        rows = connection.execute(text("select tags, source, licence, attributes from images order by sha256")).all()
        after = connection.scalar(text("select version from collections where id = :id"), {"id": collection})
    engine.dispose()
    assert [tuple(row) for row in rows] == [
        ([one, "b"], one, None, {one: one}),
        ([], "plain", None, {"plain": "plain"}),
        ([one], one, None, {one: one}),
        ([], one, None, {one: one}),
    ]
    assert after == before + 1


INSERT_AS_BEFORE_0010 = text("""
    insert into images (id, collection_id, sha256, blob_key, thumbnail_key, format, width, height, size_bytes,
        perceptual_hash, caption, tags)
    select gen_random_uuid(), id, :sha256, '', '', 'png', 1, 1, 1, 0, :caption, :tags from collections where shared
""")


def test_words_of_old_images_and_of_those_of_the_previous_release_are_filled(empty_database_url: str) -> None:
    config = alembic(empty_database_url)
    command.upgrade(config, "0009")
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        for number in range(2500):
            row = {"sha256": str(number), "caption": f"{number} dogs", "tags": ["pets"]}
            connection.execute(INSERT_AS_BEFORE_0010, row)
        connection.execute(INSERT_AS_BEFORE_0010, {"sha256": "none", "caption": None, "tags": []})
    command.upgrade(config, "0010")
    with engine.begin() as connection:
        connection.execute(INSERT_AS_BEFORE_0010, {"sha256": "later", "caption": "a dog", "tags": []})
        found = connection.scalar(text("select count(*) from images where words @@ 'dog:A' and words @@ 'pet:B'"))
        assert found == 2500
        assert connection.scalar(text("select words = '' from images where sha256 = 'none'"))
        assert connection.scalar(text("select words @@ 'dog' from images where sha256 = 'later'"))
        assert connection.scalar(
            text("select indisvalid from pg_index where indexrelid = cast('ix_images_words' as regclass)")
        )
    engine.dispose()
    command.downgrade(config, "0009")
    command.upgrade(config, "head")


def test_an_upgrade_names_an_unknown_text_language(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__TEXT_LANGUAGE", "klingon")
    get_settings.cache_clear()
    with pytest.raises(SystemExit, match=r"^retrieval.text_language: .* 'klingon' \(AFTERIMAGE_RETRIEVAL__TEXT_L"):
        command.upgrade(alembic(empty_database_url), "head")
    monkeypatch.delenv("AFTERIMAGE_RETRIEVAL__TEXT_LANGUAGE")
    get_settings.cache_clear()
    command.upgrade(alembic(empty_database_url), "head")


def test_two_upgrades_at_once_both_end(empty_database_url: str) -> None:
    """The second waits without a transaction, for which the first one's concurrent index would wait."""
    environment = {**os.environ, "AFTERIMAGE_DATABASE__URL": empty_database_url}
    upgrade = [sys.executable, "-m", "alembic", "upgrade", "head"]
    processes = [subprocess.Popen(upgrade, cwd=REPOSITORY, env=environment) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]


Rows = dict[str, list[dict[str, Any]]]


def all_rows(url: str) -> Rows:
    """Every row of every table, by the names of its columns, in an order that does not depend on the columns."""
    engine = create_engine(url)
    with engine.connect() as connection:
        names = [name for name in inspect(connection).get_table_names() if name != "alembic_version"]
        rows = {
            name: [dict(row) for row in connection.execute(text(f"select * from {name}")).mappings()] for name in names
        }
    engine.dispose()
    return {name: sorted(found, key=lambda row: str(row.get("id", row))) for name, found in rows.items()}


def fill(url: str) -> None:
    """Put a row into most tables, through the code of this release."""
    engine = create_engine(url)
    with Session(engine) as session, session.begin():
        owner = owners.ensure(session, "team")
        keys.create(session, owner, name="first", scopes=frozenset({"search"}))
        mine = collections.ensure(session, "mine", owner_id=owner)
        make_image(session, vector=np.ones(16), caption="two dogs", tags=["pets"], collection_id=mine.id)
        job = make_job(session)
        stored = an_output(job)
        session.add(stored.output)
        session.flush()
        session.add_all(stored.references)
    engine.dispose()


def test_a_release_can_be_rolled_back_with_its_data_and_upgraded_again(empty_database_url: str) -> None:
    """Each migration is taken back. The rows stay, apart from columns and tables of the migrations taken back."""
    config = alembic(empty_database_url)
    command.upgrade(config, "head")
    fill(empty_database_url)
    scripts = ScriptDirectory.from_config(config)
    for script in list(scripts.walk_revisions())[:-1]:
        assert isinstance(script.down_revision, str)
        before = all_rows(empty_database_url)
        command.downgrade(config, script.down_revision)
        after = all_rows(empty_database_url)
        for table, rows in after.items():
            assert len(rows) == len(before[table]), (script.revision, table)
            for row, old in zip(rows, before[table], strict=True):
                assert row == {name: value for name, value in old.items() if name in row}, (script.revision, table)
        command.upgrade(config, script.revision)
        command.downgrade(config, script.down_revision)
    assert len(all_rows(empty_database_url)["generations"]) == 1
    command.upgrade(config, "head")
    command.check(config)
    again = all_rows(empty_database_url)
    assert [row["caption"] for row in again["images"]] == ["two dogs"]
    assert len(again["vectors_1"]) == 1


def upgrade_by_command(url: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"],
        cwd=REPOSITORY,
        env={**os.environ, "AFTERIMAGE_DATABASE__URL": url},
        capture_output=True,
        text=True,
    )


def test_an_earlier_release_starts_on_the_schema_of_a_newer_one(empty_database_url: str) -> None:
    command.upgrade(alembic(empty_database_url), "head")
    engine = create_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    done = upgrade_by_command(empty_database_url)
    assert done.returncode == 0, done.stderr
    assert "The schema 9999 is of a newer release" in done.stdout
    with engine.begin() as connection:
        assert connection.scalar(text("select version_num from alembic_version")) == "9999"
    engine.dispose()


def test_a_database_that_does_not_store_utf8_is_refused(servers: LocalStack) -> None:
    with new_database(servers, "encoding 'SQL_ASCII' locale 'C' template template0") as url:
        done = upgrade_by_command(url)
        assert done.returncode == 1
        assert done.stderr.strip() == ("The encoding of the database is SQL_ASCII. Create it with the encoding UTF8.")
        assert tables(url) == set()
