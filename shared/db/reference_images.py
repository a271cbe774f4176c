"""Queries for the pictures that the requests of jobs brought as references."""

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db import withdrawals
from shared.db.tables import Job, ReferenceImage
from shared.errors import OutputWithdrawnError, ResourceNotFoundError

FILE_COLUMNS = ("sha256", "blob_key", "thumbnail_key", "format", "width", "height", "size_bytes")


def get(session: Session, reference_id: UUID, *, owner_id: UUID) -> ReferenceImage:
    """The picture, if its job belongs to `owner_id`.

    Raises:
        ResourceNotFoundError: the picture does not exist, or its job belongs to another owner.
        OutputWithdrawnError: it is an output that was withdrawn.
    """
    statement = (
        select(ReferenceImage)
        .join(Job, Job.id == ReferenceImage.job_id)
        .where(ReferenceImage.id == reference_id, Job.owner_id == owner_id)
    )
    picture = session.scalar(statement)
    if picture is None:
        raise ResourceNotFoundError("There is no such picture.", reference_id=str(reference_id))
    if withdrawals.filter_withdrawn(session, [reference_id]):
        raise OutputWithdrawnError("This picture is an output that was withdrawn.", reference_id=str(reference_id))
    return picture


def list_by_job(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, list[ReferenceImage]]:
    """The pictures of each job, in the order of the request. A job without pictures has no entry."""
    pictures = defaultdict(list)
    statement = select(ReferenceImage).where(ReferenceImage.job_id.in_(job_ids))
    for picture in session.scalars(statement.order_by(ReferenceImage.job_id, ReferenceImage.position)):
        pictures[picture.job_id].append(picture)
    return pictures


def lock_by_job(session: Session, job_id: UUID) -> list[ReferenceImage]:
    """The pictures of a job, in order. They and their blobs stay until this transaction ends.

    A delete of the job waits. Rows that this transaction copies are therefore there before those of the job go, and the
    sweeper finds the blobs named at any time.
    """
    statement = select(ReferenceImage).where(ReferenceImage.job_id == job_id).order_by(ReferenceImage.position)
    return list(session.scalars(statement.with_for_update(read=True)))


def copy(session: Session, pictures: Sequence[ReferenceImage], *, job_id: UUID) -> None:
    """Give another job the same pictures. They share the blobs. pictures: from `lock_by_job`."""
    for position, picture in enumerate(pictures):
        columns = {name: getattr(picture, name) for name in FILE_COLUMNS}
        copied = ReferenceImage(id=uuid4(), job_id=job_id, position=position, **columns)
        session.add(copied)
        withdrawals.copy_sources(session, picture.id, to_id=copied.id)
