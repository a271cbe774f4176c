"""The backlog of an embedding space: the `ready` images that have no vector in it.

Workers of an inactive space add its vectors while another space serves. A worker claims images for some seconds: this
is its lease, which it renews while it works. When the worker dies, the lease expires. Each of its images is then
claimed alone, and after `jobs.max_crashes` such deaths the image counts as failed.

The claims are rows of `space_attempts`, because the state of an image is about the active space only.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, Integer, and_, case, cast, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from shared.db import images, leasing, spaces
from shared.db.images import Vector
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace, Image, SpaceAttempt
from shared.errors import EmbeddingCrashedError

FIRST_ID = UUID(int=0)
RECENT_S = 60
"""Images that were added less than so many seconds ago do not keep a space from becoming active. A pause of so many
seconds ends a run of added vectors."""
REOPENED_AT_ONCE = 10_000


@dataclass(frozen=True)
class Progress:
    """The progress of a space.

    missing: `ready` images without a vector that a worker can still embed. recent: those of them that were added in the
    last minute. failed: images that no worker of the space could embed. rate_per_s: vectors per second that its workers
    add; None while they add none.
    """

    vectors: int
    missing: int
    recent: int
    failed: int
    rate_per_s: float | None

    @property
    def remaining_s(self) -> float | None:
        """Estimated seconds until no image is missing; None while no worker adds vectors."""
        if not self.missing:
            return 0.0
        return self.missing / self.rate_per_s if self.rate_per_s else None


# --- the work of a worker -----------------------------------------------------------------------------------------


def claim(session: Session, space: Space, *, limit: int, lease_s: float, max_crashes: int) -> list[Image]:
    """Claim up to `limit` images for `lease_s` seconds, or alone an image at whose embedding a worker died.

    The search for images begins at a random id, so that workers that share the work seldom find the same.
    """
    expired = and_(SpaceAttempt.lease_until < func.clock_timestamp(), SpaceAttempt.crashes + 1 >= max_crashes)
    session.execute(
        update(SpaceAttempt)
        .where(_in_lock_order(space, expired))
        .values(crashes=SpaceAttempt.crashes + 1, lease_until=None, error_code=EmbeddingCrashedError.code)
    )
    crashed = session.scalar(_claim_crashed(space, lease_s=lease_s))
    if crashed is not None:
        return list(session.scalars(select(Image).where(Image.id == crashed)))
    for after in (uuid4(), FIRST_ID):
        if found := images.list_untried(session, space, after=after, limit=limit):
            break
    else:
        return []
    until = leasing.from_now(lease_s)
    rows = [{"space_id": space.id, "image_id": image.id, "lease_until": until} for image in found]
    inserted = upsert(SpaceAttempt).values(rows).on_conflict_do_nothing().returning(SpaceAttempt.image_id)
    owned = set(session.scalars(inserted))
    return [image for image in found if image.id in owned]


def renew(session: Session, space: Space, image_ids: Collection[UUID], *, lease_s: float) -> None:
    """Extend the leases of these images to `lease_s` from now, except those that have no lease any more."""
    leased = and_(_these(space, image_ids), SpaceAttempt.lease_until.is_not(None))
    until = leasing.from_now(lease_s)
    session.execute(update(SpaceAttempt).where(_in_lock_order(space, leased)).values(lease_until=until))


def store(session: Session, space: Space, image_ids: Sequence[UUID], vectors: Vector, norms: Vector) -> int:
    """Store vectors; return how many are new. vectors, norms: as in `images.store_embeddings`."""
    added = images.add_vectors(session, space, image_ids, vectors, norms)
    session.execute(delete(SpaceAttempt).where(_in_lock_order(space, _these(space, image_ids))))
    return len(added)


def count_added(session: Session, space: Space, added: int) -> None:
    """Count vectors as progress. The first ones after a pause only start the clock.

    Not in the transaction of `store`: it locks images before the space, and `activate` does the opposite.
    """
    session.execute(
        update(EmbeddingSpace)
        .where(EmbeddingSpace.id == space.id)
        .values(
            added=case((_adds_vectors(), EmbeddingSpace.added + added), else_=0),
            adding_since=case((_adds_vectors(), EmbeddingSpace.adding_since), else_=func.now()),
            last_added_at=func.now(),
        )
    )


def mark_failed(session: Session, space: Space, image_id: UUID, *, code: str) -> None:
    """Leave an image out of this space until `retry_failed`. code: the error's code."""
    session.execute(update(SpaceAttempt).where(_these(space, [image_id])).values(lease_until=None, error_code=code))


def hand_back(session: Session, space: Space, image_ids: Collection[UUID]) -> None:
    """Give up the leases of these images. Those at which a worker died are still claimed alone."""
    leased = _in_lock_order(space, and_(_these(space, image_ids), SpaceAttempt.lease_until.is_not(None)))
    handed_back = update(SpaceAttempt).where(leased).values(lease_until=None)
    rows = session.execute(handed_back.returning(SpaceAttempt.image_id, SpaceAttempt.crashes)).all()
    session.execute(delete(SpaceAttempt).where(_these(space, [row.image_id for row in rows if not row.crashes])))


# --- for operators ------------------------------------------------------------------------------------------------


def retry_failed(session: Session, space: Space) -> int:
    """Let the workers of this space try its failed images again; return how many there are."""
    failed = delete(SpaceAttempt).where(_in_lock_order(space, SpaceAttempt.error_code.is_not(None)))
    return len(session.scalars(failed.returning(SpaceAttempt.image_id)).all())


def get_progress(session: Session, space: Space) -> Progress:
    """Count the vectors, and the images without one. It reads all images: about a second for a million."""
    failed = SpaceAttempt.error_code.is_not(None)
    missing = SpaceAttempt.error_code.is_(None)
    recently = Image.created_at > func.now() - timedelta(seconds=RECENT_S)
    counts = session.execute(
        select(
            func.count().filter(failed).label("failed"),
            func.count().filter(missing).label("missing"),
            func.count().filter(missing, recently).label("recent"),
        )
        .select_from(Image)
        .outerjoin(SpaceAttempt, and_(SpaceAttempt.image_id == Image.id, _of(space)))
        .where(images.lacks_vector(space))
    ).one()
    run_s = func.extract("epoch", EmbeddingSpace.last_added_at - EmbeddingSpace.adding_since)
    run = session.execute(
        select(EmbeddingSpace.added, run_s.label("seconds")).where(EmbeddingSpace.id == space.id, _adds_vectors())
    ).one_or_none()
    return Progress(
        vectors=session.scalar(select(func.count()).select_from(space.table)) or 0,
        missing=counts.missing,
        recent=counts.recent,
        failed=counts.failed,
        rate_per_s=run.added / float(run.seconds) if run is not None and run.seconds else None,
    )


def activate(session: Session, space: Space) -> None:
    """Let searches use this space, in the caller's transaction. `reopen` follows, in transactions of its own.

    An image with a vector there becomes `ready`, also one that failed in the space before.
    """
    spaces.activate(session, space)
    images.make_ready(session, space)


def reopen(session: Session, space: Space, *, after: UUID | None = None) -> images.Reopened:
    """Make `ready` images without a vector in the space that has just become active `pending`: one step of a pass.

    Call it again with `next_after`. If another space became active meanwhile, nothing is changed. The reconciler looks
    for such images too, but more slowly.
    """
    if not spaces.is_active(session, space, lock=True):
        return images.Reopened([], None)
    return images.reopen_without_vector(session, space, after=after, limit=REOPENED_AT_ONCE)


# --- conditions ---------------------------------------------------------------------------------------------------


def _claim_crashed(space: Space, *, lease_s: float) -> ReturningUpdate[tuple[UUID]]:
    """Claim one image at whose embedding a worker died; an expired lease is such a death."""
    expired = SpaceAttempt.lease_until < func.clock_timestamp()
    free = (
        select(SpaceAttempt.image_id)
        .where(_of(space), SpaceAttempt.error_code.is_(None), or_(SpaceAttempt.lease_until.is_(None), expired))
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    return (
        update(SpaceAttempt)
        .where(_of(space), SpaceAttempt.image_id == free.scalar_subquery())
        .values(
            crashes=SpaceAttempt.crashes + cast(SpaceAttempt.lease_until.is_not(None), Integer),
            lease_until=leasing.from_now(lease_s),
        )
        .returning(SpaceAttempt.image_id)
    )


def _of(space: Space) -> ColumnElement[bool]:
    return SpaceAttempt.space_id == space.id


def _these(space: Space, image_ids: Collection[UUID]) -> ColumnElement[bool]:
    return and_(_of(space), SpaceAttempt.image_id.in_(image_ids))


def _in_lock_order(space: Space, condition: ColumnElement[bool]) -> ColumnElement[bool]:
    """Rows of this space that meet `condition`; the statement locks them as `leasing.in_lock_order` does."""
    rows = select(SpaceAttempt.image_id).where(_of(space), condition).order_by(SpaceAttempt.image_id)
    return and_(_of(space), SpaceAttempt.image_id.in_(rows.with_for_update(key_share=True)))


def _adds_vectors() -> ColumnElement[bool]:
    return EmbeddingSpace.last_added_at > func.now() - timedelta(seconds=RECENT_S)
