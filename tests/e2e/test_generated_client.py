"""A stranger with nothing but the OpenAPI document and an API key: a public generator writes the client, which works.

The generator is OpenAPI Generator, with its Python target. What it writes lives for the length of this module.
"""

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import disc
from tests.stack import RunningStack, running_stack, wait_until

GENERATOR = Path(sys.executable).with_name("openapi-generator-cli")
PACKAGE = "generated_client"


@pytest.fixture(scope="module")
def keyed_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The whole stack with the cheap generator, where every call needs a key."""
    environment = TEST_ENVIRONMENT | {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
    with running_stack(tmp_path_factory.mktemp("keyed"), environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
def generated(keyed_stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package that the generator wrote from the document that the API serves."""
    folder = tmp_path_factory.mktemp("generated")
    document = folder / "openapi.json"
    document.write_text(httpx.get(f"{keyed_stack.url}/api/v1/openapi.json").raise_for_status().text)
    command = [str(GENERATOR), "generate", "-g", "python", "--package-name", PACKAGE]
    command += ["-i", str(document), "-o", str(folder)]
    command += ["--global-property", "apiTests=false,modelTests=false,apiDocs=false,modelDocs=false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(PACKAGE)
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
            del sys.modules[name]


class Stranger:
    """The groups of the generated client, with one key."""

    def __init__(self, generated: ModuleType, url: str, key: str | None) -> None:
        self.http = generated.ApiClient(generated.Configuration(host=url, access_token=key))
        self.generation = generated.GenerationApi(self.http)
        self.jobs = generated.JobsApi(self.http)
        self.images = generated.ImagesApi(self.http)
        self.outputs = generated.OutputsApi(self.http)
        self.search = generated.SearchApi(self.http)
        self.bulks = generated.BulksApi(self.http)
        self.service = generated.ServiceApi(self.http)

    def ended(self, job_id: Any) -> Any:
        """The job once it has ended."""
        wait_until(
            lambda: self.jobs.get_job(job_id, wait=5).finished_at is not None, timeout_s=60, what="the job to end"
        )
        return self.jobs.get_job(job_id)

    def uploaded(self, colour: str, **fields: Any) -> Any:
        """A new image, once it can be found."""
        (image,) = self.images.upload_images(file=[("disc.png", disc(colour))], **fields).images
        wait_until(
            lambda: self.images.get_image(image.id).state == "ready", timeout_s=60, what="the image to be searchable"
        )
        return image


@pytest.fixture(scope="module")
def stranger(generated: ModuleType, keyed_stack: RunningStack) -> Stranger:
    return Stranger(generated, keyed_stack.url, keyed_stack.new_key("stranger", "generate", "search", "corpus:write"))


def test_the_main_job_is_done_with_it(generated: ModuleType, stranger: Stranger) -> None:
    sent = {"caption": "a purple disc", "tags": ["disc", "purple"], "attributes": {"made": "by hand"}}
    image = stranger.uploaded("rebeccapurple", **sent)
    assert (image.caption, image.tags, image.attributes) == tuple(sent.values())
    assert stranger.images.upload_images(file=[disc("rebeccapurple")]).existing == 1

    found = stranger.search.search(generated.SearchRequest(query="a purple disc", k=100))
    assert image.id in [neighbour.image_id for neighbour in found.results]
    assert stranger.search.rag_search("a purple disc").prompt == "a purple disc"

    request = generated.RagGenerateRequest(
        prompt="a purple disc", num_images=2, seed=7, reference_ids=[generated.Reference(image.id)]
    )
    accepted = stranger.generation.rag_generate(request, idempotency_key="order-1")
    assert isinstance(accepted, generated.JobView)
    assert stranger.generation.rag_generate(request, idempotency_key="order-1").id == accepted.id
    job = stranger.ended(accepted.id)
    assert job.state is generated.JobState.SUCCEEDED
    assert [output.seed for output in job.outputs] == [7, 8]
    assert {reference.image_id for reference in job.outputs[0].references} == {image.id}
    assert "event: succeeded" in stranger.jobs.stream_job_events(job.id)
    content = stranger.outputs.get_generation_content(job.outputs[0].id)
    assert content.startswith(b"\x89PNG")
    assert len(content) == job.outputs[0].size_bytes

    assert job.id in [each.id for each in stranger.jobs.list_jobs(state="succeeded").items]
    assert job.outputs[0].id in [each.id for each in stranger.images.list_generations_of_image(image.id).items]
    stranger.images.delete_image(image.id)
    with pytest.raises(generated.exceptions.NotFoundException):
        stranger.images.get_image(image.id)


def test_a_submit_answers_with_a_queued_job_an_ended_one_or_a_plan(generated: ModuleType, stranger: Stranger) -> None:
    request = {"prompt": "a red apple"}
    queued = stranger.generation.generate(generated.GenerateRequest(**request))
    assert isinstance(queued, generated.JobView)
    ended = stranger.generation.generate(generated.GenerateRequest(**request), prefer="wait=60").actual_instance
    assert isinstance(ended, generated.JobView)
    assert ended.state is generated.JobState.SUCCEEDED
    plan = stranger.generation.generate(generated.GenerateRequest(**request, dry_run=True)).actual_instance
    assert isinstance(plan, generated.DryRunView)
    assert plan.parameters.prompt == "a red apple"


def test_json_lines_go_in_and_come_out(stranger: Stranger) -> None:
    lines = '{"bulk": {"defaults": {"kind": "generate"}}}\n{"prompt": "a red apple"}\n{"prompt": "a green pear"}\n'
    bulk = stranger.bulks.create_bulk(body=lines)
    wait_until(lambda: stranger.bulks.get_bulk(bulk.id).state == "completed", timeout_s=60, what="the bulk to end")
    assert [item.prompt for item in stranger.bulks.list_bulk_items(bulk.id).items] == ["a red apple", "a green pear"]
    assert stranger.bulks.get_bulk_manifest(bulk.id).count(b'"state":"succeeded"') == 2
    assert b"end.json" in stranger.bulks.get_bulk_archive(bulk.id)


def test_what_is_refused_comes_as_a_typed_problem(
    generated: ModuleType, stranger: Stranger, keyed_stack: RunningStack
) -> None:
    exceptions = generated.exceptions
    with pytest.raises(exceptions.NotFoundException) as absent:
        stranger.jobs.get_job(uuid4())
    assert isinstance(absent.value.data, generated.Problem)
    assert (absent.value.data.code, absent.value.data.status) == ("not_found", 404)

    pinned = generated.Reference(uuid4())
    twice = generated.RagGenerateRequest(prompt="x", reference_ids=[pinned, pinned])
    with pytest.raises(exceptions.UnprocessableEntityException) as invalid:
        stranger.generation.rag_generate(twice)
    assert invalid.value.data.code == "validation_failed"
    (mistake,) = invalid.value.data.errors
    assert isinstance(mistake, generated.FieldProblem)
    assert "names an image twice" in mistake.message

    ended = stranger.ended(stranger.generation.generate(generated.GenerateRequest(prompt="x")).id)
    with pytest.raises(exceptions.ConflictException) as conflict:
        stranger.jobs.cancel_job(ended.id)
    assert conflict.value.data.code == "job_state_conflict"

    nobody = Stranger(generated, keyed_stack.url, None)
    with pytest.raises(exceptions.UnauthorizedException) as unknown:
        nobody.service.get_usage()
    assert unknown.value.data.code == "authentication_required"
    assert nobody.service.get_liveness().status is generated.HealthStatus.OK
