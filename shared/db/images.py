"""Corpus queries: add, list, embed and find images.

An image is `pending` until an embed worker of the active space stores its vector. A worker claims a pending image for
some seconds: this is its lease, which it renews while it works. When the worker stops, the lease expires, and
`take_back_expired` makes the image available to other workers. Each claim is a new attempt, and only the latest attempt
may store the result.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Self
from uuid import UUID, uuid4

import numpy as np
from numpy.typing import NDArray
from pgvector.sqlalchemy import BIT, HALFVEC
from pydantic import ValidationError
from sqlalchemy import (
    ColumnElement,
    Integer,
    LargeBinary,
    Select,
    Text,
    and_,
    case,
    cast,
    column,
    delete,
    exists,
    func,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from shared.contracts.collections import Access
from shared.contracts.images import ImageQuery, ImageState
from shared.contracts.search import FoundBy, ImageFilter
from shared.contracts.search_tuning import IndexKind, SearchTuning
from shared.db import leasing, paging, spaces
from shared.db.collections import Principal, access_of, require, visible_to
from shared.db.count_cache import get_count_cache
from shared.db.spaces import Space
from shared.db.tables import Collection, Image, SpaceAttempt
from shared.errors import EmbeddingCrashedError, ResourceNotFoundError
from shared.metrics import RETRIEVAL_DURATION, RETRIEVAL_SIMILARITY, time_operation

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]
STORED_FILE = ("blob_key", "thumbnail_key", "format", "width", "height", "size_bytes", "perceptual_hash")
UNMEASURED_EF_SEARCH = 100
UNMEASURED_EXACT_BELOW = 100_000
MAX_EF_SEARCH = 1000
"""The largest `hnsw.ef_search` of pgvector."""
SEARCH_CONFIG = text(
    "select set_config('hnsw.ef_search', :width, true), set_config('hnsw.iterative_scan', 'strict_order', true)"
)
SHARE_OF_COLLECTION = text("""
    select frequency from pg_stats,
        unnest(cast(cast(most_common_vals as text) as text[]), most_common_freqs) as common (value, frequency)
    where schemaname = current_schema() and tablename = 'images' and attname = 'collection_id' and value = :id
""")
MOST_PERCENT = 90
"""From this share of all images on, a collection counts as all of them: the index examines few others."""
FEW_OF = 5
"""Images are few if they are at most one of so many of the space: the cost of a lookup against reading all vectors."""


@dataclass(frozen=True)
class ImageClaim:
    """The right to store an image's vector or failure. It holds until another attempt takes the image over."""

    image_id: UUID
    attempt: int

    @classmethod
    def of(cls, image: Image) -> Self:
        return cls(image.id, image.attempt)


class FoundImage(NamedTuple):
    """The columns of `Image` that the users of a search read. An entity would take several times as long to load."""

    id: UUID
    sha256: str
    blob_key: str
    thumbnail_key: str
    format: str
    width: int
    height: int
    size_bytes: int
    perceptual_hash: int
    caption: str | None
    tags: list[str]
    source: str | None
    licence: str | None
    created_at: datetime


IMAGES = Image.__table__
"""For statements that load no entities: SQLAlchemy's ORM takes about 0.3 ms for each statement with `Image`."""
FOUND_COLUMNS = [IMAGES.c[name] for name in FoundImage._fields]
NO_VECTOR: Vector = np.zeros(0, np.float32)


@dataclass(frozen=True)
class ScoredImage:
    """An image with its similarity to a query.

    similarity: cosine, in [-1, 1]; NaN without a query. vector: shape (dim,), float32, L2-normalised; NO_VECTOR if the
    search was not asked for it. norm: its length before normalisation; NaN without a vector. found_by: the searches
    that found it. word_share: part of the query's words, by weight, that its caption and tags have, in [0, 1]; 0 if it
    was not found by words; negative if it has none of them and other images have some.
    """

    image: Image | FoundImage
    similarity: float
    vector: Vector
    norm: float
    found_by: tuple[FoundBy, ...] = (FoundBy.VECTOR,)
    word_share: float = 0.0


@dataclass(frozen=True)
class Nearest:
    """The images nearest to a query. exact: every candidate was compared, without the approximate index."""

    images: list[ScoredImage]
    exact: bool


@dataclass(frozen=True)
class Reopened:
    """Images that became `pending` again. next_after: the id after which to look next; None at the end."""

    image_ids: list[UUID]
    next_after: UUID | None


# --- the corpus ---------------------------------------------------------------------------------------------------


def add(session: Session, collection_id: UUID, **columns: Any) -> tuple[Image, bool]:
    """Add an image in state `pending`, or find the image with the same content; True when it is new.

    An image that has failed becomes `pending` again, and names the bytes that have just been stored.
    """
    statement = (
        upsert(Image)
        .values(id=uuid4(), collection_id=collection_id, state=ImageState.PENDING, **columns)
        .on_conflict_do_nothing(index_elements=["collection_id", "sha256"])
        .returning(Image)
    )
    existing = select(Image).where(Image.collection_id == collection_id, Image.sha256 == columns["sha256"])
    existing = existing.execution_options(populate_existing=True)
    stored = {name: value for name, value in columns.items() if name in STORED_FILE}
    while True:
        image = session.scalar(statement)
        if image is not None:
            return image, True
        image = session.scalar(existing)
        if image is not None:
            if image.state != ImageState.FAILED:
                return image, False
            image = session.scalar(
                update(Image)
                .where(Image.id == image.id)
                .values(state=ImageState.PENDING, error_code=None, crashes=0, **stored)
                .returning(Image)
                .execution_options(populate_existing=True)
            )
            if image is not None:
                return image, False
        # The image was deleted between the statements, so the insert can succeed now.


def get(
    session: Session, image_id: UUID, *, principal: Principal, needs: Access = Access.READ, lock: bool = False
) -> tuple[Image, Collection]:
    """The image and its collection, if the principal may see it.

    lock: no other transaction changes or deletes the image until this one ends.

    Raises:
        ResourceNotFoundError: the image does not exist, or is in a collection that the principal may not see.
        CollectionAccessError: the principal may see the collection, but not more.
    """
    statement = (
        select(Image, Collection, access_of(principal))
        .join(Collection, Collection.id == Image.collection_id)
        .where(Image.id == image_id, visible_to(principal))
    )
    row = session.execute(statement.with_for_update(of=Image) if lock else statement).one_or_none()
    if row is None:
        raise ResourceNotFoundError("There is no such image.", image_id=str(image_id))
    require(row[2], needs)
    return row[0], row[1]


def list_page(session: Session, query: ImageQuery, *, collection_id: UUID) -> tuple[list[Image], str | None]:
    """A page of a collection's images, newest first, and the cursor of the next page.

    Raises:
        InvalidCursorError: the cursor was not made by this API.
    """
    statement = select(Image).where(Image.collection_id == collection_id)
    if query.state is not None:
        statement = statement.where(Image.state == query.state)
    if query.tag is not None:
        statement = statement.where(Image.tags.contains([query.tag]))
    if query.source is not None:
        statement = statement.where(Image.source == query.source)
    if query.licence is not None:
        statement = statement.where(Image.licence == query.licence)
    return paging.fetch_page(
        session, statement, created_at=Image.created_at, id=Image.id, cursor=query.cursor, limit=query.limit
    )


def remove(session: Session, image: Image) -> None:
    """Delete an image. From this commit on, no search finds it. The sweeper deletes its bytes later."""
    session.execute(delete(Image).where(Image.id == image.id))
    bump_collection_version(session, image.collection_id)


def remove_all(session: Session, image_ids: Sequence[UUID]) -> None:
    """Delete those of these images that exist, as `remove` does."""
    statement = delete(Image).where(leasing.in_lock_order(Image, Image.id.in_(image_ids)))
    removed = session.scalars(statement.returning(Image.collection_id).execution_options(synchronize_session=False))
    for collection_id in sorted(set(removed)):
        bump_collection_version(session, collection_id)


def bump_collection_version(session: Session, collection_id: UUID) -> None:
    """Raise the collection's version. From this commit on, cached searches of the collection are not used any more."""
    session.execute(update(Collection).where(Collection.id == collection_id).values(version=Collection.version + 1))


# --- embedding ----------------------------------------------------------------------------------------------------


def claim_pending(session: Session, *, limit: int, lease_s: float, space: Space | None = None) -> list[Image]:
    """Claim up to `limit` pending images for `lease_s` seconds, oldest first.

    space: the space of the worker's CLIP. If it is not the active one, nothing is claimed.

    An image whose decoding or embedding had started during a crash is claimed alone, so that its next crash affects no
    other image.
    """
    if space is not None and not spaces.is_active(session, space):
        return []
    waiting = session.execute(
        select(Image.id, Image.crashes)
        .where(_unclaimed())
        .order_by(Image.created_at, Image.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    ).all()
    if not waiting:
        return []
    chosen = waiting[:1] if waiting[0].crashes else [row for row in waiting if not row.crashes]
    statement = (
        update(Image)
        .where(Image.id.in_([row.id for row in chosen]))
        .values(attempt=Image.attempt + 1, model_started=False, lease_until=leasing.from_now(lease_s))
        .returning(Image)
        .execution_options(populate_existing=True)
    )
    return sorted(session.scalars(statement), key=lambda image: (image.created_at, image.id))


def renew(session: Session, claims: Iterable[ImageClaim], *, lease_s: float) -> set[UUID]:
    """Extend the leases of these images to `lease_s` from now; return the ids of the images still leased.

    An image that was handed back or taken back has no lease, and gets none here.
    """
    leased = leasing.in_lock_order(Image, and_(_owned(claims), Image.lease_until.is_not(None)))
    statement = update(Image).where(leased).values(lease_until=leasing.from_now(lease_s)).returning(Image.id)
    return set(session.scalars(statement.execution_options(synchronize_session=False)))


def mark_model_started(session: Session, claims: Iterable[ImageClaim]) -> set[UUID]:
    """Record that the model's work starts: from here on, an expired lease counts as a crash of these images.

    Returns the ids of the images still owned.
    """
    owned = leasing.in_lock_order(Image, _owned(claims))
    statement = update(Image).where(owned).values(model_started=True).returning(Image.id)
    return set(session.scalars(statement.execution_options(synchronize_session=False)))


def hand_back(session: Session, claims: Iterable[ImageClaim]) -> int:
    """Give up the leases of these images, so that other workers can claim them; return how many were still owned."""
    owned = leasing.in_lock_order(Image, _owned(claims))
    statement = update(Image).where(owned).values(lease_until=None, model_started=False).returning(Image.id)
    return len(session.scalars(statement.execution_options(synchronize_session=False)).all())


def any_pending(session: Session) -> bool:
    """Whether a pending image exists that no worker has claimed."""
    return session.scalar(select(Image.id).where(_unclaimed()).limit(1)) is not None


def store_embeddings(
    session: Session, space: Space, claims: Sequence[ImageClaim], vectors: Vector, norms: Vector
) -> list[UUID]:
    """Store vectors and make their images `ready`, that is, searchable; return the ids of the images still owned.

    If another space became active since the claim, the images stay `pending` for a worker of that space.

    vectors: shape (n, space.dim), float32, L2-normalised. norms: shape (n,), lengths before normalisation.
    """
    state = ImageState.READY if spaces.is_active(session, space, lock=True) else ImageState.PENDING
    # The lock orders a concurrent delete: before this (then no vector is stored) or after it (then both are deleted).
    owned = session.execute(
        select(Image.id, Image.collection_id).where(_owned(claims)).order_by(Image.id).with_for_update(key_share=True)
    ).all()
    collections = {row.id: row.collection_id for row in owned}
    rows = [
        {"image_id": claim.image_id, "embedding": vector.tolist(), "norm": float(norm)}
        for claim, vector, norm in zip(claims, vectors, norms, strict=True)
        if claim.image_id in collections
    ]
    if not rows:
        return []
    insert = upsert(space.table)
    session.execute(
        insert.on_conflict_do_update(
            index_elements=["image_id"],
            set_={"embedding": insert.excluded.embedding, "norm": insert.excluded.norm},
        ),
        rows,
    )
    session.execute(
        update(Image)
        .where(Image.id.in_(collections))
        .values(state=state, lease_until=None, error_code=None, model_started=False)
        .execution_options(synchronize_session=False)
    )
    for collection_id in sorted(set(collections.values())):
        bump_collection_version(session, collection_id)
    return list(collections)


def reopen_without_vector(session: Session, space: Space, *, after: UUID | None = None, limit: int) -> Reopened:
    """Make `ready` images without a vector in `space`, the active one, `pending` again.

    Looks at `limit` images whose ids follow `after`, so that a pass over a large corpus has short steps.
    """
    page = select(Image.id).order_by(Image.id).limit(limit)
    ids = session.scalars(page if after is None else page.where(Image.id > after)).all()
    if not ids:
        return Reopened([], None)
    statement = (
        update(Image)
        .where(leasing.in_lock_order(Image, and_(Image.id.between(ids[0], ids[-1]), lacks_vector(space))))
        .values(state=ImageState.PENDING, error_code=None, crashes=0, model_started=False, lease_until=None)
        .returning(Image.id)
        .execution_options(synchronize_session=False)
    )
    reopened = list(session.scalars(statement))
    return Reopened(reopened, ids[-1] if len(ids) == limit else None)


def make_ready(session: Session, space: Space) -> None:
    """Make `pending` and `failed` images `ready` that have a vector in `space`, the active one.

    An embedding of such an image that still runs then stores nothing.
    """
    has_vector = exists().where(space.table.c.image_id == Image.id)
    statement = (
        update(Image)
        .where(leasing.in_lock_order(Image, and_(Image.state != ImageState.READY, has_vector)))
        .values(state=ImageState.READY, error_code=None, crashes=0, model_started=False, lease_until=None)
        .returning(Image.collection_id)
        .execution_options(synchronize_session=False)
    )
    for collection_id in sorted(set(session.scalars(statement))):
        bump_collection_version(session, collection_id)


def count_without_vector(session: Session, space: Space) -> int:
    """How many `ready` images have no vector in this space."""
    return session.scalar(select(func.count()).select_from(Image).where(lacks_vector(space))) or 0


def list_untried(session: Session, space: Space, *, after: UUID, limit: int) -> list[Image]:
    """`ready` images without a vector in this space whose ids follow `after`, by id.

    Images that a worker of the space has claimed, or could not embed, are left out. The lock keeps an image from being
    deleted until the transaction ends.
    """
    tried = exists().where(SpaceAttempt.space_id == space.id, SpaceAttempt.image_id == Image.id)
    statement = select(Image).where(lacks_vector(space), ~tried, Image.id > after).order_by(Image.id).limit(limit)
    return list(session.scalars(statement.with_for_update(read=True, key_share=True, skip_locked=True)))


def add_vectors(
    session: Session, space: Space, image_ids: Sequence[UUID], vectors: Vector, norms: Vector
) -> list[UUID]:
    """Store vectors of images in a space that searches do not use yet; return the ids of the images still there.

    vectors, norms: as in `store_embeddings`.
    """
    known = select(Image.id).where(Image.id.in_(image_ids)).order_by(Image.id)
    there = set(session.scalars(known.with_for_update(key_share=True)))
    rows = [
        {"image_id": image_id, "embedding": vector.tolist(), "norm": float(norm)}
        for image_id, vector, norm in zip(image_ids, vectors, norms, strict=True)
        if image_id in there
    ]
    if rows:
        session.execute(upsert(space.table).on_conflict_do_nothing(index_elements=["image_id"]), rows)
    return list(there)


def mark_embedding_failed(session: Session, space: Space, claim: ImageClaim, *, code: str) -> bool:
    """Set an image to `failed`; False when it was not owned any more. code: the error's code.

    If another space became active since the claim, the image is handed back to a worker of that space.
    """
    if not spaces.is_active(session, space, lock=True):
        return hand_back(session, [claim]) > 0
    statement = (
        update(Image)
        .where(_owned([claim]))
        .values(state=ImageState.FAILED, error_code=code, lease_until=None)
        .returning(Image.id)
    )
    return session.scalar(statement.execution_options(synchronize_session=False)) is not None


def take_back_expired(session: Session, *, max_crashes: int, limit: int = 1000) -> list[tuple[UUID, ImageState]]:
    """Make images with an expired lease available again, or `failed` after `max_crashes` crashes.

    A crash is a lease that expired after the model's work had started. Returns the ids and new states of all these
    images.
    """
    expired = (
        select(Image.id)
        .where(Image.state == ImageState.PENDING, Image.lease_until < func.clock_timestamp())
        .order_by(Image.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    crashes = Image.crashes + cast(Image.model_started, Integer)
    statement = (
        update(Image)
        .where(Image.id.in_(expired.scalar_subquery()))
        .values(
            crashes=crashes,
            state=case((crashes >= max_crashes, ImageState.FAILED), else_=ImageState.PENDING),
            error_code=case((crashes >= max_crashes, EmbeddingCrashedError.code)),
            model_started=False,
            lease_until=None,
        )
        .returning(Image.id, Image.state)
        .execution_options(synchronize_session=False)
    )
    return [(row.id, ImageState(row.state)) for row in session.execute(statement)]


def lacks_vector(space: Space) -> ColumnElement[bool]:
    """The condition on `ready` images that have no vector in this space."""
    vectors = space.table
    return and_(Image.state == ImageState.READY, ~exists().where(vectors.c.image_id == Image.id))


def _unclaimed() -> ColumnElement[bool]:
    # An image with an expired lease still counts as claimed: only `take_back_expired` releases it, and counts crashes.
    return and_(Image.state == ImageState.PENDING, Image.lease_until.is_(None))


def _owned(claims: Iterable[ImageClaim]) -> ColumnElement[bool]:
    return leasing.owned(Image, ((claim.image_id, claim.attempt) for claim in claims), state=ImageState.PENDING)


# --- finding ------------------------------------------------------------------------------------------------------


def find_vector(session: Session, space: Space, image_id: UUID) -> tuple[Vector, float] | None:
    """The stored vector (L2-normalised, shape (dim,)) and its norm; None if the image has no vector in this space."""
    table = space.table
    row = session.execute(select(table.c.embedding, table.c.norm).where(table.c.image_id == image_id)).one_or_none()
    return (as_vector(row.embedding), row.norm) if row is not None else None


def find_by_ids(
    session: Session, space: Space, image_ids: Sequence[UUID], query: Vector | None, *, with_vectors: bool = True
) -> dict[UUID, ScoredImage]:
    """Searchable images by id, with their similarity to `query` (NaN if None). Other ids are left out.

    with_vectors: False: they come without vectors, and `query` must be None.
    """
    table = space.table
    statement = (
        select(*found_columns(space, with_vectors))
        .join(table, table.c.image_id == Image.id)
        .where(Image.id.in_(image_ids), Image.state == ImageState.READY)
    )
    found = {}
    for row in session.execute(statement):
        image, vector, norm = read_found(row, with_vectors)
        similarity = float(vector @ query) if query is not None else float("nan")
        found[image.id] = ScoredImage(image=image, similarity=similarity, vector=vector, norm=norm)
    return found


def filter_searchable(session: Session, space: Space, image_ids: Sequence[UUID], *, principal: Principal) -> set[UUID]:
    """The ids of the images that the principal may see and that a job could use now."""
    statement = (
        select(Image.id)
        .join(Collection, Collection.id == Image.collection_id)
        .join(space.table, space.table.c.image_id == Image.id)
        .where(Image.id.in_(image_ids), Image.state == ImageState.READY, visible_to(principal))
    )
    return set(session.scalars(statement))


@time_operation(RETRIEVAL_DURATION)
def nearest(
    session: Session,
    space: Space,
    vector: Vector,
    *,
    k: int,
    collection_id: UUID,
    where: ImageFilter,
    ef_search: int | None,
    exact_below: int,
    with_vectors: bool = True,
) -> Nearest:
    """The `k` searchable images nearest to `vector`, most similar first. Fewer come only when the filter leaves fewer.

    When the filter leaves fewer than `exact_below` images, each of them is compared. Until
    `tune-search` has measured the index, this holds below UNMEASURED_EXACT_BELOW images. Otherwise the HNSW index is
    scanned iteratively, so that the filter does not shorten the result. If the scan ends early all the same, at
    `hnsw.max_scan_tuples`, each image is compared after all.

    Args:
        space: as read in this transaction or shortly before, because it says how its index is searched.
        vector: shape (space.dim,), float32, L2-normalised. Similarity is cosine, in [-1, 1].
        ef_search: candidates that the index examines; `None`: as `search_tuning` measured.
        with_vectors: False: the images come without their vectors, which is quicker.
    """
    conditions = passing(collection_id, where)
    width = ef_search or _tuned_ef_search(session, space, k, collection_id=collection_id, where=where)
    # An index without a measurement may miss images, and comparing all is quick enough for more of them.
    enough = exact_below if width else max(exact_below, UNMEASURED_EXACT_BELOW)
    left = _count_left(session, collection_id, where, most=enough)
    exact = left < enough
    if not exact:
        found = scan_index(
            session,
            space,
            vector,
            k=k,
            conditions=conditions,
            kind=IndexKind(space.index_kind),
            ef_search=width or UNMEASURED_EF_SEARCH,
            with_vectors=with_vectors,
        )
        exact = len(found) < k
    if exact:
        few = left * FEW_OF <= _estimate_vectors(session, space)
        found = compare_all(session, space, vector, k=k, conditions=conditions, few=few, with_vectors=with_vectors)
    for neighbour in found:
        RETRIEVAL_SIMILARITY.observe(neighbour.similarity)
    return Nearest(images=found, exact=exact)


def _count_left(session: Session, collection_id: UUID, where: ImageFilter, *, most: int) -> int:
    """How many images the filter leaves, at most `most`, now or when a search last counted them."""
    counts, key = get_count_cache(), (collection_id, where.model_dump_json(), most)
    count = counts.find(key)
    if count is None:
        some = select(IMAGES.c.id).where(*passing(collection_id, where)).limit(most).subquery()
        count = session.scalar(select(func.count()).select_from(some)) or 0
        counts.store(key, count)
    return count


def _estimate_vectors(session: Session, space: Space) -> int:
    """How many vectors the space has, as Postgres last estimated; 0: it has not."""
    counts, table = get_count_cache(), space.table.name
    count = counts.find(table)
    if count is None:
        estimate = text("select cast(reltuples as bigint) from pg_class where oid = to_regclass(:table)")
        count = max(0, session.scalar(estimate, {"table": table}) or 0)
        counts.store(table, count)
    return count


def _tuned_ef_search(session: Session, space: Space, k: int, *, collection_id: UUID, where: ImageFilter) -> int | None:
    if space.search_tuning is None:
        return None
    try:
        tuning = SearchTuning.model_validate(space.search_tuning, extra="ignore")
    except ValidationError as error:  # of another release
        logger.warning("search_tuning_unreadable", extra={"cause": str(error)})
        return None
    if tuning.index_kind != space.index_kind:
        return None
    filtered = bool(where.model_dump(exclude={"collection"}, exclude_defaults=True))
    return tuning.ef_search(k, filtered=filtered or not _holds_most(session, collection_id))


def _holds_most(session: Session, collection_id: UUID) -> bool:
    """Whether the collection has MOST_PERCENT of all images, as Postgres last estimated; False: it has not."""
    counts, key = get_count_cache(), ("share of images", collection_id)
    percent = counts.find(key)
    if percent is None:
        percent = int(100 * (session.scalar(SHARE_OF_COLLECTION, {"id": str(collection_id)}) or 0))
        counts.store(key, percent)
    return percent >= MOST_PERCENT


def scan_index(
    session: Session,
    space: Space,
    vector: Vector,
    *,
    k: int,
    conditions: Sequence[ColumnElement[bool]],
    kind: IndexKind,
    ef_search: int,
    with_vectors: bool = True,
) -> list[ScoredImage]:
    """The `k` images that the approximate index finds, most similar first. vector: as in `nearest`."""
    # set_config(..., true) lasts for this transaction only, so the next user of the connection does not inherit it.
    width = max(ef_search, min(k, MAX_EF_SEARCH))
    session.execute(SEARCH_CONFIG, {"width": str(width)})
    table, query = space.table, _halfvec(vector)
    if kind is IndexKind.HALFVEC:
        distance = table.c.embedding.cosine_distance(query)
        found = select(IMAGES.c.id, distance.label("distance")).join(table, table.c.image_id == IMAGES.c.id)
        return _scored(session, space, found.where(*conditions).order_by(distance).limit(k), with_vectors=with_vectors)
    signs = cast(func.binary_quantize(table.c.embedding), BIT(space.dim))
    candidates = (
        select(table.c.image_id)
        .join(IMAGES, IMAGES.c.id == table.c.image_id)
        .where(*conditions)
        .order_by(signs.hamming_distance(cast(func.binary_quantize(query), BIT(space.dim))))
        .limit(width)
    )
    in_candidates = [IMAGES.c.id.in_(candidates)]
    return compare_all(session, space, vector, k=k, conditions=in_candidates, few=True, with_vectors=with_vectors)


def compare_all(
    session: Session,
    space: Space,
    vector: Vector,
    *,
    k: int,
    conditions: Sequence[ColumnElement[bool]],
    few: bool = False,
    with_vectors: bool = True,
) -> list[ScoredImage]:
    """The `k` images of those that fulfil the conditions, most similar first. vector: as in `nearest`.

    few: they are a small part of the space, so that it is quicker to look up the vector of each one. The planner
    would read all vectors: of 100,000 for 5,000 images, this takes twice as long.
    """
    table = space.table
    if few:
        own = select(table.c.embedding).where(table.c.image_id == IMAGES.c.id).offset(0).lateral()
        distance = own.c.embedding.cosine_distance(_halfvec(vector))
        images = select(IMAGES.c.id, distance.label("distance")).join(own, true()).where(*conditions)
    else:
        distance = table.c.embedding.cosine_distance(_halfvec(vector))
        images = select(table.c.image_id.label("id"), distance.label("distance")).where(
            table.c.image_id.in_(select(IMAGES.c.id).where(*conditions))
        )
    # With `+ 0` the planner cannot use the index for the order, which forces the exact comparison.
    nearest = images.order_by(distance + literal(0), column("id")).limit(k)
    return _scored(session, space, nearest, with_vectors=with_vectors)


def _scored(
    session: Session, space: Space, nearest: Select[tuple[UUID, float]], *, with_vectors: bool
) -> list[ScoredImage]:
    """Load the images of a statement that finds their ids and distances. Only these few rows are read whole."""
    few = nearest.subquery("nearest")
    statement = select(*found_columns(space, with_vectors), few.c.distance).join(few, few.c.id == IMAGES.c.id)
    if with_vectors:
        statement = statement.join(space.table, space.table.c.image_id == few.c.id)
    found = []
    for row in session.execute(statement):
        image, vector, norm = read_found(row, with_vectors)
        found.append(ScoredImage(image=image, similarity=1 - row.distance, vector=vector, norm=norm))
    # The index orders by vectors that it has normalised and rounded again, so its order differs in the last digits.
    return sorted(found, key=lambda each: (-each.similarity, each.image.id))


def found_columns(space: Space, with_vectors: bool) -> list[ColumnElement[Any]]:
    """The columns that `read_found` reads. The vector is binary, because its text takes 30 times as long to read."""
    table = space.table
    vector = [func.halfvec_send(table.c.embedding, type_=LargeBinary), table.c.norm] if with_vectors else []
    return [*FOUND_COLUMNS, *vector]


def read_found(row: Sequence[Any], with_vectors: bool) -> tuple[FoundImage, Vector, float]:
    """The image, vector and norm of a row that begins with `found_columns`."""
    image, rest = FoundImage(*row[: len(FOUND_COLUMNS)]), row[len(FOUND_COLUMNS) :]
    if not with_vectors:
        return image, NO_VECTOR, math.nan
    # Its binary form: the number of components and an unused number, of two bytes each, then the components.
    return image, np.frombuffer(rest[0], ">f2", offset=4).astype(np.float32), rest[1]


def _halfvec(vector: Vector) -> ColumnElement[Any]:
    return cast(literal(vector_text(vector), Text), HALFVEC(len(vector)))


def vector_text(vector: Vector) -> str:
    """A vector in the form that the type `halfvec` reads, rounded to its precision. The digits of float32 cost time."""
    components = vector.astype(np.float16).tolist()
    return "[" + ("%.5g," * len(components) % tuple(components))[:-1] + "]"


def passing(collection_id: UUID, where: ImageFilter) -> list[ColumnElement[bool]]:
    """The conditions on images of this collection that are searchable and that the filter lets through."""
    conditions = [IMAGES.c.collection_id == collection_id, IMAGES.c.state == ImageState.READY]
    if where.tags:
        conditions.append(IMAGES.c.tags.contains(where.tags))
    if where.source is not None:
        conditions.append(IMAGES.c.source == where.source)
    if where.licence is not None:
        conditions.append(IMAGES.c.licence == where.licence)
    if where.attributes:
        conditions.append(IMAGES.c.attributes.contains(where.attributes))
    if where.created_after is not None:
        conditions.append(IMAGES.c.created_at >= where.created_after)
    if where.created_before is not None:
        conditions.append(IMAGES.c.created_at < where.created_before)
    return conditions


def as_vector(embedding: Any) -> Vector:
    """A stored embedding as an array: shape (dim,), float32."""
    return np.asarray(embedding, dtype=np.float32)
