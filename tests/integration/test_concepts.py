"""References for each thing of a prompt: planned, submitted, drawn and recorded, with the starter CLIP."""

import io
import json
import tarfile
from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from api_service.services import views
from shared.contracts.generation import Mode, RagGenerateRequest, ResolvedConcept
from shared.db import collections, outputs, owners, spaces
from shared.db.spaces import Space
from shared.db.tables import BulkItem, Job
from shared.db.tables import Image as ImageRow
from shared.imaging import read_record
from shared.settings import STARTER, ModelSettings, SafetySettings, Settings
from shared.storage import get_blobs
from tests.factories import SHARED_COLLECTION, make_image, make_job
from tests.integration.conftest import API, Client
from tests.integration.test_api_search import embed_worker
from tests.integration.test_generation import reload, run
from tests.recording_generator import RecordingGenerator
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.worker_models import Models

THINGS = ("robot", "hibiscus", "cat", "top hat", "dog", "cut of meat", "rocket")
PROMPT = "a robot holding a flower"
GATE = 0.42


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(ModelSettings())


@pytest.fixture(scope="module")
def pictures() -> dict[str, Image.Image]:
    """One picture of the starter corpus for each of THINGS."""
    found: dict[str, Image.Image] = {}
    with tarfile.open(STARTER / "corpus.tar.gz") as corpus:
        files = {member.name: member for member in corpus}
        for name in files:
            if name.endswith(".json"):
                caption = json.load(corpus.extractfile(files[name]) or io.BytesIO())["caption"]
                if caption in THINGS and caption not in found:
                    file = corpus.extractfile(files[name.replace(".json", ".webp")])
                    assert file is not None
                    found[caption] = Image.open(io.BytesIO(file.read())).convert("RGB")
    return found


@pytest.fixture
def space(settings: Settings, session: Session, clip: Clip) -> Space:
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    return space


@pytest.fixture
def watchdog(settings: Settings) -> Watchdog:
    return Watchdog(settings.watchdog)


@pytest.fixture
def embedder(clip: Clip, space: Space, watchdog: Watchdog) -> Iterator[Embedder]:
    embedder = Embedder(clip, space, watchdog)
    yield embedder
    embedder.close(5)


def add_image(
    session: Session, embedder: Embedder, picture: Image.Image, *, caption: str, collection_id: UUID = SHARED_COLLECTION
) -> ImageRow:
    """A searchable image with its file. The caller commits."""
    (vector,) = embedder.embed([embedder.prepare(picture)])
    image = make_image(session, vector=vector, space=embedder.space, caption=caption, collection_id=collection_id)
    file = io.BytesIO()
    picture.save(file, "PNG")
    get_blobs().put(image.blob_key, file.getvalue(), media_type="image/png")
    return image


@pytest.fixture
def corpus(session: Session, embedder: Embedder, pictures: dict[str, Image.Image]) -> dict[str, ImageRow]:
    """The pictures as searchable images, by their captions."""
    images = {thing: add_image(session, embedder, pictures[thing], caption=thing) for thing in THINGS}
    session.commit()
    return images


@pytest.fixture
def worker(space: Space, embedder: Embedder) -> Iterator[list[dict[str, Any]]]:
    """An embed worker; yields the queries that it has answered."""
    with embed_worker(space, embed=embedder.embed) as answered:
        yield answered


@pytest.fixture
def models(settings: Settings, embedder: Embedder, watchdog: Watchdog, model: RecordingGenerator) -> Iterator[Models]:
    models = Models.of(embedder, model, settings.model.generators["cheap"], watchdog)
    yield models
    models.close(5)


def plan(client: Client, prompt: str = PROMPT, **query: object) -> Client:
    answer = client.get(f"{API}/rag/search", query_string={"prompt": prompt, "min_similarity": GATE, **query})
    assert answer.status_code == 200, answer.text
    return answer.json


def used(plan: Client) -> dict[str, list[str]]:
    """The concepts of each used reference, by its caption."""
    return {each["caption"]: each["concepts"] for each in plan["references"] if each["used"]}


def submit(client: Client, **fields: object) -> Client:
    return client.post(f"{API}/rag/generate", json={"prompt": PROMPT, "min_similarity": GATE, **fields})


def problem(answer: Client) -> tuple[int, str, list[str]]:
    return answer.status_code, answer.json["code"], [each["field"] for each in answer.json["errors"]]


# --- plans --------------------------------------------------------------------------------------------------------


def test_each_thing_of_a_prompt_gets_a_reference(
    client: Client, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    shown = plan(client)
    assert used(shown) == {"robot": ["a robot"], "hibiscus": ["a flower"]}
    assert [(each["text"], each["found"], each["image_ids"]) for each in shown["concepts"]] == [
        ("a robot", True, [str(corpus["robot"].id)]),
        ("a flower", True, [str(corpus["hibiscus"].id)]),
    ]
    assert [each["weight"] for each in shown["references"] if each["used"]] == [0.5, 0.5]
    assert len(worker) == 1, "one batch embeds all concepts"


def test_a_prompt_that_is_not_split_is_the_only_concept(
    client: Client, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    shown = plan(client, split_prompt="false")
    assert [each["text"] for each in shown["concepts"]] == [PROMPT]
    assert "hibiscus" not in used(shown)


def test_a_concept_that_the_corpus_lacks_is_named_with_the_reason(
    client: Client, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    shown = plan(client, prompt="a rocket", concept=["a rocket", "an accordion"])
    rocket, accordion = shown["concepts"]
    assert rocket["found"]
    assert (accordion["found"], accordion["image_ids"]) == (False, [])
    assert "is below 0.42" in accordion["reason"]
    assert used(shown) == {"rocket": ["a rocket"]}


def test_words_before_the_name_of_a_thing_do_not_spoil_its_search(
    client: Client,
    session: Session,
    corpus: dict[str, ImageRow],
    worker: list[dict[str, Any]],
    models: Models,
    leases: JobLeases,
) -> None:
    prompt = "draw me a big scary robot"
    shown = plan(client, prompt=prompt)
    assert used(shown) == {"robot": [prompt]}
    assert len(worker) == 1, "one batch embeds the concept and its shorter names"
    job_id = UUID(submit(client, prompt=prompt).json["id"])
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    resolved = client.get(f"{API}/jobs/{job_id}").json["resolution"]
    assert used(resolved) == used(shown)
    assert [each["reason"] for each in resolved["references"]] == [each["reason"] for each in shown["references"]]


def test_the_number_of_references_is_a_limit_for_all_concepts_together(
    client: Client, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    shown = plan(client, k=1)
    assert len(used(shown)) == 1
    assert [each["found"] for each in shown["concepts"]] == [True, True]
    (without,) = [each for each in shown["concepts"] if not each["image_ids"]]
    assert "at most 1" in without["reason"]


def test_what_the_request_avoids_is_not_used(
    client: Client, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    by_text = plan(client, avoid=["a flower"])
    assert used(by_text) == {"robot": ["a robot"]}
    assert "“a flower”, which the request avoids" in by_text["concepts"][1]["reason"]
    similarity = {each["caption"]: each["similarity"] for each in plan(client)["references"]}["robot"]
    assert by_text["references"][0]["similarity"] == pytest.approx(similarity, abs=1e-4), "of the concept itself"
    by_id = plan(client, avoid_ids=[str(corpus["robot"].id)])
    assert used(by_id) == {"hibiscus": ["a flower"]}
    assert "robot" not in {each["caption"] for each in by_id["references"]}


@pytest.mark.parametrize(
    "concepts", [["a robot", "A Robot"], [""], ["a"] * 9, ["x" * 2001]], ids=["twice", "empty", "nine", "long"]
)
def test_wrong_concepts_of_a_search_are_refused(client: Client, space: Space, concepts: list[str]) -> None:
    answer = client.get(f"{API}/rag/search", query_string={"prompt": PROMPT, "concept": concepts})
    assert (answer.status_code, answer.json["code"]) == (422, "validation_failed")


def test_studio_shows_references_under_their_concept_and_submits_the_concepts_of_the_form(
    client: Client, session: Session, corpus: dict[str, ImageRow], worker: list[dict[str, Any]]
) -> None:
    form = {"prompt": "x", "concepts": "a robot\r\nan accordion\r\na flower", "min_similarity": str(GATE)}
    page = client.get("/references", query_string=form, headers={"X-Fragment": "1"}).text
    places = [page.index(f">{text}<") for text in ("a robot", "an accordion", "a flower")]
    assert places == sorted(places)
    robot, accordion, flower = (page[start:end] for start, end in pairwise([*places, len(page)]))
    assert str(corpus["robot"].id) in robot
    assert "Nothing was found" in accordion
    assert str(corpus["hibiscus"].id) in flower
    client.post("/", data=form, headers={"Origin": "http://localhost"})
    job = session.scalars(select(Job)).one()
    assert [each["text"] for each in job.parameters["concepts"]] == ["a robot", "an accordion", "a flower"]


# --- requests -----------------------------------------------------------------------------------------------------


def test_the_concepts_of_a_request_are_resolved_at_submit(client: Client, session: Session) -> None:
    split = submit(client).json["parameters"]
    assert [each["text"] for each in split["concepts"]] == ["a robot", "a flower"]
    named = submit(client, concepts=[{"text": "a cat", "k": 2}, {"text": "a hat", "filter": {"tags": ["red"]}}])
    concepts = [ResolvedConcept.model_validate(each) for each in named.json["parameters"]["concepts"]]
    assert [(each.text, each.k) for each in concepts] == [("a cat", 2), ("a hat", None)]
    assert concepts[1].filter is not None
    assert concepts[1].filter.tags == ["red"]
    dry = submit(client, dry_run=True).json["parameters"]
    assert dry["concepts"] == split["concepts"]


@pytest.mark.parametrize(
    "fields",
    [
        {"split_prompt": False},
        {"mode": "none"},
        {"similar_examples_count": 0},
        {"mode": "none", "concepts": [{"text": "a cat"}]},
        {"prompt": "a winter landscape"},
    ],
)
def test_a_job_without_several_concepts_has_a_row_that_the_previous_release_reads(
    client: Client, session: Session, fields: dict[str, Any]
) -> None:
    parameters = submit(client, **fields).json["parameters"]
    assert not {"concepts", "search_mode", "max_gap"} & parameters.keys()


def test_more_concepts_than_the_default_number_of_references_get_one_each(client: Client, session: Session) -> None:
    concepts = [{"text": f"thing {number}"} for number in range(6)]
    limit = submit(client, similar_examples_count=16).json["parameters"]["k"]
    assert submit(client, concepts=concepts).json["parameters"]["k"] == min(6, limit)
    assert submit(client, concepts=concepts, similar_examples_count=2).json["parameters"]["k"] == 2


def test_a_plain_request_keeps_the_fingerprint_of_the_previous_release() -> None:
    """Otherwise an idempotency key sent before and after an upgrade would be refused."""
    fields = RagGenerateRequest(prompt="a cat").model_dump(mode="json")
    assert not {"concepts", "split_prompt", "plan", "avoid", "avoid_ids"} & fields.keys()
    assert "split_prompt" in RagGenerateRequest(prompt="a cat", split_prompt=False).model_dump()


@pytest.mark.parametrize(
    ("fields", "at"),
    [
        ({"concepts": [{"text": "a cat"}, {"text": "A CAT"}]}, "body"),
        ({"concepts": [{"text": "a cat"}], "reference_ids": [str(UUID(int=5))]}, "body"),
        ({"avoid": ["a cat"], "reference_ids": [str(UUID(int=5))]}, "body"),
        ({"avoid_ids": [str(UUID(int=5))] * 65}, "body.avoid_ids"),
        ({"avoid": [""]}, "body.avoid.0"),
        ({"concepts": [{"text": " "}]}, "body.concepts.0.text"),
        ({"concepts": [{"text": "a cat", "k": 0}]}, "body.concepts.0.k"),
        ({"concepts": [{"text": f"{n}"} for n in range(9)]}, "body.concepts"),
        ({"concepts": [{"text": "a", "filter": {"collection": "no-such"}}]}, "body.concepts.0.filter.collection"),
    ],
)
def test_wrong_concepts_are_refused_by_field(client: Client, session: Session, fields: dict[str, Any], at: str) -> None:
    assert problem(submit(client, **fields)) == (422, "validation_failed", [at])


def test_a_concept_cannot_search_a_collection_of_another_owner(client: Client, session: Session) -> None:
    collections.ensure(session, "private", owner_id=owners.ensure(session, "other"))
    session.commit()
    answer = submit(client, concepts=[{"text": "a cat", "filter": {"collection": "private"}}])
    assert problem(answer) == (422, "validation_failed", ["body.concepts.0.filter.collection"])


def test_items_of_a_bulk_have_concepts(client: Client, session: Session) -> None:
    lines = [
        {"prompt": PROMPT},
        {"prompt": "x", "concepts": [{"text": "a cat"}]},
        {"prompt": "x", "concepts": [{"text": "a cat", "filter": {"collection": "no-such"}}]},
    ]
    body = "\n".join(json.dumps(line) for line in [{"bulk": {"on_invalid": "skip"}}, *lines])
    bulk = client.post(f"{API}/bulks", data=body, content_type="application/x-ndjson").json
    items = session.scalars(select(BulkItem).where(BulkItem.bulk_id == UUID(bulk["id"])).order_by(BulkItem.line))
    texts = [[each["text"] for each in item.parameters["concepts"]] for item in items]
    assert texts == [["a robot", "a flower"], ["a cat"]]
    errors = client.get(f"{API}/bulks/{bulk['id']}/errors").json["items"]
    assert [(each["line"], each["errors"][0]["field"]) for each in errors] == [
        (4, "line.4.concepts.0.filter.collection")
    ]


# --- jobs ---------------------------------------------------------------------------------------------------------


def test_a_job_uses_the_references_that_the_plan_shows_and_records_their_concepts(
    client: Client,
    session: Session,
    corpus: dict[str, ImageRow],
    worker: list[dict[str, Any]],
    models: Models,
    leases: JobLeases,
) -> None:
    shown = plan(client)
    job_id = UUID(submit(client).json["id"])
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    view = client.get(f"{API}/jobs/{job_id}").json
    resolved = view["resolution"]
    assert used(resolved) == used(shown) == {"robot": ["a robot"], "hibiscus": ["a flower"]}
    assert resolved["concepts"] == shown["concepts"]
    assert [each["reason"] for each in resolved["references"]] == [each["reason"] for each in shown["references"]]
    (output,) = view["outputs"]
    assert {each["caption"]: each["concepts"] for each in output["references"]} == used(shown)
    assert output["provenance"]["concepts"] == shown["concepts"]
    (row,) = outputs.list_by_job(session, [job_id])[job_id]
    assert read_record(get_blobs().get(row.blob_key)) == row.provenance


def test_a_job_avoids_what_its_plan_avoids(
    client: Client,
    corpus: dict[str, ImageRow],
    worker: list[dict[str, Any]],
    models: Models,
    leases: JobLeases,
) -> None:
    fields: dict[str, Any] = {"avoid": ["roses"], "avoid_ids": [str(corpus["robot"].id)]}
    shown = plan(client, **fields)
    job_id = UUID(submit(client, **fields).json["id"])
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    resolved = client.get(f"{API}/jobs/{job_id}").json["resolution"]
    assert resolved["concepts"] == shown["concepts"]
    assert str(corpus["robot"].id) not in {each["image_id"] for each in resolved["references"]}


def test_a_concept_of_a_job_searches_with_its_own_filter(
    session: Session,
    corpus: dict[str, ImageRow],
    embedder: Embedder,
    pictures: dict[str, Image.Image],
    models: Models,
    leases: JobLeases,
) -> None:
    owner_id = owners.ensure(session, "local")
    mine = collections.ensure(session, "mine", owner_id=owner_id)
    own = add_image(session, embedder, pictures["cat"], caption="my cat", collection_id=mine.id)
    concepts = [{"text": "a cat", "filter": {"collection": "mine"}}, {"text": "a robot"}]
    job = make_job(session, concepts=concepts, min_similarity=GATE)
    session.commit()
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    resolution = reload(session, job).resolution
    assert resolution is not None
    chosen = {each["image_id"]: each["concepts"] for each in resolution["references"] if each["used"]}
    assert chosen == {str(own.id): ["a cat"], str(corpus["robot"].id): ["a robot"]}


def test_a_job_of_which_nothing_is_found_draws_from_the_prompt_alone(
    session: Session,
    corpus: dict[str, ImageRow],
    models: Models,
    leases: JobLeases,
) -> None:
    job = make_job(session, concepts=[{"text": "an accordion"}, {"text": "a teapot"}], min_similarity=0.9)
    session.commit()
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (output,) = outputs.list_by_job(session, [job.id])[job.id]
    assert output.provenance["mode"] == "none"
    assert output.provenance["references"] == []
    assert [(each["text"], each["found"]) for each in output.provenance["concepts"]] == [
        ("an accordion", False),
        ("a teapot", False),
    ]


def test_captions_of_the_references_of_all_concepts_reach_the_model(
    session: Session,
    corpus: dict[str, ImageRow],
    models: Models,
    model: RecordingGenerator,
    leases: JobLeases,
) -> None:
    concepts = [{"text": "a robot"}, {"text": "a flower"}]
    job = make_job(session, prompt=PROMPT, concepts=concepts, min_similarity=GATE, mode=Mode.CAPTION)
    session.commit()
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    assert [each.caption for each in model.received[0].references] == ["robot", "hibiscus"]


def test_a_retry_and_a_replay_keep_the_concepts(
    client: Client,
    session: Session,
    corpus: dict[str, ImageRow],
    models: Models,
    leases: JobLeases,
) -> None:
    job_id = UUID(submit(client).json["id"])
    assert run(job_id, models, leases) is Outcome.SUCCEEDED
    (output,) = outputs.list_by_job(session, [job_id])[job_id]
    replayed = UUID(client.post(f"{API}/generations/{output.id}/replay").json["id"])
    assert run(replayed, models, leases) is Outcome.SUCCEEDED
    session.expire_all()
    (again,) = outputs.list_by_job(session, [replayed])[replayed]
    assert [each["concepts"] for each in again.provenance["references"]] == [["a robot"], ["a flower"]]
    assert [(each["text"], each["found"]) for each in again.provenance["concepts"]] == [
        ("a robot", True),
        ("a flower", True),
    ]
    assert views.outputs_of(session, [again])[0].replay is not None

    canceled = submit(client).json
    assert client.post(f"{API}/jobs/{canceled['id']}/cancel").status_code in (200, 202)
    retried = client.post(f"{API}/jobs/{canceled['id']}/retry").json
    assert retried["parameters"]["concepts"] == canceled["parameters"]["concepts"]


def test_the_content_policy_reads_concepts_as_it_reads_prompts(
    settings: Settings,
    session: Session,
    embedder: Embedder,
    watchdog: Watchdog,
    model: RecordingGenerator,
    leases: JobLeases,
) -> None:
    rule = {"name": "weapon", "texts": ["a pistol"], "prompt": {"threshold": 0.75, "action": "block"}}
    policy = SafetySettings.model_validate({"concepts": [rule]})
    models = Models.of(embedder, model, settings.model.generators["cheap"], watchdog, safety=policy)
    harmless = make_job(session, prompt="a cat", concepts=[{"text": "a cat"}, {"text": "a hat"}])
    blocked = make_job(session, prompt="a cat", concepts=[{"text": "a cat"}, {"text": "a pistol"}])
    session.commit()
    assert run(harmless.id, models, leases) is Outcome.SUCCEEDED
    assert run(blocked.id, models, leases) is Outcome.FAILED
    error = reload(session, blocked).error
    assert error is not None
    assert error["code"] == "prompt_blocked"
    models.close(5)


def test_a_row_of_the_previous_release_searches_the_whole_prompt(
    session: Session,
    corpus: dict[str, ImageRow],
    models: Models,
    leases: JobLeases,
) -> None:
    job = make_job(session, prompt="a rocket", min_similarity=GATE)
    assert "concepts" not in job.parameters
    session.commit()
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert used(resolution) == {"rocket": ["a rocket"]}
    assert [each["text"] for each in resolution["concepts"]] == ["a rocket"]
