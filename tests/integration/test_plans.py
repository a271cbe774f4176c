"""Plans: what a search has shown is what a job draws from, or the request is refused by code."""

import base64
import json
import re
import time
from collections.abc import Iterator
from random import Random
from typing import Any
from uuid import UUID, uuid4

import numpy as np
import pytest
from itsdangerous import TimestampSigner
from sqlalchemy import select
from sqlalchemy.orm import Session

from api_service.http.auth import Caller
from api_service.services import plans
from shared import retrieval
from shared.contracts.generation import MAX_PLAN_LENGTH, GenerationParameters
from shared.contracts.search import ImageFilter, PlannedConcept
from shared.db import images as images_db
from shared.db import outputs, spaces
from shared.db.images import ImageClaim
from shared.db.spaces import Space
from shared.db.tables import Image, Job
from shared.settings import Settings, get_settings
from tests.factories import make_image, make_space
from tests.integration.conftest import API, AppFactory, Client, FlushingClient, a_key
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_generation import add_embedded_image, run
from tests.recording_generator import RecordingGenerator
from tests.stack import wait_until
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.models.worker_models import Models

KEY, OLD_KEY = "k" * 32, "o" * 32
PAGE = {"Origin": "http://localhost"}


@pytest.fixture(autouse=True)
def signing_keys(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    use_keys(monkeypatch, KEY)


def use_keys(monkeypatch: pytest.MonkeyPatch, *keys: str) -> None:
    monkeypatch.setenv("AFTERIMAGE_SECURITY__SIGNING_KEYS", json.dumps(keys))
    get_settings.cache_clear()


@pytest.fixture
def space(session: Session) -> Space:
    space = make_space(session)
    session.commit()
    return space


@pytest.fixture
def corpus(session: Session, space: Space) -> list[Image]:
    """Three images near the text "red", of falling similarity."""
    images = [make_image(session, vector=towards(a0=1, a3=shift)) for shift in (0.1, 0.7, 1.3)]
    session.commit()
    return images


@pytest.fixture
def worker(space: Space) -> Iterator[None]:
    with embed_worker(space):
        yield


def show(
    client: Client, prompt: str = "red", headers: dict[str, str] | None = None, **query: object
) -> dict[str, object]:
    answer = client.get(f"{API}/rag/search", query_string={"prompt": prompt, **query}, headers=headers)
    assert answer.status_code == 200, answer.text
    shown: dict[str, object] = answer.json
    return shown


def submit(client: Client, plan: object, headers: dict[str, str] | None = None, **fields: object) -> Client:
    return client.post(f"{API}/rag/generate", json={"prompt": "red", "plan": plan, **fields}, headers=headers)


def refused(answer: Client) -> tuple[int, str]:
    return answer.status_code, answer.json["code"]


def parameters(session: Session) -> GenerationParameters:
    """The parameters of the newest job, as its row has them."""
    row = session.scalars(select(Job).order_by(Job.created_at.desc()).limit(1)).one()
    return GenerationParameters.model_validate(row.parameters)


def test_a_plan_pins_the_shown_references_with_their_weights(
    client: Client, session: Session, corpus: list[Image], worker: None
) -> None:
    shown = client.get(f"{API}/rag/search?prompt=red&k=3&min_similarity=0.7").json
    used = [(UUID(each["image_id"]), each["weight"]) for each in shown["references"] if each["used"]]
    assert [image_id for image_id, _ in used] == [corpus[0].id, corpus[1].id]
    # Nearer images come afterwards. A search of the job would take them.
    for shift in (0.0, 0.3):
        make_image(session, vector=towards(a0=1, a4=shift))
    session.commit()
    answer = submit(client, shown["plan"])
    assert answer.status_code == 202, answer.text
    job = parameters(session)
    assert [(each.image_id, each.weight) for each in job.references] == used
    assert (job.k, job.min_similarity) == (0, 0.7)
    assert job.planned_at is not None
    assert parameters(session).concepts == [], "the prompt is the only concept"


def test_a_plan_keeps_its_concepts(client: Client, session: Session, corpus: list[Image], worker: None) -> None:
    make_image(session, vector=towards(a2=1))
    session.commit()
    query = [("prompt", "red"), ("concept", "red"), ("concept", "blue"), ("concept", "green")]
    shown = client.get(f"{API}/rag/search", query_string=query).json
    assert [each["found"] for each in shown["concepts"]] == [True, True, False]
    assert submit(client, shown["plan"]).status_code == 202
    job = parameters(session)
    assert [each.text for each in job.concepts] == ["red", "blue", "green"]
    named = {str(each.image_id): each.concepts for each in job.references}
    assert named == {each["image_id"]: each["concepts"] for each in shown["references"] if each["used"]}


def test_a_job_draws_from_its_plan_and_its_record_says_so(
    client: Client,
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
) -> None:
    first = add_embedded_image(session, models, "red", "a red square")
    second = add_embedded_image(session, models, "blue", "a blue square")
    with embed_worker(models.space, lambda items: models.embedder.embed(items)):
        shown = show(client, "a red square", k=2, min_similarity=-1)
    later = add_embedded_image(session, models, "darkred", "a red square")
    answer = submit(client, shown["plan"], prompt="a red square", similar_examples_count=None)
    assert answer.status_code == 202, answer.text
    job_id = UUID(answer.json["id"])
    assert run(job_id, models, leases) is Outcome.SUCCEEDED

    session.expire_all()
    (output,) = outputs.list_by_job(session, [job_id])[job_id]
    references = shown["references"]
    assert isinstance(references, list)
    expected = {each["image_id"]: pytest.approx(each["weight"]) for each in references}
    assert expected.keys() == {str(first), str(second)}
    assert str(later) not in expected
    assert {each["image_id"]: each["weight"] for each in output.provenance["references"]} == expected
    assert output.provenance["parameters"]["planned_at"] is not None
    assert len(model.received[0].references) == 2
    job = session.get_one(Job, job_id)
    assert job.resolution is not None
    assert {each["reason"] for each in job.resolution["references"]} == {"chosen by the request's plan"}
    assert not any(each["pinned"] for each in output.provenance["references"]), "the search chose them, not a person"
    assert "relevant references were found" in job.resolution["reason"]


def test_a_plan_without_references_draws_from_the_prompt_alone(
    client: Client, session: Session, space: Space, worker: None
) -> None:
    make_image(session, vector=towards(a1=1))
    session.commit()
    plan = show(client)["plan"]
    make_image(session, vector=towards(a0=1))
    session.commit()
    assert submit(client, plan).status_code == 202
    assert (parameters(session).k, parameters(session).references) == (0, [])
    assert parameters(session).planned_at is not None


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_forged_or_cut_plan_is_refused(
    client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = show(client)["plan"]
    assert isinstance(plan, str)
    content, moment, signature = plan.rsplit(".", 2)
    other_key = show_with(client, monkeypatch, "x" * 32)
    swapped = "A" if content[10] != "A" else "B"
    forgeries = {
        "cut": plan[:-1],
        "without signature": content,
        "other content": f"{content[:10]}{swapped}{content[11:]}.{moment}.{signature}",
        "later moment": f"{content}.{base64.urlsafe_b64encode((2**31).to_bytes(4)).decode().rstrip('=')}.{signature}",
        "unsigned": base64.urlsafe_b64encode(b'{"owner_id": "x"}').decode(),
        "another key": other_key,
        "no token": "...",
        "not ASCII": "plän.a.b",
    }
    for name, forged in forgeries.items():
        assert refused(submit(client, forged)) == (422, "plan_invalid"), name
    assert submit(client, plan).status_code == 202
    assert submit(client, "x" * (MAX_PLAN_LENGTH + 1)).json["errors"][0]["code"] == "string_too_long"
    assert submit(client, "").json["errors"][0]["code"] == "string_too_short"


def show_with(client: Client, monkeypatch: pytest.MonkeyPatch, key: str) -> object:
    """A plan that another service has signed."""
    use_keys(monkeypatch, key)
    try:
        return show(client)["plan"]
    finally:
        use_keys(monkeypatch, KEY)


def test_a_plan_of_another_owner_is_refused(
    settings: Settings,
    new_app: AppFactory,
    session: Session,
    corpus: list[Image],
    worker: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although all its images are in the collection that both can read."""
    monkeypatch.setenv("AFTERIMAGE_SECURITY__REQUIRE_API_KEYS", "true")
    get_settings.cache_clear()
    app = new_app(get_settings())
    app.test_client_class = FlushingClient
    client = app.test_client()
    mine, other = (a_key(session, "search", "generate", owner=owner) for owner in ("one", "two"))
    plan = show(client, headers=mine)["plan"]
    assert refused(submit(client, plan, headers=other)) == (422, "plan_invalid")
    assert submit(client, plan, headers=mine).status_code == 202


def test_a_plan_with_a_deleted_image_is_refused(client: Client, corpus: list[Image], worker: None) -> None:
    plan = show(client, k=2, min_similarity=0.5)["plan"]
    client.delete(f"{API}/images/{corpus[2].id}")
    assert submit(client, plan).status_code == 202, "that image is not one of the plan"
    client.delete(f"{API}/images/{corpus[1].id}")
    answer = submit(client, plan)
    assert refused(answer) == (422, "plan_outdated")
    assert answer.json["context"] == {"image_ids": [str(corpus[1].id)]}


def test_a_plan_of_another_space_is_refused(
    client: Client, session: Session, corpus: list[Image], space: Space, worker: None
) -> None:
    plan = show(client)["plan"]
    other = make_space(session, dim=24)
    # The images can be found there too, so only the digest of the space differs.
    vectors = np.eye(len(corpus), other.dim, dtype=np.float32)
    norms = np.ones(len(corpus), np.float32)
    images_db.store_embeddings(session, other, [ImageClaim.of(image) for image in corpus], vectors, norms)
    session.commit()
    assert submit(client, plan).status_code == 202
    spaces.activate(session, other)
    session.commit()
    assert spaces.find_active(session) == other
    answer = submit(client, plan)
    assert refused(answer) == (422, "plan_outdated")
    assert "another embedding space" in answer.json["detail"]


def test_a_plan_expires(client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = show(client)["plan"]
    key = {"Idempotency-Key": str(uuid4())}
    first = submit(client, plan, headers=key)
    assert first.status_code == 202
    monkeypatch.setenv("AFTERIMAGE_RETRIEVAL__PLAN_EXPIRES_S", "1")
    get_settings.cache_clear()
    wait_until(
        lambda: submit(client, plan, dry_run=True).json.get("code") == "plan_expired",
        timeout_s=10,
        what="the plan to expire",
    )
    assert refused(submit(client, plan)) == (422, "plan_expired")
    again = submit(client, plan, headers=key)
    assert (again.status_code, again.json["id"]) == (202, first.json["id"]), "a repeated request keeps its answer"


def test_a_plan_from_a_process_whose_clock_is_ahead_is_accepted(
    client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TimestampSigner, "get_timestamp", lambda _: int(time.time()) + 5)
        plan = show(client)["plan"]
    assert submit(client, plan).status_code == 202


def test_a_plan_of_another_prompt_is_refused(client: Client, corpus: list[Image], worker: None) -> None:
    plan = show(client)["plan"]
    answer = submit(client, plan, prompt="blue")
    assert refused(answer) == (422, "plan_mismatch")
    assert answer.json["context"] == {"fields": ["prompt"]}
    assert submit(client, plan, prompt=" red\n").status_code == 202, "the same prompt, once it is read"
    assert submit(client, plan, model="cheap").status_code == 202, "the default model, by its name"


def test_a_plan_of_another_model_is_refused(
    client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_MODEL__GENERATORS", '{"cheap": {"kind": "fake"}, "other": {"kind": "fake"}}')
    get_settings.cache_clear()
    plan = show(client, model="other")["plan"]
    answer = submit(client, plan)
    assert refused(answer) == (422, "plan_mismatch")
    assert answer.json["context"] == {"fields": ["model"]}
    assert submit(client, plan, model="other").status_code == 202


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reference_ids", [str(uuid4())]),
        ("concepts", [{"text": "a robot"}]),
        ("similar_examples_count", 2),
        ("min_similarity", 0.1),
        ("filter", {"tags": ["x"]}),
        ("split_prompt", False),
    ],
)
def test_a_plan_excludes_other_fields_that_choose_references(client: Client, field: str, value: object) -> None:
    answer = submit(client, "any", **{field: value})  # type: ignore[arg-type]
    assert refused(answer) == (422, "validation_failed")
    assert f"excludes {field}" in answer.json["errors"][0]["message"]


def test_a_line_of_a_bulk_takes_no_plan(client: Client, session: Session) -> None:
    line = json.dumps({"prompt": "red", "plan": "any"})
    answer = client.post(f"{API}/bulks", data=line, content_type="application/x-ndjson")
    assert answer.status_code == 422, answer.text
    assert "line.1.plan" in answer.text


# --- keys ---------------------------------------------------------------------------------------------------------


def test_an_older_key_still_verifies_until_it_is_removed(
    client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_keys(monkeypatch, OLD_KEY)
    plan = show(client)["plan"]
    use_keys(monkeypatch, KEY, OLD_KEY)
    assert submit(client, plan).status_code == 202
    newer = show(client)["plan"]
    use_keys(monkeypatch, KEY)
    assert refused(submit(client, plan)) == (422, "plan_invalid")
    assert submit(client, newer).status_code == 202, "the first key signs"


def test_without_keys_there_are_no_plans(
    client: Client, corpus: list[Image], worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = show(client)["plan"]
    use_keys(monkeypatch)
    assert show(client)["plan"] is None
    assert refused(submit(client, plan)) == (422, "plan_invalid")


def test_the_longest_plan_is_not_too_long(client: Client, session: Session, space: Space) -> None:
    """Random characters of four bytes, which no compression makes shorter."""
    random = Random(0)

    def text_of(length: int) -> str:
        return "".join(chr(random.randrange(0x20000, 0x2A6D0)) for _ in range(length))

    images = [make_image(session, vector=towards(a0=1, a1=shift)) for shift in range(16)]
    found = [image.id for image in images]
    texts = [text_of(2000) for _ in range(8)]
    scored = images_db.find_by_ids(session, space, found, towards(a0=1))
    plan = retrieval.Plan(
        [
            retrieval.Candidate(each, used=True, reason="", weight=random.random(), concepts=tuple(texts))
            for each in scored.values()
        ],
        [PlannedConcept(text=text, found=True, image_ids=found) for text in texts],
    )
    where = ImageFilter(
        tags=[text_of(64) for _ in range(16)],
        source=text_of(200),
        licence=text_of(100),
        attributes={text_of(64): text_of(200) for _ in range(16)},
    )
    owner = Caller(uuid4(), frozenset())
    token = plans.issue(
        plan, prompt=text_of(2000), model="m" * 63, space=space, where=where, min_similarity=0.1, caller=owner
    )
    assert token is not None
    assert MAX_PLAN_LENGTH / 2 < len(token) <= MAX_PLAN_LENGTH


# --- Studio -------------------------------------------------------------------------------------------------------


def shown_form(client: Client, **query: str) -> dict[str, Any]:
    """The form of the page `create`, as a browser sends it when nothing was changed."""
    page = client.get("/references", query_string=query, headers={"X-Fragment": "1"}).text
    hidden = dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', page))
    weights = dict(re.findall(r'name="(weight\.[^"]+)"[^>]* value="([^"]*)"', page))
    use = re.findall(r'name="use" value="([^"]+)" checked', page)
    return {**query, **hidden, **weights, "use": use}


def test_studio_submits_the_plan_that_it_showed(
    client: Client, session: Session, corpus: list[Image], worker: None
) -> None:
    form = shown_form(client, prompt="red", similar_examples_count="2", min_similarity="0.5")
    make_image(session, vector=towards(a0=1))
    session.commit()
    assert client.post("/", data=form, headers=PAGE).status_code == 303
    assert [each.image_id for each in parameters(session).references] == [corpus[0].id, corpus[1].id]
    assert parameters(session).planned_at is not None
    assert parameters(session).min_similarity == 0.5


def test_studio_leaves_a_changed_prompt_to_the_search_of_the_job(
    client: Client, session: Session, corpus: list[Image], worker: None
) -> None:
    form = shown_form(client, prompt="red", avoid="blue", avoid_ids=str(corpus[2].id))
    for change in (
        {"prompt": "blue"},
        {"similar_examples_count": "1"},
        {"filter": '{"tags": ["x"]}'},
        {"avoid": "green"},
        {"avoid_ids": [str(corpus[2].id), str(corpus[1].id)]},
    ):
        assert client.post("/", data={**form, **change}, headers=PAGE).status_code == 303
        assert (parameters(session).planned_at, parameters(session).references) == (None, []), change
    assert client.post("/", data={**form, "model": "cheap"}, headers=PAGE).status_code == 303
    assert parameters(session).planned_at is not None, "the default model, by its name"


def test_studio_pins_changed_references_without_the_plan(
    client: Client, session: Session, corpus: list[Image], worker: None
) -> None:
    form = shown_form(client, prompt="red")
    form["use"] = form["use"][:1]
    assert client.post("/", data=form, headers=PAGE).status_code == 303
    assert [each.image_id for each in parameters(session).references] == [corpus[0].id]
    assert parameters(session).planned_at is None
