"""Searching the corpus, without HTTP."""

import base64
import binascii
import hashlib
import io
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.services import images as corpus
from api_service.services import views
from shared import retrieval
from shared.cache import get_cache_manager
from shared.capabilities import resolve_mode
from shared.contracts.generation import Mode
from shared.contracts.search import (
    ImageFilter,
    PlannedReference,
    RagSearchQuery,
    RagSearchResponse,
    SearchRequest,
    SearchResponse,
)
from shared.db import images, spaces, workers
from shared.db.images import Vector
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection
from shared.errors import (
    EmbeddingError,
    EmbeddingUnavailableError,
    ModelNotFoundError,
    ReferenceUnavailableError,
)
from shared.imaging import UploadDecoder, open_image
from shared.messaging.embedding_rpc import Answer, embed_image, embed_texts
from shared.settings import get_settings

QUERY_IMAGE_SIDE = 512
"""Longest side, in pixels, of an image to look like: CLIP sees less, and the broker need not carry more."""


def images_like(request: SearchRequest, *, caller: Caller, decoder: UploadDecoder) -> bytes:
    """The images of a collection nearest to a text, an image, or both: a `SearchResponse` as JSON.

    As JSON, because an answer that is remembered is sent as it is.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        InvalidImageError: and its kinds; the image to look like is none.
        ReferenceUnavailableError: the corpus image to look like is not searchable.
        ValidationError: there is no such collection.
    """
    settings = get_settings().retrieval
    # 1. What is asked, as one vector. No session is open while a worker is waited for.
    with session_scope() as session:
        space = _active_space(session)
        collection = corpus.named(session, request.filter.collection, caller=caller, field="body.filter.collection")
        stored = _stored_vector(session, space, request.image_id, caller=caller) if request.image_id else None
    key = _answer_key(request, space, collection)
    remembered: bytes | None = get_cache_manager().get(key)
    if remembered is not None:
        return remembered
    parts = [] if stored is None else [stored]
    if request.image is not None:
        parts.append(_unit(_in_space(embed_image(_query_image(request.image, decoder)), space)))
    if request.query is not None:
        parts.append(text_vector(request.query, space))
    vector = _unit(np.sum(parts, axis=0))

    # 2. The nearest; more of them when the best are then to be chosen for difference.
    wanted = request.k * retrieval.OVERFETCH if request.diversity else request.k
    with session_scope() as session:
        nearest = images.nearest(
            session,
            space,
            vector,
            k=wanted,
            collection_id=collection.id,
            where=request.filter,
            ef_search=settings.ef_search,
            exact_below=settings.exact_below,
        )
    found = [each for each in nearest.found if request.threshold is None or each.similarity >= request.threshold]
    if request.diversity:
        found = retrieval.diversify(found, k=request.k, diversity=request.diversity)
    response = SearchResponse(
        results=[views.neighbour(each) for each in found],
        requested=request.k,
        shortfall=request.k - len(found),
        embedding_space=space.digest,
        exact=nearest.exact,
    )
    encoded = response.model_dump_json().encode()
    get_cache_manager().set(key, encoded)
    return encoded


def references_for(query: RagSearchQuery, *, caller: Caller) -> RagSearchResponse:
    """What `POST /rag/generate` would condition this prompt on, and why.

    Raises:
        EmbeddingUnavailableError, ModelNotFoundError
        ValidationError: there is no such collection.
    """
    settings = get_settings()
    name = query.model or settings.model.default_generator
    generator = settings.model.generators.get(name)
    if generator is None:
        raise ModelNotFoundError(model=name, models=sorted(settings.model.generators))
    min_similarity = settings.retrieval.min_similarity if query.min_similarity is None else query.min_similarity
    with session_scope() as session:
        space = _active_space(session)
        collection = corpus.named(session, query.collection, caller=caller, field="query.collection")
    vector = text_vector(query.prompt, space)
    with session_scope() as session:
        plan = retrieval.plan(
            session,
            space,
            vector,
            k=min(query.k or settings.retrieval.default_k, generator.max_references),
            min_similarity=min_similarity,
            collection_id=collection.id,
            where=ImageFilter(collection=query.collection, tags=query.tags),
            settings=settings.retrieval,
        )
        known = workers.capabilities(session).get(name)
    mode, reason = Mode.AUTO, "No worker has loaded this model yet, so the mode is chosen when the job runs."
    if known is not None:
        used = [reference for reference in plan if reference.used]
        captions = sum(reference.found.image.caption is not None for reference in used)
        mode, reason = resolve_mode(known[0], Mode.AUTO, references=len(used), captions=captions)
    return RagSearchResponse(
        prompt=query.prompt,
        references=[
            PlannedReference(
                **dict(views.neighbour(reference.found)),
                used=reference.used,
                reason=reference.reason,
                weight=reference.weight,
            )
            for reference in plan
        ],
        min_similarity=min_similarity,
        mode=mode,
        mode_reason=reason,
        embedding_space=space.digest,
    )


def text_vector(text: str, space: Space) -> Vector:
    """The vector of a text, L2-normalised, shape (space.dim,): remembered, or asked of an embed worker.

    Raises:
        EmbeddingUnavailableError
    """
    key = f"text-vector:{space.digest}:{hashlib.sha256(text.encode()).hexdigest()}"
    remembered: Vector | None = get_cache_manager().get(key)
    if remembered is not None:
        return remembered
    vector = _unit(_in_space(embed_texts([text]), space))
    get_cache_manager().set(key, vector, ttl=get_settings().cache.embedding_ttl_s)
    return vector


def _answer_key(request: SearchRequest, space: Space, collection: Collection) -> str:
    """Holds the collection's version as Postgres has it, so that no change of an image can be missed."""
    asked = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    return f"search:{space.digest}:{collection.id}:{collection.version}:{asked}"


def _active_space(session: Session) -> Space:
    space = spaces.find_active(session)
    if space is None:
        raise EmbeddingUnavailableError("No embed worker has started yet, so nothing can be searched.")
    return space


def _stored_vector(session: Session, space: Space, image_id: UUID, *, caller: Caller) -> Vector:
    images.get(session, image_id, owner_id=caller.owner_id)
    stored = images.vector_of(session, space, image_id)
    if stored is None:
        raise ReferenceUnavailableError("This image is not searchable yet.", image_ids=[str(image_id)])
    return stored[0]


def _query_image(encoded: str, decoder: UploadDecoder) -> bytes:
    """A file no larger than what a worker looks at, from one that anybody may have sent."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise problems.mistake("body.image", "base64", "Must be base64.") from None
    decoded = decoder.decode(data)
    if max(decoded.width, decoded.height) <= QUERY_IMAGE_SIDE:
        return decoded.data
    picture = open_image(decoded.data)
    picture.thumbnail((QUERY_IMAGE_SIDE, QUERY_IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _in_space(answer: Answer, space: Space) -> Vector:
    if answer.space != space.digest:
        raise EmbeddingUnavailableError("The embed worker that answered has not the active embedding space.")
    vector: Vector = answer.vectors[0]
    return vector


def _unit(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise EmbeddingError("The query has no direction to look in.")
    return (vector / length).astype(np.float32)
