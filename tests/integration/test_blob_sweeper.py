"""The sweeper on a real store and database: it deletes unneeded blobs and keeps those of uploads in progress."""

import base64
import io
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared import blob_sweeper, storage
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobState
from shared.db import attempts, collections, images, jobs, owners
from shared.db import blobs as blob_rows
from shared.db.session import session_scope
from shared.db.tables import BlobClaim, Image, Job
from shared.errors import DatabaseConnectionError, ForeignStorageError
from shared.settings import Settings, load_settings
from shared.storage import Blobs, get_blobs, image_key, output_key, output_thumbnail_key, thumbnail_key
from tests import one_attempt
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client, picture
from tests.integration.test_jobs import an_output

DAY_S = 86_400.0


@pytest.fixture
def folder(settings: Settings) -> Path:
    return Path(settings.storage.url.removeprefix("file://"))


def put(*keys: str, age_s: float = 2 * DAY_S) -> None:
    """Store blobs of that age."""
    for key in keys:
        get_blobs().put(key, b"12345", media_type="image/png")
        then = datetime.now(UTC).timestamp() - age_s
        root = Path(load_settings().storage.url.removeprefix("file://"))
        os.utime(root / key, (then, then))


def stored() -> set[str]:
    return {info.key for info in get_blobs().list("") if info.key != blob_sweeper.OWNER_KEY}


def sweep(*, older_than_s: float = DAY_S) -> blob_sweeper.SweepResult:
    return blob_sweeper.sweep(get_blobs(), older_than_s=older_than_s)


def corpus_image(session: Session, sha256: str, **columns: Any) -> Image:
    return make_image(
        session,
        sha256=sha256,
        blob_key=image_key(sha256, ImageFormat.PNG, b"12345"),
        thumbnail_key=thumbnail_key(sha256, b"12345"),
        **columns,
    )


def keys_of(sha256: str) -> set[str]:
    return {image_key(sha256, ImageFormat.PNG, b"12345"), thumbnail_key(sha256, b"12345")}


def keys_of_attempt(job_id: UUID, attempt: int) -> set[str]:
    return {
        output_key(job_id, attempt=attempt, index=0, image_format=ImageFormat.PNG),
        output_thumbnail_key(job_id, attempt=attempt, index=0),
    }


def test_blobs_of_a_deleted_image_go_unless_another_collection_has_the_content(session: Session) -> None:
    other = collections.ensure(session, "mine", owner_id=owners.ensure(session, "somebody"))
    kept, gone, shared = "aa" * 32, "bb" * 32, "cc" * 32
    corpus_image(session, kept)
    deleted = [corpus_image(session, gone), corpus_image(session, shared)]
    corpus_image(session, shared, collection_id=other.id)
    put(*keys_of(kept), *keys_of(gone), *keys_of(shared))
    for image in deleted:
        images.remove(session, image)
    session.commit()
    swept = sweep()
    assert stored() == keys_of(kept) | keys_of(shared)
    assert (swept.blobs, swept.size_bytes) == (2, 10)


def test_young_blobs_and_foreign_files_are_kept(session: Session) -> None:
    put(*keys_of("aa" * 32), age_s=DAY_S - 60)
    foreign = {"images/notes.txt", "outputs/readme.md", "backup/everything.tar", f"images/aa/{'A' * 64}.png"}
    put(*foreign)
    sweep()
    assert stored() == foreign | keys_of("aa" * 32)


def test_output_blobs_are_kept_while_a_row_names_them_or_their_attempt_runs(session: Session) -> None:
    running, finished, retried, canceled = (make_job(session, state=JobState.PROCESSING) for _ in range(4))
    output = an_output(finished)
    output.output.blob_key, output.output.thumbnail_key = sorted(
        keys_of_attempt(finished.id, 1), key=lambda key: "thumbnail" in key
    )
    assert one_attempt.finish(session, attempts.Claim(finished.id, 1), [output], timings={})
    attempts.hand_back(session, [attempts.Claim(retried.id, 1)])
    assert one_attempt.claim(session, retried.id, worker="w", lease_s=30) is not None
    jobs.cancel(session, canceled.id, owner_id=canceled.owner_id)
    session.commit()
    needed = keys_of_attempt(running.id, 1) | keys_of_attempt(finished.id, 1) | keys_of_attempt(retried.id, 2)
    put(*needed, *keys_of_attempt(retried.id, 1), *keys_of_attempt(canceled.id, 1), *keys_of_attempt(uuid4(), 1))
    sweep()
    assert stored() == needed

    jobs.delete(session, session.get_one(Job, finished.id, populate_existing=True))
    session.commit()
    sweep()
    assert stored() == keys_of_attempt(running.id, 1) | keys_of_attempt(retried.id, 2)


def test_a_store_larger_than_a_page_is_swept_completely(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blob_sweeper, "KEYS_PER_QUERY", 5)
    monkeypatch.setattr(blob_sweeper, "BLOBS_PER_DELETE", 3)
    contents = [f"{number:064x}" for number in range(20)]
    for content in contents[::2]:
        corpus_image(session, content)
    session.commit()
    put(*(key for content in contents for key in keys_of(content)))
    assert sweep().blobs == 20
    assert stored() == {key for content in contents[::2] for key in keys_of(content)}


def test_unneeded_blobs_can_be_listed_without_deleting_them(session: Session) -> None:
    put(*keys_of("aa" * 32))
    assert {info.key for info in blob_sweeper.list_unneeded(get_blobs(), older_than_s=DAY_S)} == keys_of("aa" * 32)
    assert stored() == keys_of("aa" * 32)


def test_old_half_written_files_of_killed_processes_are_deleted(settings: Settings, folder: Path) -> None:
    put("images/a.png")
    for name, age_s in (("old#1", 2 * DAY_S), ("young#2", 0.0)):
        (folder / "images" / name).write_bytes(b"half")
        then = datetime.now(UTC).timestamp() - age_s
        os.utime(folder / "images" / name, (then, then))
    assert sweep().leftovers == 1
    assert {path.name for path in (folder / "images").iterdir()} == {"a.png", "young#2"}


def test_a_store_of_another_database_is_not_swept_until_it_is_adopted(session: Session) -> None:
    put(*keys_of("aa" * 32))
    get_blobs().put(blob_sweeper.OWNER_KEY, b"some other database", media_type="text/plain")
    with pytest.raises(ForeignStorageError):
        sweep()
    assert stored() == keys_of("aa" * 32)
    blob_sweeper.adopt(get_blobs())
    assert sweep().blobs == 2


def test_the_grace_is_never_shorter_than_the_longest_job(settings: Settings) -> None:
    short = load_settings(
        retention={"blob_grace_s": 0}, jobs={"timeout_s": 500, "lease_s": 40}, queue={"starvation_timeout_s": 60}
    )
    longest_delay_s = 60 + 4 * 500
    assert blob_sweeper.grace_s(short) == 500 + longest_delay_s + 2 * 40
    assert blob_sweeper.grace_s(load_settings()) == DAY_S


# --- concurrent uploads -------------------------------------------------------------------------------------------


class PausedBlobs(Blobs):
    """A blob store that pauses in the method that the test names."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings.storage)
        self.reached = threading.Event()
        self.go = threading.Event()
        self.at = ""

    def _pause(self, at: str) -> None:
        if at == self.at:
            self.reached.set()
            assert self.go.wait(20)

    def put(self, key: str, data: bytes, *, media_type: str) -> None:
        super().put(key, data, media_type=media_type)
        self._pause("put")

    def delete_all(self, keys: Sequence[str]) -> None:
        self._pause("delete")
        super().delete_all(keys)


@pytest.fixture
def paused(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> PausedBlobs:
    blobs = PausedBlobs(settings)
    monkeypatch.setattr("api_service.services.stored_blobs.get_blobs", lambda: blobs)
    return blobs


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def upload(client: Client, data: bytes) -> Any:
    form = {"file": (io.BytesIO(data), "image.png")}
    return client.post(f"{API}/upload", data=form, content_type="multipart/form-data")


def age_everything(folder: Path) -> None:
    then = (datetime.now(UTC) - timedelta(days=2)).timestamp()
    for path in folder.rglob("*.*"):
        os.utime(path, (then, then))


def blobs_of(answer: Any) -> set[str]:
    with session_scope() as session:
        row = session.get_one(Image, UUID(answer.json["images"][0]["id"]))
        return {row.blob_key, row.thumbnail_key}


def test_an_upload_that_has_no_rows_yet_keeps_its_blobs_even_if_they_look_old(
    client: Client, paused: PausedBlobs, folder: Path, background: ThreadPoolExecutor
) -> None:
    paused.at = "put"
    sent = background.submit(upload, client, picture("red"))
    assert paused.reached.wait(20)
    age_everything(folder)
    assert sweep().blobs == 0
    paused.go.set()
    answer = sent.result(20)
    assert answer.status_code == 201
    assert blobs_of(answer) <= stored()
    with session_scope() as session:
        assert session.scalar(select(func.count()).select_from(BlobClaim)) == 0


def test_a_request_with_a_picture_that_has_no_job_yet_keeps_its_blobs_even_if_they_look_old(
    client: Client, paused: PausedBlobs, folder: Path, background: ThreadPoolExecutor
) -> None:
    paused.at = "put"
    request = {"prompt": "a", "reference_images": [{"data": base64.b64encode(picture("red")).decode()}]}
    sent = background.submit(client.post, f"{API}/rag/generate", json=request)
    assert paused.reached.wait(20)
    age_everything(folder)
    assert sweep().blobs == 0
    paused.go.set()
    answer = sent.result(20)
    assert answer.status_code == 202
    assert client.get(answer.json["reference_images"][0]["content_url"]).status_code == 200
    assert len(stored()) == 2


def test_an_upload_of_content_that_is_being_swept_waits_and_stores_it_again(
    client: Client, paused: PausedBlobs, folder: Path, background: ThreadPoolExecutor
) -> None:
    first = upload(client, picture("red"))
    client.delete(first.json["images"][0]["url"])
    age_everything(folder)
    paused.at = "delete"
    swept = background.submit(blob_sweeper.sweep, paused, older_than_s=DAY_S)
    assert paused.reached.wait(20)
    again = background.submit(upload, client, picture("red"))
    other = background.submit(upload, client, picture("blue"))
    assert other.result(20).status_code == 201, "only uploads of the same content wait"
    assert not again.done()
    paused.go.set()
    assert again.result(20).status_code == 201
    assert swept.result(20).blobs == 2
    assert blobs_of(again.result()) <= stored()


def test_blobs_that_a_frozen_sweeper_deletes_after_an_upload_stored_them_again_are_named(
    client: Client,
    paused: PausedBlobs,
    folder: Path,
    background: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(blob_rows, "LOCK_LIMIT_S", 1)  # then the server releases the locks
    first = upload(client, picture("red"))
    upload(client, picture("blue"))
    client.delete(first.json["images"][0]["url"])
    age_everything(folder)
    paused.at = "delete"
    swept = background.submit(blob_sweeper.sweep, paused, older_than_s=DAY_S)
    assert paused.reached.wait(20)
    again = upload(client, picture("red"))
    assert again.status_code == 201
    paused.go.set()
    with pytest.raises(DatabaseConnectionError):
        swept.result(20)
    (logged,) = [record for record in caplog.records if record.msg == "needed_blobs_deleted"]
    assert set(logged.__dict__["keys"]) == blobs_of(again)
    assert blobs_of(again).isdisjoint(stored())


def test_an_upload_whose_claim_has_expired_is_refused(
    client: Client, paused: PausedBlobs, folder: Path, background: ThreadPoolExecutor
) -> None:
    paused.at = "put"
    sent = background.submit(upload, client, picture("red"))
    assert paused.reached.wait(20)
    with session_scope() as session:
        session.execute(update(BlobClaim).values(created_at=func.now() - timedelta(days=2)))
    sweep()
    paused.go.set()
    answer = sent.result(20)
    assert (answer.status_code, answer.json["code"]) == (503, "upload_interrupted")
    assert upload(client, picture("red")).status_code == 201, "as its error advises"


def test_concurrent_uploads_deletes_and_sweeps_leave_no_row_without_its_blob(
    client: Client, settings: Settings, background: ThreadPoolExecutor
) -> None:
    data = picture("red")
    done = threading.Event()
    removed: list[int] = []

    def sweep_on() -> None:
        while not done.is_set():
            removed.append(sweep(older_than_s=0.0).blobs)

    def upload_and_delete(rounds: Iterable[int]) -> set[int]:
        statuses = set()
        for _ in rounds:
            answer = upload(client, data)
            statuses.add(answer.status_code)
            if answer.status_code == 201:
                client.delete(answer.json["images"][0]["url"])
        return statuses

    sweeping = background.submit(sweep_on)
    both = [background.submit(upload_and_delete, range(25)) for _ in range(2)]
    statuses = {status for each in both for status in each.result(60)}
    deadline = time.monotonic() + 60
    while not any(removed) and time.monotonic() < deadline:  # until a sweep has found a blob without a row
        statuses |= upload_and_delete(range(1))
    # A grace of 0 s ends claims at once, so some uploads get 503.
    assert statuses <= {200, 201, 503}
    assert 201 in statuses
    last = upload(client, data)
    while last.status_code == 503:
        last = upload(client, data)
    done.set()
    sweeping.result(20)
    assert any(removed)
    sweep(older_than_s=0.0)
    assert blobs_of(last) <= stored()


def test_claims_of_the_same_blobs_do_not_wait_for_each_other(settings: Settings) -> None:
    with session_scope() as first, session_scope() as second:
        assert blob_rows.claim(first, ["a", "b"]) != blob_rows.claim(second, ["b", "a"])


def test_a_key_is_parsed_to_its_content_or_its_attempt() -> None:
    job_id = uuid4()
    for key in keys_of("ab" * 32):
        assert (storage.parse_content_key(key), storage.parse_output_key(key)) == ("ab" * 32, None)
    for key in keys_of_attempt(job_id, 12):
        assert (storage.parse_content_key(key), storage.parse_output_key(key)) == (None, (job_id, 12))
