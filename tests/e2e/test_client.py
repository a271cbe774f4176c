"""The typed client on a whole stack: every call, and a wait while the API is killed."""

import asyncio
import io
import re
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image, ImageColor

from afterimage_client import (
    Access,
    Afterimage,
    AsyncAfterimage,
    BulkOptions,
    BulkState,
    CollectionDefaults,
    CollectionPatch,
    ConflictError,
    GenerateRequest,
    GrantedAccess,
    IdempotencyKeyReusedError,
    ImageFile,
    ImageFilter,
    ImagePatch,
    ImageState,
    InvalidInputError,
    InvalidRequestError,
    JobState,
    NotFoundError,
    Provenance,
    RagGenerateRequest,
    RagSearchQuery,
    RememberRequest,
    ReplayVerdict,
    Resolution,
    SearchRequest,
    SentReferenceImage,
    Update,
    UploadFields,
    header_line,
)
from ops.local.stack import REPOSITORY
from shared.contracts.records import ConsideredReference, RecordedModel
from tests.e2e.conftest import disc
from tests.stack import RunningStack, wait_until


@pytest.fixture
def service(stack: RunningStack) -> Iterator[Afterimage]:
    with Afterimage(stack.url) as service:
        yield service


def test_the_python_of_the_readme_runs_as_printed(
    stack: RunningStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    monkeypatch.setenv("AFTERIMAGE_URL", stack.url)
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["7.png", "8.png"]
    with Afterimage() as service:
        remembered, drawn = islice(service.jobs.list(), 2)
        assert [output.seed for output in remembered.outputs] == [9]
        assert [each.kind for each in drawn.outputs[0].references] == ["request"]


def test_one_line_draws_pictures(service: Afterimage, tmp_path: Path) -> None:
    (uploaded,) = service.images.upload([ImageFile("a.png", disc("sienna"))], UploadFields(collection="run")).images
    wait_until(
        lambda: service.images.get(uploaded).state is ImageState.READY, timeout_s=60, what="the image to be searchable"
    )
    (picture,) = service.run("a disc", references=[disc("indigo"), str(uploaded.id)], width=64, seed=5)
    assert [each.kind for each in picture.output.references] == ["corpus", "request"]
    assert (picture.output.seed, picture.image().size[0]) == (5, 64)
    assert picture.save(tmp_path / "new" / "a.png").read_bytes() == picture.data
    provenance = picture.output.provenance
    assert (provenance["seed"], provenance["model"]["name"]) == (5, "cheap")
    resolution = service.jobs.get(picture.output.job_id).resolution
    assert resolution is not None
    assert [each["used"] for each in resolution["references"]] == [True, True]
    # Every key that the service writes is in the types.
    assert provenance.keys() <= Provenance.__annotations__.keys()
    assert resolution.keys() <= Resolution.__annotations__.keys()
    assert provenance["model"].keys() <= RecordedModel.__annotations__.keys()
    assert resolution["references"][0].keys() <= ConsideredReference.__annotations__.keys()


@pytest.mark.parametrize(
    ("arguments", "field", "said"),
    [
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "a", "width": 5}, "width", "greater than or equal to 16"),
        ({"prompt": "a", "num_image": 5}, "num_image", "is num_images meant"),
        ({"prompt": "a", "references": ["absent.png"]}, None, "cannot read absent.png"),
        ({"prompt": GenerateRequest(prompt="a"), "seed": 5}, None, "a request has its own"),
    ],
)
def test_bad_input_is_refused_before_it_is_sent(arguments: dict[str, Any], field: str | None, said: str) -> None:
    with Afterimage("http://127.0.0.1:9") as nowhere, pytest.raises(InvalidInputError, match=said) as refused:
        nowhere.run(**arguments)
    assert [each.field for each in refused.value.errors] == ([field] if field else [])


def test_a_refusal_names_the_address(service: Afterimage) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        service.run(GenerateRequest(prompt="by no model", model="there-is-none"))
    assert refused.value.request == f"POST {service.url}/api/v1/generate"
    assert refused.value.request in str(refused.value)


def test_the_asynchronous_client_does_the_same(stack: RunningStack) -> None:
    async def work() -> None:
        async with AsyncAfterimage(stack.url) as service:
            groups = await asyncio.gather(*(service.run(f"async {number}", seed=number) for number in range(6)))
            assert [picture.output.seed for (picture,) in groups] == list(range(6))
            prompts = [job.prompt async for job in service.jobs.list(page_size=2) if job.prompt.startswith("async")]
            assert sorted(prompts) == [f"async {number}" for number in range(6)]
            header = header_line(BulkOptions(name="async"))
            bulk = await service.bulks.create(header, idempotency_key=uuid4().hex)
            await service.bulks.send(bulk, [header, b'{"prompt": "one"}', b'{"prompt": "two"}'])
            assert (await service.bulks.wait(bulk)).counts.succeeded == 2
            assert [record["prompt"] async for record in service.bulks.manifest(bulk)] == ["one", "two"]
            with pytest.raises(NotFoundError):
                await service.jobs.get(uuid4())

    asyncio.run(work())


def test_jobs_are_submitted_once_followed_listed_and_deleted(service: Afterimage, tmp_path: Path) -> None:
    request = RagGenerateRequest(prompt="once", seed=3, num_images=2, metadata={"by": "client"})
    assert service.jobs.dry_run(request).parameters.seeds == [3, 4]
    key = uuid4().hex
    job = service.jobs.submit(request, idempotency_key=key)
    assert service.jobs.submit(request, idempotency_key=key).id == job.id
    with pytest.raises(IdempotencyKeyReusedError):
        service.jobs.submit(RagGenerateRequest(prompt="another"), idempotency_key=key)
    updates: list[Update] = []
    done = service.jobs.wait(job, on_update=updates.append)
    assert (done.state, done.metadata) == (JobState.SUCCEEDED, {"by": "client"})
    assert updates[-1].state is JobState.SUCCEEDED
    newest = islice(service.jobs.list(state=JobState.SUCCEEDED, page_size=1), 3)  # three pages of many
    assert job.id in {each.id for each in newest}
    assert service.outputs.get(done.outputs[0].id) == done.outputs[0]
    service.outputs.download(done.outputs[1], tmp_path / "1.png")
    assert (tmp_path / "1.png").read_bytes() == service.outputs.content(done.outputs[1])

    again = service.jobs.wait(service.outputs.replay(done.outputs[1].id))
    assert again.replay_of == done.outputs[1].id
    assert [output.replay and output.replay.verdict for output in again.outputs] == [ReplayVerdict.IDENTICAL]
    described = RememberRequest(collection="remembered", caption="once more", tags=["drawn"])
    image = service.outputs.remember(done.outputs[1].id, described)
    assert (image.collection, image.caption, image.tags) == ("remembered", "once more", ["drawn"])
    assert image.sha256 == done.outputs[1].sha256
    assert service.outputs.remember(done.outputs[1].id, described).id == image.id
    with pytest.raises(ConflictError):
        service.jobs.retry(job)
    with pytest.raises(ConflictError):
        service.jobs.cancel(job)
    service.jobs.delete(job)
    with pytest.raises(NotFoundError):
        service.jobs.get(job)
    with pytest.raises(InvalidRequestError) as refused:
        service.jobs.submit(GenerateRequest(prompt="by nobody", model="there-is-none"))
    assert refused.value.code == "model_not_found"


def test_images_are_uploaded_found_changed_and_deleted(service: Afterimage, tmp_path: Path) -> None:
    collection = "client"
    fields = UploadFields(caption="a disc", tags=["round"], attributes={"side": "left"}, collection=collection)
    uploaded = service.images.upload([ImageFile("a.png", disc("coral")), ImageFile("b.png", disc("khaki"))], fields)
    assert (uploaded.created, uploaded.existing) == (2, 0)
    assert service.images.upload([ImageFile("again.png", disc("coral"))], fields).existing == 1
    first, second = (image.id for image in uploaded.images)
    wait_until(
        lambda: not [*service.images.list(collection=collection, state=ImageState.PENDING)],
        timeout_s=60,
        what="both to be searchable",
    )
    assert {image.id for image in service.images.list(collection=collection, tag="round", page_size=1)} == {
        first,
        second,
    }
    changed = service.images.change(first, ImagePatch(caption=None, tags=["ring"]))
    assert (changed.caption, changed.tags, changed.attributes) == (None, ["ring"], {"side": "left"})
    like = SearchRequest(image_id=first, k=2, filter=ImageFilter(collection=collection))
    assert service.search(like).results[0].image_id in (first, second)
    plan = service.references(RagSearchQuery(prompt="a disc", collection=collection, min_similarity=-1))
    assert {reference.image_id for reference in plan.references} <= {first, second}
    job = service.jobs.submit(RagGenerateRequest(prompt="a disc", reference_ids=[first]))
    assert service.jobs.wait(job).state is JobState.SUCCEEDED
    assert [output.job_id for output in service.images.generations(first)] == [job.id]
    service.images.download(service.images.get(second), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == service.images.content(second)
    service.images.delete(first)
    with pytest.raises(NotFoundError):
        service.images.get(first)


def test_collections_are_created_found_changed_and_deleted(service: Afterimage) -> None:
    made = service.collections.create("goods", description="for sale", defaults=CollectionDefaults(k=2))
    assert (made.access, made.defaults.k) == (Access.OWNER, 2)
    with pytest.raises(ConflictError):
        service.collections.create("goods")
    service.images.upload([ImageFile("a.png", disc("plum"))], UploadFields(collection="goods"))
    changed = service.collections.change(made, CollectionPatch(name="wares"))
    assert (changed.name, changed.description, changed.images) == ("wares", "for sale", 1)
    assert service.collections.find("wares") == changed == service.collections.get(made.id)
    assert service.collections.find("goods") is None
    assert changed in [*service.collections.list(page_size=1)]
    grant = service.collections.share(made, "system", GrantedAccess.WRITE)
    assert [*service.collections.grants(made)] == [grant]
    service.collections.unshare(made, "system")
    with pytest.raises(NotFoundError):
        service.collections.share(made, "an-unknown-owner")
    service.collections.delete(made)
    with pytest.raises(NotFoundError):
        service.collections.get(made)


def test_a_request_brings_a_picture_of_its_own(service: Afterimage) -> None:
    picture = SentReferenceImage.of(disc("salmon"), weight=2, caption="a disc")
    job = service.jobs.submit(RagGenerateRequest(prompt="a disc", reference_images=[picture]))
    (own,) = job.reference_images
    assert (own.weight, own.caption, own.width, own.height) == (2, "a disc", 128, 128)
    stored = Image.open(io.BytesIO(service.jobs.reference_content(own)))
    assert stored.getpixel((64, 64)) == ImageColor.getrgb("salmon")
    done = service.jobs.wait(job)
    assert [(each.kind, each.image_id) for each in done.outputs[0].references] == [("request", own.id)]
    with pytest.raises(InvalidRequestError) as refused:
        service.jobs.submit(RagGenerateRequest(prompt="a disc", reference_images=[SentReferenceImage.of(b"no")]))
    assert (refused.value.code, refused.value.errors[0].field) == (
        "unsupported_image_type",
        "body.reference_images.0.data",
    )
    service.jobs.delete(done)
    with pytest.raises(NotFoundError):
        service.jobs.reference_content(own)


def test_a_bulk_is_sent_paused_resumed_and_listed(service: Afterimage) -> None:
    header = header_line(BulkOptions(name="by the client"))
    lines = [header, *(b'{"prompt": "\xe2\x80\xa8 item %d", "custom_id": "c%d"}' % (n, n) for n in range(30))]
    bulk = service.bulks.create(header, idempotency_key=uuid4().hex)
    bulk = service.bulks.send(bulk.id, lines)
    assert service.bulks.send(bulk.id, lines).id == bulk.id
    assert service.bulks.pause(bulk.id).state is BulkState.PAUSED
    assert service.bulks.resume(bulk.id).state is BulkState.RUNNING
    assert service.bulks.wait(bulk.id).counts.succeeded == 30
    assert [item.custom_id for item in service.bulks.items(bulk.id, page_size=7)] == [f"c{n}" for n in range(30)]
    records = list(service.bulks.manifest(bulk.id))
    assert [record["line"] for record in records] == list(range(2, 32))
    assert service.bulks.retry_failed(bulk.id).state is BulkState.COMPLETED
    assert bulk.id in {each.id for each in service.bulks.list(page_size=1)}


def test_models_health_and_stats_are_read(service: Afterimage) -> None:
    assert [model.name for model in service.models().models] == ["cheap"]
    assert service.health().status in ("ok", "degraded")
    assert service.stats().jobs is not None


def test_a_wait_survives_a_killed_api_and_reports_each_event_once(stack: RunningStack, service: Afterimage) -> None:
    updates: list[Update] = []
    with stack.frozen("generate-cheap"):
        job = service.jobs.submit(GenerateRequest(prompt="through it all"))
        waiter = threading.Thread(target=lambda: updates.extend(service.jobs.follow(job)))
        waiter.start()
        killed = stack.control.pid("api")
        stack.control.kill("api")
        wait_until(lambda: stack.control.pid("api") not in (None, killed), timeout_s=30, what="a new API")
    waiter.join(90)
    assert updates[-1].state is JobState.SUCCEEDED
    numbers = [update.seq for update in updates if update.progress is None]
    assert numbers == sorted(set(numbers))
