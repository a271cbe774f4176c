"""OpenAPI Generator writes a working Python client from nothing but the OpenAPI document.

The generated package exists only while this module runs.
"""

import base64
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

pytestmark = pytest.mark.extended  # these tests show that the document is usable; `make test` tests the document itself


@pytest.fixture(scope="module")
def keyed_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    """The whole stack with the fake generator, where every call needs a key."""
    environment = TEST_ENVIRONMENT | {"AFTERIMAGE_SECURITY__REQUIRE_API_KEYS": "true"}
    with running_stack(tmp_path_factory.mktemp("keyed"), environment=environment) as stack:
        yield stack


@pytest.fixture(scope="module")
def generated(keyed_stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The package that the generator writes from the document that the API serves."""
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


class GeneratedClient:
    """The groups of the generated client, with one key or without a key."""

    def __init__(self, generated: ModuleType, url: str, key: str | None) -> None:
        self.http = generated.ApiClient(generated.Configuration(host=url, access_token=key))
        self.generation = generated.GenerationApi(self.http)
        self.jobs = generated.JobsApi(self.http)
        self.images = generated.ImagesApi(self.http)
        self.outputs = generated.OutputsApi(self.http)
        self.reference_images = generated.ReferenceImagesApi(self.http)
        self.search = generated.SearchApi(self.http)
        self.bulks = generated.BulksApi(self.http)
        self.service = generated.ServiceApi(self.http)

    def ended(self, job_id: Any) -> Any:
        """Wait until the job has ended, and return it."""
        wait_until(
            lambda: self.jobs.get_job(job_id, wait=5).finished_at is not None, timeout_s=60, what="the job to end"
        )
        return self.jobs.get_job(job_id)

    def uploaded(self, colour: str, **fields: Any) -> Any:
        """Upload an image, wait until it is searchable, and return it."""
        (image,) = self.images.upload_images(file=[("disc.png", disc(colour))], **fields).images
        wait_until(
            lambda: self.images.get_image(image.id).state == "ready", timeout_s=60, what="the image to be searchable"
        )
        return image


@pytest.fixture(scope="module")
def client(generated: ModuleType, keyed_stack: RunningStack) -> GeneratedClient:
    return GeneratedClient(
        generated, keyed_stack.url, keyed_stack.new_key("stranger", "generate", "search", "corpus:write")
    )


def test_the_generated_client_does_the_main_job(generated: ModuleType, client: GeneratedClient) -> None:
    sent = {"caption": "a purple disc", "tags": ["disc", "purple"], "attributes": {"made": "by hand"}}
    image = client.uploaded("rebeccapurple", **sent)
    assert (image.caption, image.tags, image.attributes) == tuple(sent.values())
    assert client.images.upload_images(file=[disc("rebeccapurple")]).existing == 1

    found = client.search.search(generated.SearchRequest(query="a purple disc", k=100))
    assert image.id in [neighbour.image_id for neighbour in found.results]
    assert client.search.rag_search("a purple disc").prompt == "a purple disc"

    request = generated.RagGenerateRequest(
        prompt="a purple disc", num_images=2, seed=7, reference_ids=[generated.Reference(image.id)]
    )
    accepted = client.generation.rag_generate(request, idempotency_key="order-1")
    assert isinstance(accepted, generated.JobView)
    assert client.generation.rag_generate(request, idempotency_key="order-1").id == accepted.id
    job = client.ended(accepted.id)
    assert job.state is generated.JobState.SUCCEEDED
    assert [output.seed for output in job.outputs] == [7, 8]
    assert {reference.image_id for reference in job.outputs[0].references} == {image.id}
    description = generated.RememberRequest(caption="drawn", collection="remembered")
    remembered = client.outputs.remember_generation(job.outputs[0].id, remember_request=description)
    assert (remembered.sha256, remembered.caption) == (job.outputs[0].sha256, "drawn")
    brought = generated.SentReferenceImage(data=base64.b64encode(disc("orchid")).decode(), weight=2)
    own = client.generation.rag_generate(generated.RagGenerateRequest(prompt="a disc", reference_images=[brought]))
    (picture,) = own.reference_images
    assert picture.weight == 2
    assert client.reference_images.get_reference_image_content(picture.id).startswith(b"\x89PNG")
    assert "event: succeeded" in client.jobs.stream_job_events(job.id)
    content = client.outputs.get_generation_content(job.outputs[0].id)
    assert content.startswith(b"\x89PNG")
    assert len(content) == job.outputs[0].size_bytes

    assert job.id in [each.id for each in client.jobs.list_jobs(state="succeeded").items]
    assert job.outputs[0].id in [each.id for each in client.images.list_generations_of_image(image.id).items]
    client.images.delete_image(image.id)
    with pytest.raises(generated.exceptions.NotFoundException):
        client.images.get_image(image.id)


def test_a_submit_returns_a_queued_job_an_ended_job_or_a_plan(generated: ModuleType, client: GeneratedClient) -> None:
    request = {"prompt": "a red apple"}
    queued = client.generation.generate(generated.GenerateRequest(**request))
    assert isinstance(queued, generated.JobView)
    ended = client.generation.generate(generated.GenerateRequest(**request), prefer="wait=60").actual_instance
    assert isinstance(ended, generated.JobView)
    assert ended.state is generated.JobState.SUCCEEDED
    plan = client.generation.generate(generated.GenerateRequest(**request, dry_run=True)).actual_instance
    assert isinstance(plan, generated.DryRunView)
    assert plan.parameters.prompt == "a red apple"


def test_a_bulk_is_sent_and_read_as_json_lines(client: GeneratedClient) -> None:
    lines = '{"bulk": {"defaults": {"kind": "generate"}}}\n{"prompt": "a red apple"}\n{"prompt": "a green pear"}\n'
    bulk = client.bulks.create_bulk(body=lines)
    wait_until(lambda: client.bulks.get_bulk(bulk.id).state == "completed", timeout_s=60, what="the bulk to end")
    assert [item.prompt for item in client.bulks.list_bulk_items(bulk.id).items] == ["a red apple", "a green pear"]
    assert client.bulks.get_bulk_manifest(bulk.id).count(b'"state":"succeeded"') == 2
    assert b"end.json" in client.bulks.get_bulk_archive(bulk.id)


def test_refused_requests_raise_typed_problems(
    generated: ModuleType, client: GeneratedClient, keyed_stack: RunningStack
) -> None:
    exceptions = generated.exceptions
    with pytest.raises(exceptions.NotFoundException) as absent:
        client.jobs.get_job(uuid4())
    assert isinstance(absent.value.data, generated.Problem)
    assert (absent.value.data.code, absent.value.data.status) == ("not_found", 404)

    pinned = generated.Reference(uuid4())
    twice = generated.RagGenerateRequest(prompt="x", reference_ids=[pinned, pinned])
    with pytest.raises(exceptions.UnprocessableEntityException) as invalid:
        client.generation.rag_generate(twice)
    assert invalid.value.data.code == "validation_failed"
    (mistake,) = invalid.value.data.errors
    assert isinstance(mistake, generated.FieldProblem)
    assert "names an image twice" in mistake.message

    ended = client.ended(client.generation.generate(generated.GenerateRequest(prompt="x")).id)
    with pytest.raises(exceptions.ConflictException) as conflict:
        client.jobs.cancel_job(ended.id)
    assert conflict.value.data.code == "job_state_conflict"

    anonymous = GeneratedClient(generated, keyed_stack.url, None)
    with pytest.raises(exceptions.UnauthorizedException) as unknown:
        anonymous.service.get_usage()
    assert unknown.value.data.code == "authentication_required"
    assert anonymous.service.get_liveness().status is generated.HealthStatus.OK
