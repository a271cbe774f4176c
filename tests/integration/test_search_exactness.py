"""Searches find the true nearest images: exactly where they compare all, and nearly always with the index."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sqlalchemy import select, text

from benchmarks.search_scale import FILTERS, load
from shared.contracts.search import ImageFilter
from shared.contracts.search_tuning import IndexKind, SearchTuning, TunedSearch
from shared.db import images, search_tuning, spaces, vector_index
from shared.db.images import Nearest, Vector
from shared.db.session import get_engine, session_scope
from shared.db.spaces import Space
from shared.db.tables import EmbeddingSpace
from shared.settings import Settings, get_settings
from tests.factories import SHARED_COLLECTION
from tests.integration.conftest import sent_statements

TAGS = {None: 1} | {f"every-{every}": every for every in FILTERS.values()}
"""Tags of the loaded images, with the number of images of which one has it."""


def unit(vectors: NDArray[Any]) -> Vector:
    normalised: Vector = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return normalised


class Corpus:
    """A searchable corpus in the test's database."""

    def __init__(self, vectors: NDArray[Any], *, indexed: bool = True) -> None:
        # As they are stored: with half precision.
        self.vectors = unit(vectors).astype(np.float16).astype(np.float32)
        with session_scope() as session:
            self.space: Space = spaces.ensure(session, digest="d" * spaces.SHORT, model="m", dim=vectors.shape[1])
        with get_engine().connect() as connection:
            connection.execute(text("set local statement_timeout = 0"))
            if not indexed:
                connection.execute(text(f"drop index ix_{self.space.table.name}_embedding"))
            self.ids = load(connection, self.space, SHARED_COLLECTION, self.vectors, first=0)
            connection.execute(text("analyze"))
            connection.commit()

    def truth(self, query: Vector, *, k: int, tag: str | None = None) -> list[float]:
        """The similarities of the true nearest images."""
        rows = self.vectors[:: TAGS[tag]]
        return sorted((rows @ query / np.linalg.norm(rows, axis=1)).tolist(), reverse=True)[:k]

    def nearest(self, query: Vector, *, k: int = 10, tag: str | None = None, exact_below: int | None = None) -> Nearest:
        settings = get_settings().retrieval
        with session_scope() as session:
            return images.nearest(
                session,
                spaces.get(session, "d" * spaces.SHORT),
                query,
                k=k,
                collection_id=SHARED_COLLECTION,
                where=ImageFilter(tags=[] if tag is None else [tag]),
                ef_search=settings.ef_search,
                exact_below=settings.exact_below if exact_below is None else exact_below,
            )

    def recall(self, queries: Vector, *, tag: str | None = None) -> float:
        shares = []
        for query in queries:
            truth = self.truth(query, k=10, tag=tag)
            found = self.nearest(query, tag=tag).images
            assert len(found) == len(truth)
            shares.append(sum(each.similarity >= truth[-1] - 1e-3 for each in found) / len(truth))
        return float(np.mean(shares))

    def measured(self, ef_search: int, *, filtered: int | None = None) -> None:
        """Let searches use the index, as if it had been measured."""
        recalls = dict.fromkeys(("recall", "recall_all", "recall_filtered"), 1)
        searches = [
            TunedSearch(k=k, ef_search=ef_search, median_ms=1, ef_search_filtered=filtered, **recalls)
            for k in search_tuning.KS
        ]
        tuning = SearchTuning(
            target=0.9,
            index_kind=IndexKind.HALFVEC,
            vectors=len(self.vectors),
            queries=1,
            measured_at=datetime.now(UTC),
            searches=searches,
        )
        with session_scope() as session:
            search_tuning.store(session, self.space, tuning)


def clustered(count: int, *, dim: int = 64, seed: int = 0, spread: float = 0.6) -> Vector:
    """Vectors around random centres, as those of a CLIP lie. spread: length of their own part; the centre's is 1."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.standard_normal((max(2, count // 50), dim)))
    own = spread * unit(rng.standard_normal((count, dim)))
    return unit(centres[rng.integers(len(centres), size=count)] + own).astype(np.float32)


@pytest.mark.parametrize("indexed", [False, True])
def test_never_fewer_images_come_than_exist_and_the_best_come_first(settings: Settings, indexed: bool) -> None:
    corpus = Corpus(clustered(1500))
    if indexed:
        corpus.measured(ef_search=400)

    @given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 100), tag=st.sampled_from(list(TAGS)))
    def search(seed: int, k: int, tag: str | None) -> None:
        query = unit(np.random.default_rng(seed).standard_normal(64)).astype(np.float32)
        truth = corpus.truth(query, k=k, tag=tag)
        found = corpus.nearest(query, k=k, tag=tag, exact_below=0 if indexed else None)
        similarities = [each.similarity for each in found.images]
        assert len(similarities) == len(truth)
        assert similarities == sorted(similarities, reverse=True)
        assert len({each.image.id for each in found.images}) == len(truth)
        if found.exact:
            assert similarities == pytest.approx(truth, abs=1e-3)

    search()


def test_an_index_scan_that_ends_early_is_followed_by_an_exact_search(settings: Settings) -> None:
    """The nearest images lack the tag, and `hnsw.max_scan_tuples` ends the scan before it reaches one that has it."""
    rng = np.random.default_rng(0)
    near, far = unit(rng.standard_normal(64)), unit(rng.standard_normal(64))
    vectors = unit(near + 0.1 * unit(rng.standard_normal((2000, 64))))
    vectors[::200] = unit(-near + 0.1 * far + 0.1 * unit(rng.standard_normal((10, 64))))
    corpus = Corpus(vectors.astype(np.float32))
    corpus.measured(ef_search=40)
    with session_scope() as session:
        session.execute(text("set local hnsw.max_scan_tuples = 1"))
        for setting in ("enable_seqscan", "enable_bitmapscan", "enable_sort"):
            session.execute(text(f"set local {setting} = off"))
        found = images.nearest(
            session,
            spaces.get(session, corpus.space.digest),
            near.astype(np.float32),
            k=10,
            collection_id=SHARED_COLLECTION,
            where=ImageFilter(tags=["every-200"]),
            ef_search=None,
            exact_below=0,
        )
    assert found.exact
    assert len(found.images) == 10


def test_the_measured_width_reaches_the_wanted_recall_and_searches_use_it(settings: Settings) -> None:
    corpus = Corpus(clustered(1500))
    with session_scope() as session:
        measured = search_tuning.measure(session, corpus.space, target=0.97, queries=30)
        search_tuning.store(session, corpus.space, measured)
    assert [each.k for each in measured.searches] == [10, 40, 100]
    assert all(each.recall >= 0.97 for each in measured.searches)
    assert [each.ef_search for each in measured.searches] == sorted(each.ef_search for each in measured.searches)
    query = clustered(1, seed=5)[0]
    assert not corpus.nearest(query, exact_below=0).exact
    with session_scope() as session:
        assert session.scalar(select(EmbeddingSpace.search_tuning)) == measured.model_dump(mode="json")
        search_tuning.store(session, corpus.space, None)
    assert corpus.nearest(query, exact_below=0).exact, "an index that nobody measured is not trusted"


def test_the_measured_width_suffices_for_queries_that_are_no_images(settings: Settings) -> None:
    """The index finds an image of its own at once, so such queries would measure a width that is too small."""
    vectors = clustered(4050, dim=256, spread=3)
    corpus = Corpus(vectors[50:])
    with session_scope() as session:
        search_tuning.store(
            session, corpus.space, search_tuning.measure(session, corpus.space, target=0.97, queries=50)
        )
    shares = []
    for query in vectors[:50]:
        truth = corpus.truth(query, k=10)
        found = corpus.nearest(query, exact_below=0)
        assert not found.exact
        shares.append(sum(each.similarity >= truth[-1] - 1e-3 for each in found.images) / 10)
    assert np.mean(shares) >= 0.95  # 50 queries estimate a recall to about 0.01


@pytest.mark.parametrize(("filtered", "wide", "width"), [(400, False, "40"), (400, True, "400"), (None, True, "40")])
@pytest.mark.parametrize("narrowed", ["by a tag", "by a collection"])
def test_only_a_search_among_some_of_the_images_has_the_width_for_filters(
    settings: Settings, narrowed: str, filtered: int | None, wide: bool, width: str
) -> None:
    corpus = Corpus(clustered(500))
    corpus.measured(ef_search=40, filtered=filtered)
    with session_scope() as session:
        images.nearest(
            session,
            spaces.get(session, corpus.space.digest),
            clustered(1, seed=5)[0],
            k=10,
            collection_id=uuid4() if wide and narrowed == "by a collection" else SHARED_COLLECTION,
            where=ImageFilter(tags=["every-2"] if wide and narrowed == "by a tag" else []),
            ef_search=None,
            exact_below=0,
        )
        assert session.scalar(text("select current_setting('hnsw.ef_search')")) == width


@pytest.mark.parametrize("tag", list(TAGS))
@pytest.mark.parametrize(("exact_below", "most"), [(10_000, 1), (0, 2)])
def test_a_repeated_search_sends_one_statement_and_one_more_to_set_up_the_index(
    settings: Settings, exact_below: int, most: int, tag: str | None
) -> None:
    corpus = Corpus(clustered(2000))
    corpus.measured(ef_search=100)
    query = clustered(1, seed=5)[0]
    corpus.nearest(query, k=1, tag=tag, exact_below=exact_below)
    with sent_statements(get_engine()) as sent:
        corpus.nearest(query, k=1, tag=tag, exact_below=exact_below)
    searching = [
        statement for statement in sent if "COMMIT" not in statement and "FROM embedding_spaces" not in statement
    ]
    assert len(searching) == most, searching


@pytest.mark.parametrize(("tag", "way"), [("every-20", "OFFSET"), ("every-2", " IN (")])
def test_few_images_are_looked_up_one_by_one_and_for_many_all_vectors_are_read(
    settings: Settings, tag: str, way: str
) -> None:
    corpus = Corpus(clustered(2000))
    query = clustered(1, seed=5)[0]
    with sent_statements(get_engine()) as sent:
        found = corpus.nearest(query, tag=tag)
    assert any(way in statement for statement in sent)
    assert [each.similarity for each in found.images] == pytest.approx(corpus.truth(query, k=10, tag=tag), abs=1e-3)


@pytest.mark.parametrize("kind", list(IndexKind))
def test_an_index_is_built_again_while_images_come_and_searches_run(settings: Settings, kind: IndexKind) -> None:
    corpus = Corpus(clustered(2000))
    corpus.measured(ef_search=100)
    vector_index.rebuild(
        get_settings().database,
        corpus.space,
        kind=kind,
        m=8,
        ef_construction=64,
        memory_mb=64,
        parallel_workers=0,
    )
    with get_engine().connect() as connection:
        indexes = connection.execute(
            text("select indexname, indexdef from pg_indexes where tablename = :table and indexdef like '%hnsw%'"),
            {"table": corpus.space.table.name},
        ).all()
        load(connection, corpus.space, SHARED_COLLECTION, clustered(10, seed=9), first=2000)
    assert [row.indexname for row in indexes] == [f"ix_{corpus.space.table.name}_embedding"]
    assert ("binary_quantize" in indexes[0].indexdef) == (kind is IndexKind.BIT)
    with session_scope() as session:
        assert search_tuning.find_kind(session, corpus.space) is kind
        for setting in ("enable_seqscan", "enable_bitmapscan", "enable_sort"):
            session.execute(text(f"set local {setting} = off"))
        query = clustered(10, seed=9)[3]
        found = images.scan_index(session, corpus.space, query, k=5, conditions=[], kind=kind, ef_search=200)
    assert found[0].similarity == pytest.approx(1, abs=2e-3)
    assert [each.similarity for each in found] == sorted((each.similarity for each in found), reverse=True)


def test_a_build_that_was_killed_is_repeated(settings: Settings) -> None:
    corpus = Corpus(clustered(200))
    name = f"ix_{corpus.space.table.name}_embedding"
    build: Callable[[], None] = lambda: vector_index.rebuild(  # noqa: E731
        get_settings().database,
        corpus.space,
        kind=IndexKind.HALFVEC,
        m=8,
        ef_construction=64,
        memory_mb=64,
        parallel_workers=0,
    )
    with get_engine().connect() as connection:
        # Killed before the last step: the new index serves under its first name.
        connection.execute(text(f"alter index {name} rename to {name}_new"))
        connection.commit()
        build()
        # Killed in the build: an index that is not complete is left.
        connection.execute(text(f"create index {name}_new on {corpus.space.table.name} (norm)"))
        connection.execute(text(f"update pg_index set indisvalid = false where indexrelid = '{name}_new'::regclass"))
        connection.commit()
        build()
        # Killed between the build and the end of the old index: there are two, of different kinds.
        connection.execute(text(f"alter index {name} rename to {name}_new"))
        connection.execute(text(f"create index {name} on {corpus.space.table.name} (norm)"))
        connection.execute(text("update embedding_spaces set index_kind = 'bit'"))
        connection.commit()
        build()
        assert connection.scalar(text("select index_kind from embedding_spaces")) == "halfvec"
        names = connection.scalars(
            text("select indexname from pg_indexes where tablename = :table and indexname like 'ix%'"),
            {"table": corpus.space.table.name},
        ).all()
    assert names == [name]


@pytest.mark.extended
def test_searches_among_50_000_random_vectors_find_the_true_nearest(settings: Settings) -> None:
    """Independent random vectors are the hardest case for a graph index, and no CLIP makes such ones."""
    rng = np.random.default_rng(0)
    corpus = Corpus(rng.standard_normal((50_000, 512), dtype=np.float32), indexed=False)
    queries = unit(rng.standard_normal((40, 512), dtype=np.float32))
    assert corpus.recall(queries) >= 0.98
    for tag in TAGS:
        assert corpus.recall(queries[:20], tag=tag) >= 0.95
