"""Submitting and following jobs without a worker: the tests take a worker's steps through `shared.db`."""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from api_service.http.concurrency import SlotPool
from api_service.services import views
from shared.capabilities import resolve_defaults
from shared.contracts.jobs import JobState
from shared.contracts.service import Capabilities, ModelDefaults
from shared.db import collections, owners, queue_limits, workers
from shared.db.session import bound_waits, session_scope
from shared.db.tables import Job, ModelRecord
from shared.errors import OwnerQueueFullError, QueueFullError
from shared.messaging import job_updates, queue
from shared.retrieval import DEFAULT_MIN_SIMILARITY
from shared.settings import Settings, get_settings
from tests import one_attempt
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client, messages, sent_statements
from tests.stack import wait_until

CAPABILITIES = Capabilities(
    modes=["none", "caption"],
    native_width=32,
    native_height=32,
    size_multiple=8,
    any_size=False,
    max_batch_size=8,
    max_references=4,
    schedulers=["ddim"],
    loras=[],
    supports_negative_prompt=False,
    supports_guidance=True,
    pipeline="Cheap",
    weights_digest="0" * 64,
    device="cpu",
    dtype="float32",
)

FIRST_VERSION_EXAMPLE = {
    "prompt": "a cat playing with a ball",
    "num_images": 2,
    "similar_examples_count": 3,
    "width": 512,
    "height": 512,
    "format": "png",
}


def submit(client: Client, route: str = "/generate", **body: Any) -> dict[str, Any]:
    answer = client.post(API + route, json={"prompt": "a red apple", **body})
    assert answer.status_code == 202, answer.text
    return dict(answer.json)


def code(answer: Any) -> tuple[int, str]:
    assert answer.content_type == "application/problem+json"
    assert answer.json["request_id"] == answer.headers["X-Request-ID"]
    return answer.status_code, answer.json["code"]


def job_count(session: Session) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(Job)) or 0


# --- submitting ---------------------------------------------------------------------------------------------------


def test_a_submitted_job_has_a_location_and_is_published_under_its_own_id(client: Client, settings: Settings) -> None:
    answer = client.post(f"{API}/generate", json={"prompt": "a red apple", "num_images": 2, "seed": 2**32 - 1})
    assert answer.status_code == 202
    assert answer.headers["Location"] == answer.json["url"]
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json["parameters"]["seeds"] == [2**32 - 1, 0]
    (message,) = messages(queue.generate_queue("cheap"))
    assert message["headers"]["id"] == answer.json["id"]
    assert client.get(answer.headers["Location"]).json["state"] == "queued"


def test_the_first_versions_example_request_is_accepted_for_any_native_size(client: Client, session: Session) -> None:
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    session.commit()
    job = submit(client, "/rag/generate", **FIRST_VERSION_EXAMPLE)
    assert (job["parameters"]["width"], job["parameters"]["height"], job["parameters"]["k"]) == (512, 512, 3)
    assert len(job["parameters"]["seeds"]) == 2


def test_defaults_come_from_the_model_and_are_all_resolved(client: Client, settings: Settings) -> None:
    defaults = resolve_defaults(settings.model.generators["cheap"].defaults, None)
    parameters = submit(client, "/rag/generate", guidance_scale=0)["parameters"]
    assert parameters["width"] == defaults.width
    assert parameters["num_inference_steps"] == defaults.num_inference_steps
    assert parameters["strength"] == defaults.strength
    assert parameters["k"] == settings.retrieval.default_k
    assert parameters["min_similarity"] == DEFAULT_MIN_SIMILARITY
    assert parameters["guidance_scale"] == 0, "a requested zero is not a missing value"


def test_what_settings_and_request_leave_open_comes_from_the_loaded_model(client: Client, session: Session) -> None:
    known = {"width": 96, "height": 64, "num_inference_steps": 4, "guidance_scale": 3.5}
    told = ModelDefaults.model_validate({**known, "ip_adapter_scale": 1, "strength": 0.5})
    workers.publish_capabilities(session, "cheap", CAPABILITIES.model_copy(update={"defaults": told}))
    session.commit()
    parameters = submit(client, num_inference_steps=5)["parameters"]
    assert {name: parameters[name] for name in known} == known | {"num_inference_steps": 5}
    (model,) = [each for each in client.get(f"{API}/models").json["models"] if each["name"] == "cheap"]
    assert {name: model["defaults"][name] for name in known} == known


def test_a_dry_run_shows_what_would_run_and_queues_nothing(client: Client, session: Session) -> None:
    answer = client.post(f"{API}/rag/generate", json={"prompt": "a red apple", "dry_run": True, "seed": 7})
    assert answer.status_code == 200
    assert answer.json["parameters"]["seeds"] == [7]
    assert job_count(session) == 0
    assert messages(queue.generate_queue("cheap")) == []


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        ("/rag/generate", {"mode": "img2img"}, (422, "mode_not_supported")),
        ("/generate", {"width": 40, "height": 32, "exact_size": True}, (422, "size_not_supported")),
        ("/generate", {"scheduler": "made-up"}, (422, "parameter_not_supported")),
        ("/generate", {"loras": {"made-up": 1.0}}, (422, "parameter_not_supported")),
        ("/generate", {"negative_prompt": "a pear"}, (422, "parameter_not_supported")),
        ("/generate", {"model": "made-up"}, (422, "model_not_found")),
        ("/rag/generate", {"reference_ids": [str(uuid4())]}, (422, "reference_unavailable")),
        ("/rag/generate", {"reference_ids": [str(uuid4()) for _ in range(5)]}, (422, "parameter_not_supported")),
        ("/rag/generate", {"filter": {"collection": "made-up"}}, (422, "validation_failed")),
    ],
)
def test_a_request_that_model_or_corpus_cannot_serve_is_refused_at_submit(
    client: Client, session: Session, route: str, body: dict[str, Any], expected: tuple[int, str]
) -> None:
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    session.commit()
    assert code(client.post(API + route, json={"prompt": "a red apple", **body})) == expected
    assert job_count(session) == 0


def test_an_exact_size_that_the_model_supports_is_accepted(client: Client, session: Session) -> None:
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    session.commit()
    assert submit(client, width=32, height=32, exact_size=True)["parameters"]["exact_size"] is True


def test_a_mode_is_accepted_while_no_worker_has_published_its_capabilities(client: Client) -> None:
    assert submit(client, "/rag/generate", mode="img2img")["parameters"]["mode"] == "img2img"


def test_pinned_references_are_kept_in_order_with_their_weights(client: Client, session: Session) -> None:
    first, second = (make_image(session, vector=[1.0] + [0.0] * 15) for _ in range(2))
    session.commit()
    pinned = [str(second.id), {"image_id": str(first.id), "weight": 2.5}]
    parameters = submit(client, "/rag/generate", reference_ids=pinned)["parameters"]
    assert [reference["image_id"] for reference in parameters["references"]] == [str(second.id), str(first.id)]
    assert [reference["weight"] for reference in parameters["references"]] == [None, 2.5]


def test_an_image_without_a_vector_or_of_another_owner_cannot_be_pinned(client: Client, session: Session) -> None:
    make_image(session, vector=[1.0] + [0.0] * 15)
    pending = make_image(session)
    theirs = collections.ensure(session, "theirs", owner_id=owners.ensure(session, "other"))
    hidden = make_image(session, vector=[1.0] + [0.0] * 15, collection_id=theirs.id)
    session.commit()
    answer = client.post(
        f"{API}/rag/generate", json={"prompt": "x", "reference_ids": [str(pending.id), str(hidden.id)]}
    )
    assert code(answer) == (422, "reference_unavailable")
    assert answer.json["context"]["image_ids"] == [str(pending.id), str(hidden.id)]


def test_a_full_queue_refuses_with_retry_after(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(client)
    monkeypatch.setenv("AFTERIMAGE_QUEUE__MAX_QUEUED", "1")
    _reread_settings()
    answer = client.post(f"{API}/generate", json={"prompt": "one too many"})
    assert code(answer) == (503, "queue_full")
    assert int(answer.headers["Retry-After"]) >= 1
    assert job_count(session) == 1


def test_the_queue_limit_of_an_owner_holds_for_concurrent_requests(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_QUEUE__MAX_QUEUED_PER_OWNER", "10")
    monkeypatch.setenv("AFTERIMAGE_DATABASE__MAX_OVERFLOW", "50")
    monkeypatch.setenv("AFTERIMAGE_DATABASE__POOL_TIMEOUT_S", "60")
    _reread_settings()
    bound_waits(60)  # the requests wait for each other, and the machine may be busy
    with ThreadPoolExecutor(50) as threads:
        answers = list(
            threads.map(
                lambda _: client.application.test_client().post(f"{API}/generate", json={"prompt": "x"}), range(50)
            )
        )
    assert Counter(answer.status_code for answer in answers) == {202: 10, 429: 40}
    assert job_count(session) == 10
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert code(refused) == (429, "owner_queue_full")
    assert int(refused.headers["Retry-After"]) >= 1
    accepted = next(answer for answer in answers if answer.status_code == 202)
    with session_scope() as other:
        queue_limits.refuse_when_full(other, owners.ensure(other, "other"), get_settings().queue)
    # A job that is no longer queued does not count.
    client.post(f"{accepted.json['url']}/cancel")
    submit(client)


def test_a_queue_count_is_cached_only_while_it_is_far_below_its_limit(settings: Settings, session: Session) -> None:
    owner_id = make_job(session).owner_id
    session.commit()
    roomy = settings.queue.model_copy(update={"max_queued": 5000, "max_queued_per_owner": 2000})
    queue_limits.refuse_when_full(session, owner_id, roomy)
    with sent_statements(session.get_bind()) as sent:
        queue_limits.refuse_when_full(session, owner_id, roomy)
    assert sent == []
    with pytest.raises(QueueFullError):
        queue_limits.refuse_when_full(session, owner_id, roomy.model_copy(update={"max_queued": 1}))
    with pytest.raises(OwnerQueueFullError):
        queue_limits.refuse_when_full(session, owner_id, roomy.model_copy(update={"max_queued_per_owner": 1}))


def _reread_settings() -> None:
    get_settings.cache_clear()


# --- following ----------------------------------------------------------------------------------------------------


def test_an_unfinished_job_has_retry_after_and_an_unchanged_job_gets_304(client: Client) -> None:
    url = submit(client)["url"]
    first = client.get(url)
    assert int(first.headers["Retry-After"]) >= 1
    assert client.get(url, headers={"If-None-Match": first.headers["ETag"]}).status_code == 304
    client.post(f"{url}/cancel")
    changed = client.get(url, headers={"If-None-Match": first.headers["ETag"]})
    assert (changed.status_code, changed.json["state"]) == (200, "canceled")
    assert "Retry-After" not in changed.headers


def test_the_queue_position_counts_the_jobs_that_run_first(client: Client) -> None:
    low, high = submit(client, lane="low"), submit(client, lane="high")
    assert client.get(low["url"]).json["queue_position"] == 1
    assert client.get(high["url"]).json["queue_position"] == 0


def test_the_estimated_start_uses_recent_speed_images_ahead_and_live_workers(client: Client, session: Session) -> None:
    def estimate(job: dict[str, Any]) -> Any:
        views.recent_throughput.cache_clear()
        return client.get(job["url"]).json["estimated_start_s"]

    first, second = submit(client, num_images=3), submit(client, num_images=5)
    assert estimate(second) is None, "no worker"
    workers.heartbeat(session, "w1", kind="generate", model="cheap", state="ready")
    workers.heartbeat(session, "other", kind="generate", model="other", state="ready")
    session.commit()
    assert estimate(first) == 0, "nothing is ahead"
    assert estimate(second) is None, "no speed"
    # Six images in ten seconds of work: two concurrent jobs, and one job later.
    began = datetime.now(UTC) - timedelta(seconds=600)
    for start_s, end_s in ((0, 6), (2, 8), (100, 102)):
        ended = make_job(session, state=JobState.SUCCEEDED, seeds=[1, 2])
        ended.started_at, ended.finished_at = began + timedelta(seconds=start_s), began + timedelta(seconds=end_s)
    session.commit()
    assert estimate(second) == pytest.approx(1 * 4 * 10 / 6, abs=0.1), "the mean of 3 and 5 images is ahead"
    workers.heartbeat(session, "w2", kind="generate", model="cheap", state="ready")
    session.commit()
    assert estimate(second) == pytest.approx(1 * 4 * 10 / 6 / 2, abs=0.1)
    one_attempt.claim(session, UUID(first["id"]), worker="w1", lease_s=30)
    session.commit()
    assert estimate(second) == pytest.approx(3 * 10 / 6 / 2, abs=0.1), "work has begun on three images"
    assert "estimated_start_s" not in {key for key, value in client.get(first["url"]).json.items() if value is not None}


def test_an_estimate_is_cached_for_a_moment(client: Client, session: Session) -> None:
    job = submit(client)
    workers.heartbeat(session, "w1", kind="generate", model="cheap", state="ready")
    session.commit()
    assert client.get(job["url"]).json["estimated_start_s"] is None, "cached by the submit"
    views.recent_throughput.cache_clear()
    assert client.get(job["url"]).json["estimated_start_s"] == 0


def test_metadata_comes_back_with_the_job(client: Client) -> None:
    job = submit(client, metadata={"order": "42", "note": "für Zoë ✓"})
    assert client.get(job["url"]).json["metadata"] == {"order": "42", "note": "für Zoë ✓"}


def test_pages_of_jobs_are_newest_first_complete_and_without_duplicates(client: Client) -> None:
    submitted = [submit(client)["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        page = client.get(f"{API}/jobs", query_string={"limit": 2, **({"cursor": cursor} if cursor else {})}).json
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert seen == submitted[::-1]


def test_jobs_are_listed_by_state_kind_and_time(client: Client, session: Session) -> None:
    make_job(session, state=JobState.SUCCEEDED)
    session.commit()
    job = submit(client)

    def listed(**query: str) -> list[str]:
        return [item["id"] for item in client.get(f"{API}/jobs", query_string=query).json["items"]]

    assert listed(state="queued") == [job["id"]]
    assert listed(kind="generate") == [job["id"]]
    assert job["id"] not in listed(created_before=job["created_at"])
    assert job["id"] in listed(created_after=job["created_at"])
    # Offsets that Postgres itself would refuse.
    assert job["id"] in listed(created_after="1999-12-31T23:59:59+23:59")
    assert job["id"] not in listed(created_before="1999-12-31T23:59:59-23:59")


def test_a_job_of_another_owner_is_not_found(client: Client, session: Session) -> None:
    theirs = make_job(session, owner="other").id
    session.commit()
    for job_id in (theirs, uuid4()):
        for method, route in [
            ("GET", ""),
            ("DELETE", ""),
            ("GET", "/events"),
            ("POST", "/cancel"),
            ("POST", "/retry"),
        ]:
            answer = client.open(f"{API}/jobs/{job_id}{route}", method=method)
            assert code(answer) == (404, "not_found"), route
    assert client.get(f"{API}/jobs").json["items"] == []
    session.expire_all()
    assert session.get_one(Job, theirs).state == JobState.QUEUED


def test_a_long_poll_answers_as_soon_as_the_job_ends(client: Client, session: Session) -> None:
    job_id = UUID(submit(client)["id"])
    answers: list[Any] = []
    asked = time.monotonic()

    def poll() -> None:
        answers.append((client.get(f"{API}/jobs/{job_id}?wait=20"), time.monotonic() - asked))

    thread = threading.Thread(target=poll)
    thread.start()
    wait_until(lambda: job_updates.subscriber()._watches, timeout_s=5, what="a request to wait")
    _finish(job_id)
    thread.join(10)
    answer, seconds = answers[0]
    assert answer.json["state"] == "succeeded"
    assert seconds < 5


def test_a_long_poll_with_after_answers_at_the_next_event(client: Client) -> None:
    job = submit(client)
    assert client.get(f"{job['url']}?wait=20&after=0").json["seq"] == 1, (
        "the call does not wait for an event that has happened"
    )
    waited: list[Any] = []
    thread = threading.Thread(target=lambda: waited.append(client.get(f"{job['url']}?wait=20&after={job['seq']}")))
    thread.start()
    wait_until(lambda: job_updates.subscriber()._watches, timeout_s=5, what="a request to wait")
    with session_scope() as session:
        one_attempt.claim(session, UUID(job["id"]), worker="w", lease_s=30)
    job_updates.publish_job_update(UUID(job["id"]))
    thread.join(10)
    assert (waited[0].json["state"], waited[0].json["seq"]) == ("processing", 2)


def test_a_preferred_wait_that_is_too_short_returns_the_unfinished_job(client: Client) -> None:
    answer = client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Prefer": "respond-async, wait=1"})
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert answer.json["state"] == "queued"


def test_a_preferred_wait_answers_200_with_a_job_that_ended_in_time(client: Client) -> None:
    def work() -> None:
        wait_until(lambda: job_updates.subscriber()._watches, timeout_s=5, what="a request to wait")
        _finish(next(iter(job_updates.subscriber()._watches)))

    thread = threading.Thread(target=work)
    thread.start()
    answer = client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Prefer": "wait=20"})
    thread.join()
    assert (answer.status_code, answer.json["state"]) == (200, "succeeded")
    assert answer.headers["Preference-Applied"] == "wait=20"


@pytest.mark.parametrize("prefer", ["wait=soon", "wait=", "return=minimal", "wait=-1", "await=5"])
def test_an_invalid_preference_is_ignored(client: Client, prefer: str) -> None:
    answer = client.post(f"{API}/generate", json={"prompt": "x"}, headers={"Prefer": prefer})
    assert answer.status_code == 202
    assert "Preference-Applied" not in answer.headers


def test_beyond_the_cap_of_waiters_a_wait_answers_at_once_and_a_stream_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(client)
    monkeypatch.setenv("AFTERIMAGE_API__MAX_WAITERS", "0")
    _reread_settings()
    asked = time.monotonic()
    answer = client.get(job["url"], headers={"Prefer": "wait=20"})
    assert answer.json["state"] == "queued"
    assert "Preference-Applied" not in answer.headers
    assert time.monotonic() - asked < 5
    assert code(client.get(job["events_url"])) == (503, "too_many_streams")


def test_one_owner_cannot_take_the_slots_of_all_waiters() -> None:
    mine, theirs = uuid4(), uuid4()
    slots = SlotPool(max_slots=3, max_slots_per_owner=2)
    assert [slots.take(mine) for _ in range(3)] == [True, True, False]
    assert [slots.take(theirs) for _ in range(2)] == [True, False], "one slot of three is left"
    slots.release(mine)
    assert [slots.take(theirs), slots.take(mine)] == [True, False]


def test_beyond_the_cap_of_an_owner_a_wait_answers_at_once_and_a_stream_is_refused(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(client)
    monkeypatch.setenv("AFTERIMAGE_API__MAX_WAITERS_PER_OWNER", "1")
    _reread_settings()
    stream = client.get(job["events_url"])
    assert stream.status_code == 200
    asked = time.monotonic()
    assert "Preference-Applied" not in client.get(job["url"], headers={"Prefer": "wait=20"}).headers
    assert time.monotonic() - asked < 5
    refused = client.get(job["events_url"])
    assert code(refused) == (503, "too_many_streams")
    assert int(refused.headers["Retry-After"]) >= 1
    stream.close()
    client.post(f"{job['url']}/cancel")
    with client.get(job["events_url"]) as again:
        assert again.status_code == 200, "a stream that ends frees its slot"


def test_published_progress_is_shown_while_the_job_runs(client: Client) -> None:
    job = submit(client)
    job_id = UUID(job["id"])
    client.get(job["url"])
    wait_until(lambda: job_updates.subscriber().connected, timeout_s=5, what="the subscription")
    with session_scope() as session:
        one_attempt.claim(session, job_id, worker="w", lease_s=30)
    job_updates.publish_progress(job_id, 3, 8)
    wait_until(lambda: job_updates.subscriber().latest_progress(job_id), timeout_s=5, what="the progress")
    assert client.get(job["url"]).json["progress"] == {"step": 3, "total_steps": 8}


def test_the_events_of_an_ended_job_are_streamed_in_order_and_resumed(client: Client) -> None:
    job = submit(client)
    _finish(UUID(job["id"]))
    answer = client.get(job["events_url"])
    assert answer.content_type == "text/event-stream"
    assert [line for line in answer.text.splitlines() if line.startswith(("id:", "event:"))] == [
        "id: 1",
        "event: queued",
        "id: 2",
        "event: started",
        "id: 3",
        "event: succeeded",
    ]
    resumed = client.get(job["events_url"], headers={"Last-Event-ID": "2"}).text
    assert "id: 3" in resumed
    assert "id: 2" not in resumed
    assert client.get(job["events_url"], query_string={"after": 3}).status_code == 204


# --- ending -------------------------------------------------------------------------------------------------------


def test_a_cancel_ends_a_job_once_and_is_safe_to_repeat(client: Client) -> None:
    job = submit(client)
    assert client.post(f"{job['url']}/cancel").json["state"] == "canceled"
    again = client.post(f"{job['url']}/cancel")
    assert (again.status_code, again.json["seq"]) == (200, 2)


def test_a_job_that_succeeded_cannot_be_canceled(client: Client) -> None:
    job = submit(client)
    _finish(UUID(job["id"]))
    assert code(client.post(f"{job['url']}/cancel")) == (409, "job_state_conflict")


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"model": "gone"}, (422, "model_not_found")),
        ({"invented_later": 1}, (503, "job_unreadable")),
        ({"width": "wide"}, (503, "job_unreadable")),
    ],
)
def test_a_retry_that_is_not_possible_is_refused_and_not_queued(
    client: Client, session: Session, change: dict[str, Any], refusal: tuple[int, str]
) -> None:
    job = make_job(session, state=JobState.CANCELED)
    job.parameters = {**job.parameters, **change}
    session.commit()
    answer = client.post(f"{API}/jobs/{job.id}/retry")
    assert code(answer) == refusal
    assert job_count(session) == 1


def test_a_retry_of_a_job_whose_webhook_this_release_cannot_read_is_refused(client: Client, session: Session) -> None:
    job = make_job(session, state=JobState.CANCELED)
    job.webhook = {"url": "https://example.com/hook", "events": ["invented_later"]}
    session.commit()
    assert code(client.post(f"{API}/jobs/{job.id}/retry")) == (503, "job_unreadable")
    assert job_count(session) == 1


def test_studio_shows_a_job_whose_parameters_this_release_cannot_read(client: Client, session: Session) -> None:
    job = make_job(session, state=JobState.CANCELED)
    job.parameters = {**job.parameters, "width": "wide"}
    session.commit()
    assert client.get(f"/jobs/{job.id}").status_code == 200


def test_capabilities_with_a_field_of_another_release_are_read(client: Client, session: Session) -> None:
    workers.publish_capabilities(session, "cheap", CAPABILITIES)
    record = session.get_one(ModelRecord, "cheap")
    record.capabilities = {**record.capabilities, "invented_later": 1}
    session.commit()
    assert client.get(f"{API}/models").status_code == 200
    assert code(client.post(f"{API}/rag/generate", json={"prompt": "x", "mode": "img2img"}))[1] == "mode_not_supported"


def test_a_job_whose_error_has_a_field_of_another_release_is_shown(client: Client, session: Session) -> None:
    job = make_job(session, state=JobState.CANCELED)
    job.error = {"code": "job_crashed", "detail": "It crashed.", "invented_later": 1}
    session.commit()
    assert client.get(f"{API}/jobs/{job.id}").json["error"]["code"] == "job_crashed"


def test_a_retry_is_a_new_job_with_the_same_parameters(client: Client) -> None:
    job = submit(client, seed=9, metadata={"order": "42"})
    assert code(client.post(f"{job['url']}/retry")) == (409, "job_state_conflict")
    client.post(f"{job['url']}/cancel")
    answer = client.post(f"{job['url']}/retry")
    assert answer.status_code == 202
    assert answer.headers["Location"] == answer.json["url"] != job["url"]
    assert answer.json["retry_of"] == job["id"]
    assert answer.json["parameters"] == job["parameters"]
    assert answer.json["metadata"] == job["metadata"]


def test_a_retry_with_the_same_idempotency_key_makes_one_job(client: Client, session: Session) -> None:
    jobs = [submit(client), submit(client)]
    for job in jobs:
        client.post(f"{job['url']}/cancel")
    key = {"Idempotency-Key": "k"}
    first, again = (client.post(f"{jobs[0]['url']}/retry", headers=key) for _ in range(2))
    assert (again.json["id"], again.headers["Idempotent-Replayed"]) == (first.json["id"], "true")
    assert code(client.post(f"{jobs[1]['url']}/retry", headers=key)) == (422, "idempotency_key_reused")
    assert job_count(session) == 3


def test_a_job_that_succeeded_is_not_retried(client: Client) -> None:
    job = submit(client)
    _finish(UUID(job["id"]))
    assert code(client.post(f"{job['url']}/retry")) == (409, "job_state_conflict")


def test_only_an_ended_job_is_deleted(client: Client) -> None:
    job = submit(client)
    assert code(client.delete(job["url"])) == (409, "job_state_conflict")
    client.post(f"{job['url']}/cancel")
    assert client.delete(job["url"]).status_code == 204
    assert code(client.get(job["url"])) == (404, "not_found")


def _finish(job_id: UUID) -> None:
    with session_scope() as session:
        taken = one_attempt.claim(session, job_id, worker="w", lease_s=30)
        assert taken is not None
    with session_scope() as session:
        assert one_attempt.finish(session, taken[0], [], timings={"generate": 0.1})
    job_updates.publish_job_update(job_id)
