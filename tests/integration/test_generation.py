"""The story of a job, told with a real database, blob store and CLIP; the image model costs milliseconds."""

import io
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from shared.contracts.generation import Mode, PinnedReference
from shared.contracts.images import ImageState
from shared.contracts.jobs import JobState, Lane, Replay
from shared.db import images, jobs, outputs, spaces
from shared.db.tables import Generation, Job
from shared.db.tables import Image as ImageRow
from shared.errors import ModelError, ModelLoadError, ModelOutOfMemoryError, StorageError
from shared.imaging import decode_upload, read_record
from shared.messaging.job_updates import close_subscriber, subscriber
from shared.settings import ModelSettings, Settings, get_settings
from shared.storage import get_blobs, image_key, thumbnail_key
from tests.factories import SHARED_COLLECTION, make_job
from tests.small_pipelines import CLIP_DIM, save_clip, save_sd15
from tests.stack import wait_until
from worker_service.execution.watchdog import Watchdog
from worker_service.indexing.embed_images import ImageEmbedding
from worker_service.indexing.image_leases import ImageLeases
from worker_service.jobs import run as generation
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import Leases
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.fake import CheapGenerator
from worker_service.models.interface import ImageRequest, OnStep
from worker_service.models.loaded import Models


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return Clip.load(ModelSettings.model_validate({"clip": {"model": f"local-dir:{folder}"}}))


class Watched(CheapGenerator):
    """The cheap generator, which also remembers what it was asked and can do something first."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(**vars(CheapGenerator.load("cheap", settings)))
        self.asked: list[ImageRequest] = []

    def before(self) -> None: ...

    def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
        self.asked += requests
        self.before()
        return super().generate(requests, on_step)


@pytest.fixture
def model(settings: Settings) -> Watched:
    return Watched(settings.model)


@pytest.fixture
def models(settings: Settings, session: Session, clip: Clip, model: Watched) -> Iterator[Models]:
    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    session.commit()
    watchdog = Watchdog(settings.watchdog)
    models = Models.of(Embedder(clip, space, watchdog), model, settings.model.generators["cheap"], watchdog)
    yield models
    models.close(5)


@pytest.fixture
def leases(settings: Settings) -> Iterator[Leases]:
    with Leases(settings.jobs) as leases:
        yield leases


def run(job_id: UUID, models: Models, leases: Leases) -> Outcome:
    return generation.run(job_id, models=models, leases=leases, settings=get_settings(), worker="test")


def remember(session: Session, models: Models, colour: str, caption: str) -> UUID:
    """Put a picture into the corpus as an upload does, and embed it as a worker does."""
    image = put(session, colour, caption)
    assert embed_pending(models) == 1
    return image.id


def embed_pending(models: Models) -> int:
    with ImageLeases(get_settings().jobs) as leases:
        return ImageEmbedding(models.embedder, leases).drain(stopping=lambda: False)


def put(session: Session, colour: str, caption: str) -> ImageRow:
    """Put a picture into the corpus as an upload does."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    decoded = decode_upload(file.getvalue(), max_bytes=10**6, max_pixels=10**6)
    key, small = image_key(decoded.sha256, decoded.format), thumbnail_key(decoded.sha256)
    get_blobs().put(key, decoded.data, media_type="image/png")
    get_blobs().put(small, decoded.thumbnail, media_type="image/webp")
    image, _ = images.add(
        session,
        SHARED_COLLECTION,
        sha256=decoded.sha256,
        blob_key=key,
        thumbnail_key=small,
        format=decoded.format,
        width=decoded.width,
        height=decoded.height,
        size_bytes=len(decoded.data),
        perceptual_hash=decoded.perceptual_hash,
        caption=caption,
    )
    session.commit()
    return image


def reload(session: Session, job: Job) -> Job:
    session.expire_all()
    return session.get_one(Job, job.id)


def submit(session: Session, **parameters: object) -> Job:
    job = make_job(session, **parameters)  # type: ignore[arg-type]
    session.commit()
    return job


def test_a_job_ends_with_its_images_and_the_memories_that_shaped_them(
    session: Session, models: Models, leases: Leases
) -> None:
    remembered = {remember(session, models, colour, f"a {colour} square") for colour in ("red", "blue")}
    job = submit(session, seeds=[5, 6], k=2)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED

    job = reload(session, job)
    assert job.state == JobState.SUCCEEDED
    assert job.resolution is not None
    assert job.resolution["mode"] == "image_prompt"
    assert {"embed", "retrieve", "generate", "store"} <= set(job.timings)
    made = outputs.of_jobs(session, [job.id])[job.id]
    assert [(output.index, output.seed, output.width) for output in made] == [(0, 5, 32), (1, 6, 32)]
    references = outputs.references_of(session, [made[0].id])[made[0].id]
    assert {reference.image_id for reference in references} == remembered
    assert sum(reference.weight for reference in references) == pytest.approx(1)

    file = get_blobs().get(made[0].blob_key)
    record = read_record(file)
    assert record == made[0].provenance, "the file tells the same as the database"
    assert record is not None
    assert record["seed"] == 5
    assert {reference["image_id"] for reference in record["references"]} == {str(image) for image in remembered}
    assert Image.open(io.BytesIO(file)).size == (32, 32)


def test_a_replay_says_whether_it_is_the_picture_of_then_and_what_has_changed(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    remember(session, models, "red", "a red square")
    job = submit(session, seeds=[5], k=1)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (original,) = outputs.of_jobs(session, [job.id])[job.id]
    (reference,) = outputs.references_of(session, [original.id])[original.id]

    def again() -> Replay:
        pinned = [PinnedReference(image_id=reference.image_id, weight=reference.weight)]
        replay = make_job(session, seeds=[5], k=0, mode=Mode.IMAGE_PROMPT, references=pinned)
        replay.replay_of = original.id
        session.commit()
        assert run(replay.id, models, leases) is Outcome.SUCCEEDED
        (output,) = outputs.of_jobs(session, [replay.id])[replay.id]
        return Replay.model_validate(output.replay)

    same = again()
    assert (same.of, same.verdict, same.max_difference, same.psnr_db) == (original.id, "identical", 0, None)
    assert same.changed == []
    assert original.replay is None, "what is no replay is compared with nothing"

    model.capabilities = model.capabilities.model_copy(update={"weights_digest": "f" * 64})
    session.execute(update(ImageRow).values(caption="another caption"))
    session.commit()
    other = again()
    assert other.verdict == "different"
    assert other.max_difference > 10
    assert other.psnr_db is not None
    assert other.psnr_db < 40
    assert [change.what for change in other.changed] == ["model.weights_digest", "references.0.caption"]

    get_blobs().put(original.blob_key, b"no picture any more", media_type="image/png")
    damaged = make_job(session, seeds=[5], k=0)
    damaged.replay_of = original.id
    session.commit()
    assert run(damaged.id, models, leases) is Outcome.FAILED
    error = reload(session, damaged).error
    assert error is not None
    assert (error["code"], error["context"]) == ("invalid_image", {"generation_id": str(original.id)})


def test_a_replay_of_what_was_deleted_meanwhile_fails_and_says_so(
    session: Session, models: Models, leases: Leases
) -> None:
    job = submit(session, k=0)
    job.replay_of = uuid4()
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    assert reload(session, job).error == {
        "code": "original_deleted",
        "detail": "The output that was to be drawn again was deleted before the job ran.",
        "context": {"generation_id": str(job.replay_of)},
    }
    assert outputs.of_jobs(session, [job.id]) == {}


def test_references_reach_the_model_as_unnormalised_projections(
    session: Session, models: Models, leases: Leases, model: Watched, clip: Clip
) -> None:
    remember(session, models, "red", "a red square")
    run(submit(session, k=1).id, models, leases)
    expected = clip.encode_image([Image.new("RGB", (40, 40), "red")])[0]
    (reference,) = model.asked[0].references
    assert reference.vector is not None
    assert reference.vector == pytest.approx(expected, rel=2e-2, abs=2e-3)  # stored as half floats


def test_no_memory_that_is_near_enough_means_the_prompt_alone_and_says_so(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    remember(session, models, "red", "a red square")
    job = submit(session, min_similarity=0.999)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert resolution["mode"] == "none"
    assert [reference["used"] for reference in resolution["references"]] == [False]
    assert model.asked[0].references == ()


def test_pinned_references_are_given_as_the_reason(session: Session, models: Models, leases: Leases) -> None:
    pinned = remember(session, models, "red", "a red square")
    job = submit(session, references=[PinnedReference(image_id=pinned)], min_similarity=1.0)
    run(job.id, models, leases)
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert (resolution["mode"], "pinned" in resolution["reason"]) == ("image_prompt", True)


def test_img2img_gets_the_pixels_of_its_reference(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    pinned = remember(session, models, "red", "a red square")
    job = submit(session, mode=Mode.IMG2IMG, references=[PinnedReference(image_id=pinned)])
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    image = model.asked[0].references[0].image
    assert image is not None
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_reference_whose_bytes_are_damaged_is_named(session: Session, models: Models, leases: Leases) -> None:
    pinned = remember(session, models, "red", "a red square")
    get_blobs().put(session.get_one(ImageRow, pinned).blob_key, b"not an image", media_type="image/png")
    job = submit(session, mode=Mode.IMG2IMG, references=[PinnedReference(image_id=pinned)])
    assert run(job.id, models, leases) is Outcome.FAILED
    error = reload(session, job).error
    assert error is not None
    assert (error["code"], error["context"]) == ("invalid_image", {"image_ids": [str(pinned)]})


def test_a_pinned_reference_deleted_after_the_submit_fails_the_job_by_name(
    session: Session, models: Models, leases: Leases
) -> None:
    pinned = remember(session, models, "red", "a red square")
    job = submit(session, references=[PinnedReference(image_id=pinned)])
    images.remove(session, session.get_one(ImageRow, pinned))
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    job = reload(session, job)
    assert job.error is not None
    assert job.error["code"] == "reference_deleted"
    assert str(pinned) in str(job.error["context"])


def test_a_size_that_the_model_cannot_draw_is_drawn_natively_and_scaled(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    model.capabilities = model.capabilities.model_copy(
        update={"any_size": False, "native_width": 16, "native_height": 16}
    )
    job = submit(session, width=48, height=24)
    run(job.id, models, leases)
    (made,) = outputs.of_jobs(session, [job.id])[job.id]
    assert (model.asked[0].width, model.asked[0].height) == (16, 16)
    assert (made.width, made.height) == (48, 24)
    assert made.provenance["scaled"] is True
    assert made.provenance["drawn_width"] == 16


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"scheduler": "unknown"}, "parameter_not_supported"),
        ({"exact_size": True, "width": 48}, "size_not_supported"),
    ],
)
def test_what_the_api_could_not_know_to_refuse_fails_later_with_the_same_code(
    session: Session, models: Models, leases: Leases, model: Watched, asked: dict[str, object], code: str
) -> None:
    model.capabilities = model.capabilities.model_copy(update={"any_size": False})
    job = submit(session, **asked)
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == code
    assert model.asked == []


def test_a_second_delivery_of_a_finished_job_draws_nothing(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    job = submit(session)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    drawn = len(model.asked)
    assert run(job.id, models, leases) is Outcome.NOT_OURS
    assert len(model.asked) == drawn


def test_who_asked_for_previews_is_shown_each_image_and_its_record_does_not_tell(
    session: Session, models: Models, leases: Leases
) -> None:
    wait_until(lambda: subscriber().connected, timeout_s=10, what="the subscription")
    job = submit(session, seeds=[5, 6], num_inference_steps=2, preview_every=1, mode=Mode.NONE)
    with subscriber().watch(job.id) as watch:
        assert run(job.id, models, leases) is Outcome.SUCCEEDED
        seen: set[tuple[int, int]] = set()
        while len(seen) < 2:
            news = watch.wait(5)
            assert news.previews or news.changed or news.progress, "in time"
            seen |= {(preview.index, preview.step) for preview in news.previews}
    close_subscriber()
    assert seen == {(0, 1), (1, 1)}
    (first, _) = outputs.of_jobs(session, [job.id])[job.id]
    assert "preview_every" not in first.provenance["parameters"]


def test_an_image_that_fits_only_with_memory_savers_says_so_in_its_record_and_its_story(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    model.memory_savers = lambda images: ["tiles"]  # type: ignore[method-assign]

    def only_in_tiles() -> None:
        if len(model.asked) == 1:
            raise ModelOutOfMemoryError

    model.before = only_in_tiles  # type: ignore[method-assign]
    job = submit(session, seeds=[5])
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (made,) = outputs.of_jobs(session, [job.id])[job.id]
    assert made.provenance["memory_savers"] == ["tiles"]
    told = [(event.type, event.data) for event in jobs.events(session, job.id, after=0)]
    assert ("degraded", {"memory_savers": {"0": ["tiles"]}}) in told

    plain = submit(session)
    assert run(plain.id, models, leases) is Outcome.SUCCEEDED
    (made,) = outputs.of_jobs(session, [plain.id])[plain.id]
    assert made.provenance["memory_savers"] == []
    assert "preview_every" not in plain.parameters, "a worker of the release before refuses fields it does not know"
    assert "degraded" not in [event.type for event in jobs.events(session, plain.id, after=0)]


@pytest.mark.parametrize(
    ("garbage", "code"),
    [
        (lambda images: [np.full_like(images[0], np.nan, dtype=np.float32)], "invalid_output"),
        (lambda images: [np.zeros_like(images[0])], "invalid_output"),
        (lambda images: [*images, *images], "invalid_output"),
        (lambda images: [], "invalid_output"),
    ],
    ids=["no numbers", "black", "too many", "none"],
)
def test_garbage_of_a_model_fails_its_job_and_publishes_nothing(
    session: Session,
    models: Models,
    leases: Leases,
    model: Watched,
    garbage: Callable[[list[np.ndarray]], list[np.ndarray]],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda requests, on_step: garbage(generate(requests, on_step)))
    job = submit(session, seeds=[5])
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == code
    assert session.scalars(select(Generation)).all() == []


def test_a_job_that_waits_in_line_has_not_begun(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    ahead, waiting = submit(session, mode=Mode.NONE), submit(session, mode=Mode.NONE)
    drawing, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        drawing.set()
        assert go_on.wait(20)

    model.before = hold  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        ran = [pool.submit(run, ahead.id, models, leases)]
        assert drawing.wait(20)
        ran.append(pool.submit(run, waiting.id, models, leases))
        wait_until(lambda: len(models.batcher._line) == 1, timeout_s=20, what="a line")
        assert reload(session, ahead).model_started
        assert not reload(session, waiting).model_started
        session.rollback()
        go_on.set()
        assert [each.result(20) for each in ran] == [Outcome.SUCCEEDED] * 2
    assert reload(session, waiting).model_started


def test_a_job_canceled_while_it_is_drawn_stops_within_a_step_and_leaves_nothing(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    model.cost_s = 20
    job = submit(session, num_inference_steps=200)

    def cancel() -> None:
        assert jobs.cancel(session, job.id, owner_id=job.owner_id)
        session.commit()

    model.before = cancel  # type: ignore[method-assign]
    assert run(job.id, models, leases) is Outcome.LOST
    assert reload(session, job).state == JobState.CANCELED
    assert session.scalars(select(Generation)).all() == []


def test_an_attempt_that_lost_its_job_while_drawing_publishes_nothing(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    job = submit(session)

    def steal() -> None:
        session.execute(text("update jobs set attempt = attempt + 1"))
        session.commit()

    model.before = steal  # type: ignore[method-assign]
    assert run(job.id, models, leases) is Outcome.LOST
    assert reload(session, job).state == JobState.PROCESSING
    assert session.scalars(select(Generation)).all() == []


@pytest.mark.parametrize(
    ("fault", "outcome", "state", "code"),
    [
        (ModelError("no"), Outcome.FAILED, JobState.FAILED, "model_error"),
        (StorageError(), Outcome.REQUEUED, JobState.QUEUED, None),
        (ZeroDivisionError("secret /path"), Outcome.FAILED, JobState.FAILED, "generation_failed"),
    ],
)
def test_a_fault_ends_the_attempt_as_its_kind_demands(
    session: Session,
    models: Models,
    leases: Leases,
    model: Watched,
    fault: Exception,
    outcome: Outcome,
    state: JobState,
    code: str | None,
) -> None:
    def break_down() -> None:
        raise fault

    model.before = break_down  # type: ignore[method-assign]
    job = submit(session)
    assert run(job.id, models, leases) is outcome
    job = reload(session, job)
    assert job.state == state
    assert (job.error or {}).get("code") == code
    assert "secret" not in str(job.error)


def test_a_row_that_this_release_cannot_read_goes_back_for_one_that_can_and_is_not_held(
    session: Session, models: Models, leases: Leases
) -> None:
    job = submit(session)
    session.execute(text("update jobs set parameters = parameters || '{\"of_the_next_release\": 1}'"))
    session.commit()
    assert run(job.id, models, leases) is Outcome.REQUEUED
    assert reload(session, job).state == JobState.QUEUED
    assert leases.wait_until_empty(0)

    session.execute(text("update jobs set parameters = parameters - 'of_the_next_release', run_after = null"))
    session.commit()
    assert run(job.id, models, leases) is Outcome.SUCCEEDED, "by a worker of the next release"


def test_a_row_that_no_worker_can_read_fails_its_job_and_says_why(
    session: Session, models: Models, leases: Leases
) -> None:
    job = submit(session)
    session.execute(text("update jobs set parameters = '{}', transient_retries = 3"))
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    failed = reload(session, job)
    assert (failed.state, (failed.error or {})["code"]) == (JobState.FAILED, "job_unreadable")


def test_a_job_that_runs_longer_than_it_allows_fails_with_job_timeout(
    session: Session, models: Models, leases: Leases, model: Watched
) -> None:
    model.cost_s = 20
    job = submit(session, num_inference_steps=100, timeout_s=0.3)
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == "job_timeout"


def test_a_job_whose_time_to_start_is_over_when_the_model_is_free_expires_undrawn(
    session: Session, models: Models, leases: Leases, model: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(session, expires_in_s=60)

    def slow_resolution(*_: object, **__: object) -> None:
        session.execute(text("update jobs set expires_at = now() - interval '1 second'"))
        session.commit()

    monkeypatch.setattr("worker_service.jobs.attempt.Attempt.resolved", slow_resolution)
    assert run(job.id, models, leases) is Outcome.EXPIRED
    assert reload(session, job).state == JobState.EXPIRED
    assert model.asked == []


def test_an_image_whose_bytes_are_damaged_fails_with_a_code_and_the_others_are_embedded(
    session: Session, models: Models
) -> None:
    good = remember(session, models, "red", "a red square")
    bad = images.add(
        session,
        SHARED_COLLECTION,
        sha256="00" * 32,
        blob_key="images/bad.png",
        thumbnail_key="t",
        format="png",
        width=1,
        height=1,
        size_bytes=1,
        perceptual_hash=0,
    )[0]
    get_blobs().put("images/bad.png", b"not an image", media_type="image/png")
    session.execute(text("update images set state = 'pending' where id = :id"), {"id": good})
    session.commit()
    embed_pending(models)
    session.expire_all()
    assert session.get_one(ImageRow, good).state == "ready"
    refused = session.get_one(ImageRow, bad.id)
    assert (refused.state, refused.error_code) == ("failed", "invalid_image")


def test_blobs_of_outputs_name_their_attempt(session: Session, models: Models, leases: Leases, tmp_path: Path) -> None:
    job = submit(session)
    run(job.id, models, leases)
    (made,) = outputs.of_jobs(session, [job.id])[job.id]
    assert made.blob_key == f"outputs/{job.id}/1/0.png"


def test_a_clip_that_is_not_the_adapters_encoder_is_refused_when_the_worker_starts(
    settings: Settings, tmp_path: Path
) -> None:
    save_clip(tmp_path / "clip", dim=CLIP_DIM + 8)
    save_sd15(tmp_path / "sd15")
    adapter = {"source": str(tmp_path / "sd15"), "conditions_on": "embedding_space"}
    model = {
        "clip": {"model": f"local-dir:{tmp_path / 'clip'}"},
        "generators": {"sd15": {"source": str(tmp_path / "sd15"), "ip_adapter": adapter}},
        "default_generator": "sd15",
    }
    with pytest.raises(ModelLoadError, match="conditions_on"):
        Models.load(
            "sd15",
            settings.model_copy(update={"model": ModelSettings.model_validate(model)}),
            Watchdog(settings.watchdog),
        )


def test_an_image_that_the_store_cannot_give_holds_up_no_other(
    session: Session, models: Models, settings: Settings
) -> None:
    unreadable, *others = (put(session, colour, colour) for colour in ("red", "green", "blue"))
    blob = Path(settings.storage.url.removeprefix("file://")) / unreadable.blob_key
    data = blob.read_bytes()
    blob.unlink()
    blob.symlink_to(blob)

    def searchable(*, rings: int) -> list[UUID]:
        for _ in range(rings):
            embed_pending(models)
        session.rollback()
        ready = select(ImageRow.id).where(ImageRow.state == ImageState.READY).order_by(ImageRow.created_at)
        return list(session.scalars(ready))

    assert searchable(rings=2) == [image.id for image in others]

    blob.unlink()
    blob.write_bytes(data)
    session.execute(update(ImageRow).values(lease_until=None))
    session.commit()
    assert searchable(rings=1) == [unreadable.id, *(image.id for image in others)], "a fault that passed harms nothing"


def test_jobs_that_may_have_killed_a_process_take_turns_to_their_ends(
    session: Session, models: Models, model: Watched, leases: Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(session, prompt="first", seeds=[1, 2, 3], mode=Mode.NONE)
    second = submit(session, prompt="second", seeds=[4], mode=Mode.NONE, lane=Lane.HIGH)
    session.execute(update(Job).values(crashes=1))
    session.commit()
    at_work, go = threading.Event(), threading.Event()

    def hold() -> None:
        at_work.set()
        assert go.wait(30)

    monkeypatch.setattr(model, "before", hold)
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(run, first.id, models, leases)]
        assert at_work.wait(30)
        outcomes.append(pool.submit(run, second.id, models, leases))
        wait_until(lambda: reload(session, second).resolution, timeout_s=20, what="the second to be about to draw")
        go.set()
        assert [outcome.result(30) for outcome in outcomes] == [Outcome.SUCCEEDED] * 2
    drawn = [request.prompt for request in model.asked]
    assert drawn == ["first", "first", "first", "second"], (
        "the better lane waits, too: a crash would count against both"
    )
