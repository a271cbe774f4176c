"""Pictures that requests bring as references of their own jobs: check, store, copy and read them."""

import base64
import binascii
import hashlib
from collections.abc import Sequence
from uuid import UUID, uuid4

from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.http.concurrency import decoding
from api_service.services.stored_blobs import NewBlob
from shared.contracts.common import ImageFormat
from shared.contracts.generation import ResolvedReferenceImage, SentReferenceImage
from shared.db import reference_images, withdrawals
from shared.db.session import session_scope
from shared.db.tables import ReferenceImage
from shared.errors import InvalidImageError, ReferenceUnavailableError
from shared.imaging import DecodedImage, UploadDecoder
from shared.storage import reference_key, reference_thumbnail_key


def resolve(sent: Sequence[SentReferenceImage]) -> list[ResolvedReferenceImage]:
    """Return the pictures of a request as its job records them. They are not decoded.

    Raises:
        ValidationError: a picture is not base64.
    """
    return [
        ResolvedReferenceImage(
            sha256=hashlib.sha256(_file(each, index)).hexdigest(), weight=each.weight, caption=each.caption or None
        )
        for index, each in enumerate(sent)
    ]


def decode(sent: Sequence[SentReferenceImage], *, caller: Caller, decoder: UploadDecoder) -> list[DecodedImage]:
    """Decode the pictures of a request as an upload is decoded.

    Raises:
        InvalidImageError: a picture is not an image that the service accepts; `errors` names the field.
        DecoderBusyError: too many images are being decoded at once.
    """
    return [_decode(each, index, caller, decoder) for index, each in enumerate(sent)]


def new_blobs(decoded: Sequence[DecodedImage]) -> dict[str, NewBlob]:
    """Return the blobs of the pictures and of their thumbnails, by key."""
    blobs = {}
    for image in decoded:
        blobs[_blob_key(image)] = NewBlob(image.data, image.format.media_type)
        blobs[_thumbnail_key(image)] = NewBlob(image.thumbnail, ImageFormat.WEBP.media_type)
    return blobs


def add(session: Session, decoded: Sequence[DecodedImage], *, job_id: UUID) -> None:
    """Add the rows of the pictures of a job.

    Raises:
        ReferenceUnavailableError: a picture is an output that was withdrawn.
    """
    if not decoded:
        return
    withdrawals.delay_withdrawals(session)
    session.add_all(
        ReferenceImage(
            id=uuid4(),
            job_id=job_id,
            position=position,
            sha256=image.sha256,
            blob_key=_blob_key(image),
            thumbnail_key=_thumbnail_key(image),
            format=image.format,
            width=image.width,
            height=image.height,
            size_bytes=len(image.data),
        )
        for position, image in enumerate(decoded)
    )
    session.flush()  # the next statement reads the rows
    withdrawals.record_sources_of_pictures(session, job_id)
    _refuse_withdrawn(session, job_id)


def _refuse_withdrawn(session: Session, job_id: UUID) -> None:
    withdrawn = withdrawals.withdrawn_pictures(session, job_id)
    if withdrawn:
        raise ReferenceUnavailableError(
            "A picture of the request is an output that was withdrawn.", image_ids=[str(each) for each in withdrawn]
        )


def copy(session: Session, *, from_job_id: UUID, to_job_id: UUID, only: Sequence[UUID] | None = None) -> None:
    """Give a job the pictures of another one.

    only: ids of the pictures to copy, in order; `None`: all.

    Raises:
        ReferenceUnavailableError: a picture does not exist any more, or is an output that was withdrawn.
    """
    pictures = reference_images.lock_by_job(session, from_job_id)
    if pictures:
        withdrawals.delay_withdrawals(session)
        _refuse_withdrawn(session, from_job_id)
    if only is not None:
        by_id = {picture.id: picture for picture in pictures}
        missing = [str(reference_id) for reference_id in only if reference_id not in by_id]
        if missing:
            raise ReferenceUnavailableError(image_ids=missing)
        pictures = [by_id[reference_id] for reference_id in only]
    reference_images.copy(session, pictures, job_id=to_job_id)


def get_row(reference_id: UUID, *, caller: Caller) -> ReferenceImage:
    """Return the database row of a picture.

    Raises:
        ResourceNotFoundError: no job of the caller has a picture with this id.
        OutputWithdrawnError: it is an output that was withdrawn.
    """
    with session_scope() as session:
        return reference_images.get(session, reference_id, owner_id=caller.owner_id)


def _file(sent: SentReferenceImage, index: int) -> bytes:
    try:
        return base64.b64decode(sent.data, validate=True)
    except (ValueError, binascii.Error):
        raise problems.field_error(_field(index), "base64", "Must be base64.") from None


def _decode(sent: SentReferenceImage, index: int, caller: Caller, decoder: UploadDecoder) -> DecodedImage:
    try:
        with decoding(caller.owner_id):
            return decoder.decode(_file(sent, index), owner=caller.owner_id)
    except InvalidImageError as error:
        error.errors = [{"field": _field(index), "code": error.code, "message": error.message}]
        error.message = f"Reference image {index + 1}: {error.message}"
        raise


def _field(index: int) -> str:
    return f"body.reference_images.{index}.data"


def _blob_key(image: DecodedImage) -> str:
    return reference_key(image.sha256, image.format, image.data)


def _thumbnail_key(image: DecodedImage) -> str:
    return reference_thumbnail_key(image.sha256, image.thumbnail)
