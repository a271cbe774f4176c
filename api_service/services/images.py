"""Adding, changing and removing images of the corpus, without HTTP."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from uuid import UUID

from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.services import views
from shared import metrics
from shared.contracts.common import ImageFormat, OnInvalid, Page
from shared.contracts.images import (
    FileOutcome,
    ImageDescription,
    ImagePatch,
    ImageQuery,
    ImageState,
    ImageView,
    UploadedFile,
    UploadFields,
    UploadResponse,
)
from shared.db import blobs, images, owners
from shared.db.session import session_scope
from shared.db.tables import Collection, Image
from shared.errors import InvalidImageError, ResourceNotFoundError, UploadInterruptedError
from shared.imaging import DecodedImage, UploadDecoder
from shared.messaging.coalesce import embed_bell
from shared.settings import get_settings
from shared.storage import get_blobs, image_key, thumbnail_key

SHARED = "shared"
FILENAME_LENGTH = 200


@dataclass(frozen=True)
class SentFile:
    name: str | None
    data: bytes


@dataclass(frozen=True)
class _Checked:
    """A file that is an image, and what is said of it."""

    file: SentFile
    image: DecodedImage
    description: ImageDescription


def upload(files: list[SentFile], fields: UploadFields, *, caller: Caller, decoder: UploadDecoder) -> UploadResponse:
    """Store images, all or none; they become searchable as soon as an embed worker has their vectors.

    A file that the collection already has is answered with the image it has. With `on_invalid: skip` files that are
    no images are left out, and all others are stored or none.

    Raises:
        ValidationError: no file, or too many, or `each` is not about as many.
        InvalidImageError: and its kinds; `context` says which file.
        DecoderBusyError, StorageError, DatabaseConnectionError
    """
    most = get_settings().api.max_upload_files
    if not 1 <= len(files) <= most:
        raise problems.mistake("form.file", "file_count", f"Send 1 to {most} files under the name `file`.")
    if fields.each and len(fields.each) != len(files):
        raise problems.mistake("form.each", "length", f"Has {len(fields.each)} entries for {len(files)} files.")
    # 1. Every file is checked before anything of it is kept.
    outcomes = [_checked(file, index, fields, decoder) for index, file in enumerate(files)]
    checked = [outcome for outcome in outcomes if isinstance(outcome, _Checked)]
    if not checked:
        return _response(outcomes, [], fields.collection)
    # 2. Bytes before rows: a blob without a row is swept away, a row without its blob would be broken. Claimed first,
    # so that it is not swept in between.
    with session_scope() as session:
        claim_id = blobs.claim(session, _keys(checked))
    for image in (each.image for each in checked):
        get_blobs().put(image_key(image.sha256, image.format), image.data, media_type=image.format.media_type)
        get_blobs().put(thumbnail_key(image.sha256), image.thumbnail, media_type=ImageFormat.WEBP.media_type)
    # 3. All rows in one transaction.
    with session_scope() as session:
        if not blobs.settle(session, claim_id):
            raise UploadInterruptedError
        collection = _writable(session, fields.collection, caller=caller)
        response = _response(outcomes, _add_all(session, collection, checked), collection.name)
    metrics.increment_counter("uploads_total", response.created, {"outcome": "created"})
    metrics.increment_counter("uploads_total", response.existing, {"outcome": "existing"})
    if any(image.state is ImageState.PENDING for image in response.images):
        embed_bell().pull()
    return response


def page(query: ImageQuery, *, caller: Caller) -> Page[ImageView]:
    """
    Raises:
        ValidationError: there is no such collection.
        InvalidCursorError
    """
    with session_scope() as session:
        collection = named(session, query.collection, caller=caller, field="query.collection")
        rows, next_cursor = images.page(session, query, collection_id=collection.id)
        return Page(items=[views.image(row, collection.name) for row in rows], next_cursor=next_cursor)


def image(image_id: UUID, *, caller: Caller) -> ImageView:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        row, collection = images.get(session, image_id, owner_id=caller.owner_id)
        return views.image(row, collection.name)


def row(image_id: UUID, *, caller: Caller) -> Image:
    """
    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        return images.get(session, image_id, owner_id=caller.owner_id)[0]


def change(image_id: UUID, patch: ImagePatch, *, caller: Caller) -> ImageView:
    """Give an image new values for the fields that `patch` names.

    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        row, collection = images.get(session, image_id, owner_id=caller.owner_id)
        for name in patch.model_fields_set:
            value = getattr(patch, name)
            # Tags and attributes are never unknown, only empty.
            setattr(row, name, {"tags": [], "attributes": {}}.get(name) if value is None else value)
        images.touch(session, row.collection_id)
        return views.image(row, collection.name)


def remove(image_id: UUID, *, caller: Caller) -> None:
    """Take an image out of every search and future generation at once.

    Raises:
        ResourceNotFoundError
    """
    with session_scope() as session:
        row, _ = images.get(session, image_id, owner_id=caller.owner_id)
        images.remove(session, row)


def named(session: Session, name: str, *, caller: Caller, field: str) -> Collection:
    """The collection that the request's `field` names: the caller's own, or the shared one.

    Raises:
        ValidationError: there is none.
    """
    try:
        return images.get_collection(session, name, owner_id=caller.owner_id)
    except ResourceNotFoundError as error:
        raise problems.mistake(field, "unknown", error.message) from None


def _checked(file: SentFile, index: int, fields: UploadFields, decoder: UploadDecoder) -> _Checked | UploadedFile:
    try:
        image = decoder.decode(file.data)
    except InvalidImageError as error:
        metrics.increment_counter("uploads_total", labels={"outcome": error.code})
        if fields.on_invalid is OnInvalid.SKIP:
            return UploadedFile(outcome=FileOutcome.SKIPPED, code=error.code, detail=error.message)
        error.context.update(file=file.name, index=index)
        raise
    description = fields.each[index] if fields.each else ImageDescription()
    for_all = {name: getattr(fields, name) for name in ImageDescription.model_fields}
    said = {name: getattr(description, name) for name in description.model_fields_set}
    return _Checked(file, image, ImageDescription.model_construct(**for_all | said))


def _response(
    outcomes: Sequence[_Checked | UploadedFile], rows: Sequence[tuple[Image, bool]], collection: str
) -> UploadResponse:
    """rows: of the checked ones, in their order."""
    remaining = iter(rows)
    files = [outcome if isinstance(outcome, UploadedFile) else _stored(*next(remaining)) for outcome in outcomes]
    counts = Counter(file.outcome for file in files)
    return UploadResponse(
        images=[views.image(row, collection) for row, _ in rows],
        files=files,
        created=counts[FileOutcome.CREATED],
        existing=counts[FileOutcome.EXISTING],
    )


def _stored(row: Image, is_new: bool) -> UploadedFile:
    return UploadedFile(outcome=FileOutcome.CREATED if is_new else FileOutcome.EXISTING, image_id=row.id)


def _keys(checked: Sequence[_Checked]) -> set[str]:
    images = [each.image for each in checked]
    return {key for image in images for key in (image_key(image.sha256, image.format), thumbnail_key(image.sha256))}


def _writable(session: Session, name: str, *, caller: Caller) -> Collection:
    if name == SHARED:
        return images.get_collection(session, name, owner_id=caller.owner_id)
    return owners.ensure_collection(session, name, owner_id=caller.owner_id)


def _add_all(session: Session, collection: Collection, checked: Sequence[_Checked]) -> list[tuple[Image, bool]]:
    """A row for each file, in the order they were sent, and whether it is new."""
    # Added in the order of their content: two uploads of the same files would otherwise wait for each other's rows.
    order = sorted(range(len(checked)), key=lambda index: checked[index].image.sha256)
    rows = {index: _add(session, collection, checked[index]) for index in order}
    return [rows[index] for index in range(len(checked))]


def _add(session: Session, collection: Collection, checked: _Checked) -> tuple[Image, bool]:
    image, description = checked.image, checked.description
    return images.add(
        session,
        collection.id,
        sha256=image.sha256,
        blob_key=image_key(image.sha256, image.format),
        thumbnail_key=thumbnail_key(image.sha256),
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
        filename=_clean(checked.file.name),
    )


def _clean(name: str | None) -> str | None:
    """The last part of a client's file name, without what no file name should hold."""
    last = PurePosixPath((name or "").replace("\\", "/")).name
    clean = re.sub(r"[\x00-\x1f\x7f\ud800-\udfff]", "", last)[-FILENAME_LENGTH:].strip()
    return clean if clean.strip(".") else None
