"""Outputs are exported into a file and imported into a corpus, where they can be searched and referenced at once."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from afterimage_client import Afterimage, ImageFilter, ImageState, RagGenerateRequest, SearchRequest
from ops.local.stack import REPOSITORY
from tests.stack import RunningStack


@pytest.fixture
def service(stack: RunningStack) -> Iterator[Afterimage]:
    with Afterimage(stack.url) as service:
        yield service


def export(stack: RunningStack, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.export", *arguments, "--json"],
        cwd=REPOSITORY,
        env=os.environ | stack.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_exported_outputs_are_imported_with_their_vectors_and_used_as_references(
    stack: RunningStack, service: Afterimage, tmp_path: Path
) -> None:
    job = service.jobs.wait(service.jobs.submit(RagGenerateRequest(prompt="a teal kite over export", num_images=2)))
    path = tmp_path / "outputs.parquet"
    summary = export(stack, "outputs", str(path), "--vectors", "--after", job.created_at.isoformat())
    assert summary["without_vector"] == 0
    rows = {row["id"]: row for row in parquet.read_table(path).to_pylist()}
    for output in job.outputs:
        row = rows[str(output.id)]
        assert (row["sha256"], row["prompt"], row["seed"]) == (output.sha256, job.prompt, output.seed)
        assert json.loads(row["provenance"]) == output.provenance
        assert [each["image_id"] for each in row["references"]] == [str(each.image_id) for each in output.references]

    summary = export(stack, "import", str(path), "--owner", "local", "--collection", "remembered")
    assert (summary["new"], summary["to_embed"]) == (len(rows), 0)
    images = {image.id: image for image in service.images.list(collection="remembered")}
    assert {output.id for output in job.outputs} <= images.keys()
    assert {image.state for image in images.values()} == {ImageState.READY}
    # Each has the vector that an embedding of its bytes gives.
    for output in job.outputs:
        own = base64.b64encode(rows[str(output.id)]["image"]).decode()
        search = SearchRequest(image=own, k=len(rows), filter=ImageFilter(collection="remembered"))
        similarities = {found.image_id: found.similarity for found in service.search(search).results}
        similarity = similarities[output.id]
        assert similarity is not None
        assert similarity > 0.9999
    # A job uses one as its reference, and the record names the id of the output.
    request = RagGenerateRequest(prompt="the kite again", reference_ids=[job.outputs[0].id])
    generated = service.jobs.wait(service.jobs.submit(request))
    assert [each.image_id for each in generated.outputs[0].references] == [job.outputs[0].id]
