"""Use cases that search the corpus: by text, by image, and the references that a generation would use."""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import numpy as np
from sqlalchemy.orm import Session

from api_service.http import problems
from api_service.http.auth import Caller
from api_service.http.concurrency import decoding
from api_service.services import plans, views
from api_service.services.collections import find_collection
from api_service.services.generation import split_texts
from shared import prompt_planner, retrieval
from shared.cache import get_cache_manager
from shared.capabilities import default_references, resolve_mode
from shared.concepts import searched_texts, wordings
from shared.contracts.generation import Mode
from shared.contracts.search import (
    ImageFilter,
    PlannedReference,
    RagSearchQuery,
    RagSearchResponse,
    SearchMode,
    SearchRequest,
    SearchResponse,
)
from shared.db import calibrations, images, spaces, workers
from shared.db.collections import defaults_of
from shared.db.images import Vector
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection
from shared.errors import (
    EmbeddingError,
    EmbeddingUnavailableError,
    NoReferenceError,
    ReferenceUnavailableError,
    ResourceNotFoundError,
)
from shared.imaging import UploadDecoder, open_image
from shared.messaging.embedding_rpc import embed_image, embed_texts
from shared.settings import get_settings
from shared.vectors import l2_normalised

QUERY_IMAGE_SIDE = 512
"""Longest side, in pixels, of a query image. CLIP uses fewer pixels, and larger messages would load the broker."""


def search_images(request: SearchRequest, *, caller: Caller, decoder: UploadDecoder) -> bytes:
    """Return the images of a collection that match texts, images, or both: a `SearchResponse` as JSON.

    It is JSON because cached answers are stored and sent in this form.

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time.
        InvalidImageError: the query image is not an image that the service accepts.
        DecoderBusyError: too many images are being decoded at once.
        ResourceNotFoundError: no corpus image that the caller may see has the id `image_id`.
        ReferenceUnavailableError: the corpus image with this id is not searchable.
        ValidationError: no collection has the requested name, a query image is not base64, or the parts of the query
            cancel each other.
    """
    settings = get_settings().retrieval
    # No session is open during the wait for a worker. These reads need no transaction: to begin and end one takes
    # as long as they do.
    parts = _query_parts(request)
    with session_scope(single_read=True) as session:
        space = _find_space(session, request.space, field="body.space")
        collection = find_collection(session, request.filter.collection, caller=caller, field="body.filter.collection")
        mode = _search_mode(request, defaults_of(collection).mode)
        ids = {part.image_id for part in parts if part.image_id is not None}
        stored = {image_id: _vector_of_image(session, space, image_id, caller=caller) for image_id in ids}
    key = _cache_key(request, mode, space, collection)

    def search() -> bytes:
        vector = None
        if mode is not SearchMode.TEXT:
            vector = _query_vector(parts, stored, space, caller=caller, decoder=decoder)
        return _search(request, mode, space, collection.id, vector)

    # Not with a named space: an inactive one gets vectors without a new version of the collection.
    if request.space is not None:
        return search()
    [answer] = get_cache_manager().get_or_compute(
        [key],
        lambda _: [search()],
        read=lambda value: value if isinstance(value, bytes) else None,
        wait_s=settings.text_timeout_s,
    )
    return answer


def _search(
    request: SearchRequest, mode: SearchMode, space: Space, collection_id: UUID, vector: Vector | None
) -> bytes:
    """Search the images, and return a `SearchResponse` as JSON. For diversity more of them are candidates."""
    with session_scope() as session:
        candidates = retrieval.find_candidates(
            session,
            space,
            text=request.words,
            vector=vector,
            k=request.k * retrieval.OVERFETCH if request.diversity else request.k,
            mode=mode,
            collection_id=collection_id,
            where=request.filter,
            settings=get_settings().retrieval,
            threshold=request.threshold,
            without=[part.text for part in request.negative if part.text is not None],
            with_vectors=bool(request.diversity),
        )
    found = candidates.images
    if request.diversity:
        found = retrieval.diversify(found, k=request.k, diversity=request.diversity)
    response = SearchResponse(
        results=[views.scored_image(each) for each in found],
        mode=mode,
        requested=request.k,
        shortfall=request.k - len(found),
        embedding_space=space.digest,
        exact=candidates.exact,
    )
    return response.model_dump_json().encode()


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
    with session_scope() as session:
        space = _find_space(session, query.space, field="query.space")
        calibration = calibrations.find(session, space)
        collection = find_collection(session, where.collection, caller=caller, field="query.collection")
    defaults = defaults_of(collection)
    gate = retrieval.resolve_gate(
        calibration, query.min_similarity, defaults.min_similarity, settings.retrieval.min_similarity
    )
    concepts = query.concept
    if not concepts and query.split_prompt:
        concepts = split_texts(query.prompt, prompt_planner.concepts_of)
    texts = concepts or [query.prompt]
    avoided = [wording for text in query.avoid for wording in wordings(text)]
    queried = list(dict.fromkeys([*(queried for text in texts for queried in searched_texts(text)), *avoided]))
    vectors = dict(zip(queried, text_vectors(queried, space), strict=True))
    with session_scope() as session:
        known = workers.list_capabilities(session).get(name)
        loaded = known[0] if known else None
        most = generator.max_references if loaded is None else loaded.max_references
        default_k = default_references(
            loaded, Mode.AUTO, default=defaults.k or settings.retrieval.default_k, concepts=len(texts)
        )
        plan = retrieval.plan_concepts(
            session,
            space,
            [retrieval.ConceptQuery.of(text, vectors, collection_id=collection.id, where=where) for text in texts],
            most=min(query.k or default_k, generator.max_references, most),
            gate=gate,
            settings=settings.retrieval,
            mode=defaults.mode or SearchMode.HYBRID,
            avoided=retrieval.Avoided({text: vectors[text] for text in avoided}, frozenset(query.avoid_ids)),
        )
    mode, reason = Mode.AUTO, "No worker has loaded this model yet, so the mode is chosen when the job runs."
    if known is not None:
        used = plan.used.candidates
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
                concepts=list(reference.concepts),
            )
            for reference in plan.candidates
        ],
        concepts=plan.concepts,
        plan=plans.issue(
            plan,
            prompt=query.prompt,
            model=name,
            space=space,
            where=where,
            min_similarity=gate.min_similarity,
            caller=caller,
        ),
        min_similarity=gate.min_similarity,
        mode=mode,
        mode_reason=reason,
        embedding_space=space.digest,
    )


def text_vector(text: str, space: Space) -> Vector:
    """Return the vector of a text, as `text_vectors` does."""
    return text_vectors([text], space)[0]


def text_vectors(texts: Sequence[str], space: Space) -> list[Vector]:
    """Return the vectors of texts from the cache or, in one batch, from an embed worker.

    Each is L2-normalised, shape (space.dim,).

    Raises:
        EmbeddingUnavailableError: no embed worker answered in time, or one with another embedding space answered.
    """
    settings = get_settings()
    texts_by_key = {f"text-vector:{space.digest}:{hashlib.sha256(text.encode()).hexdigest()}": text for text in texts}
    vectors = get_cache_manager().get_or_compute(
        list(texts_by_key),
        lambda keys: [_normalised(vector) for vector in embed_texts([texts_by_key[key] for key in keys], space)],
        read=lambda value: np.asarray(value, np.float32).reshape(space.dim),
        ttl=settings.cache.embedding_ttl_s,
        wait_s=settings.retrieval.text_timeout_s,
    )
    by_text = dict(zip(texts_by_key.values(), vectors, strict=True))
    return [by_text[text] for text in texts]


@dataclass(frozen=True)
class _Part:
    """One text or image of a query. field: its place in the request."""

    text: str | None
    image_id: UUID | None
    image: str | None
    weight: float
    field: str
    unwanted: bool = False


def _query_parts(request: SearchRequest) -> list[_Part]:
    parts = [
        _Part(each.text, each.image_id, each.image, each.weight, f"body.{name}.{index}", unwanted=name == "negative")
        for name, sent in (("mix", request.mix), ("negative", request.negative))
        for index, each in enumerate(sent)
    ]
    if request.query is not None:
        parts.append(_Part(request.query, None, None, 1.0, "body.query"))
    if request.image_id is not None or request.image is not None:
        parts.append(_Part(None, request.image_id, request.image, 1.0, "body"))
    return parts


def _query_vector(
    parts: Sequence[_Part],
    stored: Mapping[UUID, Vector],
    space: Space,
    *,
    caller: Caller,
    decoder: UploadDecoder,
) -> Vector:
    """Return the vector of a query: L2-normalised, shape (space.dim,). stored: vectors of its corpus images."""
    texts = [part.text for part in parts if part.text is not None]
    of_texts = dict(zip(texts, text_vectors(texts, space), strict=True)) if texts else {}
    of_images = dict[str, Vector]()
    wanted, unwanted = list[tuple[Vector, float]](), list[tuple[Vector, float]]()
    for part in parts:
        if part.text is not None:
            vector = of_texts[part.text]
        elif part.image_id is not None:
            vector = stored[part.image_id]
        else:
            encoded = part.image or ""
            if encoded not in of_images:
                png = _decode_query_image(encoded, field=part.field, caller=caller, decoder=decoder)
                of_images[encoded] = _normalised(embed_image(png, space))
            vector = of_images[encoded]
        (unwanted if part.unwanted else wanted).append((vector, part.weight))
    combined = retrieval.combine(wanted, unwanted)
    if combined is None:
        field, message = ("body.negative", "It leaves nothing of") if unwanted else ("body.mix", "It cancels")
        raise problems.field_error(field, "contradiction", f"{message} the rest of the query.")
    return combined


def _search_mode(request: SearchRequest, preferred: SearchMode | None) -> SearchMode:
    """Return the mode of a search. preferred: the default of its collection, which may not fit the request."""
    if request.mode is not None:
        return request.mode
    if request.words is None:
        return SearchMode.VECTOR
    if preferred is SearchMode.TEXT and request.needs_vectors:
        return SearchMode.HYBRID
    return preferred or SearchMode.HYBRID


def _cache_key(request: SearchRequest, mode: SearchMode, space: Space, collection: Collection) -> str:
    """The key contains the collection's version in Postgres, so an answer from before a change is never used."""
    request_digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
    prefix = get_settings().api.path_prefix  # of the addresses in the answer
    return f"search:{space.digest}:{collection.id}:{collection.version}:{mode}:{request_digest}{prefix}"


def _find_space(session: Session, name: str | None, *, field: str) -> Space:
    """Return the embedding space that a request names, or the active one.

    Raises:
        EmbeddingUnavailableError: no space is active yet.
        ValidationError: no space has this name. field: path of the request field with the name.
    """
    if name is not None:
        try:
            return spaces.get(session, name)
        except ResourceNotFoundError as error:
            raise problems.field_error(field, "unknown", error.message) from None
    space = spaces.find_active(session)
    if space is None:
        raise EmbeddingUnavailableError("No embed worker has started yet, so nothing can be searched.")
    return space


def _vector_of_image(session: Session, space: Space, image_id: UUID, *, caller: Caller) -> Vector:
    images.get(session, image_id, principal=caller.principal)
    stored = images.find_vector(session, space, image_id)
    if stored is None:
        raise ReferenceUnavailableError("This image is not searchable yet.", image_ids=[str(image_id)])
    return stored[0]


def _decode_query_image(encoded: str, *, field: str, caller: Caller, decoder: UploadDecoder) -> bytes:
    """Decode an untrusted file in base64; return a clean file of at most `QUERY_IMAGE_SIDE` pixels per side.

    field: the place in the request whose `image` it is.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
    except (ValueError, binascii.Error):
        raise problems.field_error(f"{field}.image", "base64", "Must be base64.") from None
    with decoding(caller.owner_id):
        decoded = decoder.decode(data, owner=caller.owner_id)
    if max(decoded.width, decoded.height) <= QUERY_IMAGE_SIDE:
        return decoded.data
    picture = open_image(decoded.data)
    picture.thumbnail((QUERY_IMAGE_SIDE, QUERY_IMAGE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _normalised(vector: Vector) -> Vector:
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0:
        raise EmbeddingError("The vector of the query is zero or not finite.")
    return l2_normalised(vector)
