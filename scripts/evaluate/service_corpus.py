"""The corpus in a Postgres of its own, so that the parts `gate` and `concepts` run the service's own search."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

from pydantic import SecretStr
from sqlalchemy import Connection, insert, select
from sqlalchemy.orm import Session

from ops.local.stack import LocalStack
from scripts.evaluate.store import Store
from shared.contracts.images import ImageState
from shared.db import spaces
from shared.db.session import build_engine
from shared.db.spaces import Space
from shared.db.tables import Collection, Image
from shared.settings import DatabaseSettings
from worker_service.models.clip import Clip

STATEMENT_TIMEOUT_S = 120.0
ROWS_PER_INSERT = 500


@dataclass(frozen=True)
class ServiceCorpus:
    """The images of a store as rows of the collection that all owners share."""

    session: Session
    space: Space
    collection_id: UUID


@contextmanager
def service_corpus(store: Store, clip: Clip) -> Iterator[ServiceCorpus]:
    """Start a Postgres in a temporary folder, with the images of the store, their words and vectors, until the end.

    Raises:
        StackError: Postgres cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="afterimage-eval-") as folder:
        stack = LocalStack(Path(folder))
        stack.start(servers_only=True, durable=False, attached=True, on_message=lambda _: None)
        try:
            stack.migrate()
            url = SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])
            engine = build_engine(DatabaseSettings(url=url, statement_timeout_s=STATEMENT_TIMEOUT_S))
            try:
                with Session(engine, expire_on_commit=False) as session:
                    yield fill(session, store, clip)
            finally:
                engine.dispose()
        finally:
            stack.stop()


def fill(session: Session, store: Store, clip: Clip) -> ServiceCorpus:
    """Insert the images of a store, with their vectors, into the shared collection of an empty database, and commit."""
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    collection_id = session.scalars(select(Collection.id).where(Collection.shared)).one()
    for start in range(0, len(store.images), ROWS_PER_INSERT):
        _insert(session.connection(), store, slice(start, start + ROWS_PER_INSERT), space, collection_id)
    session.commit()
    return ServiceCorpus(session, space, collection_id)


def _insert(connection: Connection, store: Store, rows: slice, space: Space, collection_id: UUID) -> None:
    images = [
        {
            "id": uuid4(),
            "collection_id": collection_id,
            "state": ImageState.READY,
            "sha256": image.sha256,
            "blob_key": image.sha256,
            "thumbnail_key": image.sha256,
            "format": "png",
            "width": 1,
            "height": 1,
            "size_bytes": len(image.data),
            "perceptual_hash": image.perceptual_hash,
            "caption": image.caption,
            "tags": list(image.tags),
        }
        for image in store.images[rows]
    ]
    connection.execute(insert(Image), images)
    vectors = zip(images, store.vectors[rows], store.norms[rows], strict=True)
    connection.execute(
        insert(space.table),
        [{"image_id": row["id"], "embedding": vector.tolist(), "norm": float(norm)} for row, vector, norm in vectors],
    )
