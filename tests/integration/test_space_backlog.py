"""A second embedding space beside the active one: its backlog, the switch, the roll-back and the drop."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import numpy as np
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from scripts.admin.__main__ import main as admin
from shared.contracts.images import ImageState
from shared.db import images, space_backlog, spaces, workers
from shared.db.images import ImageClaim
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.db.tables import Collection, Image, SpaceAttempt
from shared.errors import DatabaseConflictError, EmbeddingUnavailableError
from shared.messaging import embedding_rpc, queue
from shared.settings import JobSettings, Settings
from shared.storage import get_blobs
from tests.factories import DIM, make_image, make_space
from tests.integration.conftest import API, Client, picture, waiting
from worker_service.maintenance.reconciler import Reconciler

if TYPE_CHECKING:
    from worker_service.models.clip import Clip

ONE = np.ones(1, np.float32)
UNIT = np.eye(1, DIM, dtype=np.float32)


@pytest.fixture
def old(session: Session) -> Space:
    """The active space."""
    return make_space(session)


@pytest.fixture
def new(session: Session, old: Space) -> Space:
    """A space of another CLIP, whose vectors have the same length."""
    return spaces.ensure(session, digest="ef" * 32, model="second", dim=DIM)


def searchable(session: Session, count: int, space: Space) -> list[UUID]:
    found = [make_image(session, vector=UNIT[0], space=space).id for _ in range(count)]
    session.commit()
    return found


def claimed(session: Session, space: Space, *, limit: int = 100, max_crashes: int = 3) -> list[UUID]:
    rows = space_backlog.claim(session, space, limit=limit, lease_s=30, max_crashes=max_crashes)
    session.commit()
    return [row.id for row in rows]


def claim_all(session: Session, space: Space) -> list[UUID]:
    found: list[UUID] = []
    while more := claimed(session, space):
        found += more
    return found


def store(session: Session, space: Space, *image_ids: UUID) -> None:
    count = len(image_ids)
    added = space_backlog.store(session, space, image_ids, np.repeat(UNIT, count, axis=0), np.repeat(ONE, count))
    space_backlog.count_added(session, space, added)
    session.commit()


def let_leases_expire(session: Session) -> None:
    leased = SpaceAttempt.lease_until.is_not(None)
    session.execute(update(SpaceAttempt).where(leased).values(lease_until=func.now() - text("interval '1 second'")))
    session.commit()


def activate(space: Space) -> int:
    """Switch as the command does; return how many images are pending for lack of a vector."""
    with session_scope() as session:
        space_backlog.activate(session, space)
    with session_scope() as session:
        return len(space_backlog.reopen(session, space).image_ids)


def make_old(session: Session) -> None:
    """Let all images be older than the images that do not keep a space from becoming active."""
    session.execute(update(Image).values(created_at=func.now() - text("interval '1 hour'")))
    session.commit()


def state(session: Session, image_id: UUID) -> str:
    session.expire_all()
    return session.get_one(Image, image_id).state


# --- the backlog --------------------------------------------------------------------------------------------------


def test_two_workers_share_the_backlog_without_an_image_in_common(session: Session, old: Space, new: Space) -> None:
    known = searchable(session, 9, old)
    make_image(session)  # pending, so the backlog lacks it
    session.commit()
    first = claimed(session, new, limit=5)
    with session_scope() as other:
        second = [row.id for row in space_backlog.claim(other, new, limit=100, lease_s=30, max_crashes=3)]
    assert len(first) <= 5
    rest = claim_all(session, new)
    assert sorted([*first, *second, *rest]) == sorted(known)
    store(session, new, *known)
    assert claimed(session, new) == []
    assert space_backlog.get_progress(session, new).vectors == 9


def test_a_dead_workers_images_are_claimed_alone_and_fail_after_too_many_deaths(
    session: Session, old: Space, new: Space
) -> None:
    known = searchable(session, 3, old)
    assert sorted(claim_all(session, new)) == sorted(known)
    let_leases_expire(session)
    alone = [claimed(session, new) for _ in known]
    assert sorted(image_id for (image_id,) in alone) == sorted(known)
    for (image_id,) in alone[1:]:
        store(session, new, image_id)
    let_leases_expire(session)
    assert claimed(session, new, max_crashes=2) == []
    progress = space_backlog.get_progress(session, new)
    assert (progress.vectors, progress.missing, progress.failed) == (2, 0, 1)
    assert space_backlog.retry_failed(session, new) == 1
    assert len(claimed(session, new)) == 1


def test_images_that_are_handed_back_are_no_crash_and_failed_ones_stay_failed(
    session: Session, old: Space, new: Space
) -> None:
    searchable(session, 3, old)
    ids = claim_all(session, new)
    space_backlog.mark_failed(session, new, ids[0], code="invalid_image")
    space_backlog.hand_back(session, new, ids)
    progress = space_backlog.get_progress(session, new)
    assert (progress.missing, progress.recent, progress.failed) == (2, 2, 1)
    make_old(session)
    assert space_backlog.get_progress(session, new).recent == 0
    again = claim_all(session, new)
    assert sorted(again) == sorted(ids[1:])
    assert set(session.scalars(select(SpaceAttempt.crashes))) == {0}


def test_an_image_that_is_deleted_while_it_is_embedded_leaves_nothing_behind(
    session: Session, old: Space, new: Space
) -> None:
    (image_id,) = searchable(session, 1, old)
    assert claimed(session, new) == [image_id]
    images.remove(session, session.get_one(Image, image_id))
    store(session, new, image_id)
    assert session.scalar(select(func.count()).select_from(SpaceAttempt)) == 0
    assert space_backlog.get_progress(session, new).vectors == 0


def test_the_progress_says_how_long_the_rest_takes(session: Session, old: Space, new: Space) -> None:
    known = searchable(session, 7, old)
    assert space_backlog.get_progress(session, new).remaining_s is None
    store(session, new, *known[:2])
    session.execute(text("update embedding_spaces set adding_since = now() - interval '10 seconds'"))
    store(session, new, *known[2:6])
    progress = space_backlog.get_progress(session, new)
    assert (progress.vectors, progress.missing) == (6, 1)
    assert progress.rate_per_s == pytest.approx(0.4, rel=0.2), "four vectors in ten seconds"
    assert progress.remaining_s == pytest.approx(2.5, rel=0.2)
    session.execute(text("update embedding_spaces set last_added_at = now() - interval '1 hour'"))
    assert space_backlog.get_progress(session, new).remaining_s is None, "nobody works on it now"


# --- switch and roll-back -----------------------------------------------------------------------------------------


def test_the_states_of_images_follow_the_active_space_there_and_back(session: Session, old: Space, new: Space) -> None:
    both, only_old = searchable(session, 2, old)
    store(session, new, both)
    assert activate(new) == 1
    assert (state(session, both), state(session, only_old)) == ("ready", "pending")
    # Uploaded now, so that only the new space has its vector; and the image that the new CLIP cannot embed.
    only_new = make_image(session, vector=UNIT[0], space=new).id
    (claim,) = images.claim_pending(session, limit=1, lease_s=30, space=new)
    assert images.mark_embedding_failed(session, new, ImageClaim.of(claim), code="embedding_failed")
    session.commit()
    assert state(session, only_old) == "failed"
    version = session.scalar(select(Collection.version))

    assert activate(old) == 1
    assert [state(session, each) for each in (both, only_old, only_new)] == ["ready", "ready", "pending"]
    assert session.get_one(Image, only_old).error_code is None
    assert session.scalar(select(Collection.version)) != version, "cached searches lack the image"


def test_a_failure_in_the_space_before_does_not_fail_an_image(session: Session, old: Space, new: Space) -> None:
    image = make_image(session)
    (row,) = images.claim_pending(session, limit=1, lease_s=30, space=old)
    session.commit()
    activate(new)
    images.mark_embedding_failed(session, old, ImageClaim.of(row), code="embedding_failed")
    session.commit()
    assert state(session, image.id) == ImageState.PENDING
    assert len(images.claim_pending(session, limit=1, lease_s=30, space=new)) == 1


def run_admin(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["admin", *arguments])
        admin()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as error:
        run_admin(monkeypatch, *arguments)
    assert error.value.code == 1
    return capsys.readouterr().err


def live_worker(session: Session, space: Space, *, kind: str = "embed", state: str = "standby") -> None:
    workers.heartbeat(session, f"{kind}-{space.id}", kind=kind, model=None, state=state, space=space.digest)
    session.commit()


def test_the_switch_waits_for_all_but_new_images_and_for_a_worker(
    session: Session, old: Space, new: Space, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, broken = searchable(session, 3, old)
    make_old(session)
    assert "3 ready images" in refused(monkeypatch, capsys, "activate-space", new.digest)
    claim_all(session, new)
    space_backlog.mark_failed(session, new, broken, code="embedding_failed")
    store(session, new, first, second)
    just_uploaded = searchable(session, 1, old)[0]
    assert "No embed worker" in refused(monkeypatch, capsys, "activate-space", new.digest)
    live_worker(session, new)
    run_admin(monkeypatch, "activate-space", new.digest[:12])
    assert spaces.is_active(session, new)
    assert [state(session, each) for each in (first, just_uploaded, broken)] == ["ready", "pending", "pending"]
    session.rollback()
    live_worker(session, old)
    make_old(session)
    run_admin(monkeypatch, "activate-space", old.digest)
    assert [state(session, each) for each in (first, just_uploaded, broken)] == ["ready", "ready", "ready"]


def test_images_are_reopened_in_steps_that_end_when_another_space_becomes_active(
    session: Session, old: Space, new: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_backlog, "REOPENED_AT_ONCE", 2)
    known = sorted(searchable(session, 5, old))
    space_backlog.activate(session, new)
    step = space_backlog.reopen(session, new)
    session.commit()
    assert (sorted(step.image_ids), step.next_after) == (known[:2], known[1])
    space_backlog.activate(session, old)
    late = space_backlog.reopen(session, new, after=step.next_after)
    session.commit()
    assert (late.image_ids, late.next_after) == ([], None)
    assert {state(session, each) for each in known} == {"ready"}
    run_admin(monkeypatch, "activate-space", new.digest, "--force")
    assert {state(session, each) for each in known} == {"pending"}


def test_the_switch_and_a_worker_of_the_backlog_do_not_wait_for_each_other(
    session: Session, old: Space, clip: "Clip", settings: Settings
) -> None:
    """The worker has locked an image when the switch waits for it. To lock the space then was a deadlock."""
    from worker_service.execution.watchdog import Watchdog
    from worker_service.indexing.backlog import Backlog
    from worker_service.models.embedder import Embedder

    space = spaces.ensure(session, digest=clip.space_digest, model=clip.name, dim=clip.dim)
    image = make_image(session, vector=UNIT[0], space=old)
    get_blobs().put(image.blob_key, picture(), media_type="image/png")
    session.commit()
    embedder = Embedder(clip, space, Watchdog(settings.watchdog))
    # The worker's insert of the same row waits for the end of this transaction.
    session.execute(space.table.insert().values(image_id=image.id, embedding=np.eye(1, clip.dim)[0].tolist(), norm=1))

    with (
        waiting(Backlog(embedder, settings.jobs).embed_chunk) as embedded,
        waiting(partial(activate, space), count=2) as switched,
    ):
        session.rollback()
        assert embedded.result(10)
        switched.result(10)
    embedder.close(5)
    assert spaces.is_active(session, space)
    assert images.find_vector(session, space, image.id) is not None


def test_a_space_is_dropped_by_command_but_not_the_active_one_or_one_in_use(
    session: Session, old: Space, new: Space, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    searchable(session, 1, old)
    assert len(claimed(session, new)) == 1
    assert "Searches use" in refused(monkeypatch, capsys, "drop-space", old.digest)
    assert "no such" in refused(monkeypatch, capsys, "drop-space", "ef" * 4)
    live_worker(session, new)
    assert "embed-" in refused(monkeypatch, capsys, "drop-space", new.digest)
    run_admin(monkeypatch, "drop-space", new.digest, "--force")
    session.rollback()
    assert [space for space, _ in spaces.list_all(session)] == [old]
    assert session.scalar(select(func.to_regclass(f"vectors_{new.id}"))) is None
    assert session.scalar(select(func.count()).select_from(SpaceAttempt)) == 0
    run_admin(monkeypatch, "list-spaces")
    printed = capsys.readouterr().out
    assert old.digest in printed
    assert "vectors: 1, missing: 0, failed: 0" in printed


def test_a_search_in_a_space_that_is_dropped_meanwhile_is_a_temporary_error(
    session: Session, old: Space, new: Space
) -> None:
    spaces.drop(session, new)
    session.commit()
    with pytest.raises(DatabaseConflictError), session_scope() as scope:
        scope.execute(select(new.table.c.image_id))


def test_a_drop_waits_for_a_search_and_does_not_wait_for_ever(session: Session, old: Space, new: Space) -> None:
    session.commit()
    session.execute(select(new.table.c.image_id).join(Image, Image.id == new.table.c.image_id))
    with pytest.raises(DatabaseConflictError), session_scope() as scope:
        spaces.drop(scope, new)
    session.rollback()
    with session_scope() as scope:
        spaces.drop(scope, new)


# --- who answers a search -----------------------------------------------------------------------------------------


@contextmanager
def answering(name: str, space: Space, *, lost: int = 0) -> Iterator[list[str]]:
    """Answer queries of one queue as a worker of `space`, except the first `lost`, which are taken and not answered."""
    taken: list[str] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            message = queue.broker().lpop(name)
            if message is None:
                stop.wait(0.005)
                continue
            (reply_key, payload), _, _ = json.loads(base64.b64decode(json.loads(message)["body"]))  # type: ignore[arg-type]
            taken.append(name)
            if len(taken) > lost:
                embedding_rpc.answer(
                    reply_key,
                    payload,
                    space_digest=space.digest,
                    embed=lambda items: np.repeat(UNIT, len(items), axis=0),
                )

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield taken
    finally:
        stop.set()
        thread.join()


def search(client: Client, **body: Any) -> Any:
    return client.post(f"{API}/search", json={"mode": "vector", **body})


def test_a_search_names_its_space_and_is_answered_there(
    client: Client, session: Session, old: Space, new: Space
) -> None:
    first, _ = searchable(session, 2, old)
    store(session, new, first)
    live_worker(session, new)
    with answering(queue.EMBED_QUERIES_QUEUE, old), answering(queue.embed_queries_queue(new), new):
        answers = {space: search(client, query="red", space=space).json for space in (None, old.digest, new.digest)}
        plan = client.get(f"{API}/rag/search", query_string={"prompt": "red", "space": new.digest[:12]}).json
    assert [answers[space]["embedding_space"] for space in answers] == [old.digest, old.digest, new.digest]
    assert [len(answers[space]["results"]) for space in answers] == [2, 2, 1]
    assert (plan["embedding_space"], len(plan["references"])) == (new.digest, 1)


def test_an_answer_of_an_inactive_space_is_not_cached(client: Client, session: Session, old: Space, new: Space) -> None:
    """The backlog adds vectors without a new version of the collection."""
    known = searchable(session, 2, old)
    live_worker(session, new)
    with answering(queue.embed_queries_queue(new), new):
        for count in range(3):
            store(session, new, *known[:count])
            assert len(search(client, query="red", space=new.digest).json["results"]) == count


def test_a_search_in_a_space_without_a_worker_fails_at_once_and_an_unknown_one_is_named(
    client: Client, session: Session, old: Space, new: Space
) -> None:
    (image_id,) = searchable(session, 1, old)
    store(session, new, image_id)
    silent = search(client, query="red", space=new.digest)
    assert (silent.status_code, silent.json["code"]) == (503, "embedding_unavailable")
    assert len(search(client, image_id=str(image_id), space=new.digest).json["results"]) == 1, "needs no worker"
    for name, path in (("a" * 64, "body.space"), ("zz", "body.space")):
        wrong = search(client, query="red", space=name)
        assert (wrong.status_code, wrong.json["errors"][0]["field"]) == (422, path)
    wrong = client.get(f"{API}/rag/search", query_string={"prompt": "red", "space": "b" * 12})
    assert (wrong.status_code, wrong.json["errors"][0]["field"]) == (422, "query.space")


def test_a_query_that_a_killed_worker_had_taken_is_sent_once_more(session: Session, old: Space) -> None:
    live_worker(session, old, state="ready")
    with answering(queue.embed_queries_queue(old), old, lost=1) as taken:
        assert embedding_rpc.embed_texts(["red"], old).shape == (1, DIM)
    assert len(taken) == 2


def test_an_overloaded_queue_gets_no_second_message(session: Session, old: Space) -> None:
    live_worker(session, old, state="ready")
    with pytest.raises(EmbeddingUnavailableError):
        embedding_rpc.embed_texts(["red"], old)
    assert queue.broker().llen(queue.embed_queries_queue(old)) == 1


def test_an_api_process_that_missed_the_switch_searches_the_old_vectors(
    client: Client, session: Session, old: Space, new: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The space changes between the two transactions of a search."""
    _, second = searchable(session, 2, old)
    store(session, new, second)
    live_worker(session, old, state="ready")
    embed = embedding_rpc.embed_texts

    def embed_then_switch(texts: list[str], space: Space) -> embedding_rpc.Vectors:
        answer = embed(texts, space)
        activate(new)
        return answer

    monkeypatch.setattr("api_service.services.search.embed_texts", embed_then_switch)
    with answering(queue.embed_queries_queue(old), old):
        answer = search(client, query="red").json
    assert spaces.is_active(session, new)
    assert answer["embedding_space"] == old.digest
    assert [result["image_id"] for result in answer["results"]] == [str(second)], "of those that are ready now"


# --- where the progress is shown ----------------------------------------------------------------------------------


def test_the_statistics_and_the_page_queue_show_the_progress(
    client: Client, session: Session, old: Space, new: Space
) -> None:
    first, _ = searchable(session, 2, old)
    store(session, new, first)
    live_worker(session, new)
    shown = client.get(f"{API}/stats").json["embedding_spaces"]
    counts = [[each[name] for name in ("digest", "active", "vectors", "missing", "failed")] for each in shown]
    assert counts == [[old.digest, True, 2, 0, 0], [new.digest, False, 1, 1, 0]]
    assert shown[1]["workers"] == {"embed standby": 1}
    page = client.get("/queue").text
    assert all(text in page for text in (old.short, new.short, "no worker adds vectors", "1 embed standby"))


def test_metrics_count_each_space_until_it_is_dropped(
    session: Session, old: Space, new: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    searchable(session, 2, old)
    monkeypatch.setattr("worker_service.maintenance.reconciler.SPACES_INTERVAL_S", 0)
    reconciler = Reconciler(JobSettings())

    def measured(name: str, space: Space) -> float | None:
        return REGISTRY.get_sample_value(f"embedding_space_{name}", {"space": space.short})

    reconciler.tick()
    assert [measured(name, old) for name in ("vectors", "missing", "failed", "active")] == [2, 0, 0, 1]
    assert [measured(name, new) for name in ("vectors", "missing", "failed", "active")] == [0, 2, 0, 0]
    spaces.drop(session, new)
    session.commit()
    reconciler.tick()
    assert measured("missing", new) is None
