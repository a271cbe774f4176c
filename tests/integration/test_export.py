"""A corpus out of an installation and into one: nothing is embedded again, and searches answer as before."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from pyarrow import parquet
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared.contracts.common import ImageFormat
from shared.contracts.search import ImageFilter
from shared.db import images, owners, spaces
from shared.db.tables import Collection, EmbeddingSpace, Image
from shared.imaging import decode_upload
from shared.settings import Settings, get_settings
from shared.storage import get_blobs, image_key, thumbnail_key
from tests.factories import SHARED_COLLECTION, make_image, make_space
from tests.integration.conftest import picture

COUNT = 70
"""More than one group of rows."""


@pytest.fixture
def corpus(session: Session, settings: Settings) -> None:
    """70 images with bytes, vectors and descriptions, and one that waits for its vector."""
    random = np.random.default_rng(7)
    limits = get_settings().api
    for number in range(COUNT + 1):
        data = picture(f"#{number:02x}4080")
        decoded = decode_upload(data, max_bytes=limits.max_upload_bytes, max_pixels=limits.max_upload_pixels)
        key = image_key(decoded.sha256, ImageFormat.PNG)
        get_blobs().put(key, decoded.data, media_type="image/png")
        get_blobs().put(thumbnail_key(decoded.sha256), decoded.thumbnail, media_type="image/webp")
        make_image(
            session,
            vector=random.normal(size=16) if number < COUNT else None,
            sha256=decoded.sha256,
            blob_key=key,
            thumbnail_key=thumbnail_key(decoded.sha256),
            caption=None if number == 3 else f"bild nummer {number}, „schön“",
            tags=["even"] if number % 2 == 0 else [],
            attributes={"number": str(number)},
            perceptual_hash=number - 70,
        )
    session.commit()


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.export", *arguments, "--json"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    return {"code": done.returncode, **json.loads(done.stdout.splitlines()[-1])}


def answers(session: Session, collection_id: UUID = SHARED_COLLECTION) -> list[tuple[str, str | None, float, float]]:
    session.rollback()
    space = spaces.find_active(session)
    assert space is not None
    query = np.random.default_rng(1).normal(size=16).astype(np.float32)
    query /= np.linalg.norm(query)
    nearest = images.nearest(
        session,
        space,
        query,
        k=COUNT,
        collection_id=collection_id,
        where=ImageFilter(),
        ef_search=200,
        exact_below=10_000,
    )
    return [(each.image.sha256, each.image.caption, each.similarity, each.norm) for each in nearest.found]


def wipe(session: Session) -> None:
    for key in session.scalars(select(Image.blob_key)).all():
        get_blobs().delete(key)
    session.execute(delete(Image))
    session.commit()


@pytest.mark.usefixtures("corpus")
def test_exported_wiped_and_imported_the_corpus_answers_with_the_same_scores(session: Session, tmp_path: Path) -> None:
    before = answers(session)
    columns = (Image.id, Image.sha256, Image.tags, Image.attributes, Image.created_at, Image.perceptual_hash)
    rows = session.execute(select(*columns).order_by(Image.id)).all()
    some = session.scalars(select(Image).limit(1)).one()
    content = get_blobs().get(some.blob_key)
    told = run("corpus", str(tmp_path / "corpus.parquet"))
    assert told == {"code": 0, "event": "done", "images": COUNT + 1, "without_vector": 1, "missing": 0}
    assert parquet.read_table(tmp_path / "corpus.parquet", columns=["caption"]).num_rows == COUNT + 1

    wipe(session)
    assert answers(session) == []
    told = run("import", str(tmp_path / "corpus.parquet"))
    assert told == {"code": 0, "event": "done", "new": COUNT + 1, "existing": 0, "to_embed": 1}
    assert answers(session) == before
    assert len(before) == COUNT
    assert session.execute(select(*columns).order_by(Image.id)).all() == rows
    assert get_blobs().get(some.blob_key) == content

    assert run("import", str(tmp_path / "corpus.parquet"))["existing"] == COUNT + 1, "again is harmless"
    assert answers(session) == before


@pytest.mark.usefixtures("corpus")
def test_a_corpus_comes_into_the_collection_of_another_owner_beside_the_first(session: Session, tmp_path: Path) -> None:
    before = answers(session)
    run("corpus", str(tmp_path / "corpus.parquet"))
    owners.ensure(session, "team-b")
    session.commit()
    told = run("import", str(tmp_path / "corpus.parquet"), "--owner", "team-b", "--collection", "copy")
    assert told["new"] == COUNT + 1
    copy = session.scalars(select(Collection.id).where(Collection.name == "copy")).one()
    assert answers(session, copy) == before
    assert answers(session) == before


@pytest.mark.usefixtures("corpus")
def test_vectors_of_another_space_are_not_mixed_in(session: Session, tmp_path: Path) -> None:
    run("corpus", str(tmp_path / "corpus.parquet"))
    wipe(session)
    session.execute(delete(EmbeddingSpace))
    make_space(session, dim=8)
    session.commit()
    assert run("import", str(tmp_path / "corpus.parquet"))["to_embed"] == COUNT + 1
    assert session.scalars(select(Image.state).distinct()).all() == ["pending"]


@pytest.mark.usefixtures("corpus")
def test_a_damaged_or_foreign_file_is_refused(session: Session, tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    run("corpus", str(path))
    table = parquet.read_table(path)
    wipe(session)
    swapped = [b"other bytes", *table["image"].to_pylist()[1:]]
    index = table.schema.get_field_index("image")
    parquet.write_table(table.set_column(index, "image", [swapped]), path)
    assert run("import", str(path))["code"] == 2
    parquet.write_table(table.replace_schema_metadata({}), path)
    assert run("import", str(path))["code"] == 2
    path.write_bytes(b"PAR1")
    assert run("import", str(path))["code"] == 2
    assert session.scalars(select(Image.id)).all() == []
