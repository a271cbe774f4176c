"""Queries for outputs, the images that jobs generated, and for the reference images that conditioned them."""

from collections import defaultdict
from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db import paging, withdrawals
from shared.db.tables import Output, OutputReference
from shared.errors import ResourceNotFoundError


def get(session: Session, generation_id: UUID, *, owner_id: UUID, lock: bool = False) -> Output:
    """The output, if it belongs to `owner_id`.

    lock: no other transaction changes or deletes the output until this one ends.

    Raises:
        ResourceNotFoundError: the output does not exist, or belongs to another owner.
        OutputWithdrawnError: the output was withdrawn.
    """
    statement = select(Output).where(Output.id == generation_id, Output.owner_id == owner_id)
    generation = session.scalar(statement.with_for_update() if lock else statement)
    if generation is None:
        raise ResourceNotFoundError("There is no such output.", generation_id=str(generation_id))
    withdrawals.refuse_withdrawn(session, generation_id)
    return generation


def list_by_job(session: Session, job_ids: Sequence[UUID]) -> dict[UUID, list[Output]]:
    """The outputs of each job, ordered by index. A job without outputs has no entry."""
    outputs = defaultdict(list)
    statement = select(Output).where(Output.job_id.in_(job_ids)).order_by(Output.job_id, Output.index)
    for generation in session.scalars(statement):
        outputs[generation.job_id].append(generation)
    return outputs


def list_references(session: Session, generation_ids: Sequence[UUID]) -> dict[UUID, list[OutputReference]]:
    """The references of each output, ordered by position. An output without references has no entry."""
    references = defaultdict(list)
    statement = (
        select(OutputReference)
        .where(OutputReference.generation_id.in_(generation_ids))
        .order_by(OutputReference.generation_id, OutputReference.position)
    )
    for reference in session.scalars(statement):
        references[reference.generation_id].append(reference)
    return references


def list_page(
    session: Session, *, owner_id: UUID, cursor: str | None, limit: int, reference_id: UUID | None = None
) -> tuple[list[Output], str | None]:
    """A page of an owner's outputs, newest first, and the cursor of the next page.

    reference_id: only outputs that this corpus image conditioned.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(Output).where(Output.owner_id == owner_id)
    if reference_id is not None:
        using = select(OutputReference.generation_id).where(OutputReference.image_id == reference_id)
        statement = statement.where(Output.id.in_(using))
    return paging.fetch_page(session, statement, created_at=Output.created_at, id=Output.id, cursor=cursor, limit=limit)
