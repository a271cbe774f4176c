"""Alembic environment: the database of the product's settings, one transaction per migration, one run at a time."""

from typing import Any

from alembic import context
from sqlalchemy import NullPool, create_engine, text

from shared.db.session import database_url
from shared.db.tables import Base
from shared.settings import get_settings

LOCK = 7_046_029_254_386_353_131
"""Key of the advisory lock that serialises concurrent upgrades; an arbitrary constant."""

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
        connection.execute(text("set local lock_timeout = 60000"))  # another upgrade may take that long
        connection.execute(text("select pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
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


if context.is_offline_mode():
    raise SystemExit("offline migrations are not supported: connect to a database")
run()
