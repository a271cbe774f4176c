"""Alembic environment: the database of the product's settings, one transaction per migration, one run at a time."""

import operator
from typing import Any

from alembic import command, context
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, NullPool, create_engine, text
from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

from shared.db.session import database_url
from shared.db.tables import Base
from shared.settings import get_settings

LOCK = 7_046_029_254_386_353_131
"""Key of the advisory lock that serialises concurrent upgrades; an arbitrary constant."""

OTHER_UPGRADE_S = 600
"""How long an upgrade waits for another one."""

SERVER_SETTINGS = (
    "-c lock_timeout=5000"
    # The server ends a frozen upgrade, which would keep tables, and every other upgrade, locked.
    " -c idle_in_transaction_session_timeout=10000 -c idle_session_timeout=10000"
)


def include_object(_object: Any, name: str | None, type_: str, _reflected: bool, _compare_to: Any) -> bool:
    """Exclude vector tables: the service creates them per embedding space, so autogenerate must not drop them."""
    return not (type_ == "table" and name is not None and name.startswith("vectors_"))


def run() -> None:
    url = context.config.attributes.get("url") or database_url(get_settings().database)
    engine = create_engine(url, poolclass=NullPool, connect_args={"options": SERVER_SETTINGS})
    with engine.connect() as connection:
        _check_encoding(connection)
        _take_lock(connection)
        if _upgrades() and (newer := _unknown_revision(connection)):
            # The processes of this release run on it: each migration is compatible with the release before it.
            context.config.print_stdout("The schema %s is of a newer release. The upgrade changes nothing.", newer)
            return
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            include_object=include_object,
            transaction_per_migration=True,
            compare_server_default=True,
        )
        with context.begin_transaction():
            context.run_migrations()
        connection.execute(text("select pg_advisory_unlock(:lock)"), {"lock": LOCK})
        connection.commit()
    engine.dispose()


def _check_encoding(connection: Connection) -> None:
    """Refuse a database that cannot store every text, or stores it without a check."""
    with connection.begin():
        encoding = connection.scalar(text("show server_encoding"))
    if encoding != "UTF8":
        raise SystemExit(f"The encoding of the database is {encoding}. Create it with the encoding UTF8.")


def _upgrades() -> bool:
    """Whether this is `alembic upgrade`, by command."""
    run = getattr(context.config.cmd_opts, "cmd", None)
    return run is not None and run[0] is command.upgrade


def _unknown_revision(connection: Connection) -> str | None:
    """The revision of the database, if this release does not have its migration."""
    with connection.begin():
        current = MigrationContext.configure(connection).get_current_revision()
    scripts = ScriptDirectory.from_config(context.config)
    known = {script.revision for script in scripts.walk_revisions()}
    return current if current is not None and current not in known else None


def _take_lock(connection: Connection) -> None:
    """Wait until no other upgrade runs.

    Each try is a transaction of its own. The other upgrade may build an index concurrently, and that waits for every
    open transaction.
    """
    tries = Retrying(retry=retry_if_result(operator.not_), wait=wait_fixed(0.2), stop=stop_after_delay(OTHER_UPGRADE_S))

    def taken() -> bool:
        with connection.begin():
            return bool(connection.scalar(text("select pg_try_advisory_lock(:lock)"), {"lock": LOCK}))

    tries(taken)


if context.is_offline_mode():
    raise SystemExit("offline migrations are not supported: connect to a database")
run()
