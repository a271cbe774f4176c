"""The evaluation's store in memory decides as the service does on Postgres."""

import numpy as np
import pytest
from sqlalchemy.orm import Session

from scripts.evaluate.corpus import CorpusImage
from scripts.evaluate.store import Store
from shared import retrieval
from shared.contracts.search import ImageFilter
from shared.settings import RetrievalSettings
from shared.vectors import l2_normalised
from tests.factories import DIM, SHARED_COLLECTION, make_image, make_space

IMAGES = 24


def test_the_evaluation_chooses_references_as_the_service_does(session: Session) -> None:
    rng = np.random.default_rng(4)
    projections = rng.normal(size=(IMAGES, DIM)).astype(np.float32)
    projections[5] = projections[3] + 0.01
    space = make_space(session)
    rows = [make_image(session, vector=projection, space=space) for projection in projections]
    images = [
        CorpusImage(
            data=b"",
            sha256=row.sha256,
            perceptual_hash=row.perceptual_hash,
            concept=row.sha256,
            caption=row.caption,
            tags=(),
            held_out=False,
        )
        for row in rows
    ]
    store = Store.of(images, projections)
    settings = RetrievalSettings(min_similarity=0.3, duplicate_similarity=0.97)
    for query in l2_normalised(projections[3] + rng.normal(size=(5, DIM)).astype(np.float32)):
        theirs = retrieval.plan_concepts(
            session,
            space,
            [retrieval.ConceptQuery("", [query], SHARED_COLLECTION, ImageFilter())],
            most=4,
            gate=retrieval.Gate(0.3),
            settings=settings,
        ).candidates
        ours = store.plan(query, k=4, settings=settings)
        assert {r.used for r in ours} == {True, False}, "some images are below min_similarity"
        assert not {rows[3].sha256, rows[5].sha256} <= {r.scored.image.sha256 for r in ours}, (
            "near duplicates are left out"
        )
        assert [(r.scored.image.sha256, r.used) for r in ours] == [(r.scored.image.sha256, r.used) for r in theirs]
        assert [r.weight for r in ours] == pytest.approx([r.weight for r in theirs], abs=0.01)
        for our, their in zip(ours, theirs, strict=True):
            condition = our.scored.vector * our.scored.norm
            assert condition == pytest.approx(their.scored.vector * their.scored.norm, abs=1e-5)
