"""The short version of `make chaos`: all promises under sixteen faults."""

import secrets
from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from shared.db.tables import Image, Job, JobEvent, Output
from tests.chaos import orders, promises
from tests.chaos.promises import Breach
from tests.chaos.scene import Scene
from tests.chaos.storm import Outcome, short, storm

pytestmark = [pytest.mark.extended, pytest.mark.timeout(900)]  # the first test's time includes the storm


@pytest.fixture(scope="module")
def after_the_storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Outcome]]:
    with storm(short(secrets.randbelow(10**6)), tmp_path_factory.mktemp("chaos") / "run") as over:
        yield over


def test_nothing_is_lost_doubled_or_stuck(after_the_storm: tuple[Scene, Outcome]) -> None:
    _, outcome = after_the_storm
    seed = f"repeat it with seed {outcome.plan.seed}"
    assert outcome.broken == [], seed
    assert outcome.failures == [], seed
    assert set(outcome.recovery_s) == set(outcome.plan.sequence()), seed


def test_the_checks_report_every_kind_of_breach(after_the_storm: tuple[Scene, Outcome]) -> None:
    scene, _ = after_the_storm
    _, changed = scene.an_upload()
    with Session(scene.engine, expire_on_commit=False) as session, session.begin():
        lost, gapped, altered, hidden = session.scalars(select(Output).order_by(Output.id).limit(4)).all()
        others = {each.job_id for each in (lost, gapped, altered, hidden)}
        notified = next(receipt.event for receipt in scene.receiver.receipts if UUID(receipt.event[0]) not in others)
        others.add(UUID(notified[0]))  # of a deleted job the checks report only that it is gone
        gone = session.scalars(select(Job.id).where(Job.id.not_in(others)).limit(1)).one()
        session.execute(delete(Output).where(Output.id == lost.id))
        session.execute(delete(Job).where(Job.id == gone))
        session.execute(delete(JobEvent).where(JobEvent.job_id == gapped.job_id, JobEvent.seq == 1))
        image = session.scalars(select(Image.id).where(Image.id != changed.id).limit(1)).one()
        held = func.now() + timedelta(hours=1)  # no worker takes it
        session.execute(update(Image).where(Image.id == image).values(state="pending", lease_until=held))
    (scene.store.folder / altered.blob_key).write_bytes(bytes(altered.size_bytes))
    (scene.store.folder / hidden.blob_key).unlink()
    (scene.store.folder / "outputs" / "unreferenced").write_bytes(b"")
    scene.mailbox.note(orders.GENERATED, job_id=str(altered.job_id), attempt=99, index=0)
    scene.receiver.receipts[:] = [receipt for receipt in scene.receiver.receipts if receipt.event != notified]
    with scene.broker() as broker:
        broker.lpush("generate.starter", "{}")  # no worker consumes this queue
    blob = scene.store.folder / changed.blob_key
    blob.write_bytes(bytes(blob.stat().st_size))

    reported = {(each.breach, each.what) for each in promises.broken(scene)}

    def is_reported(breach: Breach, *words: object) -> bool:
        return any(breach is kind and all(str(word) in what for word in words) for kind, what in reported)

    assert is_reported(Breach.LOST, lost.job_id, "images, not")
    assert is_reported(Breach.LOST, gone, "is gone")
    assert is_reported(Breach.LOST, gapped.job_id, "gaps")
    assert is_reported(Breach.STUCK, image, "still waits")
    assert is_reported(Breach.LOST, changed.id, "its bytes")
    assert is_reported(Breach.LOST, altered.job_id, "bytes are not those")
    assert is_reported(Breach.LOST, hidden.job_id, "404")
    assert is_reported(Breach.LOST, hidden.blob_key, "is gone")
    assert is_reported(Breach.STUCK, "outputs/unreferenced")
    assert is_reported(Breach.DOUBLED, altered.job_id, "generated")
    assert is_reported(Breach.LOST, notified[0], "notified")
    assert is_reported(Breach.STUCK, "generate.starter")
