"""Use cases of outputs, the generated images: list, read, remember and delete."""

import base64
import hashlib
from dataclasses import dataclass
from typing import Any, Self
from uuid import UUID

from api_service.http.auth import Caller
from api_service.http.concurrency import decoding
from api_service.http.multipart import SentFile
from api_service.services import images, search, views
from api_service.services.collections import ensure_collection
from api_service.services.stored_blobs import session_for_rows_of
from shared.contracts.admin import AuditAction
from shared.contracts.common import Page
from shared.contracts.images import ImageDescription, ImageView
from shared.contracts.jobs import OutputView
from shared.contracts.outputs import OutputPatch, OutputQuery, RememberRequest
from shared.contracts.search import SearchMode, SearchRequest, SearchResponse
from shared.db import audit, collections, idempotency, outputs, withdrawals
from shared.db.session import session_scope
from shared.db.tables import Output
from shared.errors import AuthorizationError
from shared.imaging import UploadDecoder
from shared.storage import get_blobs

REMEMBER_ROUTE = "remember"
"""Name under which the idempotency keys of `remember` are stored."""
MAX_LIKE = 100
"""Largest number of images of the corpus that a search by a picture compares with outputs."""
GENERATION_ATTRIBUTE = "generation_id"
"""Attribute of a remembered image: the id of its output."""


@dataclass(frozen=True)
class Remembered:
    """The corpus image of an output."""

    image: ImageView
    created: bool
    """False: the collection already had the image."""
    already_answered: bool = False
    """The idempotency key belongs to an earlier request, and this is the answer to that request."""

    @classmethod
    def stored(cls, answer: dict[str, Any]) -> Self:
        image = ImageView.model_validate(answer["image"], extra="ignore")
        return cls(image, answer["created"], already_answered=True)

    def answer(self) -> dict[str, Any]:
        return {"image": self.image.model_dump(mode="json"), "created": self.created}


def list_page(query: OutputQuery, *, caller: Caller) -> Page[OutputView]:
    """Return a page of the caller's outputs, newest first.

    Raises:
        InvalidCursorError: the cursor was not issued by this service.
    """
    with session_scope() as session:
        rows, next_cursor = outputs.list_page(session, query, owner_id=caller.owner_id)
        return Page(items=views.outputs_of(session, rows), next_cursor=next_cursor)


def get(generation_id: UUID, *, caller: Caller) -> OutputView:
    """Return an output with its references.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
        OutputWithdrawnError: the output was withdrawn.
    """
    with session_scope() as session:
        return views.outputs_of(session, [outputs.get(session, generation_id, owner_id=caller.owner_id)])[0]


def get_row(generation_id: UUID, *, caller: Caller) -> Output:
    """Return the database row of an output.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
        OutputWithdrawnError: the output was withdrawn.
    """
    with session_scope() as session:
        return outputs.get(session, generation_id, owner_id=caller.owner_id)


def find_like(picture: bytes, *, caller: Caller, decoder: UploadDecoder) -> list[OutputView]:
    """Return the caller's outputs with this file, then outputs that look like it, most similar first.

    Only outputs that are images of the collection `shared` can be found by their look: no other output has a vector.
    Without the scope `search`, only the file itself is found.

    Raises:
        InvalidImageError: the file is not an image that the service accepts.
        EmbeddingUnavailableError: no embed worker answered in time.
        DecoderBusyError: too many images are being decoded at once.
    """
    digests = [hashlib.sha256(picture).hexdigest()]
    if "search" in caller.scopes:
        request = SearchRequest(image=base64.b64encode(picture).decode(), mode=SearchMode.VECTOR, k=MAX_LIKE)
        answer = search.search_images(request, caller=caller, decoder=decoder)
        digests += [each.sha256 for each in SearchResponse.model_validate_json(answer).results]
    with session_scope() as session:
        rows = outputs.list_by_digest(session, digests, owner_id=caller.owner_id)
        return views.outputs_of(session, sorted(rows, key=lambda row: digests.index(row.sha256)))


def change(generation_id: UUID, patch: OutputPatch, *, caller: Caller) -> OutputView:
    """Mark an output as a favourite of its owner, or end that.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
        OutputWithdrawnError: the output was withdrawn.
    """
    with session_scope() as session:
        row = outputs.get(session, generation_id, owner_id=caller.owner_id, lock=True)
        row.favourite = patch.favourite
        return views.outputs_of(session, [row])[0]


def remember(
    generation_id: UUID,
    request: RememberRequest,
    *,
    caller: Caller,
    decoder: UploadDecoder,
    key: str | None = None,
) -> Remembered:
    """Store an output as an image of the corpus, as an upload of its file does. The image names the output.

    Raises:
        AuthorizationError: the caller must not change the corpus.
        ResourceNotFoundError: the caller has no output with this id, or its file is gone.
        OutputWithdrawnError: the output was withdrawn.
        IdempotencyKeyReusedError: `key` was sent with another request in the last 24 hours.
        ImageTooLargeError: the output's file is larger than an upload may be.
        DecoderBusyError, UploadInterruptedError, StorageError, DatabaseConnectionError: as an upload.
    """
    if "corpus:write" not in caller.scopes:
        raise AuthorizationError("This API key lacks the scope 'corpus:write'.", scope="corpus:write")
    fingerprint = hashlib.sha256(f"{generation_id} {request.model_dump_json()}".encode()).hexdigest()
    # 1. Read and decode the output's file. Decoding drops its provenance record, which contains the prompt.
    with session_scope() as session:
        if key is not None:
            known = idempotency.find_answer(
                session, owner_id=caller.owner_id, route=REMEMBER_ROUTE, key=key, fingerprint=fingerprint
            )
            if known is not None:
                withdrawals.refuse_withdrawn(session, generation_id)
                return Remembered.stored(known)
        row = outputs.get(session, generation_id, owner_id=caller.owner_id)
        blob_key, name = row.blob_key, f"{row.id}.{row.format}"
    file = SentFile(name, get_blobs().get(blob_key))
    with decoding(caller.owner_id):
        decoded = decoder.decode(file.data, owner=caller.owner_id)
    description = ImageDescription(
        caption=request.caption, tags=request.tags, attributes={GENERATION_ATTRIBUTE: str(generation_id)}
    )
    checked = [images.CheckedFile(file, decoded, description)]
    # 2. Store the image. The answer for the idempotency key is stored in the same transaction.
    with session_for_rows_of(images.new_blobs(checked)) as session:
        if key is not None:
            known = idempotency.begin(
                session, owner_id=caller.owner_id, route=REMEMBER_ROUTE, key=key, fingerprint=fingerprint
            )
            if known is not None:
                return Remembered.stored(known)
        withdrawals.delay_withdrawals(session)
        # Locked: an image without its sources would not be found by their withdrawal.
        outputs.get(session, generation_id, owner_id=caller.owner_id, lock=True)
        collection = ensure_collection(session, request.collection, caller=caller, field="body.collection")
        ((image, is_new),) = images.add_rows(session, collection, checked)
        withdrawals.record_sources(session, image.id, generation_id=generation_id)
        name = collections.name_for(session, collection, principal=caller.principal)
        remembered = Remembered(views.image(image, name), created=is_new)
        if key is not None:
            idempotency.store_answer(
                session, remembered.answer(), owner_id=caller.owner_id, route=REMEMBER_ROUTE, key=key
            )
    images.after_upload([remembered.image], created=int(is_new))
    return remembered


def delete(generation_id: UUID, *, caller: Caller) -> None:
    """Delete an output; its job stays.

    Raises:
        ResourceNotFoundError: the caller has no output with this id.
        OutputWithdrawnError: the output was withdrawn.
    """
    with session_scope() as session:
        row = outputs.get(session, generation_id, owner_id=caller.owner_id, lock=True)
        session.delete(row)
        audit.record(session, caller, action=AuditAction.OUTPUT_DELETED, subject=row.id, job_id=str(row.job_id))
