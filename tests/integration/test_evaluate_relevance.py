"""The gate's evaluation on Postgres, with the starter's CLIP and a piece of its corpus."""

import pytest
from sqlalchemy.orm import Session

from scripts.evaluate import gate
from scripts.evaluate.corpus import Corpus, read_corpus
from scripts.evaluate.gate import Way
from scripts.evaluate.queries import Kind, Query
from scripts.evaluate.service_corpus import fill
from scripts.evaluate.store import Store
from shared import retrieval
from shared.settings import STARTER, APISettings, ModelSettings, RetrievalSettings
from shared.vectors import l2_normalised
from worker_service.models.clip import Clip

THINGS = {"dog", "cut of meat", "two hearts", "bone", "robot", "hibiscus", "face holding back tears", "cat", "top hat"}
GATE = retrieval.Gate(0.5, max_gap=0.15)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(ModelSettings())


@pytest.fixture(scope="module")
def store(clip: Clip) -> Store:
    whole = read_corpus(STARTER / "corpus.tar.gz", limits=APISettings(), threads=1)
    piece = Corpus([image for image in whole.images if image.caption in THINGS], left_out=0)
    return Store.of(piece.images, clip.encode_image([image.open() for image in piece.images]))


def test_the_service_finds_what_one_vector_misses(session: Session, store: Store, clip: Clip) -> None:
    def query(kind: Kind, text: str, *right: str) -> Query:
        return Query(kind, text, [frozenset({caption}) for caption in right])

    queries = [
        query(Kind.PLURAL, "two dogs", "dog"),
        query(Kind.NAME, "two hearts", "two hearts"),
        query(Kind.TWO, "a robot holding a flower", "robot", "hibiscus"),
        query(Kind.NONSENSE, "qwertyuiop"),
    ]
    outcomes = gate.plan_queries(
        queries,
        fill(session, store, clip),
        lambda texts: l2_normalised(clip.encode_text(texts)),
        GATE,
        RetrievalSettings(),
    )

    dogs, hearts, robot, nonsense = outcomes[Way.SERVICE]
    assert set(dogs.used) == {"dog"}
    assert set(hearts.used) == {"two hearts"}
    assert robot.concepts == ["a robot", "a flower"]
    assert robot.covered == [True, True]
    assert nonsense.used == []

    by_one_vector = dict(zip([each.text for each in queries], outcomes[Way.ONE_VECTOR], strict=True))
    assert not any(by_one_vector["two dogs"].right)
    assert by_one_vector["a robot holding a flower"].covered == [True, False]
