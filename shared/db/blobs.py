"""Finds the blobs that nothing needs any more, and keeps the claims of uploads on blobs that their rows will name.

Equal images of several collections share one blob. So an upload may start to use a blob that no row names any more,
while the sweeper deletes it. To prevent that, an upload claims its keys before it stores the bytes, and both the upload
and the sweeper lock the keys first. See docs/decisions/0008-how-are-unneeded-blobs-deleted.md.
"""

from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import ARRAY, Connection, Text, cast, delete, func, insert, null, select, text, union
from sqlalchemy.orm import Session

from shared.contracts.jobs import JobState
from shared.db import withdrawals
from shared.db.tables import BlobClaim, Image, Job, Output, ReferenceImage
from shared.storage import parse_content_key, parse_output_key


def claim(session: Session, keys: Collection[str]) -> UUID:
    """Protect the blobs of `keys` from the sweeper until `end_claim`. Commit it before storing the bytes.

    Waits while the sweeper deletes one of these blobs.
    """
    _lock(session, keys, shared=True)
    claim_id = uuid4()
    session.execute(insert(BlobClaim).values(id=claim_id, keys=sorted(keys)))
    return claim_id


def end_claim(session: Session, claim_id: UUID) -> bool:
    """End a claim, in the transaction that writes the rows; False when the claim has expired and blobs may be gone."""
    statement = delete(BlobClaim).where(BlobClaim.id == claim_id).returning(BlobClaim.id)
    return session.scalar(statement.execution_options(synchronize_session=False)) is not None


def delete_old_claims(session: Session, *, older_than_s: float) -> None:
    """Delete the claims of uploads that started more than `older_than_s` ago and did not finish."""
    old = BlobClaim.created_at <= func.clock_timestamp() - timedelta(seconds=older_than_s)
    session.execute(delete(BlobClaim).where(old).execution_options(synchronize_session=False))


LOCK_LIMIT_S = 15
"""After so long without a statement, the server releases the locks of a frozen sweeper."""
KEYS_PER_PAGE = 1000
BACKUP_LOCK = "backup"
"""Key of the advisory lock that a backup holds while it reads blobs. Deletions share it."""


def may_delete(session: Session) -> bool:
    """Whether no backup runs. If so, none begins before this transaction ends."""
    lock = func.pg_try_advisory_xact_lock_shared(func.hashtextextended(BACKUP_LOCK, 0))
    return bool(session.scalar(select(lock)))


def pause_deletions(connection: Connection) -> None:
    """Let no sweeper delete a blob until this connection closes. Waits for a deletion, or a backup, that runs.

    The wait ends with an error after the connection's `lock_timeout`.
    """
    connection.execute(select(func.pg_advisory_lock(func.hashtextextended(BACKUP_LOCK, 0))))


def iterate_named(session: Session) -> Iterator[tuple[str, str | None]]:
    """Yield the key of each blob that a row names, once, in the order of their bytes.

    The sha256 of the blob's bytes, in hex, follows. It is None where no row has it.
    """
    unknown = cast(null(), Text)
    kept = ~withdrawals.is_withdrawn(Output.id)
    parts = [select(Image.thumbnail_key.label("key"), unknown.label("sha256")), select(Image.blob_key, unknown)]
    picture_stands = ~withdrawals.is_withdrawn_image(ReferenceImage.id)
    for column in (ReferenceImage.thumbnail_key, ReferenceImage.blob_key):
        parts.append(select(column, unknown).where(picture_stands))
    parts += [select(Output.thumbnail_key, unknown).where(kept), select(Output.blob_key, Output.sha256).where(kept)]
    named = union(*parts).subquery()
    statement = select(named.c.key, named.c.sha256).order_by(named.c.key.collate("C"))
    for row in session.execute(statement.execution_options(yield_per=KEYS_PER_PAGE)):
        yield row.key, row.sha256


def lock_keys(session: Session, keys: Collection[str]) -> None:
    """Make every upload that claims one of these keys wait until this transaction ends.

    The caller must delete no blob later than `LOCK_LIMIT_S` seconds after this call.
    """
    # Longer than elsewhere, because the blob store may take long to delete the blobs.
    limit = func.set_config("idle_in_transaction_session_timeout", f"{LOCK_LIMIT_S * 1000}", True)
    session.execute(select(limit))
    _lock(session, keys, shared=False)


def list_unneeded(session: Session, keys: Sequence[str]) -> list[str]:
    """The keys that no row names, no upload claims, and no running attempt may still name.

    A key of unknown form counts as needed. The result stays valid while the keys are locked, because an attempt that
    has lost its job never gets it back.
    """
    known = [key for key in keys if parse_content_key(key) is not None or parse_output_key(key) is not None]
    # Claims and running attempts are read before the rows. A key whose rows are written in between is then found twice;
    # in the other order it would be missed.
    expected = _claimed(session, known) | _of_running_attempts(session, known)
    named = _named_by_content(session, known) | _named_by_outputs(session, known)
    return [key for key in known if key not in expected and key not in named]


def _claimed(session: Session, keys: Sequence[str]) -> set[str]:
    claimed = session.scalars(select(func.unnest(BlobClaim.keys)).where(BlobClaim.keys.overlap(keys)))
    return set(claimed)


def _of_running_attempts(session: Session, keys: Sequence[str]) -> set[str]:
    attempts = {key: attempt for key in keys if (attempt := parse_output_key(key)) is not None}
    job_ids = {job_id for job_id, _ in attempts.values()}
    statement = select(Job.id, Job.attempt).where(Job.id.in_(job_ids), Job.state == JobState.PROCESSING)
    running = {(row.id, row.attempt) for row in session.execute(statement)}
    return {key for key, attempt in attempts.items() if attempt in running}


def _named_by_content(session: Session, keys: Sequence[str]) -> set[str]:
    digests = {sha256 for key in keys if (sha256 := parse_content_key(key)) is not None}
    named: set[str] = set()
    for table in (Image, ReferenceImage):
        # A withdrawn picture keeps no file. An image of the corpus that is withdrawn has no row.
        kept = ~withdrawals.is_withdrawn_image(table.id)
        statement = select(table.blob_key, table.thumbnail_key).where(table.sha256.in_(digests), kept)
        named.update(key for row in session.execute(statement) for key in row)
    return named


def _named_by_outputs(session: Session, keys: Sequence[str]) -> set[str]:
    job_ids = {attempt[0] for key in keys if (attempt := parse_output_key(key)) is not None}
    kept = ~withdrawals.is_withdrawn(Output.id)
    statement = select(Output.blob_key, Output.thumbnail_key).where(Output.job_id.in_(job_ids), kept)
    return {key for row in session.execute(statement) for key in row}


def _lock(session: Session, keys: Collection[str], *, shared: bool) -> None:
    take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
    # Every transaction locks in the same order. Otherwise two with two keys in common could wait for each other.
    key = func.unnest(cast(sorted(keys), ARRAY(Text))).column_valued("key")
    session.execute(select(take(func.hashtextextended(key, 0))))


def database_identity(session: Session) -> str:
    """The server's system identifier and the database's name. A dump restored on another server gets another one."""
    row = session.execute(text("select system_identifier, current_database() from pg_control_system()")).one()
    return f"{row[0]}/{row[1]}"
