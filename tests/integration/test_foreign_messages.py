"""Messages and keys of other programs in Redis, and a broker that refuses writes. On real workers and servers."""

import base64
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import orjson
import pytest
import redis
from sqlalchemy.orm import Session

from shared.cache import NAMESPACE, get_cache_manager
from shared.contracts.generation import Mode
from shared.contracts.jobs import JobState
from shared.db import jobs
from shared.db.tables import Job
from shared.errors import EmbeddingUnavailableError
from shared.messaging import embedding_rpc, queue
from shared.messaging.foreign import read_task_id
from shared.metrics import MESSAGES_DROPPED
from shared.request_stats import request_stats
from shared.settings import Settings, get_settings
from tests.factories import make_job, make_space
from tests.foreign_broker import FOREIGN, REFUSALS, SECRET, Refusal, body, message, refusing_writes
from tests.integration.conftest import API, Client, a_key
from tests.integration.test_worker_process import worker
from tests.small_pipelines import save_clip
from tests.stack import wait_until
from worker_service.maintenance.reconciler import Reconciler

START_S = 60
LISTS = queue.broker_lists(queue.generate_queue("cheap"))


@pytest.fixture
def environment(settings: Settings, tmp_path: Path) -> dict[str, str]:
    save_clip(tmp_path / "clip")
    return {
        **os.environ,
        "AFTERIMAGE_MODEL__CLIP__MODEL": f"local-dir:{tmp_path / 'clip'}",
        "AFTERIMAGE_JOBS__RECONCILE_S": "1",
        "PYTHONWARNINGS": "ignore",
    }


def submit(session: Session) -> Job:
    job = make_job(session, mode=Mode.NONE, num_inference_steps=2)
    session.commit()
    queue.dispatch_jobs("cheap")
    return job


def succeeds(session: Session, job: Job) -> bool:
    session.rollback()
    return jobs.find_state(session, job.id) == JobState.SUCCEEDED


def dropped(source: str) -> float:
    return float(MESSAGES_DROPPED.labels(source=source)._value.get())


def test_a_worker_drops_what_it_cannot_read_and_goes_on(
    environment: dict[str, str], session: Session, redis_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    broker = queue.broker()
    for number, each in enumerate(FOREIGN):
        broker.lpush(LISTS[number % len(LISTS)] if number % 5 else queue.IO_QUEUE, each)
    broker.hset("unacked", "foreign", SECRET)
    broker.hset("unacked", "other", orjson.dumps([{"body": SECRET}, 5, {}]))
    broker.zadd("unacked_index", {"foreign": 1, "other": 1})
    job = submit(session)
    with worker("generate", environment) as process:
        wait_until(lambda: succeeds(session, job), timeout_s=START_S, what="a job behind unreadable messages")
        for channel in ("/0.celery.pidbox", "/0.celeryev/worker.heartbeat"):
            for each in [*FOREIGN, orjson.dumps(message(body=body(SECRET)))]:
                broker.publish(channel, each)
        for name in LISTS:
            for each in FOREIGN:
                broker.lpush(name, each)
        later = submit(session)
        wait_until(lambda: succeeds(session, later), timeout_s=30, what="a job beside unreadable messages")
        wait_until(lambda: broker.hlen("unacked") == 0, timeout_s=30, what="every message to be dropped")
        wait_until(lambda: sum(broker.llen(name) for name in LISTS) == 0, timeout_s=30, what="the lists to be empty")
        assert process.poll() is None
    logged = "".join(capfd.readouterr())
    assert "message_dropped" in logged
    assert SECRET not in logged
    assert "Traceback" not in logged


def test_a_worker_and_the_reconciler_replace_keys_of_another_type(
    environment: dict[str, str], session: Session, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_service.maintenance.reconciler.CLAIM_GRACE_S", -1)
    reconciler = Reconciler(get_settings().jobs)

    def repaired(job: Job) -> bool:
        reconciler.tick()
        return succeeds(session, job)

    broker = queue.broker()
    for name in (*LISTS, "unacked", "unacked_index"):
        broker.set(name, "text")
    with worker("generate", environment) as process:
        job = submit(session)
        wait_until(lambda: repaired(job), timeout_s=START_S, what="a job whose list was another key")
        for name in LISTS:
            broker.set(name, "text")
        job = submit(session)
        wait_until(lambda: repaired(job), timeout_s=30, what="a job after that")
        assert process.poll() is None


def test_the_reconciler_drops_what_it_cannot_read_and_finds_the_jobs_beside_it(
    settings: Settings, session: Session, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker_service.maintenance.reconciler.CLAIM_GRACE_S", -1)
    job = submit(session)
    broker = queue.broker()
    listed: Any
    (listed,) = [each for name in LISTS for each in broker.lrange(name, 0, -1)]
    before = dropped("queue")
    for name in LISTS:
        broker.rpush(name, *FOREIGN[:10])
    broker.set(queue.EMBED_IMAGES_QUEUE, "text")
    Reconciler(settings.jobs).tick()
    assert [each for name in LISTS for each in broker.lrange(name, 0, -1)] == [listed]
    assert read_task_id(listed) == str(job.id)
    assert dropped("queue") == before + 10 * len(LISTS)
    for name in LISTS:
        broker.delete(name)
        broker.set(name, "text")
    Reconciler(settings.jobs).tick()
    Reconciler(settings.jobs).tick()
    assert len([each for name in LISTS for each in broker.lrange(name, 0, -1)]) == 1, "it published the job again"


def refused(redis_url: str, how: Refusal) -> int:
    with redis.Redis.from_url(redis_url) as admin:
        return int(admin.info("errorstats").get(f"errorstat_{how}", {"count": 0})["count"])


@pytest.mark.parametrize("how", REFUSALS)
def test_a_worker_waits_for_a_broker_that_refuses_writes(
    environment: dict[str, str], session: Session, redis_url: str, client: Client, how: Refusal
) -> None:
    with worker("generate", environment) as process, refusing_then(redis_url, how, process):
        answer = client.post(f"{API}/generate", json={"prompt": "a cat", "num_inference_steps": 2})
        assert answer.status_code == 202, "a job is accepted while the broker refuses its message"
    reconciler = Reconciler(get_settings().jobs)
    with worker("generate", environment) as process:
        job = submit(session)
        wait_until(lambda: succeeds(session, job), timeout_s=START_S, what="the worker to run a job")
        with refusing_then(redis_url, how, process):
            waiting = submit(session)

        def recovered() -> bool:
            reconciler.tick()
            return succeeds(session, waiting)

        wait_until(recovered, timeout_s=30, what="the job to run when the broker accepts writes again")
        assert process.poll() is None


@contextmanager
def refusing_then(redis_url: str, how: Refusal, process: "Popen[bytes]") -> Iterator[None]:
    """Let the broker refuse writes until the worker has tried several times, and check that the worker lives."""
    before = refused(redis_url, how)
    with refusing_writes(redis_url, how):
        yield
        wait_until(lambda: refused(redis_url, how) > before + 4, timeout_s=START_S, what="the worker to try again")
        assert process.poll() is None


@pytest.mark.parametrize("reply", [b"", b"5", b"[]", b"{}", b'{"vectors": [5], "space": "a"}', b'{"error": 5}'])
def test_an_unreadable_reply_of_an_embed_worker_is_a_temporary_error(session: Session, reply: bytes) -> None:
    space = make_space(session)
    session.commit()

    def foreign_worker() -> None:
        received: Any = queue.broker().brpop([queue.EMBED_QUERIES_QUEUE], timeout=20)
        args, _, _ = orjson.loads(base64.b64decode(orjson.loads(received[1])["body"]))
        queue.broker().rpush(args[0], reply)

    thread = threading.Thread(target=foreign_worker)
    thread.start()
    try:
        with pytest.raises(EmbeddingUnavailableError):
            embedding_rpc.embed_texts(["a cat"], space)
    finally:
        thread.join()


def test_a_query_that_names_a_foreign_key_is_dropped(settings: Settings) -> None:
    queue.broker().set("precious", "1")
    for reply_key, payload in (("precious", {"texts": ["a"]}), ("afterimage:reply:1", {"image_key": "precious"})):
        embedding_rpc.answer(reply_key, payload, space_digest="a", embed=lambda _: pytest.fail("it was embedded"))
    assert queue.broker().get("precious") == b"1"


ENTRIES = (b"", b"x", b"jx", b"n5", b"n[5,5]\n", b'j{"a":1}', b"j5", b'j"a"', b"b1", None)
"""Contents of a cache's key. `None`: the key has another type."""


@pytest.mark.parametrize("entry", ENTRIES)
def test_unreadable_cache_entries_count_as_missing(
    client: Client, settings: Settings, session: Session, entry: bytes | None
) -> None:
    queued = make_job(session)
    session.commit()
    cache = get_cache_manager().redis
    keys = ["queued", f"queued:{queued.owner_id}", "places:cheap", "pace:cheap"]
    for key in keys:
        cache.delete(NAMESPACE + key)
        cache.hset(NAMESPACE + key, "a", "1") if entry is None else cache.set(NAMESPACE + key, entry)
    assert client.post(f"{API}/generate", json={"prompt": "a cat"}).status_code == 202
    assert client.get(f"{API}/jobs/{queued.id}").status_code == 200
    assert get_cache_manager().stats()["backend"] == "redis"


def test_unreadable_request_counts_are_left_out(client: Client, settings: Settings) -> None:
    cache = get_cache_manager().redis
    request_stats().add(status=200, seconds=0.1)
    request_stats().flush()
    assert list(cache.scan_iter("afterimage:requests:*"))
    for key in cache.scan_iter("afterimage:requests:*"):
        cache.hset(key, mapping={"x": "1", "2:999": "1", "2:1": "x", b"\xff": "1"})
    assert client.get(f"{API}/stats").status_code == 200


def test_unreadable_rate_counts_do_not_stop_requests(keyed_client: Client, session: Session) -> None:
    key = a_key(session, "search")
    assert keyed_client.get(f"{API}/models", headers=key).status_code == 200
    cache = get_cache_manager().redis
    counters = list(cache.scan_iter("LIMITS*")) or list(cache.scan_iter("*afterimage*per*"))
    assert counters
    for write in (lambda name: cache.set(name, "x"), lambda name: cache.hset(name, "a", "1")):
        for name in counters:
            cache.delete(name)
            write(name)
        assert keyed_client.get(f"{API}/models", headers=key).status_code == 200


def test_log_lines_of_dropped_messages_have_no_content(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for each in FOREIGN[:4]:
        with pytest.raises(ValueError, match=r"^(no JSON|wrong: )"):
            read_task_id(each)
    assert SECRET not in caplog.text
