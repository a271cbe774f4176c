"""Running jobs with a real database, blob store and CLIP, and an image model that takes milliseconds."""

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from uuid import UUID, uuid4

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from api_service.services import reference_images, views
from shared.contracts.collections import GrantedAccess
from shared.contracts.generation import Mode, PinnedReference, ResolvedReferenceImage
from shared.contracts.images import ImageState
from shared.contracts.jobs import JobState, Lane, Replay
from shared.contracts.search import ImageFilter
from shared.db import collections, images, jobs, outputs, owners, spaces
from shared.db.tables import Image as ImageRow
from shared.db.tables import Job, Output, ReferenceImage
from shared.errors import ModelError, ModelLoadError, ModelOutOfMemoryError, StorageError
from shared.imaging import decode_upload, read_record
from shared.messaging.job_updates import close_subscriber, subscriber
from shared.settings import ModelSettings, Settings, get_settings
from shared.storage import get_blobs, image_key, thumbnail_key
from shared.vectors import l2_normalised
from tests.factories import SHARED_COLLECTION, make_job
from tests.recording_generator import RecordingGenerator
from tests.small_pipelines import CLIP_DIM, save_clip, save_sd15
from tests.stack import wait_until
from worker_service.execution.batcher import Submission
from worker_service.execution.steps import OnStep
from worker_service.execution.watchdog import Watchdog
from worker_service.indexing.embed_images import ImageEmbedding
from worker_service.indexing.image_leases import ImageLeases
from worker_service.jobs import outputs as outputs_of_jobs
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.clip import Clip
from worker_service.models.embedder import Embedder
from worker_service.models.generate_batch import GeneratedImage
from worker_service.models.interface import ImageRequest, UnreadTexts
from worker_service.models.worker_models import Models


def run(job_id: UUID, models: Models, leases: JobLeases) -> Outcome:
    return run_job(job_id, models=models, leases=leases, settings=get_settings(), worker="test")


def add_embedded_image(session: Session, models: Models, colour: str, caption: str) -> UUID:
    """Store a picture in the corpus as an upload does, and embed it as a worker does."""
    image = add_image(session, colour, caption)
    assert embed_pending(models) == 1
    return image.id


def embed_pending(models: Models) -> int:
    with ImageLeases(get_settings().jobs) as leases:
        return ImageEmbedding(models.embedder, leases).embed_until_empty(stopping=lambda: False)


def add_image(session: Session, colour: str, caption: str) -> ImageRow:
    """Store a picture in the corpus as an upload does."""
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    decoded = decode_upload(file.getvalue(), max_bytes=10**6, max_pixels=10**6)
    key = image_key(decoded.sha256, decoded.format, decoded.data)
    small = thumbnail_key(decoded.sha256, decoded.thumbnail)
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


def test_a_job_ends_with_its_images_and_their_references(session: Session, models: Models, leases: JobLeases) -> None:
    image_ids = {add_embedded_image(session, models, colour, f"a {colour} square") for colour in ("red", "blue")}
    job = submit(session, seeds=[5, 6], k=2)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED

    job = reload(session, job)
    assert job.state == JobState.SUCCEEDED
    assert job.resolution is not None
    assert job.resolution["mode"] == "image_prompt"
    assert {"embed", "retrieve", "generate", "store"} <= set(job.timings)
    made = outputs.list_by_job(session, [job.id])[job.id]
    assert [(output.index, output.seed, output.width) for output in made] == [(0, 5, 32), (1, 6, 32)]
    references = outputs.list_references(session, [made[0].id])[made[0].id]
    assert {reference.image_id for reference in references} == image_ids
    assert sum(reference.weight for reference in references) == pytest.approx(1)

    file = get_blobs().get(made[0].blob_key)
    record = read_record(file)
    assert record == made[0].provenance, "the file has the same record as the database"
    assert record is not None
    assert record["seed"] == 5
    assert {reference["image_id"] for reference in record["references"]} == {str(image) for image in image_ids}
    assert Image.open(io.BytesIO(file)).size == (32, 32)


@pytest.mark.parametrize("mode", [Mode.IMAGE_PROMPT, Mode.IMG2IMG])
def test_a_replay_records_if_it_equals_the_original_and_what_has_changed(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, mode: Mode
) -> None:
    add_embedded_image(session, models, "red", "a red square")
    job = submit(session, seeds=[5], k=1, mode=mode)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (original,) = outputs.list_by_job(session, [job.id])[job.id]
    (reference,) = outputs.list_references(session, [original.id])[original.id]

    def run_replay() -> Replay:
        pinned = [PinnedReference(image_id=reference.image_id, weight=reference.weight)]
        replay = make_job(session, seeds=[5], k=0, mode=mode, references=pinned)
        replay.replay_of = original.id
        session.commit()
        assert run(replay.id, models, leases) is Outcome.SUCCEEDED
        (output,) = outputs.list_by_job(session, [replay.id])[replay.id]
        return Replay.model_validate(output.replay)

    same = run_replay()
    assert (same.of, same.verdict, same.max_difference, same.psnr_db) == (original.id, "identical", 0, None)
    assert same.changed == []
    assert original.replay is None, "a job that is not a replay is not compared"

    model.capabilities = model.capabilities.model_copy(update={"weights_digest": "f" * 64})
    session.execute(update(ImageRow).values(caption="another caption"))
    session.commit()
    other = run_replay()
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


def test_a_replay_of_an_output_that_was_deleted_fails_with_a_code(
    session: Session, models: Models, leases: JobLeases
) -> None:
    job = submit(session, k=0)
    job.replay_of = uuid4()
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    assert reload(session, job).error == {
        "code": "original_deleted",
        "detail": "The original output was deleted before the job could draw it again.",
        "context": {"generation_id": str(job.replay_of)},
    }
    assert outputs.list_by_job(session, [job.id]) == {}


def test_references_reach_the_model_as_unnormalised_projections(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, clip: Clip
) -> None:
    add_embedded_image(session, models, "red", "a red square")
    run(submit(session, k=1).id, models, leases)
    expected = clip.encode_image([Image.new("RGB", (40, 40), "red")])[0]
    (reference,) = model.received[0].references
    assert reference.vector is not None
    assert reference.vector == pytest.approx(expected, rel=2e-2, abs=2e-3)  # stored as half floats


def test_without_a_similar_enough_image_the_job_uses_the_prompt_alone(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    add_embedded_image(session, models, "red", "a red square")
    job = submit(session, min_similarity=0.999)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert resolution["mode"] == "none"
    assert [reference["used"] for reference in resolution["references"]] == [False]
    assert model.received[0].references == ()


def test_the_reason_of_the_mode_names_pinned_references(session: Session, models: Models, leases: JobLeases) -> None:
    pinned = add_embedded_image(session, models, "red", "a red square")
    job = submit(session, references=[PinnedReference(image_id=pinned)], min_similarity=1.0)
    run(job.id, models, leases)
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert (resolution["mode"], "pinned" in resolution["reason"]) == ("image_prompt", True)


def make_job_with_pictures(
    session: Session,
    *pictures: Image.Image,
    captions: Sequence[str | None] = (),
    weights: Sequence[float] = (),
    **more: object,
) -> Job:
    """A job whose request brought these pictures, stored as the API stores them."""
    decoded = []
    for image in pictures:
        file = io.BytesIO()
        image.save(file, "PNG")
        decoded.append(decode_upload(file.getvalue(), max_bytes=10**6, max_pixels=10**6))
    described = [
        ResolvedReferenceImage(
            sha256=image.sha256,
            weight=weights[index] if weights else None,
            caption=captions[index] if captions else None,
        )
        for index, image in enumerate(decoded)
    ]
    for key, blob in reference_images.new_blobs(decoded).items():
        get_blobs().put(key, blob.data, media_type=blob.media_type)
    job = make_job(session, k=0, reference_images=described, **more)  # type: ignore[arg-type]
    reference_images.add(session, decoded, job_id=job.id)
    session.commit()
    return job


def test_pictures_of_a_request_condition_the_image_like_pinned_references(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, clip: Clip
) -> None:
    pinned = add_embedded_image(session, models, "red", "a red square")
    blue, green = Image.new("RGB", (40, 40), "blue"), Image.new("RGB", (20, 60), "green")
    job = make_job_with_pictures(
        session,
        blue,
        green,
        captions=["a sea", None],
        weights=[2, 1],
        references=[PinnedReference(image_id=pinned)],
        seeds=[5],
        min_similarity=1.0,
    )
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    received = model.received[0].references
    assert [reference.weight for reference in received] == pytest.approx([0.25, 0.5, 0.25])
    assert [reference.caption for reference in received] == ["a red square", "a sea", None]
    for reference, expected in zip(received[1:], clip.encode_image([blue, green]), strict=True):
        assert reference.vector is not None
        assert reference.vector == pytest.approx(expected, rel=1e-4, abs=1e-4)

    (view,) = views.jobs(session, [reload(session, job)])
    used = view.outputs[0].references
    assert [each.kind for each in used] == ["corpus", "request", "request"]
    assert [each.image_id for each in used] == [pinned, *(each.id for each in view.reference_images)]
    assert [each.sha256 for each in used[1:]] == [each.sha256 for each in view.reference_images]
    words = l2_normalised(clip.encode_text(["a red apple"])[0])
    similarities = [float(words @ unit) for unit in l2_normalised(clip.encode_image([blue, green]))]
    assert [each.similarity for each in used[1:]] == pytest.approx(similarities, abs=1e-4)
    provenance = view.outputs[0].provenance
    assert [each["kind"] for each in provenance["references"]] == ["corpus", "request", "request"]
    assert provenance["parameters"]["reference_images"][0]["caption"] == "a sea"
    resolution = reload(session, job).resolution
    assert resolution is not None
    assert [each["reason"] for each in resolution["references"]] == [
        "pinned by the request",
        "sent with the request",
        "sent with the request",
    ]
    assert "pinned" in resolution["reason"]


@pytest.mark.parametrize("mode", [Mode.IMG2IMG, Mode.IMAGE_PROMPT_IMG2IMG, Mode.REFERENCE])
def test_modes_that_need_pixels_get_those_of_a_picture_of_the_request(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, mode: Mode
) -> None:
    job = make_job_with_pictures(session, Image.new("RGB", (40, 40), "blue"), mode=mode)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (reference,) = model.received[0].references
    assert reference.image is not None
    assert reference.image.getpixel((0, 0)) == (0, 0, 255)


def test_the_mode_caption_uses_the_caption_of_a_picture_of_the_request(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.capabilities = model.capabilities.model_copy(update={"modes": ["none", "caption"]})
    job = make_job_with_pictures(session, Image.new("RGB", (40, 40), "blue"), captions=["a sea"])
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    assert (model.received[0].mode, model.received[0].references[0].caption) == (Mode.CAPTION, "a sea")


def test_a_replay_with_a_picture_of_the_request_is_identical(
    session: Session, models: Models, leases: JobLeases
) -> None:
    blue = Image.new("RGB", (40, 40), "blue")
    job = make_job_with_pictures(session, blue, seeds=[5], mode=Mode.IMAGE_PROMPT)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (original,) = outputs.list_by_job(session, [job.id])[job.id]
    verdicts = []
    for image in (blue, Image.new("RGB", (40, 40), "green")):
        again = make_job_with_pictures(session, image, seeds=[5], mode=Mode.IMAGE_PROMPT)
        again.replay_of = original.id
        session.commit()
        assert run(again.id, models, leases) is Outcome.SUCCEEDED
        (output,) = outputs.list_by_job(session, [again.id])[again.id]
        replay = Replay.model_validate(output.replay)
        verdicts.append((replay.verdict, [change.what for change in replay.changed]))
    assert verdicts == [("identical", []), ("different", ["references.0.sha256"])]


@pytest.mark.parametrize(
    ("damage", "code"), [("delete", "reference_deleted"), ("replace", "invalid_image"), ("rows", "reference_deleted")]
)
def test_a_picture_of_the_request_that_is_gone_or_damaged_fails_the_job_with_a_code(
    session: Session, models: Models, leases: JobLeases, damage: str, code: str
) -> None:
    job = make_job_with_pictures(session, Image.new("RGB", (40, 40), "blue"))
    (row,) = session.scalars(select(ReferenceImage))
    if damage == "delete":
        get_blobs().delete(row.blob_key)
    elif damage == "replace":
        get_blobs().put(row.blob_key, b"not an image", media_type="image/png")
    else:
        session.delete(row)
        session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    error = reload(session, job).error
    assert error is not None
    assert error["code"] == code


@pytest.mark.parametrize("end", ["unshared", "deleted", "not shared", "shared"])
@pytest.mark.parametrize("pinned", [True, False])
def test_the_access_to_a_collection_is_checked_again_when_the_job_runs(
    session: Session, models: Models, leases: JobLeases, pinned: bool, end: str
) -> None:
    image_id = add_embedded_image(session, models, "red", "a red square")
    theirs = collections.create(session, "products", owner_id=owners.ensure(session, "other"), most=None)
    session.get_one(ImageRow, image_id).collection_id = theirs.id
    mine = owners.ensure(session, "local")
    if end != "not shared":
        collections.share(session, theirs, owner_id=mine, access=GrantedAccess.READ)
    references = [PinnedReference(image_id=image_id)] if pinned else []
    job = submit(session, references=references, filter=ImageFilter(collection="other/products"))
    if end == "unshared":
        collections.unshare(session, theirs, owner_id=mine)
    if end == "deleted":
        collections.mark_deleted(session, theirs)
    session.commit()
    outcome = run(job.id, models, leases)
    if end == "shared":
        assert outcome is Outcome.SUCCEEDED
        (output,) = outputs.list_by_job(session, [job.id])[job.id]
        used = outputs.list_references(session, [output.id])[output.id]
        assert [reference.image_id for reference in used] == [image_id]
        return
    assert outcome is Outcome.FAILED
    error = reload(session, job).error
    assert error is not None
    context = {"image_ids": [str(image_id)]} if pinned else {"collection": "other/products"}
    assert (error["code"], error["context"]) == (
        "reference_deleted" if pinned else "collection_unavailable",
        context,
    )


def test_img2img_gets_the_pixels_of_its_reference(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    pinned = add_embedded_image(session, models, "red", "a red square")
    job = submit(session, mode=Mode.IMG2IMG, references=[PinnedReference(image_id=pinned)])
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    image = model.received[0].references[0].image
    assert image is not None
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_reference_with_damaged_bytes_is_named_in_the_error(
    session: Session, models: Models, leases: JobLeases
) -> None:
    pinned = add_embedded_image(session, models, "red", "a red square")
    get_blobs().put(session.get_one(ImageRow, pinned).blob_key, b"not an image", media_type="image/png")
    job = submit(session, mode=Mode.IMG2IMG, references=[PinnedReference(image_id=pinned)])
    assert run(job.id, models, leases) is Outcome.FAILED
    error = reload(session, job).error
    assert error is not None
    assert (error["code"], error["context"]) == ("invalid_image", {"image_ids": [str(pinned)]})


def test_a_pinned_reference_deleted_after_the_submit_is_named_in_the_error(
    session: Session, models: Models, leases: JobLeases
) -> None:
    pinned = add_embedded_image(session, models, "red", "a red square")
    job = submit(session, references=[PinnedReference(image_id=pinned)])
    images.remove(session, session.get_one(ImageRow, pinned))
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    job = reload(session, job)
    assert job.error is not None
    assert job.error["code"] == "reference_deleted"
    assert str(pinned) in str(job.error["context"])


def test_a_size_that_the_model_does_not_support_is_scaled_from_the_native_size(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.capabilities = model.capabilities.model_copy(
        update={"any_size": False, "native_width": 16, "native_height": 16}
    )
    job = submit(session, width=48, height=24)
    run(job.id, models, leases)
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
    assert (model.received[0].width, model.received[0].height) == (16, 16)
    assert (made.width, made.height) == (48, 24)
    assert made.provenance["scaled"] is True
    assert made.provenance["drawn_width"] == 16


def test_the_result_says_which_part_of_the_drawn_image_it_shows(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.capabilities = model.capabilities.model_copy(
        update={"any_size": False, "native_width": 16, "native_height": 16}
    )
    job = submit(session, width=96, height=48, mode=Mode.NONE)
    run(job.id, models, leases)
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
    pixels = np.asarray(Image.open(io.BytesIO(get_blobs().get(made.blob_key))))
    drawn = model.generate(model.received, lambda *_: True)[0]
    assert pixels.shape == (48, 96, 3)
    blocks = drawn[4:12:4, ::4].astype(int)  # the middle two rows of four blocks
    assert np.abs(pixels[12::24, 12::24] - blocks).max() < 25, "each block is a square of 24 pixels, as it was one of 4"
    assert made.provenance["crop"] == [0, 4, 16, 12]
    (warning,) = made.provenance["warnings"]
    assert (warning["code"], warning["context"]) == ("image_cropped", {"drawn": [16, 16], "crop": [0, 4, 16, 12]})
    assert "The middle 16 x 8" in warning["detail"]
    resolved = next(event for event in jobs.list_events(session, job.id, after=0) if event.type == "resolved")
    assert resolved.data["warnings"] == [warning]
    assert reload(session, job).resolution == resolved.data
    view = views.job(session, job)
    assert (
        [each.code for each in view.warnings] == [each.code for each in view.outputs[0].warnings] == [warning["code"]]
    )


def test_a_part_of_less_than_a_pixel_is_not_called_zero(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.capabilities = model.capabilities.model_copy(
        update={"any_size": False, "native_width": 64, "native_height": 64}
    )
    job = submit(session, width=2048, height=16, mode=Mode.NONE)
    run(job.id, models, leases)
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
    (warning,) = made.provenance["warnings"]
    assert "The middle 64 x 0.5 of them" in warning["detail"]


@pytest.mark.parametrize(("width", "height", "codes"), [(32, 32, []), (64, 32, ["reference_padded"])])
def test_the_result_says_when_a_reference_has_another_ratio(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    width: int,
    height: int,
    codes: list[str],
) -> None:
    model.capabilities = model.capabilities.model_copy(update={"native_width": 32, "native_height": 32})
    add_embedded_image(session, models, "blue", "a sea")
    job = submit(session, mode=Mode.IMG2IMG, width=width, height=height)
    run(job.id, models, leases)
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
    left = (width - height) // 2
    assert made.provenance["initial_image_box"] == [left, 0, left + height, height]
    assert [warning["code"] for warning in made.provenance["warnings"]] == codes


def test_the_result_says_which_text_the_model_did_not_read(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    unread = UnreadTexts(prompt="the end", negative_prompt="the other end", captions=["a caption"])
    monkeypatch.setattr(model, "unread_texts", lambda request: unread)
    job = submit(session, mode=Mode.NONE)
    run(job.id, models, leases)
    (view,) = views.jobs(session, [reload(session, job)])
    assert view.warnings == view.outputs[0].warnings
    assert [(warning.code, warning.context) for warning in view.warnings] == [
        ("prompt_cut", {"unread": "the end"}),
        ("negative_prompt_cut", {"unread": "the other end"}),
        ("caption_left_out", {"caption": "a caption"}),
    ]


def test_every_word_of_a_long_prompt_counts_in_the_search_for_references(models: Models) -> None:
    start = "a word " * 20
    one, other = models.embed_texts([start + "apple", start + "river"])
    assert not np.allclose(one, other, atol=1e-3)


def test_a_crash_during_the_work_on_prompt_and_references_counts(
    session: Session, models: Models, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_embedded_image(session, models, "blue", "a sea")
    job = submit(session, mode=Mode.IMG2IMG)
    counted: list[tuple[str, bool]] = []

    def note(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object, **more: object) -> object:
            counted.append((name, reload(session, job).model_started))
            return function(*arguments, **more)

        return noted

    monkeypatch.setattr(models.embedder, "embed", note("embed", models.embedder.embed))
    monkeypatch.setattr(outputs_of_jobs, "_pixels", note("decode", outputs_of_jobs._pixels))
    monkeypatch.setattr(models.batcher, "submit", note("wait for the model", models.batcher.submit))
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    assert counted == [("embed", True), ("decode", True), ("wait for the model", False)]


def test_a_crash_during_the_work_on_a_picture_of_the_request_counts(
    session: Session, models: Models, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job_with_pictures(session, Image.new("RGB", (40, 40), "blue"))
    counted: list[bool] = []

    def decode(image: ImageRow) -> Image.Image:
        counted.append(reload(session, job).model_started)
        return picture_of(image)

    picture_of = outputs_of_jobs.picture_of
    monkeypatch.setattr(outputs_of_jobs, "picture_of", decode)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    assert counted == [True, True], "for CLIP, then for the model"


def test_a_job_that_waits_for_an_isolated_one_is_not_counted_with_it(
    session: Session, models: Models, leases: JobLeases
) -> None:
    job = submit(session)
    session.execute(update(Job).values(crashes=1))
    session.commit()
    with ThreadPoolExecutor(1) as pool:
        with models.crash_isolation_lock:
            outcome = pool.submit(run, job.id, models, leases)
            wait_until(lambda: reload(session, job).state == JobState.PROCESSING, timeout_s=20, what="the claim")
            with pytest.raises(TimeoutError):
                outcome.result(0.3)
            assert not reload(session, job).model_started
        assert outcome.result(20) is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    ("parameters", "code"),
    [
        ({"scheduler": "unknown"}, "parameter_not_supported"),
        ({"exact_size": True, "width": 48}, "size_not_supported"),
    ],
)
def test_a_request_that_the_api_could_not_check_fails_later_with_the_same_code(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    parameters: dict[str, object],
    code: str,
) -> None:
    model.capabilities = model.capabilities.model_copy(update={"any_size": False})
    job = submit(session, **parameters)
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == code
    assert model.received == []


def test_a_second_delivery_of_a_finished_job_generates_nothing(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    job = submit(session)
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    generated = len(model.received)
    assert run(job.id, models, leases) is Outcome.SKIPPED
    assert len(model.received) == generated


def test_requested_previews_show_each_image_and_are_not_in_the_record(
    session: Session, models: Models, leases: JobLeases
) -> None:
    wait_until(lambda: subscriber().connected, timeout_s=10, what="the subscription")
    job = submit(session, seeds=[5, 6], num_inference_steps=2, preview_every=1, mode=Mode.NONE)
    with subscriber().watch(job.id) as watch:
        assert run(job.id, models, leases) is Outcome.SUCCEEDED
        seen: set[tuple[int, int]] = set()
        while len(seen) < 2:
            job_update = watch.wait(5)
            assert job_update.previews or job_update.changed or job_update.progress, "in time"
            seen |= {(preview.index, preview.step) for preview in job_update.previews}
    close_subscriber()
    assert seen == {(0, 1), (1, 1)}
    (first, _) = outputs.list_by_job(session, [job.id])[job.id]
    assert "preview_every" not in first.provenance["parameters"]


def test_memory_savers_are_recorded_with_the_image_and_in_an_event(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.memory_savers = lambda images: ["tiles"]  # type: ignore[method-assign]

    def fail_without_tiles() -> None:
        if len(model.received) == 1:
            raise ModelOutOfMemoryError

    model.before = fail_without_tiles  # type: ignore[method-assign]
    job = submit(session, seeds=[5])
    assert run(job.id, models, leases) is Outcome.SUCCEEDED
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
    assert made.provenance["memory_savers"] == ["tiles"]
    events = [(event.type, event.data) for event in jobs.list_events(session, job.id, after=0)]
    assert ("degraded", {"memory_savers": {"0": ["tiles"]}}) in events

    plain = submit(session)
    assert run(plain.id, models, leases) is Outcome.SUCCEEDED
    (made,) = outputs.list_by_job(session, [plain.id])[plain.id]
    assert made.provenance["memory_savers"] == []
    assert "preview_every" not in plain.parameters, "a worker of the previous release refuses unknown fields"
    assert "degraded" not in [event.type for event in jobs.list_events(session, plain.id, after=0)]


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
def test_an_invalid_output_of_the_model_fails_the_job_and_publishes_nothing(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    garbage: Callable[[list[np.ndarray]], list[np.ndarray]],
    code: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda requests, on_step: garbage(generate(requests, on_step)))
    job = submit(session, seeds=[5])
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == code
    assert session.scalars(select(Output)).all() == []


def test_a_job_that_waits_for_the_model_has_not_started(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    ahead, waiting = submit(session, mode=Mode.NONE), submit(session, mode=Mode.NONE)
    generating, go_on = threading.Event(), threading.Event()

    def block() -> None:
        generating.set()
        assert go_on.wait(20)

    model.before = block  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        ran = [pool.submit(run, ahead.id, models, leases)]
        assert generating.wait(20)
        ran.append(pool.submit(run, waiting.id, models, leases))
        wait_until(lambda: len(models.batcher._queue) == 1, timeout_s=20, what="a batch to wait")
        assert reload(session, ahead).model_started
        assert not reload(session, waiting).model_started
        session.rollback()
        go_on.set()
        assert [each.result(20) for each in ran] == [Outcome.SUCCEEDED] * 2
    assert reload(session, waiting).model_started


def logged_end(caplog: pytest.LogCaptureFixture) -> tuple[str, str | None]:
    """The outcome and the error code in the log line at the end of an attempt."""
    (line,) = [vars(record) for record in caplog.records if record.message == "job_ended"]
    return line["outcome"], line.get("code")


def test_a_job_canceled_during_generation_stops_within_a_step_and_stores_nothing(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model.cost_s = 20
    job = submit(session, num_inference_steps=200)

    def cancel() -> None:
        assert jobs.cancel(session, job.id, owner_id=job.owner_id)
        session.commit()

    model.before = cancel  # type: ignore[method-assign]
    with caplog.at_level("INFO"):
        assert run(job.id, models, leases) is Outcome.CANCELED
    assert logged_end(caplog) == ("canceled", None)
    assert reload(session, job).state == JobState.CANCELED
    assert session.scalars(select(Output)).all() == []


def test_an_attempt_that_lost_its_job_during_generation_publishes_nothing(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    job = submit(session)

    def steal() -> None:
        session.execute(text("update jobs set attempt = attempt + 1"))
        session.commit()

    model.before = steal  # type: ignore[method-assign]
    assert run(job.id, models, leases) is Outcome.LOST
    assert reload(session, job).state == JobState.PROCESSING
    assert session.scalars(select(Output)).all() == []


@pytest.mark.parametrize(
    ("fault", "outcome", "state", "code"),
    [
        (ModelError("no"), Outcome.FAILED, JobState.FAILED, "model_error"),
        (StorageError(), Outcome.REQUEUED, JobState.QUEUED, None),
        (ZeroDivisionError("secret /path"), Outcome.FAILED, JobState.FAILED, "generation_failed"),
    ],
)
def test_the_kind_of_an_error_decides_how_the_attempt_ends(
    session: Session,
    models: Models,
    leases: JobLeases,
    model: RecordingGenerator,
    fault: Exception,
    outcome: Outcome,
    state: JobState,
    code: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raise_fault() -> None:
        raise fault

    model.before = raise_fault  # type: ignore[method-assign]
    job = submit(session)
    with caplog.at_level("INFO"):
        assert run(job.id, models, leases) is outcome
    assert logged_end(caplog) == (outcome, code or "storage_unavailable")
    job = reload(session, job)
    assert job.state == state
    assert (job.error or {}).get("code") == code
    assert "secret" not in str(job.error)


def test_a_job_that_this_release_cannot_read_is_requeued_without_a_lease(
    session: Session, models: Models, leases: JobLeases
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


def test_a_job_that_no_worker_can_read_fails_with_a_code(session: Session, models: Models, leases: JobLeases) -> None:
    job = submit(session)
    session.execute(text("update jobs set parameters = '{}', transient_retries = 3"))
    session.commit()
    assert run(job.id, models, leases) is Outcome.FAILED
    failed = reload(session, job)
    assert (failed.state, (failed.error or {})["code"]) == (JobState.FAILED, "job_unreadable")


def test_a_job_that_runs_longer_than_its_timeout_fails_with_job_timeout(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator
) -> None:
    model.cost_s = 20
    job = submit(session, num_inference_steps=100, timeout_s=0.3)
    assert run(job.id, models, leases) is Outcome.FAILED
    assert (reload(session, job).error or {})["code"] == "job_timeout"


def test_a_job_that_expires_before_the_model_is_free_is_not_generated(
    session: Session, models: Models, leases: JobLeases, model: RecordingGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(session, expires_in_s=60)

    def slow_resolution(*_: object, **__: object) -> None:
        session.execute(text("update jobs set expires_at = now() - interval '1 second'"))
        session.commit()

    monkeypatch.setattr("worker_service.jobs.attempt.Attempt.record_resolution", slow_resolution)
    assert run(job.id, models, leases) is Outcome.EXPIRED
    assert reload(session, job).state == JobState.EXPIRED
    assert model.received == []


def test_an_image_with_damaged_bytes_fails_with_a_code_and_the_others_are_embedded(
    session: Session, models: Models
) -> None:
    good = add_embedded_image(session, models, "red", "a red square")
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


def test_blob_keys_of_outputs_contain_the_attempt(
    session: Session, models: Models, leases: JobLeases, tmp_path: Path
) -> None:
    job = submit(session)
    run(job.id, models, leases)
    (made,) = outputs.list_by_job(session, [job.id])[job.id]
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


def test_an_image_that_cannot_be_read_delays_no_other(session: Session, models: Models, settings: Settings) -> None:
    unreadable, *others = (add_image(session, colour, colour) for colour in ("red", "green", "blue"))
    blob = Path(settings.storage.url.removeprefix("file://")) / unreadable.blob_key
    data = blob.read_bytes()
    blob.unlink()
    blob.symlink_to(blob)

    def searchable(*, passes: int) -> list[UUID]:
        for _ in range(passes):
            embed_pending(models)
        session.rollback()
        ready = select(ImageRow.id).where(ImageRow.state == ImageState.READY).order_by(ImageRow.created_at)
        return list(session.scalars(ready))

    assert searchable(passes=2) == [image.id for image in others]

    blob.unlink()
    blob.write_bytes(data)
    session.execute(update(ImageRow).values(lease_until=None))
    session.commit()
    assert searchable(passes=1) == [unreadable.id, *(image.id for image in others)], (
        "a temporary error has no lasting effect"
    )


def test_jobs_that_may_have_crashed_a_process_run_one_at_a_time(
    session: Session, models: Models, model: RecordingGenerator, leases: JobLeases, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submit(session, prompt="first", seeds=[1, 2, 3], mode=Mode.NONE)
    second = submit(session, prompt="second", seeds=[4], mode=Mode.NONE, lane=Lane.HIGH)
    session.execute(update(Job).values(crashes=1))
    session.commit()
    working, go = threading.Event(), threading.Event()

    def block() -> None:
        working.set()
        assert go.wait(30)

    monkeypatch.setattr(model, "before", block)
    with ThreadPoolExecutor(2) as pool:
        outcomes = [pool.submit(run, first.id, models, leases)]
        assert working.wait(30)
        outcomes.append(pool.submit(run, second.id, models, leases))
        wait_until(lambda: reload(session, second).state == JobState.PROCESSING, timeout_s=20, what="the second claim")
        with pytest.raises(TimeoutError):
            outcomes[1].result(0.3)
        go.set()
        assert [outcome.result(30) for outcome in outcomes] == [Outcome.SUCCEEDED] * 2
    prompts = [request.prompt for request in model.received]
    assert prompts == ["first", "first", "first", "second"], (
        "the job of the higher-priority lane waits, too: a crash would count against both"
    )


@pytest.mark.parametrize("changes_images", [False, True])
def test_an_urgent_image_waits_for_the_end_of_another_only_where_it_would_change_it(
    settings: Settings, session: Session, clip: Clip, changes_images: bool
) -> None:
    events: list[str] = []
    urgent: list[Future[list[GeneratedImage]]] = []

    class Steps(RecordingGenerator):
        def generate(self, requests: Sequence[ImageRequest], on_step: OnStep) -> list[np.ndarray]:
            events.append(f"{requests[0].prompt} starts")
            if not urgent:
                urgent.append(pool.submit(models.generate, [request("urgent")], Submission(lane=0)))
                wait_until(lambda: len(models.batcher._queue) == 1, timeout_s=10, what="the urgent image")
            images = super().generate(requests, on_step)
            events.append(f"{requests[0].prompt} ends")
            return images

    model = Steps(settings.model)
    model.capabilities = model.capabilities.model_copy(update={"interruption_changes_images": changes_images})

    def request(prompt: str) -> ImageRequest:
        return ImageRequest.of(model.defaults, prompt=prompt, seed=1, width=32, height=32, mode=Mode.NONE)

    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    watchdog = Watchdog(settings.watchdog)
    models = Models.of(Embedder(clip, space, watchdog), model, settings.model.generators["cheap"], watchdog)
    with ThreadPoolExecutor(1) as pool:
        models.generate([request("bulk")], Submission(lane=2))
        urgent[0].result(10)
    models.close(5)
    inside = ["bulk starts", "urgent starts", "urgent ends", "bulk ends"]
    assert events == (["bulk starts", "bulk ends", "urgent starts", "urgent ends"] if changes_images else inside)
