"""Embedding pending images, also when a worker crashes, a file cannot be read, or the model rejects an image."""

import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from shared.contracts.images import ImageState
from shared.db import images
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Image as ImageRow
from shared.errors import DatabaseConnectionError, EmbeddingError, ModelOutOfMemoryError
from shared.settings import JobSettings, Settings
from shared.storage import get_blobs
from tests.factories import DIM, make_image, make_space
from tests.integration.conftest import picture
from tests.stack import wait_until
from worker_service.indexing.embed_images import ImageEmbedding
from worker_service.indexing.image_leases import ImageLeases
from worker_service.models.clip import ImageInput
from worker_service.models.embedder import Embedder

TOO_LARGE = (48, 48)
"""Size of an image that does not fit in memory."""
UNPREPARABLE = (47, 48)
"""Size of an image that the preprocessing rejects."""


class SlowEmbedder(Embedder):
    """Returns when the test sets `go`. Records the batch sizes, and how many calls ran at the same time."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.chunks_at_once = 2
        self.go = threading.Event()
        self.sizes: list[int] = []
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def prepare(self, image: Image.Image) -> Image.Image:
        if image.size == UNPREPARABLE:
            raise EmbeddingError
        return image

    def embed_corpus_images(self, images: Sequence[ImageInput]) -> np.ndarray:
        with self._lock:
            self.sizes.append(len(images))
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        assert self.go.wait(30)
        with self._lock:
            self.running -= 1
        if any(isinstance(picture, Image.Image) and picture.size == TOO_LARGE for picture in images):
            raise ModelOutOfMemoryError
        return np.ones((len(images), DIM), np.float32)


@pytest.fixture
def embedder(session: Session) -> SlowEmbedder:
    space = make_space(session)
    session.commit()
    return SlowEmbedder(space)


@pytest.fixture
def leases(settings: Settings) -> Iterator[ImageLeases]:
    with ImageLeases(JobSettings(lease_s=2, heartbeat_s=0.1)) as leases:
        yield leases


def pending_image(session: Session, *, crashes: int = 0, size: tuple[int, int] = (32, 32)) -> ImageRow:
    image = make_image(session)
    get_blobs().put(image.blob_key, picture(size=size), media_type="image/png")
    session.execute(
        update(ImageRow).where(ImageRow.id == image.id).values(crashes=crashes, created_at=func.clock_timestamp())
    )
    session.commit()
    return image


def start(work: ImageEmbedding) -> threading.Thread:
    """Embed in a thread until no image is pending."""
    thread = threading.Thread(target=work.embed_until_empty, kwargs={"stopping": lambda: False})
    thread.start()
    return thread


def start_notified(work: ImageEmbedding) -> threading.Thread:
    """Embed in a thread, as a worker does after a notification."""
    thread = threading.Thread(target=work.embed_pending, kwargs={"stopping": lambda: False})
    thread.start()
    return thread


def states() -> dict[UUID, str]:
    with session_scope() as session:
        return {row.id: row.state for row in session.execute(select(ImageRow.id, ImageRow.state))}


def test_the_lease_of_an_image_is_renewed_during_its_model_call(
    session: Session, embedder: SlowEmbedder, leases: ImageLeases
) -> None:
    image = pending_image(session)
    thread = start(ImageEmbedding(embedder, leases))
    wait_until(lambda: embedder.running, timeout_s=20, what="the model to work")

    def lease_left_s() -> float:
        left = func.extract("epoch", ImageRow.lease_until - func.clock_timestamp())
        with session_scope() as scope:
            return float(scope.scalars(select(left).where(ImageRow.id == image.id)).one() or 0)

    session.execute(update(ImageRow).values(lease_until=func.now() + timedelta(milliseconds=200)))
    session.commit()
    wait_until(lambda: lease_left_s() > 1, timeout_s=10, what="a renewal")
    embedder.go.set()
    thread.join(20)
    assert states() == {image.id: "ready"}
    assert leases.wait_until_empty(0)


def test_an_image_that_crashed_a_process_is_embedded_in_isolation(
    session: Session, embedder: SlowEmbedder, leases: ImageLeases
) -> None:
    others = [pending_image(session) for _ in range(2)]
    crashed = pending_image(session, crashes=1)
    others += [pending_image(session) for _ in range(2)]
    work = ImageEmbedding(embedder, leases)
    threads = [start(work)]
    wait_until(lambda: embedder.running, timeout_s=20, what="the other images to be in the model")
    threads.append(start(work))
    wait_until(lambda: claimed(crashed.id), timeout_s=20, what="the image to be claimed")
    with session_scope() as scope:
        assert not scope.get_one(ImageRow, crashed.id).model_started, "a crash of the others does not count against it"
    embedder.go.set()
    for thread in threads:
        thread.join(20)
    assert set(states().values()) == {"ready"}
    assert sorted(embedder.sizes) == [1, 4]
    assert embedder.most_running == 1


def claimed(image_id: UUID) -> bool:
    with session_scope() as session:
        return session.get_one(ImageRow, image_id).lease_until is not None


def test_an_image_that_crashes_every_process_fails_and_its_neighbours_do_not(
    session: Session, settings: Settings
) -> None:
    """The test drops claims without renewing them or handing them back, like a killed process."""
    poison, *others = (pending_image(session) for _ in range(3))
    for _ in range(10):
        with session_scope() as scope:
            rows = images.claim_pending(scope, limit=5, lease_s=30)
            claims = [images.ImageClaim.of(row) for row in rows]
            images.mark_model_started(scope, claims)
            if poison.id not in {claim.image_id for claim in claims}:
                vectors = np.ones((len(claims), DIM), np.float32)
                images.store_embeddings(scope, make_space(scope), claims, vectors, vectors[:, 0])
            scope.execute(update(ImageRow).where(ImageRow.lease_until.is_not(None)).values(lease_until=func.now()))
        with session_scope() as scope:
            images.take_back_expired(scope, max_crashes=settings.jobs.max_crashes)
    assert states() == {poison.id: "failed", **{other.id: "ready" for other in others}}


def test_images_of_a_worker_without_database_are_handed_back_and_count_no_crash(
    session: Session, leases: ImageLeases
) -> None:
    image = pending_image(session)
    with session_scope() as scope:
        (row,) = images.claim_pending(scope, limit=1, lease_s=60)
        claim = images.ImageClaim.of(row)
        images.mark_model_started(scope, [claim])
    with pytest.raises(DatabaseConnectionError), leases.holding([claim]):
        raise DatabaseConnectionError
    wait_until(lambda: not claimed(image.id), timeout_s=10, what="the image to be handed back")
    with session_scope() as scope:
        assert scope.get_one(ImageRow, image.id).crashes == 0


def test_an_image_that_was_handed_back_is_not_leased_again_by_a_late_renewal(
    session: Session, leases: ImageLeases
) -> None:
    pending_image(session)
    with session_scope() as scope:
        (row,) = images.claim_pending(scope, limit=1, lease_s=60)
        claim = images.ImageClaim.of(row)
    with leases.holding([claim]):
        assert leases.hand_back() == 1
        leases._renew_due([claim])
        with session_scope() as scope:
            assert images.any_pending(scope)


def test_an_image_that_cannot_be_read_keeps_its_lease_and_delays_no_other(
    session: Session, settings: Settings, embedder: SlowEmbedder, leases: ImageLeases
) -> None:
    unreadable, other = pending_image(session), pending_image(session)
    blob = Path(settings.storage.url.removeprefix("file://")) / unreadable.blob_key
    blob.unlink()
    blob.symlink_to(blob)
    embedder.go.set()
    for _ in range(2):
        start(ImageEmbedding(embedder, leases)).join(20)
    assert states() == {unreadable.id: "pending", other.id: "ready"}
    with session_scope() as scope:
        scope.execute(update(ImageRow).where(ImageRow.id == unreadable.id).values(lease_until=func.now()))
    with session_scope() as scope:
        assert images.take_back_expired(scope, max_crashes=1) == [(unreadable.id, ImageState.PENDING)], (
            "an unreadable file is not a crash"
        )


@pytest.mark.parametrize(("size", "code"), [(TOO_LARGE, "out_of_memory"), (UNPREPARABLE, "embedding_failed")])
def test_an_image_that_the_model_rejects_fails_and_the_others_do_not(
    session: Session, embedder: SlowEmbedder, leases: ImageLeases, size: tuple[int, int], code: str
) -> None:
    rejected, others = pending_image(session, size=size), [pending_image(session) for _ in range(3)]
    embedder.go.set()
    start(ImageEmbedding(embedder, leases)).join(20)
    assert states() == {rejected.id: "failed", **{other.id: "ready" for other in others}}
    with session_scope() as scope:
        assert scope.get_one(ImageRow, rejected.id).error_code == code


def test_an_image_that_arrives_while_all_workers_are_busy_is_embedded_later(
    session: Session, embedder: SlowEmbedder, leases: ImageLeases
) -> None:
    work = ImageEmbedding(embedder, leases)
    threads: list[threading.Thread] = []
    for _ in range(embedder.chunks_at_once):
        pending_image(session)
        threads.append(start_notified(work))
        wait_until(lambda: embedder.running == len(threads), timeout_s=20, what="another chunk in the model")
    late = pending_image(session)
    assert work.embed_pending(stopping=lambda: False) == 0, "the busy workers look for images again"
    embedder.go.set()
    for thread in threads:
        thread.join(20)
    assert states()[late.id] == "ready"
    assert set(states().values()) == {"ready"}
