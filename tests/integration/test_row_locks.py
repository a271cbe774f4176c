"""Statements that change the same rows lock them in one order, so no two wait for each other. On a real database."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID, uuid4

import numpy as np
import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from shared.contracts.bulks import BulkState
from shared.contracts.jobs import JobState
from shared.db import attempts, bulks, images, jobs, owners, space_backlog, spaces
from shared.db.attempts import Claim, Success
from shared.db.dispatch import mark_next_published
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Bulk, BulkItem, Image, ImageUsage, Job, SpaceAttempt
from shared.settings import Settings
from tests.factories import DIM, make_image, make_job, make_space
from tests.integration.conftest import count_waiting
from tests.stack import wait_until

ROWS = 12
VECTORS = np.ones((ROWS, DIM), np.float32) / np.sqrt(np.float32(DIM))
NORMS = np.ones(ROWS, np.float32)

ImageStatement = Callable[[Session, Space, Sequence[ImageClaim]], object]
BacklogStatement = Callable[[Session, Space, Sequence[UUID]], object]
JobStatement = Callable[[Session, Sequence[Claim]], object]


def locks_in_order(
    table: type[Image] | type[Job] | type[SpaceAttempt], session: Session, statement: Callable[[Session], object]
) -> bool:
    """Whether `statement` holds no row while it waits for the row with the lowest id.

    A statement that skips the locked row ends without waiting. That is safe too.
    """
    row_id = SpaceAttempt.image_id if issubclass(table, SpaceAttempt) else table.id
    first = session.scalars(select(row_id).order_by(row_id).limit(1)).one()
    # The table has the rows in the opposite order, in which a scan of the table reads them.
    name = table.__tablename__
    session.execute(text(f"create index opposite on {name} ({row_id.key} desc)"))
    session.execute(text(f"cluster {name} using opposite"))
    session.execute(text("drop index opposite"))
    session.commit()
    session.scalars(select(row_id).where(row_id == first).with_for_update()).one()

    return waits_without_locks(table, session, statement)


def waits_without_locks(
    table: type[Image] | type[Job] | type[ImageUsage] | type[SpaceAttempt],
    session: Session,
    statement: Callable[[Session], object],
) -> bool:
    """Whether `statement` ends, or holds no row of `table` while it waits for the one row that `session` has locked."""

    def execute() -> None:
        with session_scope() as scope:
            # On large tables the planner chooses other plans, which read the rows in another order than their index.
            scope.execute(text("set local enable_indexscan = off"))
            statement(scope)

    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(execute)
        try:
            wait_until(lambda: running.done() or count_waiting(), timeout_s=10, what="the statement to wait or to end")
            if running.done():
                running.result()
                return True
            with session_scope() as scope:
                count = scope.scalar(select(func.count()).select_from(table)) or 0
                free = scope.scalars(select(table).with_for_update(skip_locked=True)).all()
            return len(free) == count - 1
        finally:
            session.rollback()
            running.result(10)


@pytest.mark.parametrize(
    "statement",
    [
        lambda session, _, claims: images.renew(session, claims, lease_s=30),
        lambda session, _, claims: images.mark_model_started(session, claims),
        lambda session, _, claims: images.hand_back(session, claims),
        lambda session, space, claims: images.store_embeddings(session, space, claims, VECTORS, NORMS),
        lambda session, space, claims: images.add_vectors(
            session, space, [claim.image_id for claim in claims], VECTORS, NORMS
        ),
    ],
    ids=["renew", "mark_model_started", "hand_back", "store_embeddings", "add_vectors"],
)
def test_claimed_images_are_locked_in_one_order(session: Session, statement: ImageStatement) -> None:
    space, claims = make_space(session), claimed_images(session)
    assert locks_in_order(Image, session, lambda scope: statement(scope, space, claims))


def test_images_without_a_vector_are_locked_in_one_order(session: Session) -> None:
    space = make_space(session)
    for _ in range(ROWS):
        make_image(session, vector=np.ones(DIM))
    session.execute(space.table.delete())
    session.commit()
    assert locks_in_order(Image, session, lambda scope: images.reopen_without_vector(scope, space, limit=ROWS))


@pytest.mark.parametrize(
    "statement",
    [
        lambda session, space, _: space_backlog.claim(session, space, limit=1, lease_s=30, max_crashes=1),
        lambda session, space, ids: space_backlog.renew(session, space, ids, lease_s=30),
        lambda session, space, ids: space_backlog.hand_back(session, space, ids),
        lambda session, space, ids: space_backlog.store(session, space, ids, VECTORS, NORMS),
        lambda session, space, _: space_backlog.retry_failed(session, space),
    ],
    ids=["claim", "renew", "hand_back", "store", "retry_failed"],
)
def test_claims_of_a_backlog_are_locked_in_one_order(session: Session, statement: BacklogStatement) -> None:
    """Some of them have crashed, have failed or have expired, so that each statement changes several rows."""
    make_space(session)
    ids = [make_image(session, vector=np.ones(DIM)).id for _ in range(ROWS)]
    new = spaces.ensure(session, digest="ef" * 32, model="second", dim=DIM)
    for number, image_id in enumerate(sorted(ids)):
        attempt = SpaceAttempt(space_id=new.id, image_id=image_id, crashes=1 - number % 2, lease_until=func.now())
        attempt.error_code = "embedding_failed" if number % 3 == 0 else None
        session.add(attempt)
    session.commit()
    assert locks_in_order(SpaceAttempt, session, lambda scope: statement(scope, new, ids))


@pytest.mark.parametrize(
    "statement",
    [
        lambda session, claims: attempts.renew(session, claims, lease_s=30),
        lambda session, claims: attempts.hand_back(session, claims),
        lambda session, claims: jobs.revoke(session, [claim.job_id for claim in claims]),
        lambda session, claims: attempts.mark_models_started(session, claims),
        lambda session, claims: attempts.finish_all(session, [Success(claim, [], {}) for claim in claims]),
    ],
    ids=["renew", "hand_back", "revoke", "mark_models_started", "finish_all"],
)
def test_running_jobs_are_locked_in_one_order(session: Session, statement: JobStatement) -> None:
    rows = [make_job(session, state=JobState.PROCESSING) for _ in range(ROWS)]
    session.commit()
    claims = [Claim(row.id, row.attempt) for row in rows]
    assert locks_in_order(Job, session, lambda scope: statement(scope, claims))


@pytest.mark.parametrize(
    "statement",
    [
        lambda session, bulk_id: jobs.cancel_bulk(session, bulk_id),
        lambda session, bulk_id: bulks.pause(session, session.get_one(Bulk, bulk_id)),
        lambda session, _: jobs.unpublish(session, session.scalars(select(Job.id)).all()),
        lambda session, _: mark_next_published(session, "cheap", window=ROWS, starvation_timeout_s=1e6),
        lambda session, _: jobs.fail_unserved(session, "cheap", limit=ROWS),
    ],
    ids=["cancel_bulk", "pause", "unpublish", "dispatch", "fail_unserved"],
)
def test_queued_jobs_are_locked_in_one_order(session: Session, statement: Callable[[Session, UUID], object]) -> None:
    bulk_id = bulk_of_jobs(session)
    assert locks_in_order(Job, session, lambda scope: statement(scope, bulk_id))


def test_expired_jobs_are_locked_in_one_order(session: Session) -> None:
    bulk_of_jobs(session, expired=True)
    assert locks_in_order(Job, session, jobs.end_expired)


@pytest.mark.parametrize(
    ("table", "take_back"),
    [(Image, images.take_back_expired), (Job, attempts.take_back_expired)],
    ids=["images", "jobs"],
)
def test_rows_with_an_expired_lease_are_locked_in_one_order(
    table: type[Image] | type[Job], take_back: Callable[..., object], session: Session
) -> None:
    claimed_images(session)
    for _ in range(ROWS):
        make_job(session, state=JobState.PROCESSING)
    session.execute(update(table).values(lease_until=func.now()))
    session.commit()
    assert locks_in_order(table, session, lambda scope: take_back(scope, max_crashes=3))


def test_pending_images_are_claimed_in_one_order(session: Session) -> None:
    for _ in range(ROWS):
        make_image(session)
    session.commit()
    assert locks_in_order(Image, session, lambda scope: images.claim_pending(scope, limit=ROWS, lease_s=30))


def test_failed_jobs_of_a_bulk_that_are_locked_are_left_for_the_next_dispatch(session: Session) -> None:
    bulk_id = bulk_of_jobs(session)
    session.execute(update(Job).values(state=JobState.FAILED, finished_at=func.now()))
    session.execute(update(Bulk).values(retry_before=func.clock_timestamp()))
    session.commit()
    assert locks_in_order(Job, session, lambda scope: bulks.top_up(scope, "cheap", window=ROWS))
    with session_scope() as scope:
        assert scope.scalar(select(func.count()).where(Job.bulk_id == bulk_id, Job.state == JobState.FAILED)) == 1
        assert scope.get_one(Bulk, bulk_id).retry_before is not None
        bulks.top_up(scope, "cheap", window=ROWS)
    with session_scope() as scope:
        assert set(scope.scalars(select(Job.state).where(Job.bulk_id == bulk_id))) == {JobState.QUEUED}


def test_items_and_bulks_that_are_locked_are_not_waited_for_by_a_cleanup(session: Session) -> None:
    refused, stale = bulk_of_jobs(session), uuid4()
    session.execute(update(Bulk).values(state=BulkState.REFUSED, finished_at=func.now()))
    session.execute(update(BulkItem).values(job_id=None))
    owner_id = session.get_one(Bulk, refused).owner_id
    session.add(Bulk(id=stale, owner_id=owner_id, lane=0, on_invalid="fail", models=[], total=0, fed=0))
    session.commit()
    session.scalars(select(Bulk).where(Bulk.id == stale).with_for_update()).one()
    session.scalars(select(BulkItem).where(BulkItem.line == 3).with_for_update()).one()
    with session_scope() as scope:
        scope.execute(text("set local lock_timeout = 1000"))
        bulks.delete_abandoned(scope, abandoned_after_s=-60)
    session.rollback()
    with session_scope() as scope:
        assert scope.scalars(select(BulkItem.line)).all() == [3]
        assert scope.get_one(Bulk, stale).state == BulkState.RECEIVING
        bulks.delete_abandoned(scope, abandoned_after_s=-60)
    with session_scope() as scope:
        assert scope.scalars(select(BulkItem.line)).all() == []
        assert scope.get_one(Bulk, stale).state == BulkState.ABANDONED


@pytest.mark.parametrize("ended_by", ["crash", "deadline"])
def test_images_are_given_back_to_owners_in_one_order(session: Session, ended_by: str) -> None:
    lower, higher = sorted(owners.ensure(session, name) for name in ("ada", "ben"))
    today = session.scalars(select(func.current_date())).one()
    # In the opposite order in every table, and in the order of their leases.
    for age, owner_id in enumerate([lower, higher]):
        session.add(ImageUsage(owner_id=owner_id, day=today, images=5))
        job = make_job(session, state=JobState.PROCESSING)
        job.owner_id, job.quota_day, job.model_started = owner_id, today, True
        job.lease_until = func.now() - timedelta(seconds=60 + age)
    session.flush()
    if ended_by == "deadline":
        for owner_id in (higher, lower):
            session.add(
                Bulk(
                    id=uuid4(),
                    owner_id=owner_id,
                    state=BulkState.RUNNING,
                    lane=0,
                    on_invalid="fail",
                    models=["cheap"],
                    total=1,
                    fed=0,
                    quota_day=today,
                    expires_at=func.now(),
                )
            )
            session.flush()
    session.commit()
    session.scalars(select(ImageUsage).where(ImageUsage.owner_id == lower).with_for_update()).one()

    def end(scope: Session) -> None:
        if ended_by == "crash":
            attempts.take_back_expired(scope, max_crashes=1)
        else:
            bulks.top_up(scope, "cheap", window=1)

    assert waits_without_locks(ImageUsage, session, end)


def test_images_are_stored_while_their_leases_are_renewed(settings: Settings, session: Session) -> None:
    """Threads that store, renew, mark and hand back the same images at once: this ended in a deadlock."""
    space, claims = make_space(session), claimed_images(session, count=200)
    vectors, norms = np.tile(VECTORS[:1], (200, 1)), np.ones(200, np.float32)
    meet = threading.Barrier(4)
    random = np.random.default_rng(0)

    def run_often(statement: Callable[[Session, Sequence[ImageClaim]], object], orders: list[list[int]]) -> None:
        for order in orders:
            meet.wait(30)
            with session_scope() as scope:
                statement(scope, [claims[index] for index in order])

    def store(scope: Session, some: Sequence[ImageClaim]) -> None:
        images.store_embeddings(scope, space, some, vectors[: len(some)], norms[: len(some)])
        ids = [claim.image_id for claim in some]
        scope.execute(update(Image).where(Image.id.in_(ids)).values(state="pending", lease_until=func.now()))

    statements = [
        store,
        lambda scope, some: images.renew(scope, some, lease_s=30),
        images.mark_model_started,
        images.hand_back,
    ]
    with ThreadPoolExecutor(4) as threads:
        running = [
            threads.submit(run_often, statement, [random.permutation(200).tolist() for _ in range(15)])
            for statement in statements
        ]
        for each in running:
            each.add_done_callback(lambda done: meet.abort() if done.exception() else None)
        errors = [each.exception(60) for each in running]
    assert [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)] == []


def claimed_images(session: Session, *, count: int = ROWS) -> list[ImageClaim]:
    for _ in range(count):
        make_image(session)
    claims = [ImageClaim.of(image) for image in images.claim_pending(session, limit=count, lease_s=60)]
    session.commit()
    return claims


def bulk_of_jobs(session: Session, *, expired: bool = False) -> UUID:
    """A running bulk whose items are `ROWS` queued jobs, none published. expired: they are past their deadline."""
    rows = [make_job(session) for _ in range(ROWS)]
    bulk = Bulk(
        id=uuid4(),
        owner_id=rows[0].owner_id,
        state=BulkState.RUNNING,
        lane=rows[0].lane,
        on_invalid="fail",
        models=["cheap"],
        total=ROWS,
        fed=ROWS,
    )
    session.add(bulk)
    session.flush()
    for line, job in enumerate(rows):
        job.bulk_id, job.bulk_line, job.expires_at = bulk.id, line, func.now() if expired else None
        session.add(
            BulkItem(
                bulk_id=bulk.id,
                line=line,
                model="cheap",
                kind=job.kind,
                images=1,
                parameters=job.parameters,
                item_metadata={},
                timeout_s=60,
                job_id=job.id,
            )
        )
    session.commit()
    return bulk.id
