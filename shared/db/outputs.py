"""Queries for outputs, the images that jobs generated, and for the reference images that conditioned them."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from shared.contracts.outputs import OutputQuery
from shared.db import paging, withdrawals
from shared.db.tables import Job, Output, OutputReference
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


def list_by_digest(session: Session, digests: Sequence[str], *, owner_id: UUID) -> list[Output]:
    """An owner's outputs whose files have one of these SHA-256 digests, newest first. Withdrawn ones are left out."""
    statement = select(Output).where(
        Output.owner_id == owner_id, Output.sha256.in_(digests), ~withdrawals.is_withdrawn(Output.id)
    )
    return list(session.scalars(statement.order_by(Output.created_at.desc(), Output.id.desc())))


def list_page(session: Session, query: OutputQuery, *, owner_id: UUID) -> tuple[list[Output], str | None]:
    """A page of an owner's outputs, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(Output).where(Output.owner_id == owner_id, *_conditions(query))
    return paging.fetch_page(
        session, statement, created_at=Output.created_at, id=Output.id, cursor=query.cursor, limit=query.limit
    )


def _conditions(query: OutputQuery) -> Iterator[ColumnElement[bool]]:
    if query.reference_id is not None:
        using = select(OutputReference.generation_id).where(OutputReference.image_id == query.reference_id)
        yield Output.id.in_(using)
    if query.favourite is not None:
        yield Output.favourite.is_(query.favourite)
    if query.job_id is not None:
        yield Output.job_id == query.job_id
    if query.bulk_id is not None:
        yield Output.job_id.in_(select(Job.id).where(Job.bulk_id == query.bulk_id))
    if query.model is not None:
        yield Output.provenance["model"]["name"].astext == query.model
    if query.mode is not None:
        yield Output.provenance["mode"].astext == query.mode.value
    for word in (query.words or "").split():
        yield Output.provenance["parameters"]["prompt"].astext.icontains(word, autoescape=True)
    if query.created_after is not None:
        yield Output.created_at > query.created_after
    if query.created_before is not None:
        yield Output.created_at < query.created_before
