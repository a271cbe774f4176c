"""Export of outputs with their records, and their import as images of a corpus."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from pyarrow import parquet
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from shared.contracts.bulks import BulkOptions
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobState
from shared.db import attempts, bulks, images, owners
from shared.db.attempts import StoredOutput
from shared.db.tables import BulkItem, Image, Job, Output, OutputReference
from shared.imaging import encode_image, open_image, perceptual_hash, pixels_sha256, thumbnail
from shared.storage import get_blobs, output_key, output_thumbnail_key
from tests import one_attempt
from tests.factories import make_image, make_job, make_space
from tests.integration.test_export import run

COUNT = 70
"""More than one page of rows."""


def make_output(session: Session, number: int, *, owner: str = "local") -> Output:
    """Store an output with one reference, as a worker does."""
    job = make_job(session, state=JobState.PROCESSING, owner=owner, prompt=f"apfel „{number}“", seeds=[number])
    pixels = np.full((24, 24, 3), number, np.uint8)
    pixels[:, number % 24 :] = 255
    reference = {"image_id": str(uuid4()), "sha256": "ab" * 32, "similarity": 0.5, "weight": 1.0, "pinned": False}
    record = {
        "job_id": str(job.id),
        "index": 0,
        "seed": number,
        "parameters": {name: value for name, value in job.parameters.items() if name != "seeds"},
        "mode": "image_prompt",
        "references": [reference],
        "model": {"name": "cheap", "source_revision": None, "weights_digest": "cd" * 32},
        "versions": {"afterimage": "1", "torch": "2"},
    }
    data = encode_image(pixels, image_format=ImageFormat.PNG, record=record)
    key = output_key(job.id, attempt=1, index=0, image_format=ImageFormat.PNG)
    thumbnail_key = output_thumbnail_key(job.id, attempt=1, index=0)
    get_blobs().put(key, data, media_type="image/png")
    get_blobs().put(thumbnail_key, thumbnail(pixels), media_type="image/webp")
    generation = Output(
        id=uuid4(),
        job_id=job.id,
        owner_id=job.owner_id,
        index=0,
        seed=number,
        format=ImageFormat.PNG,
        blob_key=key,
        thumbnail_key=thumbnail_key,
        width=24,
        height=24,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        pixels_sha256=pixels_sha256(pixels),
        provenance=record,
    )
    used = OutputReference(
        **{**reference, "image_id": UUID(str(reference["image_id"]))},
        generation_id=generation.id,
        position=0,
        caption="an apple",
    )
    claim = attempts.Claim(job.id, job.attempt)
    assert one_attempt.finish(session, claim, [StoredOutput(output=generation, references=[used])], timings={})
    session.commit()
    return generation


def read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.usefixtures("settings")
def test_every_output_is_exported_with_its_bytes_and_its_whole_record(session: Session, tmp_path: Path) -> None:
    made = [make_output(session, number) for number in range(COUNT)]
    report = run("outputs", str(tmp_path / "outputs.parquet"))
    assert report == {"code": 0, "event": "done", "images": COUNT, "without_vector": COUNT, "missing": 0}
    rows = read(tmp_path / "outputs.parquet")
    assert [row["id"] for row in rows] == [str(each.id) for each in made], "the oldest first"
    for row, output in zip(rows, made, strict=True):
        assert hashlib.sha256(row["image"]).hexdigest() == row["sha256"] == output.sha256
        assert row["perceptual_hash"] == perceptual_hash(open_image(row["image"]))
        assert (row["prompt"], row["seed"], row["owner"]) == (f"apfel „{output.seed}“", output.seed, "local")
        assert json.loads(row["provenance"]) == output.provenance
        assert json.loads(row["parameters"])["num_inference_steps"] == 4
        assert json.loads(row["versions"]) == {"afterimage": "1", "torch": "2"}
        assert (row["model"], row["model_digest"], row["mode"]) == ("cheap", "cd" * 32, "image_prompt")
        (reference,) = row["references"]
        assert reference.pop("image_id") == output.provenance["references"][0]["image_id"]
        assert reference == {
            "sha256": "ab" * 32,
            "similarity": 0.5,
            "weight": 1.0,
            "pinned": False,
            "caption": "an apple",
        }


@pytest.mark.usefixtures("settings")
def test_outputs_are_selected_by_owner_and_time(session: Session, tmp_path: Path) -> None:
    first, second = make_output(session, 1), make_output(session, 2)
    other = make_output(session, 3, owner="other")
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)
    for hour, output in enumerate((first, second, other)):
        moved = update(Output).where(Output.id == output.id).values(created_at=noon + timedelta(hours=hour))
        session.execute(moved)
    session.commit()

    def chosen(*options: str) -> set[str]:
        assert run("outputs", str(tmp_path / "some.parquet"), *options)["code"] == 0
        return {row["id"] for row in read(tmp_path / "some.parquet")}

    assert chosen("--owner", "other") == {str(other.id)}
    assert chosen("--before", "2026-01-01T13:00:00Z") == {str(first.id)}
    assert chosen("--after", "2026-01-01T14:00:00+01:00") == {str(second.id), str(other.id)}
    assert run("outputs", str(tmp_path / "some.parquet"), "--owner", "nobody")["code"] == 2


@pytest.mark.usefixtures("settings")
def test_an_output_of_a_bulk_names_the_bulk_and_its_custom_id(session: Session, tmp_path: Path) -> None:
    output = make_output(session, 1)
    job = session.get_one(Job, output.job_id)
    bulk = bulks.create(session, BulkOptions(), owner_id=job.owner_id, received_lines=0, digest=b"")
    item = BulkItem(
        bulk_id=bulk.id,
        line=7,
        custom_id="sku-7",
        kind=job.kind,
        model=job.model,
        images=1,
        parameters=job.parameters,
        timeout_s=60,
        job_id=job.id,
    )
    session.add(item)
    job.bulk_id, job.bulk_line = bulk.id, 7
    session.commit()
    run("outputs", str(tmp_path / "outputs.parquet"))
    (row,) = read(tmp_path / "outputs.parquet")
    assert (row["bulk_id"], row["custom_id"]) == (str(bulk.id), "sku-7")


@pytest.mark.usefixtures("settings")
def test_outputs_with_a_missing_or_damaged_file_are_counted_and_the_others_exported(
    session: Session, tmp_path: Path
) -> None:
    gone, damaged, whole = (make_output(session, number) for number in range(3))
    get_blobs().delete(gone.blob_key)
    get_blobs().put(damaged.blob_key, b"no image", media_type="image/png")
    report = run("outputs", str(tmp_path / "outputs.parquet"))
    assert (report["code"], report["images"], report["missing"]) == (1, 1, 2)
    assert [row["id"] for row in read(tmp_path / "outputs.parquet")] == [str(whole.id)]


@pytest.mark.usefixtures("settings")
def test_outputs_are_imported_as_images_of_a_named_collection_without_jobs(session: Session, tmp_path: Path) -> None:
    made = [make_output(session, number) for number in range(3)]
    content = get_blobs().get(made[0].blob_key)
    path = str(tmp_path / "outputs.parquet")
    run("outputs", path)
    session.execute(delete(Job))
    owners.ensure(session, "team-b")
    session.commit()

    assert run("import", path, "--owner", "team-b")["code"] == 2, (
        "the collection must be named, so that outputs do not mix with references"
    )
    into = ("--owner", "team-b", "--collection", "best")
    counts = {"new": 3, "existing": 0, "withdrawn": 0, "to_embed": 3}
    assert run("import", path, *into) == {"code": 0, "event": "done", **counts}
    rows = {image.id: image for image in session.scalars(select(Image))}
    assert rows.keys() == {each.id for each in made}, "an output keeps its id"
    image = rows[made[0].id]
    assert (image.caption, image.tags, image.state) == ("apfel „0“", ["generated"], "pending")
    assert image.attributes == {"job_id": str(made[0].job_id), "seed": "0", "model": "cheap"}
    assert get_blobs().get(image.blob_key) == content, "the file keeps its record"
    assert session.scalar(select(func.count()).select_from(Job)) == 0
    assert run("import", path, *into)["existing"] == 3, "a second import changes nothing"


@pytest.mark.usefixtures("settings")
def test_a_corpus_file_that_names_no_kind_is_still_read(session: Session, tmp_path: Path) -> None:
    make_space(session)
    image = make_image(session, vector=np.ones(16), blob_key="images/x.png", thumbnail_key="thumbnails/x.webp")
    data = encode_image(np.zeros((8, 8, 3), np.uint8), image_format=ImageFormat.PNG)
    for key in (image.blob_key, image.thumbnail_key):
        get_blobs().put(key, data, media_type="image/png")
    session.commit()
    path = tmp_path / "corpus.parquet"
    run("corpus", str(path))
    table = parquet.read_table(path)
    described = json.loads(table.schema.metadata[b"afterimage.corpus"])
    del described["kind"]
    parquet.write_table(table.replace_schema_metadata({b"afterimage.corpus": json.dumps(described)}), path)
    images.remove(session, image)
    session.commit()
    report = run("import", str(path))
    assert (report["code"], report["new"], report["to_embed"]) == (0, 1, 0)
