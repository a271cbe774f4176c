"""Stores the blobs of a request before the rows that name them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.orm import Session

from shared.db import blobs
from shared.db.session import session_scope
from shared.errors import UploadInterruptedError
from shared.storage import get_blobs


@dataclass(frozen=True)
class NewBlob:
    data: bytes
    media_type: str


@contextmanager
def session_for_rows_of(new: Mapping[str, NewBlob]) -> Iterator[Session]:
    """Store the blobs, then open the transaction in which the caller writes the rows that name them.

    Bytes come before rows: the sweeper deletes a blob without a row, but a row without its blob would be broken. A
    claim keeps the sweeper from deleting the blobs in between. No session is open while the blobs are stored. Without
    blobs this is only a transaction.

    Raises:
        UploadInterruptedError: storing the blobs took too long. No row is written.
        StorageError: the blob store failed.
        DatabaseConnectionError: the database does not answer.
    """
    if not new:
        with session_scope() as session:
            yield session
        return
    with session_scope() as session:
        claim_id = blobs.claim(session, new.keys())
    for key, blob in new.items():
        get_blobs().put(key, blob.data, media_type=blob.media_type)
    with session_scope() as session:
        if not blobs.end_claim(session, claim_id):
            raise UploadInterruptedError
        yield session
