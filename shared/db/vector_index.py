"""Builds the approximate index of an embedding space again, of another kind or width, while the service runs.

`CREATE INDEX CONCURRENTLY` lets inserts and searches go on. The old index serves until the new one is complete. The
command can be killed at any time: the next run continues.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, NullPool, create_engine, text

from shared.contracts.search_tuning import IndexKind
from shared.db.session import database_url, unbounded_waits
from shared.db.spaces import Space
from shared.settings import DatabaseSettings


def rebuild(
    settings: DatabaseSettings,
    space: Space,
    *,
    kind: IndexKind,
    m: int,
    ef_construction: int,
    memory_mb: int,
    parallel_workers: int,
) -> None:
    """Build the index, let searches use it, and drop the old one.

    Args:
        m: neighbours per vector in the graph. ef_construction: candidates per insert. Both as in pgvector.
        memory_mb: the graph is built in this much memory of the server. With less than it needs, it takes far longer.

    Raises:
        SQLAlchemyError: the server refused or lost a statement. The old index is unchanged, or the new one is complete.
    """
    expression, operators = {
        IndexKind.HALFVEC: ("embedding", "halfvec_cosine_ops"),
        IndexKind.BIT: (f"(binary_quantize(embedding)::bit({space.dim}))", "bit_hamming_ops"),
    }[kind]
    index = f"ix_{space.table.name}_embedding"
    new = f"{index}_new"
    with _patient_connection(settings) as connection:
        connection.execute(text(f"set maintenance_work_mem = '{memory_mb:d}MB'"))
        connection.execute(text(f"set max_parallel_maintenance_workers = {parallel_workers:d}"))
        # A killed run left an index whose build has not ended, or a complete one beside the old one.
        definition = connection.scalar(
            text(
                "select pg_get_indexdef(indexrelid) from pg_index where indexrelid = to_regclass(:new) and indisvalid"
            ),
            {"new": new},
        )
        if definition is not None:
            _swap(connection, space, kind=IndexKind.BIT if "bit_hamming_ops" in definition else IndexKind.HALFVEC)
        connection.execute(text(f"drop index concurrently if exists {new}"))
        connection.execute(
            text(
                f"create index concurrently {new} on {space.table.name} using hnsw ({expression} {operators}) "
                f"with (m = {m:d}, ef_construction = {ef_construction:d})"
            )
        )
        _swap(connection, space, kind=kind)


def _swap(connection: Connection, space: Space, *, kind: IndexKind) -> None:
    """Put the new index, which is complete, in the place of the old one. Each statement may be repeated."""
    index = f"ix_{space.table.name}_embedding"
    connection.execute(
        text("update embedding_spaces set index_kind = :kind, search_tuning = null where id = :id"),
        {"kind": kind.value, "id": space.id},
    )
    connection.execute(text(f"drop index concurrently if exists {index}"))
    connection.execute(text(f"alter index {index}_new rename to {index}"))


@contextmanager
def _patient_connection(settings: DatabaseSettings) -> Iterator[Connection]:
    """A connection that commits each statement, and waits for it without limit."""
    engine = create_engine(
        database_url(settings),
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"application_name": "afterimage rebuild-index"},
    )
    with unbounded_waits(), engine.connect() as connection:
        yield connection
