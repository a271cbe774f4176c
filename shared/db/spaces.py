"""Embedding spaces: vectors of the same space may be compared, and each space has its own vector table.

One space is active: searches use it unless they name another, and an image is `ready` when it has a vector there. The
worker that starts on an empty database adds the first space. An operator adds every other one, so that a wrong CLIP
cannot join by accident.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pgvector.sqlalchemy import HALFVEC
from sqlalchemy import REAL, Column, ForeignKey, Index, MetaData, Table, delete, func, select, text, update
from sqlalchemy.orm import Session

from shared.db.tables import EmbeddingSpace, Image
from shared.errors import ResourceNotFoundError

SHORT = 12
"""Fewest characters by which a digest is named. Queues and metrics use the first so many."""
DROP_WAIT_S = 2
"""Longest wait for the locks of `drop`, because other statements wait behind it."""


@dataclass(frozen=True)
class Space:
    """One embedding space. digest: of the model, its weights and its preprocessing. dim: components of a vector.

    index_kind, search_tuning: columns of `EmbeddingSpace` when it was read. They say how to search its index.
    """

    id: int
    digest: str
    model: str
    dim: int
    index_kind: str = field(default="halfvec", compare=False)
    search_tuning: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def short(self) -> str:
        """The beginning of the digest that names the space in queues, metrics and logs."""
        return self.digest[:SHORT]

    @property
    def table(self) -> Table:
        return _vector_table(self.id, self.dim)


@lru_cache(maxsize=16)
def _vector_table(space_id: int, dim: int) -> Table:
    metadata = MetaData()
    Table("images", metadata, Column("id", Image.__table__.c.id.type, primary_key=True))
    name = f"vectors_{space_id}"
    return Table(
        name,
        metadata,
        Column("image_id", ForeignKey("images.id", ondelete="CASCADE"), primary_key=True),
        Column("embedding", HALFVEC(dim), nullable=False),  # L2-normalised
        Column("norm", REAL, nullable=False),  # length before normalisation; the adapter uses embedding * norm
        Index(
            f"ix_{name}_embedding",
            "embedding",
            postgresql_using="hnsw",
            postgresql_ops={"embedding": "halfvec_cosine_ops"},
            postgresql_with={"m": 16, "ef_construction": 128},
        ),
    )


def ensure(session: Session, *, digest: str, model: str, dim: int) -> Space:
    """The space with this digest, added with its table if needed. The very first space becomes the active one."""
    _lock(session)
    row = session.scalar(select(EmbeddingSpace).where(EmbeddingSpace.digest == digest))
    if row is None:
        active_exists = session.scalar(select(EmbeddingSpace.id).where(EmbeddingSpace.active)) is not None
        row = EmbeddingSpace(digest=digest, model=model, dim=dim, active=not active_exists)
        session.add(row)
        session.flush()
        _vector_table(row.id, row.dim).create(session.connection(), checkfirst=True)
    return _space(row)


def find_or_add_first(session: Session, *, digest: str, model: str, dim: int) -> Space | None:
    """The space with this digest. The first space of a database is added; None if only other spaces are known."""
    _lock(session)
    known = find(session, digest)
    if known is None and find_active(session) is None:
        return ensure(session, digest=digest, model=model, dim=dim)
    return known


def find(session: Session, digest: str) -> Space | None:
    """The space with this digest."""
    row = session.scalar(select(EmbeddingSpace).where(EmbeddingSpace.digest == digest))
    return _space(row) if row is not None else None


def get(session: Session, name: str) -> Space:
    """The space whose digest begins with `name`, which has at least `SHORT` characters.

    Raises:
        ResourceNotFoundError: no digest begins so, or several do.
    """
    rows = session.scalars(select(EmbeddingSpace).where(EmbeddingSpace.digest.startswith(name, autoescape=True))).all()
    if len(rows) != 1 or len(name) < SHORT:
        raise ResourceNotFoundError("There is no such embedding space.", space=name)
    return _space(rows[0])


def is_active(session: Session, space: Space, *, lock: bool = False) -> bool:
    """Whether searches use this space. lock: the answer holds until the transaction ends."""
    statement = select(EmbeddingSpace.id).where(EmbeddingSpace.active)
    return session.scalar(statement.with_for_update(read=True) if lock else statement) == space.id


def activate(session: Session, space: Space) -> None:
    """Let searches use this space. `space_backlog.activate` also sets the states of the images by it."""
    session.execute(update(EmbeddingSpace).where(EmbeddingSpace.active).values(active=False))
    session.execute(update(EmbeddingSpace).where(EmbeddingSpace.id == space.id).values(active=True))


def drop(session: Session, space: Space) -> None:
    """Delete a space with its vectors. Outputs keep its digest in their record.

    A search that runs in this space may fail with `DatabaseConflictError`.

    Raises:
        ValueError: the space is active.
        DatabaseConflictError: other transactions held the locks for too long.
    """
    _lock(session)
    if is_active(session, space, lock=True):
        raise ValueError("Searches use this embedding space. Activate another one first.")
    # The foreign key of the vectors makes the drop lock `images` too. Every statement behind it would wait as long.
    session.execute(select(func.set_config("lock_timeout", f"{DROP_WAIT_S * 1000}", True)))
    # In the order of searches and workers, which lock the images first.
    session.execute(text("lock table images in access exclusive mode"))
    session.execute(delete(EmbeddingSpace).where(EmbeddingSpace.id == space.id))
    space.table.drop(session.connection(), checkfirst=True)


def find_active(session: Session) -> Space | None:
    """The space that searches use; None before the first worker has registered one."""
    row = session.scalar(select(EmbeddingSpace).where(EmbeddingSpace.active))
    return _space(row) if row is not None else None


def list_all(session: Session) -> list[tuple[Space, bool]]:
    """Every space, and whether it is active."""
    return [(_space(row), row.active) for row in session.scalars(select(EmbeddingSpace).order_by(EmbeddingSpace.id))]


def _lock(session: Session) -> None:
    """Keep two workers that start at once from both adding a space, until the transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended("embedding_spaces", 0))))


def _space(row: EmbeddingSpace) -> Space:
    return Space(
        id=row.id,
        digest=row.digest,
        model=row.model,
        dim=row.dim,
        index_kind=row.index_kind,
        search_tuning=row.search_tuning,
    )
