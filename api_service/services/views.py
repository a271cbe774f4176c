"""Converts database rows to the contracts that the API returns."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy.orm import Session

from api_service.http.urls import api_address
from shared.contracts.collections import CollectionView, GrantedAccess, GrantView
from shared.contracts.common import ImageFormat
from shared.contracts.images import ImageDescription, ImageState, ImageView
from shared.contracts.jobs import (
    EventType,
    EventView,
    JobError,
    JobKind,
    JobState,
    JobView,
    JobWarning,
    Lane,
    OutputView,
    Progress,
    ReferenceImageView,
    ReferenceKind,
    Replay,
    UsedReference,
    WithdrawnView,
)
from shared.contracts.safety import SafetyRecord
from shared.contracts.search import Neighbour
from shared.contracts.webhooks import DeliveryState, DeliveryView
from shared.db import outputs, queue_position, reference_images, throughput, withdrawals
from shared.db.collections import Details, defaults_of
from shared.db.images import ScoredImage
from shared.db.tables import (
    Collection,
    CollectionGrant,
    Image,
    Job,
    JobEvent,
    Output,
    OutputReference,
    ReferenceImage,
    WebhookDelivery,
)
from shared.db.throughput import Throughput
from shared.db.withdrawals import Withdrawal
from shared.recent import Recent
from shared.singleton import process_singleton

THROUGHPUT_TTL_S = 2


def job(session: Session, row: Job, *, progress: Progress | None = None) -> JobView:
    """Return a job with its outputs, its queue position and its progress."""
    view = jobs(session, [row])[0]
    if view.state is JobState.QUEUED:
        return with_queue_position(session, row, view)
    return view.model_copy(update={"progress": progress}) if view.state is JobState.PROCESSING else view


def with_queue_position(session: Session, row: Job, view: JobView) -> JobView:
    """Return the view of a queued job with its queue position and its estimated start."""
    ahead = queue_position.queue_position(session, row)
    return view.model_copy(update=_queue_fields(session, row, jobs_ahead=ahead))


def new_job(session: Session, row: Job, *, jobs_ahead: int) -> JobView:
    """Return a job that this transaction has inserted. jobs_ahead: its queue position."""
    pictures = reference_images.list_by_job(session, [row.id]) if row.parameters.get("reference_images") else {}
    view = _job(row, outputs=[], pictures=pictures.get(row.id, []))
    return view.model_copy(update=_queue_fields(session, row, jobs_ahead=jobs_ahead))


def jobs(session: Session, rows: Sequence[Job]) -> list[JobView]:
    """Return jobs with their outputs, in order. Their queue positions are left out, because each needs a query."""
    # Only these states can have outputs. A failed job has none.
    ended = [row.id for row in rows if row.state == JobState.SUCCEEDED]
    rows_by_job = outputs.list_by_job(session, ended) if ended else {}
    output_rows = [each for of_job in rows_by_job.values() for each in of_job]
    views_by_id = {each.id: each for each in outputs_of(session, output_rows)}
    with_pictures = [row.id for row in rows if row.parameters.get("reference_images")]
    pictures_by_job = reference_images.list_by_job(session, with_pictures) if with_pictures else {}
    return [
        _job(
            row,
            outputs=[views_by_id[each.id] for each in rows_by_job.get(row.id, [])],
            pictures=pictures_by_job.get(row.id, []),
        )
        for row in rows
    ]


def _job(row: Job, *, outputs: list[OutputView], pictures: Sequence[ReferenceImage]) -> JobView:
    parameters = row.parameters
    return JobView(
        id=row.id,
        kind=JobKind(row.kind),
        state=JobState(row.state),
        lane=list(Lane)[row.lane],
        model=row.model,
        prompt=parameters["prompt"],
        attempt=row.attempt,
        seq=row.last_seq,
        retry_of=row.retry_of,
        replay_of=row.replay_of,
        bulk_id=row.bulk_id,
        parameters=parameters,
        reference_images=[
            _reference_image(each, described)
            for each, described in zip(pictures, parameters.get("reference_images", []), strict=False)
        ],
        resolution=row.resolution,
        warnings=_warnings(row.resolution),
        safety=_safety(row.safety),
        error=JobError.model_validate(row.error, extra="ignore") if row.error else None,
        outputs=outputs,
        metadata=row.job_metadata,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        timings=row.timings or {},
        url=api_address(f"/jobs/{row.id}"),
        events_url=api_address(f"/jobs/{row.id}/events"),
    )


def _queue_fields(session: Session, row: Job, *, jobs_ahead: int) -> dict[str, Any]:
    pace = recent_throughput().get(row.model, lambda: throughput.measure(session, row.model))
    start_in_s = pace.start_in_s(jobs_ahead)
    if start_in_s is not None:
        due_in_s = (row.run_after - datetime.now(UTC)).total_seconds() if row.run_after is not None else 0
        start_in_s = round(max(start_in_s, due_in_s), 1)
    return {"queue_position": jobs_ahead, "estimated_start_s": start_in_s}


@process_singleton
def recent_throughput() -> Recent[Throughput]:
    """The throughput of each model. All waiting clients need it."""
    return Recent(THROUGHPUT_TTL_S)


def event(row: JobEvent) -> EventView:
    return EventView(seq=row.seq, type=EventType(row.type), at=row.at, data=row.data)


def _reference_image(row: ReferenceImage, described: dict[str, Any]) -> ReferenceImageView:
    """described: the picture in the parameters of its job."""
    return ReferenceImageView(
        id=row.id,
        sha256=row.sha256,
        weight=described["weight"],
        caption=described["caption"],
        format=row.format,
        width=row.width,
        height=row.height,
        size_bytes=row.size_bytes,
        content_url=api_address(f"/reference-images/{row.id}/content"),
        thumbnail_url=api_address(f"/reference-images/{row.id}/thumbnail"),
    )


def outputs_of(session: Session, rows: Sequence[Output]) -> list[OutputView]:
    """Return outputs with their references, in order."""
    if not rows:
        return []
    ids = [row.id for row in rows]
    references, withdrawn = outputs.list_references(session, ids), withdrawals.find(session, ids)
    return [_output(row, references.get(row.id, []), withdrawn.get(row.id)) for row in rows]


def withdrawn(withdrawal: Withdrawal | None) -> WithdrawnView | None:
    return None if withdrawal is None else WithdrawnView(at=withdrawal.at, reason=withdrawal.reason)


def _output(row: Output, references: Sequence[OutputReference], withdrawal: Withdrawal | None) -> OutputView:
    stands = withdrawal is None
    # Releases before concepts recorded none.
    concepts = {each["image_id"]: each.get("concepts", []) for each in row.provenance.get("references", [])}
    return OutputView(
        id=row.id,
        job_id=row.job_id,
        index=row.index,
        seed=row.seed,
        width=row.width,
        height=row.height,
        format=ImageFormat(row.format),
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        favourite=row.favourite,
        created_at=row.created_at,
        content_url=api_address(f"/generations/{row.id}/content") if stands else None,
        thumbnail_url=api_address(f"/generations/{row.id}/thumbnail") if stands else None,
        withdrawn=withdrawn(withdrawal),
        references=[
            UsedReference(
                kind=ReferenceKind(each.kind),
                image_id=each.image_id,
                sha256=each.sha256,
                similarity=each.similarity,
                weight=each.weight,
                pinned=each.pinned,
                caption=each.caption if stands else None,
                concepts=concepts.get(str(each.image_id), []) if stands else [],
            )
            for each in references
        ],
        safety=_safety(row.provenance.get("safety")),
        warnings=_warnings(row.provenance) if stands else [],
        replay=Replay.model_validate(row.replay, extra="ignore") if row.replay is not None and stands else None,
        provenance=row.provenance if stands else {},
    )


def _safety(record: Any) -> SafetyRecord | None:
    return SafetyRecord.model_validate(record, extra="ignore") if record else None


def _warnings(record: dict[str, Any] | None) -> list[JobWarning]:
    return [JobWarning.model_validate(each, extra="ignore") for each in (record or {}).get("warnings", [])]


def delivery(row: WebhookDelivery, type: str) -> DeliveryView:  # noqa: A002 - the field's name
    state = DeliveryState(row.state)
    return DeliveryView(
        id=row.id,
        job_id=row.job_id,
        seq=row.seq,
        type=type,
        url=row.url,
        state=state,
        attempts=row.attempts,
        last_status=row.last_status,
        last_error=row.last_error,
        due_at=row.due_at if state is DeliveryState.PENDING else None,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )


def image(row: Image, collection: str) -> ImageView:
    return ImageView(
        id=row.id,
        collection=collection,
        state=ImageState(row.state),
        error_code=row.error_code,
        caption=row.caption,
        tags=row.tags,
        licence=row.licence,
        source=row.source,
        attributes=row.attributes,
        file_description=None if row.file_description is None else ImageDescription(**row.file_description),
        filename=row.filename,
        format=row.format,
        width=row.width,
        height=row.height,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=row.created_at,
        url=api_address(f"/images/{row.id}"),
        content_url=api_address(f"/images/{row.id}/content"),
        thumbnail_url=api_address(f"/images/{row.id}/thumbnail"),
    )


def collection(row: Collection, details: Details) -> CollectionView:
    return CollectionView(
        id=row.id,
        name=details.name,
        owner=None if row.shared else details.owner,
        access=details.access,
        description=row.description,
        defaults=defaults_of(row),
        images=details.images,
        created_at=row.created_at,
        url=api_address(f"/collections/{row.id}"),
    )


def grant(row: CollectionGrant, owner: str) -> GrantView:
    access = GrantedAccess(row.access)
    return GrantView(collection_id=row.collection_id, owner=owner, access=access, created_at=row.created_at)


def scored_image(found: ScoredImage) -> Neighbour:
    row = found.image
    return Neighbour(
        image_id=row.id,
        similarity=None if math.isnan(found.similarity) else found.similarity,
        found_by=list(found.found_by),
        caption=row.caption,
        tags=row.tags,
        source=row.source,
        licence=row.licence,
        width=row.width,
        height=row.height,
        sha256=row.sha256,
        created_at=row.created_at,
        content_url=api_address(f"/images/{row.id}/content"),
        thumbnail_url=api_address(f"/images/{row.id}/thumbnail"),
    )
