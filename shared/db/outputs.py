"""What jobs generated, and which memories shaped it."""

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db import paging
from shared.db.tables import Generation, GenerationReference
from shared.errors import ResourceNotFoundError


def get(session: Session, generation_id: UUID, *, owner_id: UUID) -> Generation:
    """
    Raises:
        ResourceNotFoundError: there is none, or it belongs to somebody else.
    """
    statement = select(Generation).where(Generation.id == generation_id, Generation.owner_id == owner_id)
    generation = session.scalar(statement)
    if generation is None:
        raise ResourceNotFoundError("There is no such output.", generation_id=str(generation_id))
    return generation


def of_jobs(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, list[Generation]]:
    """The outputs of each job, in order."""
    outputs = defaultdict(list)
    statement = select(Generation).where(Generation.job_id.in_(job_ids)).order_by(Generation.job_id, Generation.index)
    for generation in session.scalars(statement):
        outputs[generation.job_id].append(generation)
    return outputs


def references_of(session: Session, generation_ids: Sequence[UUID]) -> dict[UUID, list[GenerationReference]]:
    """The references of each output, in order."""
    references = defaultdict(list)
    statement = (
        select(GenerationReference)
        .where(GenerationReference.generation_id.in_(generation_ids))
        .order_by(GenerationReference.generation_id, GenerationReference.position)
    )
    for reference in session.scalars(statement):
        references[reference.generation_id].append(reference)
    return references


def page(
    session: Session, *, owner_id: UUID, cursor: str | None, limit: int, reference_id: UUID | None = None
) -> tuple[list[Generation], str | None]:
    """An owner's outputs, newest first; with `reference_id`, those that this image shaped."""
    statement = select(Generation).where(Generation.owner_id == owner_id)
    if reference_id is not None:
        using = select(GenerationReference.generation_id).where(GenerationReference.image_id == reference_id)
        statement = statement.where(Generation.id.in_(using))
    return paging.page(
        session, statement, created_at=Generation.created_at, id=Generation.id, cursor=cursor, limit=limit
    )
