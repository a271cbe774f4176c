"""Use cases that search the corpus: by text, by image, and the references that a generation would use."""

import base64
import binascii
import hashlib
import io
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.http.concurrency import decoding
from api_service.services import views
from api_service.services.images import find_collection
from shared import retrieval
from shared.cache import get_cache_manager
from shared.capabilities import default_references, resolve_mode
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
    NoReferenceError,
    ReferenceUnavailableError,
)
from shared.imaging import UploadDecoder, open_image
from shared.messaging.embedding_rpc import Answer, embed_image, embed_texts
from shared.settings import get_settings
from shared.vectors import l2_normalised

QUERY_IMAGE_SIDE = 512
"""Longest side, in pixels, of a query image. CLIP uses fewer pixels, and larger messages would load the broker."""


def search_images(request: SearchRequest, *, caller: Caller, decoder: UploadDecoder) -> bytes:
    """Return the images of a collection nearest to a text, an image, or both: a `SearchResponse` as JSON.

    It is JSON because cached answers are stored and sent in this form.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        InvalidImageError: the query image is not an image that the service accepts.
        DecoderBusyError: too many images are being decoded at once.
        ResourceNotFoundError: no corpus image that the caller may see has the id `image_id`.
        ReferenceUnavailableError: the corpus image with this id is not searchable.
        ValidationError: no collection has the requested name, or the query image is not base64.
    """
    settings = get_settings().retrieval
    # 1. The query as one vector. No session is open during the wait for a worker.
    with session_scope() as session:
        space = _active_space(session)
        collection = find_collection(session, request.filter.collection, caller=caller, field="body.filter.collection")
        stored = _vector_of_image(session, space, request.image_id, caller=caller) if request.image_id else None
    key = _cache_key(request, space, collection)
    cached: bytes | None = get_cache_manager().get(key, lambda value: value if isinstance(value, bytes) else None)
    if cached is not None:
        return cached
    parts = [] if stored is None else [stored]
    if request.image is not None:
        parts.append(
            _normalised(
                _vector_in_space(embed_image(_decode_query_image(request.image, caller=caller, decoder=decoder)), space)
            )
        )
    if request.query is not None:
        parts.append(text_vector(request.query, space))
    vector = _normalised(np.sum(parts, axis=0))

    # 2. The nearest images. For diversity more of them are candidates.
    candidates = request.k * retrieval.OVERFETCH if request.diversity else request.k
    with session_scope() as session:
        nearest = images.nearest(
            session,
            space,
            vector,
            k=candidates,
            collection_id=collection.id,
            where=request.filter,
            ef_search=settings.ef_search,
            exact_below=settings.exact_below,
        )
    found = [each for each in nearest.images if request.threshold is None or each.similarity >= request.threshold]
    if request.diversity:
        found = retrieval.diversify(found, k=request.k, diversity=request.diversity)
    response = SearchResponse(
        results=[views.scored_image(each) for each in found],
        requested=request.k,
        shortfall=request.k - len(found),
        embedding_space=space.digest,
        exact=nearest.exact,
    )
    encoded = response.model_dump_json().encode()
    get_cache_manager().set(key, encoded)
    return encoded


def plan_references(query: RagSearchQuery, *, caller: Caller, where: ImageFilter | None = None) -> RagSearchResponse:
    """Return the references that `POST /rag/generate` would use for this prompt, with weights and reasons.

    where: the filter of the generation; `None`: collection and tags of the query.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        ModelNotFoundError: no model of this name is configured.
        ValidationError: no collection has the requested name.
    """
    where = where or ImageFilter(collection=query.collection, tags=query.tags)
    settings = get_settings()
    name = query.model or settings.model.default_generator
    generator = settings.model.generator(name)
    min_similarity = settings.retrieval.min_similarity if query.min_similarity is None else query.min_similarity
    with session_scope() as session:
        space = _active_space(session)
        collection = find_collection(session, where.collection, caller=caller, field="query.collection")
    vector = text_vector(query.prompt, space)
    with session_scope() as session:
        known = workers.list_capabilities(session).get(name)
        loaded = known[0] if known else None
        most = generator.max_references if loaded is None else loaded.max_references
        default_k = default_references(loaded, Mode.AUTO, default=settings.retrieval.default_k)
        plan = retrieval.plan(
            session,
            space,
            vector,
            k=min(query.k or default_k, generator.max_references, most),
            min_similarity=min_similarity,
            collection_id=collection.id,
            where=where,
            settings=settings.retrieval,
        )
    mode, reason = Mode.AUTO, "No worker has loaded this model yet, so the mode is chosen when the job runs."
    if known is not None:
        used = [reference for reference in plan if reference.used]
        captions = sum(reference.scored.image.caption is not None for reference in used)
        try:
            mode, reason = resolve_mode(known[0], Mode.AUTO, references=len(used), captions=captions)
        except NoReferenceError as error:  # the plan shows why no reference is used
            mode, reason = Mode.REFERENCE, str(error)
    return RagSearchResponse(
        prompt=query.prompt,
        references=[
            PlannedReference(
                **dict(views.scored_image(reference.scored)),
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
    """Return the vector of a text from the cache or from an embed worker: L2-normalised, shape (space.dim,).

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time, or one with another embedding space answered.
    """
    key = f"text-vector:{space.digest}:{hashlib.sha256(text.encode()).hexdigest()}"
    cached: Vector | None = get_cache_manager().get(key, lambda value: np.asarray(value, np.float32).reshape(space.dim))
    if cached is not None:
        return cached
    vector = _normalised(_vector_in_space(embed_texts([text]), space))
    get_cache_manager().set(key, vector, ttl=get_settings().cache.embedding_ttl_s)
    return vector


def _cache_key(request: SearchRequest, space: Space, collection: Collection) -> str:
    """The key contains the collection's version in Postgres, so an answer from before a change is never used."""
    request_digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    prefix = get_settings().api.path_prefix  # of the addresses in the answer
    return f"search:{space.digest}:{collection.id}:{collection.version}:{request_digest}{prefix}"


def _active_space(session: Session) -> Space:
    space = spaces.find_active(session)
    if space is None:
        raise EmbeddingUnavailableError("No embed worker has started yet, so nothing can be searched.")
    return space


def _vector_of_image(session: Session, space: Space, image_id: UUID, *, caller: Caller) -> Vector:
    images.get(session, image_id, owner_id=caller.owner_id)
    stored = images.find_vector(session, space, image_id)
    if stored is None:
        raise ReferenceUnavailableError("This image is not searchable yet.", image_ids=[str(image_id)])
    return stored[0]


def _decode_query_image(encoded: str, *, caller: Caller, decoder: UploadDecoder) -> bytes:
    """Decode an untrusted file in base64; return a clean file of at most `QUERY_IMAGE_SIDE` pixels per side."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise problems.field_error("body.image", "base64", "Must be base64.") from None
    with decoding(caller.owner_id):
        decoded = decoder.decode(data, owner=caller.owner_id)
    if max(decoded.width, decoded.height) <= QUERY_IMAGE_SIDE:
        return decoded.data
    picture = open_image(decoded.data)
    picture.thumbnail((QUERY_IMAGE_SIDE, QUERY_IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _vector_in_space(answer: Answer, space: Space) -> Vector:
    if answer.space != space.digest or answer.vectors.shape[1:] != (space.dim,):
        raise EmbeddingUnavailableError("The embed worker that answered does not use the active embedding space.")
    vector: Vector = answer.vectors[0]
    return vector


def _normalised(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise EmbeddingError("The vector of the query is zero or not finite.")
    return l2_normalised(vector)
