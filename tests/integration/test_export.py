"""Export and import of a corpus: nothing is embedded again, and searches return the same results."""

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID

import numpy as np
import pytest
from pyarrow import parquet
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from scripts.export import __main__ as export
from shared.contracts.common import ImageFormat
from shared.contracts.images import ImageDescription
from shared.contracts.search import ImageFilter
from shared.db import collections, images, owners, spaces
from shared.db.tables import Collection, EmbeddingSpace, Image
from shared.imaging import decode_upload
from shared.settings import Settings, get_settings
from shared.storage import get_blobs, image_key, thumbnail_key
from tests.factories import SHARED_COLLECTION, make_image, make_space
from tests.integration.conftest import picture

COUNT = 70
"""More than one page of rows."""
EMPTY = ImageDescription().model_dump()


@pytest.fixture
def corpus(session: Session, settings: Settings) -> None:
    """70 images with bytes, vectors and descriptions, and one without a vector."""
    random = np.random.default_rng(7)
    limits = get_settings().api
    for number in range(COUNT + 1):
        data = picture(f"#{number:02x}4080")
        decoded = decode_upload(data, max_bytes=limits.max_upload_bytes, max_pixels=limits.max_upload_pixels)
        key = image_key(decoded.sha256, ImageFormat.PNG, decoded.data)
        get_blobs().put(key, decoded.data, media_type="image/png")
        get_blobs().put(thumbnail_key(decoded.sha256, decoded.thumbnail), decoded.thumbnail, media_type="image/webp")
        of_file = EMPTY | {"caption": f"{number}", "tags": ["of the file"]}
        optional: dict[str, Any] = {} if number == 3 else {"file_description": of_file}
        make_image(
            session,
            vector=random.normal(size=16) if number < COUNT else None,
            sha256=decoded.sha256,
            blob_key=key,
            thumbnail_key=thumbnail_key(decoded.sha256, decoded.thumbnail),
            caption=None if number == 3 else f"bild nummer {number}, „schön“",
            tags=["even"] if number % 2 == 0 else [],
            attributes={"number": str(number)},
            **optional,
            perceptual_hash=number - 70,
        )
    session.commit()


def run(*arguments: str) -> dict[str, Any]:
    """Run the script in this process: its exit code and its last event. An e2e test runs it as a command."""
    stdout = io.StringIO()
    command = ["export", *arguments, "--json"]
    with patch.object(sys, "argv", command), redirect_stdout(stdout), pytest.raises(SystemExit) as ended:
        export.main()
    return {"code": ended.value.code, **json.loads(stdout.getvalue().splitlines()[-1])}


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
    return [(each.image.sha256, each.image.caption, each.similarity, each.norm) for each in nearest.images]


def wipe(session: Session) -> None:
    for key in session.scalars(select(Image.blob_key)).all():
        get_blobs().delete(key)
    session.execute(delete(Image))
    session.commit()


@pytest.mark.usefixtures("corpus")
def test_an_exported_and_imported_corpus_returns_the_same_scores(session: Session, tmp_path: Path) -> None:
    before = answers(session)
    columns = (
        *(Image.id, Image.sha256, Image.tags, Image.attributes, Image.created_at, Image.perceptual_hash),
        *(Image.file_description, Image.file_description.is_(None)),
    )
    rows = session.execute(select(*columns).order_by(Image.id)).all()
    some = session.scalars(select(Image).limit(1)).one()
    content = get_blobs().get(some.blob_key)
    report = run("corpus", str(tmp_path / "corpus.parquet"))
    assert report == {"code": 0, "event": "done", "images": COUNT + 1, "without_vector": 1, "missing": 0}
    assert parquet.read_table(tmp_path / "corpus.parquet", columns=["caption"]).num_rows == COUNT + 1

    wipe(session)
    assert answers(session) == []
    report = run("import", str(tmp_path / "corpus.parquet"))
    counts = {"new": COUNT + 1, "existing": 0, "withdrawn": 0, "to_embed": 1}
    assert report == {"code": 0, "event": "done", **counts}
    assert answers(session) == before
    assert len(before) == COUNT
    assert session.execute(select(*columns).order_by(Image.id)).all() == rows
    assert get_blobs().get(some.blob_key) == content

    assert run("import", str(tmp_path / "corpus.parquet"))["existing"] == COUNT + 1, "a second import changes nothing"
    assert answers(session) == before


@pytest.mark.usefixtures("corpus")
def test_a_corpus_can_be_imported_into_a_collection_of_another_owner(session: Session, tmp_path: Path) -> None:
    before = answers(session)
    run("corpus", str(tmp_path / "corpus.parquet"))
    owners.ensure(session, "team-b")
    session.commit()
    report = run("import", str(tmp_path / "corpus.parquet"), "--owner", "team-b", "--collection", "copy")
    assert report["new"] == COUNT + 1
    copy = session.scalars(select(Collection.id).where(Collection.name == "copy")).one()
    assert answers(session, copy) == before
    assert answers(session) == before


def test_a_collection_is_found_without_its_owner_if_only_one_has_the_name(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    collections.ensure(session, "goods", owner_id=owners.ensure(session, "team-a"))
    make_space(session)
    session.commit()
    file = str(tmp_path / "goods.parquet")
    assert run("corpus", file, "--collection", "goods")["code"] == 0
    assert "no collection 'wares'" in run("corpus", file, "--collection", "wares")["message"]
    assert "name its --owner" in run("import", file)["message"], "an import never chooses an owner"
    collections.ensure(session, "goods", owner_id=owners.ensure(session, "team-b"))
    session.commit()
    refused = run("corpus", file, "--collection", "goods")
    assert refused["code"] == 2
    assert "team-a, team-b" in refused["message"]
    assert run("corpus", file, "--collection", "goods", "--owner", "team-b")["code"] == 0


@pytest.mark.usefixtures("corpus")
def test_a_file_of_the_release_before_is_imported(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "corpus.parquet"
    run("corpus", str(file))
    wipe(session)
    parquet.write_table(parquet.read_table(file).drop_columns("file_description"), file)
    assert run("import", str(file))["new"] == COUNT + 1
    assert session.scalars(select(Image.file_description.is_(None)).distinct()).all() == [True]


@pytest.mark.usefixtures("corpus")
def test_vectors_of_another_embedding_space_are_not_imported(session: Session, tmp_path: Path) -> None:
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
