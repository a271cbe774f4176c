"""The short version of `make chaos`: every kind of promise under a dozen faults, in about two minutes."""

import secrets
from collections.abc import Iterator
from uuid import UUID

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from shared.db.tables import Generation, Image, Job, JobEvent
from tests.chaos import orders, promises
from tests.chaos.promises import Breach
from tests.chaos.scene import Scene
from tests.chaos.storm import Outcome, Plan, storm

KINDS = (
    "kill_generate",
    "kill_before_commit",
    "kill_after_commit",
    "wipe_broker",
    "restart_postgres",
    "deliver_twice",
    "steal_lease",
    "poison",
    "out_of_memory",
    "garbage",
    "full_store",
    "hang_receivers",
)

pytestmark = pytest.mark.timeout(900)  # the first test's time includes the storm


@pytest.fixture(scope="module")
def after_the_storm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scene, Outcome]]:
    plan = Plan(
        seed=secrets.randbelow(10**6),
        jobs=80,
        faults=len(KINDS),
        kinds=KINDS,
        lease_s=4,
        # `make chaos` is for figures. Here a busy machine may need a minute to load a killed worker's libraries again.
        slack_s=120,
        starter_share=0,
        durable=False,
    )
    with storm(plan, tmp_path_factory.mktemp("chaos") / "run") as over:
        yield over


def test_nothing_is_lost_doubled_or_stuck(after_the_storm: tuple[Scene, Outcome]) -> None:
    _, outcome = after_the_storm
    seed = f"repeat it with seed {outcome.plan.seed}"
    assert outcome.broken == [], seed
    assert outcome.failures == [], seed
    assert set(outcome.recovery_s) == set(KINDS), seed


def test_the_checks_see_everything_that_can_be_broken(after_the_storm: tuple[Scene, Outcome]) -> None:
    scene, _ = after_the_storm
    with Session(scene.engine, expire_on_commit=False) as session, session.begin():
        lost, headless, altered, hidden = session.scalars(select(Generation).order_by(Generation.id).limit(4)).all()
        others = {each.job_id for each in (lost, headless, altered, hidden)}
        told = next(receipt.event for receipt in scene.receiver.receipts if UUID(receipt.event[0]) not in others)
        others.add(UUID(told[0]))  # what is asked of a job that is gone is told once, as that
        gone = session.scalars(select(Job.id).where(Job.id.not_in(others)).limit(1)).one()
        session.execute(delete(Generation).where(Generation.id == lost.id))
        session.execute(delete(Job).where(Job.id == gone))
        session.execute(delete(JobEvent).where(JobEvent.job_id == headless.job_id, JobEvent.seq == 1))
        image = session.scalars(select(Image.id).limit(1)).one()
        session.execute(update(Image).where(Image.id == image).values(state="pending"))
    (scene.store.folder / altered.blob_key).write_bytes(bytes(altered.size_bytes))
    (scene.store.folder / hidden.blob_key).unlink()
    (scene.store.folder / "outputs" / "nobody").write_bytes(b"")
    scene.backstage.note(orders.DRAWN, job_id=str(altered.job_id), attempt=99, index=0)
    scene.receiver.receipts[:] = [receipt for receipt in scene.receiver.receipts if receipt.event != told]
    with scene.broker() as broker:
        broker.lpush("generate.starter", "{}")  # nobody listens there

    seen = {(each.breach, each.what) for each in promises.broken(scene)}

    def is_seen(breach: Breach, *words: object) -> bool:
        return any(breach is kind and all(str(word) in what for word in words) for kind, what in seen)

    assert is_seen(Breach.LOST, lost.job_id, "images, not")
    assert is_seen(Breach.LOST, gone, "is gone")
    assert is_seen(Breach.LOST, headless.job_id, "gaps")
    assert is_seen(Breach.STUCK, image, "still waits")
    assert is_seen(Breach.LOST, altered.job_id, "bytes are not those")
    assert is_seen(Breach.LOST, hidden.job_id, "404")
    assert is_seen(Breach.LOST, hidden.blob_key, "is gone")
    assert is_seen(Breach.STUCK, "outputs/nobody")
    assert is_seen(Breach.DOUBLED, altered.job_id, "drew")
    assert is_seen(Breach.LOST, told[0], "told")
    assert is_seen(Breach.STUCK, "generate.starter")
