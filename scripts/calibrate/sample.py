"""Search a sample of a collection as the service does, and say which images are right.

The queries are captions, tags, and prompts of one's own. Vectors of texts come from the embed workers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from scripts.calibrate.thresholds import Found, Searches
from scripts.table_files import read_rows
from shared.concepts import wordings
from shared.contracts.images import ImageState
from shared.contracts.search import ImageFilter
from shared.db.images import ScoredImage, Vector, as_vector
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Image
from shared.messaging.embedding_rpc import embed_texts
from shared.retrieval import ConceptQuery, search_concept, without_near_duplicates
from shared.settings import RetrievalSettings
from shared.vectors import l2_normalised

MIN_CAPTIONS = 50
"""With fewer different captions, a share of 10 % would be five queries."""
DEPTH = 64
"""Images of each search. After those of the query's own thing are removed, enough must remain."""
SAME_THING = 0.5
"""Share of the query's words from which an image may show the thing too, under another caption."""
TEXTS_PER_MESSAGE = 16
RANDOM_IMAGES = 300


class SampleError(Exception):
    """The collection or the file cannot be used for a calibration."""


@dataclass(frozen=True)
class SampleQuery:
    """A text to search, and what is known about the right images.

    captions, tags, image_ids: an image with one of them is right; in lower case. All empty: nothing fits the text.
    """

    text: str
    captions: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    image_ids: frozenset[UUID] = frozenset()

    @property
    def fits_nothing(self) -> bool:
        return not (self.captions or self.tags or self.image_ids)

    def is_right(self, found: ScoredImage) -> bool | None:
        """Whether an image is right; None: unclear, because it may show the same thing under other words."""
        image = found.image
        if (
            image.id in self.image_ids
            or _key(image.caption or "") in self.captions
            or not self.tags.isdisjoint(map(_key, image.tags))
        ):
            return True
        if self.fits_nothing:
            return False
        return None if found.word_share >= SAME_THING or self._is_named_by(image.caption or "", *image.tags) else False

    def _is_named_by(self, *words: str) -> bool:
        return any(_key(self.text) in _key(text) for text in words)


def count_images(session: Session, collection_id: UUID) -> int:
    """Number of searchable images of the collection."""
    return session.scalar(select(func.count()).where(*_searchable(collection_id))) or 0


def sample_queries(session: Session, collection_id: UUID, *, most: int) -> list[SampleQuery]:
    """Up to `most` different captions and as many tags of a collection, always the same ones.

    Raises:
        SampleError: the collection has too few different captions.
    """
    caption = func.lower(func.btrim(Image.caption))
    captions = select(caption.label("text")).where(*_searchable(collection_id), caption != "").distinct().subquery()
    count = session.scalar(select(func.count()).select_from(captions)) or 0
    if count < MIN_CAPTIONS:
        raise SampleError(
            f"The collection has {count} different captions of searchable images, and a calibration needs at least "
            f"{MIN_CAPTIONS}."
        )
    tag = func.lower(func.unnest(Image.tags))
    tags = select(tag.label("text")).where(*_searchable(collection_id)).distinct().subquery()
    some_captions, some_tags = (
        session.scalars(select(texts.c.text).order_by(func.md5(texts.c.text)).limit(most)) for texts in (captions, tags)
    )
    return [
        *(SampleQuery(text, captions=frozenset({_key(text)})) for text in some_captions),
        *(SampleQuery(text, tags=frozenset({_key(text)})) for text in some_tags),
    ]


def read_prompts(session: Session, path: Path, *, collection_id: UUID) -> list[SampleQuery]:
    """Prompts of a file, each with the caption (`caption`) or the id (`image_id`) of its right image, or with neither.

    Images with the caption of the right image are right too.

    Raises:
        SampleError: a row has no prompt, or names an image that the collection does not have.
        TableFileError: the file cannot be read.
    """
    queries = []
    for row in read_rows(path):
        prompt, caption = (str(row.values.get(name) or "").strip() for name in ("prompt", "caption"))
        if row.problem or not prompt:
            raise SampleError(f"{path}, line {row.number}: {row.problem or 'there is no prompt'}")
        image_ids = set[UUID]()
        if image_id := str(row.values.get("image_id") or "").strip():
            image = _find_image(session, image_id, collection_id=collection_id)
            if image is None:
                raise SampleError(f"{path}, line {row.number}: the collection has no searchable image {image_id}")
            image_ids.add(image.id)
            caption = caption or image.caption or ""
        captions = frozenset({_key(caption)} if caption else ())
        known = select(Image.id).where(*_searchable(collection_id), func.lower(func.btrim(Image.caption)).in_(captions))
        if captions and not image_ids and session.scalar(known.limit(1)) is None:
            raise SampleError(f"{path}, line {row.number}: the collection has no searchable image {caption!r}")
        queries.append(SampleQuery(prompt, captions, image_ids=frozenset(image_ids)))
    return queries


def search_all(
    space: Space,
    queries: Sequence[SampleQuery],
    *,
    collection_id: UUID,
    settings: RetrievalSettings,
    on_progress: Callable[[int], object],
) -> Searches:
    """Search every query as the service does, by the concept itself. on_progress: called with the number done.

    The service also searches a concept by its shorter names, if no image with all words of the concept passes the gate.
    This cannot be measured here: it depends on the gate, which is chosen from these searches. For captions and tags of
    the corpus it does not happen, as their own images have all words. So the share of wrong references is measured for
    the first search alone. `python -m scripts.evaluate --only gate concepts` measures both together.

    Raises:
        EmbeddingUnavailableError: no embed worker of this space answered.
    """
    with session_scope() as session:
        shown = _random_images(session, space, collection_id)
    fitting, unfitting = list[list[Found]](), list[list[Found]]()
    wrong = list[float]()
    for done, (query, vectors) in enumerate(_with_vectors(space, queries), start=1):
        with session_scope() as session:
            concept = ConceptQuery(query.text, vectors, collection_id, ImageFilter())
            images = search_concept(session, space, concept, k=DEPTH, settings=settings).images
        distinct = without_near_duplicates(images, similarity=settings.duplicate_similarity)
        found = [Found(each.similarity, each.word_share, query.is_right(each)) for each in distinct]
        if any(each.right for each in found):
            fitting.append(found)
        if others := [each for each in found if each.right is False]:
            unfitting.append(others)
        not_wrong = {each.image.id for each in images if query.is_right(each) is not False}
        wrong += [float(vectors[0] @ vector) for image_id, vector in shown if image_id not in not_wrong]
        on_progress(done)
    return Searches(fitting, unfitting, wrong)


def _with_vectors(space: Space, queries: Sequence[SampleQuery]) -> Iterator[tuple[SampleQuery, list[Vector]]]:
    """Each query with the vectors of its wordings, L2-normalised, shape (space.dim,)."""
    for start in range(0, len(queries), TEXTS_PER_MESSAGE):
        group = queries[start : start + TEXTS_PER_MESSAGE]
        texts = [wordings(query.text) for query in group]
        vectors = iter(l2_normalised(embed_texts([text for of_query in texts for text in of_query], space)))
        for query, of_query in zip(group, texts, strict=True):
            yield query, [next(vectors) for _ in of_query]


def _random_images(session: Session, space: Space, collection_id: UUID) -> list[tuple[UUID, Vector]]:
    table = space.table
    statement = (
        select(Image.id, table.c.embedding)
        .join(table, table.c.image_id == Image.id)
        .where(*_searchable(collection_id))
        .order_by(func.md5(Image.sha256))
        .limit(RANDOM_IMAGES)
    )
    return [(image_id, as_vector(embedding)) for image_id, embedding in session.execute(statement)]


def _find_image(session: Session, image_id: str, *, collection_id: UUID) -> Image | None:
    try:
        return session.scalar(select(Image).where(*_searchable(collection_id), Image.id == UUID(image_id)))
    except ValueError:
        return None


def _searchable(collection_id: UUID) -> tuple[ColumnElement[bool], ...]:
    return Image.collection_id == collection_id, Image.state == ImageState.READY


def _key(text: str) -> str:
    return text.strip().lower()
