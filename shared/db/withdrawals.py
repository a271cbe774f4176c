"""Withdrawn images, and with them every output that drew from one.

An output has no mark of its own: it is withdrawn when one of its references is, an image or a picture of its request.
So one row hides any number of outputs at its commit. A job that loaded the image before also counts, whenever it stores
its outputs. See docs/decisions/0032-what-happens-to-outputs-when-an-image-is-withdrawn.md.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    ColumnExpressionArgument,
    Select,
    Uuid,
    and_,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.contracts.collections import Access
from shared.contracts.jobs import ReferenceKind
from shared.db import images
from shared.db.collections import Principal, access_of, visible_to
from shared.db.tables import Collection as ImageCollection
from shared.db.tables import DerivedImage, Image, Output, OutputReference, ReferenceImage, WithdrawnImage
from shared.errors import OutputWithdrawnError

LOCK = "withdrawals"
OUTPUTS_PER_STATEMENT = 1000


@dataclass(frozen=True)
class Withdrawal:
    """When and why an output was withdrawn."""

    at: datetime
    reason: str | None


@dataclass(frozen=True)
class Followed:
    """An image with all images made of it, sorted; how many outputs drew from them, and the owners of these outputs."""

    image_ids: list[UUID]
    outputs: int
    owner_ids: set[UUID]


# --- reading ------------------------------------------------------------------------------------------------------


def is_withdrawn(generation_id: ColumnExpressionArgument[UUID]) -> ColumnElement[bool]:
    """The condition that the output with this id is withdrawn."""
    return exists(
        select(WithdrawnImage.image_id)
        .join(OutputReference, and_(OutputReference.image_id == WithdrawnImage.image_id, _is_of_its_kind()))
        .where(OutputReference.generation_id == generation_id)
    )


def find(session: Session, generation_ids: Collection[UUID]) -> dict[UUID, Withdrawal]:
    """The first withdrawal of each of these outputs. An output that is not withdrawn has no entry."""
    statement = (
        select(OutputReference.generation_id, WithdrawnImage.created_at, WithdrawnImage.reason)
        .join(WithdrawnImage, WithdrawnImage.image_id == OutputReference.image_id)
        .where(_is_of_its_kind(), OutputReference.generation_id.in_(generation_ids))
        .order_by(WithdrawnImage.created_at.desc(), WithdrawnImage.image_id)
    )
    return {generation_id: Withdrawal(at, reason) for generation_id, at, reason in session.execute(statement)}


def refuse_withdrawn(session: Session, generation_id: UUID) -> None:
    """Do nothing for an output that is not withdrawn, or does not exist.

    Raises:
        OutputWithdrawnError: the output is withdrawn.
    """
    withdrawal = find(session, [generation_id]).get(generation_id)
    if withdrawal is not None:
        raise OutputWithdrawnError(
            f"This output was withdrawn: {withdrawal.reason}" if withdrawal.reason else None,
            generation_id=str(generation_id),
            reason=withdrawal.reason,
            withdrawn_at=withdrawal.at.isoformat(),
        )


def is_withdrawn_image(image_id: ColumnExpressionArgument[UUID]) -> ColumnElement[bool]:
    """The condition that the image or picture with this id is withdrawn."""
    return exists().where(WithdrawnImage.image_id == image_id)


def filter_withdrawn(session: Session, image_ids: Collection[UUID]) -> set[UUID]:
    """Those of these images and pictures that are withdrawn."""
    return set(session.scalars(select(WithdrawnImage.image_id).where(WithdrawnImage.image_id.in_(image_ids))))


def is_known(session: Session, image_id: UUID) -> bool:
    """Whether an output or a remembered output drew from this image, which may be deleted."""
    used = exists().where(_is_corpus(), OutputReference.image_id == image_id)
    return bool(session.scalar(select(or_(used, exists().where(DerivedImage.source_id == image_id)))))


def _is_corpus() -> ColumnElement[bool]:
    """The condition that a reference is an image of the corpus."""
    return OutputReference.kind == ReferenceKind.CORPUS


def _is_of_its_kind() -> ColumnElement[bool]:
    """The condition that a reference can be the withdrawn image: a withdrawal names no picture of a request."""
    return or_(_is_corpus(), WithdrawnImage.cause_id != WithdrawnImage.image_id)


# --- writing ------------------------------------------------------------------------------------------------------


def delay_withdrawals(session: Session) -> None:
    """Let no withdrawal begin until this transaction ends, after one that is running has ended.

    For a transaction that adds an output to the corpus. Without the lock, a withdrawal at the same time could miss the
    image that it adds.
    """
    session.execute(select(func.pg_advisory_xact_lock_shared(func.hashtextextended(LOCK, 0))))


def lock(session: Session) -> None:
    """Let no other withdrawal begin, and no output become an image, until this transaction ends."""
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(LOCK, 0))))


def record_sources(session: Session, image_id: UUID, *, generation_id: UUID) -> None:
    """Record that the image is this output, so that it follows the images from which the output drew.

    The record also holds when the output is deleted later.
    """
    sources = select(literal(image_id), OutputReference.image_id).where(OutputReference.generation_id == generation_id)
    _add_sources(session, sources)


def record_sources_of_pictures(session: Session, job_id: UUID) -> None:
    """Record which pictures of a job are outputs, so that they follow the images from which these outputs drew.

    A picture is an output if it has the bytes of its file. The record also holds when the output is deleted later.
    """
    _add_sources(
        session,
        select(ReferenceImage.id, OutputReference.image_id)
        .join(Output, Output.sha256 == ReferenceImage.sha256)
        .join(OutputReference, OutputReference.generation_id == Output.id)
        .where(ReferenceImage.job_id == job_id)
        .distinct(),
    )


def copy_sources(session: Session, image_id: UUID, *, to_id: UUID) -> None:
    """Record that a copy of a picture is made of the same images."""
    _add_sources(session, select(literal(to_id), DerivedImage.source_id).where(DerivedImage.image_id == image_id))


def _add_sources(session: Session, rows: Select[UUID, UUID]) -> None:
    """rows: the id of an image or a picture, and the id of one that it was made of."""
    session.execute(upsert(DerivedImage).from_select(["image_id", "source_id"], rows).on_conflict_do_nothing())


def withdrawn_pictures(session: Session, job_id: UUID) -> list[UUID]:
    """The pictures of a job that are withdrawn, or made of a withdrawn image."""
    made = exists(
        select(DerivedImage.image_id)
        .join(WithdrawnImage, WithdrawnImage.image_id == DerivedImage.source_id)
        .where(DerivedImage.image_id == ReferenceImage.id)
    )
    statement = select(ReferenceImage.id).where(
        ReferenceImage.job_id == job_id, or_(made, is_withdrawn_image(ReferenceImage.id))
    )
    return list(session.scalars(statement))


def follow(session: Session, image_id: UUID) -> Followed:
    """Find all images made of this one: outputs that drew from it and are in the corpus, and so on.

    Pictures of requests count as images here: one may be such an output too. An image is made of another if
    `record_sources` says so, or if it has the bytes of an output that drew from it. Each statement reads few rows,
    however many outputs there are.
    """
    found, latest = {image_id}, {image_id}
    output_ids, owner_ids = set[UUID](), set[UUID]()
    while latest:
        made = set(session.scalars(select(DerivedImage.image_id).where(DerivedImage.source_id.in_(latest))))
        of_its_kind = or_(_is_corpus(), OutputReference.image_id != image_id)
        drew = select(OutputReference.generation_id).where(of_its_kind, OutputReference.image_id.in_(latest))
        for ids in session.scalars(drew.execution_options(yield_per=OUTPUTS_PER_STATEMENT)).partitions():
            output_ids.update(ids)
            of_outputs = (
                select(func.array_agg(Output.owner_id.distinct()), func.array_agg(Image.id))
                .outerjoin(Image, Image.sha256 == Output.sha256)
                .where(Output.id == func.any(cast(ids, ARRAY(Uuid))))
            )
            owners, remembered = session.execute(of_outputs).one()
            owner_ids.update(owners or [])
            made.update(each for each in remembered or [] if each is not None)
            sent = select(ReferenceImage.id).join(Output, Output.sha256 == ReferenceImage.sha256)
            made.update(session.scalars(sent.where(Output.id == func.any(cast(ids, ARRAY(Uuid))))))
        latest = made - found
        found |= made
    return Followed(sorted(found), len(output_ids), owner_ids)


def count_images(session: Session, image_ids: Sequence[UUID], *, principal: Principal) -> tuple[int, int]:
    """How many of these images are still in the corpus, and how many of them the principal may not change."""
    writable = and_(visible_to(principal), access_of(principal).in_([Access.WRITE, Access.OWNER]))
    statement = (
        select(func.count(), func.count().filter(~writable))
        .select_from(Image)
        .join(ImageCollection, ImageCollection.id == Image.collection_id)
        .where(Image.id.in_(image_ids), ImageCollection.deleted_at.is_(None))
    )
    present, foreign = session.execute(statement).one()
    return present, foreign


def withdraw(session: Session, image_ids: Sequence[UUID], *, cause_id: UUID, reason: str | None) -> None:
    """Withdraw these images for good, and delete those that are still in the corpus. Call `lock` before.

    From this commit on, every output that drew from one of them is withdrawn, also one that is stored later. The
    sweeper deletes the files later. cause_id: the image that was named; the others were made of it.
    """
    images.remove_all(session, image_ids)
    rows = [{"image_id": image_id, "cause_id": cause_id, "reason": reason} for image_id in image_ids]
    session.execute(upsert(WithdrawnImage).on_conflict_do_nothing(), rows)
