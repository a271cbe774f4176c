"""Which blobs something still needs, and the claims of uploads that are about to need them.

Equal images of several collections share one blob, so an upload may come to name a blob that no row names any more
while the sweeper removes it. Both take the lock of each key first, and the upload claims what it will name before it
stores it: docs/decisions/0008-how-are-unneeded-blobs-deleted.md.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import ARRAY, Text, cast, delete, func, insert, select, text
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db.tables import BlobClaim, Generation, Image, Job
from shared.storage import attempt_of, content_of


def claim(session: Session, keys: Collection[str]) -> UUID:
    """Keep the sweeper from these keys until `settle`. Commit before anything is stored.

    Waits while the sweeper is removing one of them.
    """
    _lock(session, keys, shared=True)
    claim_id = uuid4()
    session.execute(insert(BlobClaim).values(id=claim_id, keys=sorted(keys)))
    return claim_id


def settle(session: Session, claim_id: UUID) -> bool:
    """End a claim in the transaction that names its blobs; False when it had run out, and they may be gone."""
    statement = delete(BlobClaim).where(BlobClaim.id == claim_id).returning(BlobClaim.id)
    return session.scalar(statement.execution_options(synchronize_session=False)) is not None


def forget_claims(session: Session, *, older_than_s: float) -> None:
    """End the claims of uploads that will not come back."""
    old = BlobClaim.created_at <= func.clock_timestamp() - timedelta(seconds=older_than_s)
    session.execute(delete(BlobClaim).where(old).execution_options(synchronize_session=False))


def lock(session: Session, keys: Collection[str]) -> None:
    """Hold up every upload that is about to claim one of these keys, until this transaction ends.

    However long the blob store takes meanwhile: a lock that is lost in the middle of a removal is worth nothing.
    """
    session.execute(select(func.set_config("idle_in_transaction_session_timeout", "0", True)))
    _lock(session, keys, shared=False)


def unneeded(session: Session, keys: Sequence[str]) -> list[str]:
    """Those of these keys that no row names, no live attempt will and no upload claims. Unknown kinds are needed.

    The answer stays true as long as the keys are locked: an attempt that has lost its job never gets it back.
    """
    # What will be named is asked for before what is: a finish in between moves from the first to the second.
    known = [key for key in keys if content_of(key) is not None or attempt_of(key) is not None]
    coming = _claimed(session, known) | _of_live_attempts(session, known)
    named = _named_by_images(session, known) | _named_by_outputs(session, known)
    return [key for key in known if key not in coming and key not in named]


def _claimed(session: Session, keys: Sequence[str]) -> set[str]:
    claimed = session.scalars(select(func.unnest(BlobClaim.keys)).where(BlobClaim.keys.overlap(keys)))
    return set(claimed)


def _of_live_attempts(session: Session, keys: Sequence[str]) -> set[str]:
    attempts = {key: attempt for key in keys if (attempt := attempt_of(key)) is not None}
    job_ids = {job_id for job_id, _ in attempts.values()}
    statement = select(Job.id, Job.attempt).where(Job.id.in_(job_ids), Job.state == JobState.PROCESSING)
    live = {(row.id, row.attempt) for row in session.execute(statement)}
    return {key for key, attempt in attempts.items() if attempt in live}


def _named_by_images(session: Session, keys: Sequence[str]) -> set[str]:
    contents = {content for key in keys if (content := content_of(key)) is not None}
    statement = select(Image.blob_key, Image.thumbnail_key).where(Image.sha256.in_(contents))
    return {key for row in session.execute(statement) for key in row}


def _named_by_outputs(session: Session, keys: Sequence[str]) -> set[str]:
    job_ids = {attempt[0] for key in keys if (attempt := attempt_of(key)) is not None}
    statement = select(Generation.blob_key, Generation.thumbnail_key).where(Generation.job_id.in_(job_ids))
    return {key for row in session.execute(statement) for key in row}


def _lock(session: Session, keys: Collection[str], *, shared: bool) -> None:
    take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    # In one order everywhere: two that share two keys would otherwise wait for each other.
    key = func.unnest(cast(sorted(keys), ARRAY(Text))).column_valued("key")
    session.execute(select(take(func.hashtextextended(key, 0))))


def database_identity(session: Session) -> str:
    """What tells this database from every other, a copy on another server included."""
    row = session.execute(text("select system_identifier, current_database() from pg_control_system()")).one()
    return f"{row[0]}/{row[1]}"
