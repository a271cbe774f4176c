"""Use cases of the corpus: add, list, read, change and delete images."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.http.concurrency import decoding
from api_service.http.multipart import SentFile
from api_service.services import file_description, views
from api_service.services.collections import ensure_collection, find_collection
from api_service.services.stored_blobs import NewBlob, session_for_rows_of
from shared import metrics
from shared.contracts.admin import AuditAction
from shared.contracts.collections import Access
from shared.contracts.common import ImageFormat, OnInvalid, Page
from shared.contracts.images import (
    FileOutcome,
    ImageDelete,
    ImageDescription,
    ImagePatch,
    ImageQuery,
    ImageState,
    ImageView,
    UploadedFile,
    UploadFields,
    UploadResponse,
    WithdrawalView,
)
from shared.db import audit, collections, images, jobs, withdrawals
from shared.db.session import session_scope
from shared.db.tables import Collection, Image
from shared.errors import AuthorizationError, InvalidImageError, ResourceNotFoundError
from shared.imaging import DecodedImage, UploadDecoder
from shared.messaging.coalesce import notify_embed_workers_soon
from shared.messaging.job_updates import publish_job_update
from shared.settings import get_settings
from shared.storage import image_key, thumbnail_key

MAX_FILENAME_LENGTH = 200


@dataclass(frozen=True)
class CheckedFile:
    """A file that is a valid image, with its description."""

    file: SentFile
    image: DecodedImage
    description: ImageDescription


def upload(files: list[SentFile], fields: UploadFields, *, caller: Caller, decoder: UploadDecoder) -> UploadResponse:
    """Store all images, or none. They are searchable as soon as an embed worker has computed their vectors.

    For a file that the collection already has, the answer contains the existing image. With `on_invalid: skip` invalid
    files are left out, and all others are stored or none.

    Raises:
        ValidationError: no file was sent, or too many, or `each` has another number of entries.
        InvalidImageError: a file is not an image that the service accepts; `context` names the file.
        DecoderBusyError: too many images are being decoded at once.
        UploadInterruptedError: storing the images took too long.
        StorageError: the blob store failed.
        DatabaseConnectionError: the database does not answer.
    """
    max_files = get_settings().api.max_upload_files
    if not 1 <= len(files) <= max_files:
        raise problems.field_error("form.file", "file_count", f"Send 1 to {max_files} files under the name `file`.")
    if fields.each and len(fields.each) != len(files):
        raise problems.field_error("form.each", "length", f"Has {len(fields.each)} entries for {len(files)} files.")
    # 1. Check every file before storing any.
    outcomes = [_check_file(file, index, fields, caller, decoder) for index, file in enumerate(files)]
    checked = [outcome for outcome in outcomes if isinstance(outcome, CheckedFile)]
    if not checked:
        return _upload_response(outcomes, [], fields.collection)
    # 2. Store all blobs, then write all rows in one transaction.
    with session_for_rows_of(new_blobs(checked)) as session:
        collection = ensure_collection(session, fields.collection, caller=caller, field="form.collection")
        name = collections.name_for(session, collection, principal=caller.principal)
        response = _upload_response(outcomes, add_rows(session, collection, checked), name)
    after_upload(response.images, created=response.created)
    return response


def after_upload(stored: Sequence[ImageView], *, created: int) -> None:
    """Count stored images, and notify the embed workers if an image has no vector yet. Call it after the commit."""
    metrics.increment_counter(metrics.UPLOADS, created, {"outcome": "created"})
    metrics.increment_counter(metrics.UPLOADS, len(stored) - created, {"outcome": "existing"})
    if any(image.state is ImageState.PENDING for image in stored):
        notify_embed_workers_soon()


def list_page(query: ImageQuery, *, caller: Caller) -> Page[ImageView]:
    """Return a page of a collection's images, newest first.

    Raises:
        ValidationError: no collection has the requested name.
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        collection = find_collection(session, query.collection, caller=caller, field="query.collection")
        name = collections.name_for(session, collection, principal=caller.principal)
        rows, next_cursor = images.list_page(session, query, collection_id=collection.id)
        return Page(items=[views.image(row, name) for row in rows], next_cursor=next_cursor)


def get(image_id: UUID, *, caller: Caller) -> ImageView:
    """Return an image.

    Raises:
        ResourceNotFoundError: no image that the caller may see has this id.
    """
    with session_scope() as session:
        row, collection = images.get(session, image_id, principal=caller.principal)
        return views.image(row, collections.name_for(session, collection, principal=caller.principal))


def get_row(image_id: UUID, *, caller: Caller) -> Image:
    """Return the database row of an image.

    Raises:
        ResourceNotFoundError: no image that the caller may see has this id.
    """
    with session_scope() as session:
        return images.get(session, image_id, principal=caller.principal)[0]


def update(image_id: UUID, patch: ImagePatch, *, caller: Caller) -> ImageView:
    """Set the fields of an image that `patch` contains.

    A `file_description` is merged with the values that people have set: see `file_description.merge`.

    Raises:
        ValidationError: `file_description` comes with other fields, or the merged values are not valid.
        ResourceNotFoundError: no image that the caller may see has this id.
        CollectionAccessError: the caller may not change images of its collection.
    """
    with session_scope() as session:
        row, collection = images.get(session, image_id, principal=caller.principal, needs=Access.WRITE, lock=True)
        values: ImagePatch | ImageDescription = patch
        names: Iterable[str] = patch.model_fields_set
        if patch.file_description is not None:
            if len(patch.model_fields_set) > 1:
                raise problems.field_error("body.file_description", "exclusive", "Send it without other fields.")
            names = ImageDescription.model_fields
            current = {name: getattr(row, name) for name in names}
            values = file_description.merge(current, row.file_description, patch.file_description)
            row.file_description = patch.file_description.model_dump()
        for name in names:
            value = getattr(values, name)
            # `None` empties a field. Tags and attributes have empty values of their own.
            setattr(row, name, {"tags": [], "attributes": {}}.get(name) if value is None else value)
        images.bump_collection_version(session, row.collection_id)
        return views.image(row, collections.name_for(session, collection, principal=caller.principal))


def delete(image_id: UUID, *, caller: Caller) -> None:
    """Delete an image; no search and no new generation uses it from then on.

    Raises:
        ResourceNotFoundError: no image that the caller may see has this id.
        CollectionAccessError: the caller may not change images of its collection.
    """
    with session_scope() as session:
        row, _ = images.get(session, image_id, principal=caller.principal, needs=Access.WRITE, lock=True)
        images.remove(session, row)
        audit.record(
            session, caller, action=AuditAction.IMAGE_DELETED, subject=image_id, collection_id=str(row.collection_id)
        )


def withdraw(image_id: UUID, request: ImageDelete, *, caller: Caller) -> WithdrawalView:
    """Delete an image, and withdraw all outputs that drew from it or from an image made of such an output.

    An image that was deleted before can be withdrawn by a key with the scope `admin`.

    Raises:
        ResourceNotFoundError: no image that the caller may see has this id.
        CollectionAccessError: the caller may not change images of its collection.
        AuthorizationError: outputs or images of other owners are among them, and the key lacks the scope `admin`.
    """
    with session_scope() as session:
        if not request.dry_run:
            withdrawals.lock(session)
        _check_withdrawal(session, image_id, caller)
        followed = withdrawals.follow(session, image_id)
        image_ids = followed.image_ids
        present, foreign = withdrawals.count_images(session, image_ids, principal=caller.principal)
        needs_admin = foreign > 0 or not followed.owner_ids <= {caller.owner_id}
        ended: list[UUID] = []
        if not request.dry_run:
            if needs_admin and "admin" not in caller.scopes:
                raise AuthorizationError(
                    "Outputs or images of other owners are among them, so this needs the scope 'admin'.", scope="admin"
                )
            withdrawals.withdraw(session, image_ids, cause_id=image_id, reason=request.reason)
            ended = jobs.fail_using(session, image_ids)
            audit.record(
                session,
                caller,
                action=AuditAction.IMAGE_WITHDRAWN,
                subject=image_id,
                reason=request.reason,
                outputs=followed.outputs,
                owners=len(followed.owner_ids),
                image_ids=[str(each) for each in image_ids],
                job_ids=[str(each) for each in ended],
            )
    for job_id in ended:
        publish_job_update(job_id)
    return WithdrawalView(
        image_id=image_id,
        reason=request.reason,
        dry_run=request.dry_run,
        outputs=followed.outputs,
        owners=len(followed.owner_ids),
        images=present,
        running_jobs=len(ended),
        needs_admin=needs_admin,
    )


def _check_withdrawal(session: Session, image_id: UUID, caller: Caller) -> None:
    try:
        images.get(session, image_id, principal=caller.principal, needs=Access.WRITE)
    except ResourceNotFoundError:
        alive = select(Image.id).join(Collection).where(Image.id == image_id, Collection.deleted_at.is_(None))
        was_deleted = session.scalar(alive) is None and withdrawals.is_known(session, image_id)
        if not was_deleted or "admin" not in caller.scopes:
            raise


def _check_file(
    file: SentFile, index: int, fields: UploadFields, caller: Caller, decoder: UploadDecoder
) -> CheckedFile | UploadedFile:
    try:
        with decoding(caller.owner_id):
            image = decoder.decode(file.data, owner=caller.owner_id)
    except InvalidImageError as error:
        metrics.increment_counter(metrics.UPLOADS, labels={"outcome": error.code})
        if fields.on_invalid is OnInvalid.SKIP:
            return UploadedFile(outcome=FileOutcome.SKIPPED, code=error.code, detail=error.message)
        error.context.update(file=file.name, index=index)
        name = _clean_filename(file.name)
        error.message = f"File {index + 1}{f' ({name})' if name else ''}: {error.message}"
        raise
    description = fields.each[index] if fields.each else ImageDescription()
    common = {name: getattr(fields, name) for name in ImageDescription.model_fields}
    own = {name: getattr(description, name) for name in description.model_fields_set}
    return CheckedFile(file, image, ImageDescription.model_construct(**common | own))


def _upload_response(
    outcomes: Sequence[CheckedFile | UploadedFile], rows: Sequence[tuple[Image, bool]], collection: str
) -> UploadResponse:
    """rows: row of each `CheckedFile` of `outcomes`, in the same order, and whether it is new."""
    next_row = iter(rows)
    files = [outcome if isinstance(outcome, UploadedFile) else _uploaded_file(*next(next_row)) for outcome in outcomes]
    counts = Counter(file.outcome for file in files)
    return UploadResponse(
        images=[views.image(row, collection) for row, _ in rows],
        files=files,
        created=counts[FileOutcome.CREATED],
        existing=counts[FileOutcome.EXISTING],
    )


def _uploaded_file(row: Image, is_new: bool) -> UploadedFile:
    return UploadedFile(outcome=FileOutcome.CREATED if is_new else FileOutcome.EXISTING, image_id=row.id)


def new_blobs(checked: Sequence[CheckedFile]) -> dict[str, NewBlob]:
    """Return the blobs of the images and of their thumbnails, by key."""
    blobs = {}
    for image in (each.image for each in checked):
        blobs[_blob_key(image)] = NewBlob(image.data, image.format.media_type)
        blobs[_thumbnail_key(image)] = NewBlob(image.thumbnail, ImageFormat.WEBP.media_type)
    return blobs


def _blob_key(image: DecodedImage) -> str:
    return image_key(image.sha256, image.format, image.data)


def _thumbnail_key(image: DecodedImage) -> str:
    return thumbnail_key(image.sha256, image.thumbnail)


def add_rows(session: Session, collection: Collection, checked: Sequence[CheckedFile]) -> list[tuple[Image, bool]]:
    """Return the row of each file, in the order of the files, and whether it is new."""
    # Rows are added in the order of their digests. Otherwise two uploads of the same files could deadlock.
    order = sorted(range(len(checked)), key=lambda index: checked[index].image.sha256)
    rows = {index: _add_row(session, collection, checked[index]) for index in order}
    return [rows[index] for index in range(len(checked))]


def _add_row(session: Session, collection: Collection, checked: CheckedFile) -> tuple[Image, bool]:
    image, description = checked.image, checked.description
    return images.add(
        session,
        collection.id,
        sha256=image.sha256,
        blob_key=_blob_key(image),
        thumbnail_key=_thumbnail_key(image),
        format=image.format,
        width=image.width,
        height=image.height,
        size_bytes=len(image.data),
        perceptual_hash=image.perceptual_hash,
        caption=description.caption or None,
        tags=description.tags,
        source=description.source,
        licence=description.licence,
        attributes=description.attributes,
        file_description=description.model_dump() | {"caption": description.caption or None},
        filename=_clean_filename(checked.file.name),
    )


def _clean_filename(name: str | None) -> str | None:
    """Return the last part of the client's file name, without control characters; `None`: nothing is left."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    clean = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "", last)[-MAX_FILENAME_LENGTH:].strip()
    return clean if clean.strip(".") else None
