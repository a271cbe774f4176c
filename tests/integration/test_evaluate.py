"""The evaluation's store in memory against the service's on Postgres."""

import numpy as np
import pytest
from sqlalchemy.orm import Session

from scripts.evaluate.corpus import Picture
from scripts.evaluate.judging import unit
from scripts.evaluate.store import Store
from shared import retrieval
from shared.contracts.search import ImageFilter
from shared.settings import RetrievalSettings
from tests.factories import DIM, SHARED_COLLECTION, make_image, make_space

IMAGES = 24


def test_the_evaluation_decides_on_references_as_the_service_does(session: Session) -> None:
    rng = np.random.default_rng(4)
    projections = rng.normal(size=(IMAGES, DIM)).astype(np.float32)
    projections[5] = projections[3] + 0.01
    space = make_space(session)
    rows = [make_image(session, vector=projection, space=space) for projection in projections]
    pictures = [
        Picture(
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
    store = Store.of(pictures, projections)
    settings = RetrievalSettings(min_similarity=0.3, duplicate_similarity=0.97)
    for query in unit(projections[3] + rng.normal(size=(5, DIM)).astype(np.float32)):
        theirs = retrieval.plan(
            session,
            space,
            query,
            k=4,
            min_similarity=settings.min_similarity,
            collection_id=SHARED_COLLECTION,
            where=ImageFilter(),
            settings=settings,
        )
        ours = store.plan(query, k=4, settings=settings)
        assert {r.used for r in ours} == {True, False}, "the gate has something to decide"
        assert not {rows[3].sha256, rows[5].sha256} <= {r.found.image.sha256 for r in ours}, "nor have doubles a place"
        assert [(r.found.image.sha256, r.used) for r in ours] == [(r.found.image.sha256, r.used) for r in theirs]
        assert [r.weight for r in ours] == pytest.approx([r.weight for r in theirs], abs=0.01)
        for our, their in zip(ours, theirs, strict=True):
            condition = our.found.vector * our.found.norm
            assert condition == pytest.approx(their.found.vector * their.found.norm, abs=1e-5)
