"""Jobs in mode `reference`: a small FLUX.2 pipeline reads pictures of a real database and blob store."""

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from sqlalchemy.orm import Session

from shared.contracts.generation import Mode, PinnedReference
from shared.contracts.jobs import Replay
from shared.contracts.service import Capabilities
from shared.db import outputs, spaces, workers
from shared.db.tables import Job, Output
from shared.imaging import read_record
from shared.settings import ClipSettings, GeneratorDefaults, GeneratorSettings, ModelSettings, Settings
from shared.storage import get_blobs
from tests.factories import make_image, make_job, make_space
from tests.integration.conftest import API, Client
from tests.integration.test_api_jobs import CAPABILITIES
from tests.integration.test_api_search import embed_worker, towards
from tests.integration.test_generation import add_embedded_image, make_job_with_pictures, reload, run, submit
from tests.small_pipelines import save_clip, save_flux2_klein
from worker_service.execution.watchdog import Watchdog
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.generation.diffusion import Diffusion
from worker_service.models.worker_models import Models

SIDE, SIDE_OF_SEVERAL = 32, 16
DRAWN: dict[str, Any] = {"width": 256, "height": 256, "num_inference_steps": 2, "ip_adapter_scale": 1.0}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Clip, Diffusion]:
    clip, klein = (tmp_path_factory.mktemp(name) for name in ("clip", "klein"))
    save_clip(clip)
    save_flux2_klein(klein)
    generator = GeneratorSettings(
        source=str(klein),
        reference_side=SIDE,
        reference_side_of_several=SIDE_OF_SEVERAL,
        weigh_references=True,
        defaults=GeneratorDefaults(width=256, height=256, num_inference_steps=2),
    )
    settings = ModelSettings(
        clip=ClipSettings(model=f"local-dir:{clip}"),
        generators={"klein": generator},
        default_generator="klein",
        threads=1,
    )
    return Clip.load(settings), Diffusion.load("klein", settings)


@pytest.fixture
def models(settings: Settings, session: Session, loaded: tuple[Clip, Diffusion]) -> Iterator[Models]:
    clip, model = loaded
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    models = Models.of(Embedder(clip, space, watchdog), model, model.settings, watchdog)
    yield models
    models.close(5)


@pytest.fixture
def leases(settings: Settings) -> Iterator[JobLeases]:
    with JobLeases(settings.jobs) as leases:
        yield leases


def outputs_of(session: Session, job: Job) -> list[Output]:
    return list(outputs.list_by_job(session, [job.id])[job.id])


def test_auto_reads_the_retrieved_pictures_and_records_how(session: Session, models: Models, leases: JobLeases) -> None:
    image_ids = {str(add_embedded_image(session, models, colour, f"a {colour} square")) for colour in ("red", "blue")}
    job = submit(session, seeds=[5, 6], k=3, **DRAWN)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    job = reload(session, job)
    assert job.resolution is not None
    assert job.resolution["mode"] == "reference"
    assert job.resolution["warnings"] == []
    first, second = outputs_of(session, job)
    assert first.pixels_sha256 != second.pixels_sha256
    record = read_record(get_blobs().get(first.blob_key))
    assert record is not None
    assert record["mode"] == "reference"
    assert {reference["image_id"] for reference in record["references"]} == image_ids
    heaviest, lightest = (reference["weight"] for reference in record["references"])
    assert record["reference_call"] == {
        "shape": "packed",
        "order": [0, 1],
        "side": SIDE,
        "fit": "pad",
        "weights": [1.0, pytest.approx(lightest / heaviest)],
    }


def test_pinned_pictures_condition_the_image_heaviest_first_and_replay_as_identical(
    session: Session, models: Models, leases: JobLeases
) -> None:
    red, blue = (add_embedded_image(session, models, colour, f"a {colour} square") for colour in ("red", "blue"))

    def drawn(*pinned: PinnedReference, **changes: object) -> Output:
        job = submit(session, seeds=[5], k=0, references=list(pinned), mode=Mode.REFERENCE, **DRAWN | changes)
        assert run(job.id, models, leases) is Outcome.SUCCEEDED
        return outputs_of(session, job)[0]

    one = drawn(PinnedReference(image_id=red))
    both = drawn(PinnedReference(image_id=red, weight=1), PinnedReference(image_id=blue, weight=3))
    call = both.provenance["reference_call"]
    assert (call["order"], call["weights"]) == ([1, 0], [1.0, pytest.approx(1 / 3)])
    assert one.provenance["reference_call"]["weights"] == [1.0]
    assert len({one.pixels_sha256, both.pixels_sha256}) == 2

    pinned = [PinnedReference(image_id=red, weight=1), PinnedReference(image_id=blue, weight=3)]
    replay = make_job(session, seeds=[5], k=0, references=pinned, mode=Mode.REFERENCE, **DRAWN)
    replay.replay_of = both.id
    session.commit()
    assert run(replay.id, models, leases) is Outcome.SUCCEEDED
    compared = Replay.model_validate(outputs_of(session, replay)[0].replay)
    assert (compared.verdict, compared.changed) == ("identical", [])


def test_pictures_of_several_things_are_smaller_and_in_the_order_of_the_prompt(
    session: Session, models: Models, leases: JobLeases
) -> None:
    red, blue = (add_embedded_image(session, models, colour, f"a {colour} square") for colour in ("red", "blue"))
    pinned = [
        PinnedReference(image_id=red, weight=3, concepts=["a red square"]),
        PinnedReference(image_id=blue, concepts=["a blue square"]),
    ]
    prompt = "a blue square beside a red square"
    job = submit(session, prompt=prompt, seeds=[5], k=0, references=pinned, mode=Mode.REFERENCE, **DRAWN)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    call = outputs_of(session, job)[0].provenance["reference_call"]
    assert (call["order"], call["side"]) == ([1, 0], SIDE_OF_SEVERAL)
    assert call["weights"] == [pytest.approx(1 / 3), 1.0]


def test_a_picture_of_the_request_is_read_like_the_same_image_of_the_corpus(
    session: Session, models: Models, leases: JobLeases
) -> None:
    red, blue = (add_embedded_image(session, models, colour, f"a {colour} square") for colour in ("red", "blue"))
    common = {"seeds": [5], "mode": Mode.REFERENCE, **DRAWN}
    both = [PinnedReference(image_id=red, weight=1), PinnedReference(image_id=blue, weight=3)]
    pinned = submit(session, k=0, references=both, **common)
    sent = make_job_with_pictures(
        session, Image.new("RGB", (40, 40), "blue"), weights=[3], references=both[:1], **common
    )
    alone = submit(session, k=0, references=both[:1], **common)
    drawn = []
    for job in (pinned, sent, alone):
        assert run(job.id, models, leases) is Outcome.SUCCEEDED
        drawn += outputs_of(session, job)
    assert drawn[1].pixels_sha256 == drawn[0].pixels_sha256 != drawn[2].pixels_sha256
    assert drawn[1].provenance["reference_call"] == drawn[0].provenance["reference_call"]
    assert [each["kind"] for each in drawn[1].provenance["references"]] == ["corpus", "request"]


def test_a_job_without_a_relevant_picture_is_drawn_from_its_prompt(
    session: Session, models: Models, leases: JobLeases
) -> None:
    job = submit(session, seeds=[5], k=3, **DRAWN)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (output,) = outputs_of(session, job)
    assert (output.provenance["mode"], output.provenance["reference_call"]) == ("none", None)


# --- submitting, before a worker runs the job ---------------------------------------------------------------------


def publish(session: Session, **changes: Any) -> None:
    declared = {**dict(CAPABILITIES), "modes": ["reference", "caption", "none"], "max_references": 4, **changes}
    workers.publish_capabilities(session, "cheap", Capabilities(**declared))
    session.commit()


def planned_k(client: Client, **body: Any) -> int:
    answer = client.post(f"{API}/rag/generate", json={"prompt": "a red apple", "dry_run": True, **body})
    assert answer.status_code == 200, answer.text
    return int(answer.json["parameters"]["k"])


def test_a_request_that_does_not_say_how_many_gets_three_pictures(client: Client, session: Session) -> None:
    assert planned_k(client) == 4, "no worker has published what the model reads"
    assert planned_k(client, mode="reference") == 3
    publish(session)
    assert planned_k(client) == 3
    assert planned_k(client, mode="caption") == 4
    assert planned_k(client, similar_examples_count=4) == 4


def test_a_model_that_only_edits_refuses_a_request_without_references(client: Client, session: Session) -> None:
    publish(session, modes=["reference"], needs_reference=True)
    for route, body in (("/generate", {}), ("/rag/generate", {"mode": "none"})):
        answer = client.post(API + route, json={"prompt": "a red apple", **body})
        assert (answer.status_code, answer.json["code"]) == (422, "no_reference")


def test_the_plan_of_a_model_that_only_edits_says_that_no_reference_is_relevant(
    client: Client, session: Session
) -> None:
    space = make_space(session)
    make_image(session, vector=towards(a1=1))
    publish(session, modes=["reference"], needs_reference=True)
    with embed_worker(space):
        plan = client.get(f"{API}/rag/search?prompt=red&min_similarity=0.5").json
    assert [reference["used"] for reference in plan["references"]] == [False]
    assert (plan["mode"], "no relevant reference" in plan["mode_reason"]) == ("reference", True)


def test_the_plan_has_no_more_references_than_the_model_reads(client: Client, session: Session) -> None:
    space = make_space(session)
    for axis in range(3):
        make_image(session, vector=towards(a0=1, **{f"a{axis + 1}": 1}))
    publish(session, max_references=1)
    with embed_worker(space):
        plan = client.get(f"{API}/rag/search?prompt=red&k=3").json
    assert len(plan["references"]) == 1


def test_weights_of_pinned_references_are_told_to_decide_only_the_order(
    session: Session, models: Models, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    red, blue = (add_embedded_image(session, models, colour, f"a {colour} square") for colour in ("red", "blue"))
    model = models.image_model
    assert isinstance(model, Diffusion)
    assert model.native_references is not None
    monkeypatch.setattr(model.native_references, "weighs", False)
    monkeypatch.setattr(model, "capabilities", model.capabilities.model_copy(update={"weighs_references": False}))

    def warnings(**parameters: Any) -> list[str]:
        job = submit(session, seeds=[5], **DRAWN | parameters)
        assert run(job.id, models, leases) is Outcome.SUCCEEDED
        return [warning["code"] for warning in outputs_of(session, job)[0].provenance["warnings"]]

    unequal = [PinnedReference(image_id=red, weight=1), PinnedReference(image_id=blue, weight=3)]
    assert warnings(k=0, references=unequal) == ["weights_not_applied"]
    assert warnings(k=0, references=[PinnedReference(image_id=red), PinnedReference(image_id=blue)]) == []
    assert warnings(k=2) == []

    searched = submit(session, seeds=[5], k=2, **DRAWN)
    assert run(searched.id, models, leases) is Outcome.SUCCEEDED
    (original,) = outputs_of(session, searched)
    pinned = [
        PinnedReference.recorded(reference["image_id"], reference["weight"], concepts=reference["concepts"])
        for reference in original.provenance["references"]
    ]
    replay = make_job(session, seeds=[5], k=0, references=pinned, mode=Mode.REFERENCE, **DRAWN)
    replay.replay_of = original.id
    session.commit()
    assert run(replay.id, models, leases) is Outcome.SUCCEEDED
    (output,) = outputs_of(session, replay)
    assert output.provenance["warnings"] == []
    assert Replay.model_validate(output.replay).verdict == "identical"
