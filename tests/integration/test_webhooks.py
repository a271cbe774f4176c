"""Webhooks against real receivers on this machine."""

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.orm import Session
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from shared import ssrf
from shared.contracts.generation import Webhook
from shared.contracts.jobs import EventType
from shared.db import jobs, webhooks
from shared.db.tables import Job, WebhookDelivery
from shared.errors import ImageGenerationError
from shared.messaging import queue
from shared.settings import Settings, WebhookSettings
from tests import one_attempt
from tests.factories import make_job
from tests.integration.conftest import API, Client, Receiver, messages
from tests.stack import wait_until
from worker_service.maintenance import deliver_webhooks
from worker_service.maintenance.deliver_webhooks import deliver_due

ALLOW_LOCAL = WebhookSettings(allow_http=True, allow_private=True, timeout_s=2)


def ended_job(session: Session, url: str, *, owner: str = "local", **webhook: Any) -> Job:
    """A job that has failed, with a webhook."""
    job = make_job(session, owner=owner, webhook=Webhook(url=url, **webhook))
    taken = one_attempt.claim(session, job.id, worker="w", lease_s=30)
    assert taken is not None
    one_attempt.fail(session, taken[0], ImageGenerationError())
    session.commit()
    return job


def deliver(settings: WebhookSettings = ALLOW_LOCAL) -> int:
    return deliver_due(settings, stopping=lambda: False)


def only_delivery(session: Session) -> WebhookDelivery:
    session.expire_all()
    return session.scalars(select(WebhookDelivery)).one()


def test_the_end_of_a_job_is_delivered_once_thin_and_signed(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    assert deliver() == 1
    assert deliver() == 0
    ((headers, body),) = receiver.got
    (secret,) = webhooks.signing_secrets(session, job.owner_id)
    sent = Verifier(secret).verify(body, headers)
    assert sent["type"] == "job.failed"
    assert sent["data"]["job_id"] == str(job.id)
    assert headers["host"].startswith("localhost:"), "it connects to the address and sends the name of the host"
    assert only_delivery(session).state == "delivered"
    with pytest.raises(WebhookVerificationError):
        Verifier("whsec_" + "A" * 43 + "=").verify(body, headers)


def test_only_the_requested_events_are_delivered_in_order(session: Session, receiver: Receiver) -> None:
    ended_job(session, receiver.url, events=[EventType.STARTED, EventType.FAILED])
    deliver()
    assert [json.loads(body)["type"] for _, body in receiver.got] == ["job.started", "job.failed"]


def test_during_the_overlap_of_a_rotation_both_secrets_sign(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    (old,) = webhooks.signing_secrets(session, job.owner_id)
    new, _ = webhooks.rotate_secret(session, job.owner_id, overlap_s=3600)
    session.commit()
    deliver()
    ((headers, body),) = receiver.got
    for secret in (old, new):
        Verifier(secret).verify(body, headers)


def test_a_secret_does_not_sign_after_its_overlap(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    (old,) = webhooks.signing_secrets(session, job.owner_id)
    webhooks.rotate_secret(session, job.owner_id, overlap_s=0)
    session.commit()
    deliver()
    ((headers, body),) = receiver.got
    with pytest.raises(WebhookVerificationError):
        Verifier(old).verify(body, headers)


def test_a_refused_delivery_is_retried_later_with_the_same_id(session: Session, receiver: Receiver) -> None:
    ended_job(session, receiver.url)
    receiver.answers = [(500, {}), (302, {"location": "http://localhost/elsewhere"})]
    for wait_s in webhooks.RETRY_AFTER_S[:2]:
        deliver()
        assert deliver() == 0, "not due yet"
        delivery = only_delivery(session)
        assert (delivery.due_at - delivery.created_at).total_seconds() == pytest.approx(wait_s, abs=5)
        session.execute(text("update webhook_deliveries set due_at = now()"))
        session.commit()
    deliver()
    assert only_delivery(session).state == "delivered"
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len(receiver.got) == 3


def test_a_receiver_may_delay_or_stop_the_retries(session: Session, receiver: Receiver) -> None:
    ended_job(session, receiver.url)
    receiver.answers = [(429, {"retry-after": "1000"}), (410, {})]
    deliver()
    delivery = only_delivery(session)
    assert (delivery.due_at - delivery.created_at).total_seconds() == pytest.approx(1000, abs=5)
    session.execute(text("update webhook_deliveries set due_at = now()"))
    session.commit()
    deliver()
    assert only_delivery(session).state == "failed"


def test_a_delivery_fails_after_the_last_retry_and_can_be_redelivered(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    for _ in range(len(webhooks.RETRY_AFTER_S) + 1):
        receiver.answers = [(500, {})]
        session.execute(text("update webhook_deliveries set due_at = now()"))
        session.commit()
        deliver()
    assert only_delivery(session).state == "failed"
    webhooks.redeliver(session, only_delivery(session).id, owner_id=job.owner_id)
    session.commit()
    deliver()
    assert only_delivery(session).state == "delivered"


@pytest.mark.usefixtures("settings")
def test_a_hanging_receiver_takes_at_most_its_share_and_delays_no_other_host(
    session: Session, receiver: Receiver
) -> None:
    receiver.hanging = True
    for _ in range(3):
        ended_job(session, receiver.url)
    other = ended_job(session, "http://127.0.0.1:1/closed")
    session.commit()
    workers = [
        threading.Thread(target=deliver, args=(ALLOW_LOCAL.model_copy(update={"timeout_s": 10}),)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    wait_until(lambda: len(receiver.got) == 2, timeout_s=10, what="two deliveries in flight")

    def tried() -> bool:
        session.expire_all()
        statement = select(WebhookDelivery.last_error).where(WebhookDelivery.job_id == other.id)
        return session.scalar(statement) == "ConnectError"

    wait_until(tried, timeout_s=10, what="the other host's delivery to be tried")
    assert len(receiver.got) == 2
    receiver.release.set()
    for worker in workers:
        worker.join()
    assert len(receiver.got) == 3


@pytest.mark.usefixtures("settings")
def test_an_owner_with_hanging_receivers_on_many_hosts_delays_no_other_owner(
    session: Session, receiver: Receiver
) -> None:
    receiver.hanging = True
    for host in ("localhost", "127.0.0.1", "127.0.1", "127.1"):
        ended_job(session, receiver.url.replace("localhost", host))
    other = ended_job(session, "http://127.0.0.2:1/closed", owner="other")
    limits = {"timeout_s": 10, "per_host": 1, "per_owner": 2}
    workers = [threading.Thread(target=deliver, args=(ALLOW_LOCAL.model_copy(update=limits),)) for _ in range(4)]
    for worker in workers:
        worker.start()

    def tried() -> bool:
        session.expire_all()
        statement = select(WebhookDelivery.last_error).where(WebhookDelivery.job_id == other.id)
        return session.scalar(statement) == "ConnectError"

    wait_until(lambda: tried() and len(receiver.got) == 2, timeout_s=10, what="two deliveries, and the other owner's")
    receiver.release.set()
    for worker in workers:
        worker.join()
    assert len(receiver.got) == 4


def test_a_receiver_that_drips_its_answer_is_left_at_the_deadline(session: Session, receiver: Receiver) -> None:
    ended_job(session, receiver.url)
    receiver.dripping = True
    started = time.monotonic()
    assert deliver(ALLOW_LOCAL.model_copy(update={"timeout_s": 0.5})) == 1
    assert time.monotonic() - started < 3
    delivery = only_delivery(session)
    assert (delivery.state, delivery.last_error, delivery.lease_until) == ("pending", "TimeoutError", None)


def test_a_slow_name_server_counts_toward_the_deadline_and_nothing_is_sent_later(
    session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_job(session, receiver.url)
    resolve = ssrf.resolve
    looked_up = threading.Event()

    def slow(url: str, settings: WebhookSettings) -> ssrf.Target:
        receiver.release.wait(5)
        looked_up.set()
        return resolve(url, settings)

    monkeypatch.setattr(ssrf, "resolve", slow)
    started = time.monotonic()
    assert deliver(ALLOW_LOCAL.model_copy(update={"timeout_s": 0.5})) == 1
    assert time.monotonic() - started < 3
    assert only_delivery(session).last_error == "TimeoutError"
    receiver.release.set()
    assert looked_up.wait(5)
    assert receiver.got == []


def test_a_delivery_that_was_claimed_too_long_ago_is_not_sent(
    session: Session, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended_job(session, receiver.url)
    clock = iter([0.0])
    # The process was stopped for an hour between the claim and the try.
    monkeypatch.setattr(deliver_webhooks, "monotonic", lambda: next(clock, 3600.0))
    assert deliver() == 0
    assert receiver.got == []
    assert only_delivery(session).lease_until is not None


@pytest.mark.usefixtures("settings")
def test_a_redelivery_waits_for_the_try_that_runs(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    receiver.hanging = True
    worker = threading.Thread(target=deliver, args=(ALLOW_LOCAL.model_copy(update={"timeout_s": 10}),))
    worker.start()
    wait_until(lambda: len(receiver.got) == 1, timeout_s=10, what="the first try")
    webhooks.redeliver(session, only_delivery(session).id, owner_id=job.owner_id)
    session.commit()
    assert deliver() == 0
    assert len(receiver.got) == 1
    receiver.release.set()
    worker.join()
    assert len(receiver.got) == 2, "the worker sends it again after the first try"
    delivery = only_delivery(session)
    assert (delivery.state, delivery.attempts, delivery.lease_until) == ("delivered", 1, None)


def test_the_result_of_an_expired_claim_is_not_recorded_for_a_later_one(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    limits = {"per_host": 2, "per_owner": 2}
    expired = webhooks.claim_due(session, lease_s=0, **limits)
    assert expired is not None
    session.expunge(expired[0])
    session.commit()
    webhooks.redeliver(session, expired[0].id, owner_id=job.owner_id)
    session.commit()
    assert webhooks.claim_due(session, lease_s=30, **limits) is not None
    session.commit()
    webhooks.record_success(session, expired[0], status=200)
    session.commit()
    delivery = only_delivery(session)
    assert (delivery.state, delivery.attempts) == ("pending", 1)
    assert delivery.lease_until is not None


@pytest.mark.parametrize(
    "settings_of_operator",
    [WebhookSettings(), WebhookSettings(allow_http=True), WebhookSettings(allow_private=True)],
    ids=["default", "http", "private"],
)
def test_a_target_that_is_not_allowed_is_never_called(
    session: Session, receiver: Receiver, settings_of_operator: WebhookSettings
) -> None:
    ended_job(session, receiver.url)
    deliver(settings_of_operator)
    assert receiver.got == []
    assert only_delivery(session).last_error is not None


def test_a_signing_secret_is_never_logged(
    session: Session, receiver: Receiver, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    job = ended_job(session, receiver.url)
    receiver.answers = [(500, {})]
    deliver()
    for secret in webhooks.signing_secrets(session, job.owner_id):
        assert secret not in caplog.text


def test_only_the_newest_secrets_sign_after_many_rotations(session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    for _ in range(webhooks.MAX_SIGNATURES + 2):
        webhooks.rotate_secret(session, job.owner_id, overlap_s=3600)
        session.commit()
    deliver()
    assert len(receiver.got[0][0]["webhook-signature"].split()) == webhooks.MAX_SIGNATURES


# --- over HTTP ----------------------------------------------------------------------------------------------------


def log(client: Client, **query: Any) -> list[dict[str, Any]]:
    answer = client.get(f"{API}/webhooks/deliveries", query_string=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json["items"])


def test_the_log_shows_each_attempt_and_a_delivery_can_be_redelivered(
    client: Client, session: Session, receiver: Receiver
) -> None:
    job = ended_job(session, receiver.url)
    receiver.answers = [(500, {}), (410, {})]
    deliver()
    (refused,) = log(client)
    assert (refused["type"], refused["job_id"], refused["url"]) == ("job.failed", str(job.id), receiver.url)
    assert (refused["state"], refused["attempts"], refused["last_status"]) == ("pending", 1, 500)
    assert refused["last_error"] == "the receiver answered 500"
    assert refused["due_at"] > refused["created_at"]
    session.execute(text("update webhook_deliveries set due_at = now()"))
    session.commit()
    deliver()
    (failed,) = log(client, state="failed")
    assert (failed["attempts"], failed["due_at"]) == (2, None)

    answer = client.post(f"{API}/webhooks/deliveries/{failed['id']}/redeliver")
    assert answer.status_code == 202
    assert (answer.json["state"], answer.json["attempts"]) == ("pending", 0)
    assert len(messages(queue.IO_QUEUE)) == 1, "the io workers are notified"
    deliver()
    (delivered,) = log(client, job_id=str(job.id), state="delivered")
    assert delivered["delivered_at"] is not None
    assert delivered["last_error"] is None
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_the_log_is_paged_newest_first_and_contains_deliveries_of_no_job(client: Client, session: Session) -> None:
    first = ended_job(session, "http://127.0.0.1:1/closed")
    second = ended_job(session, "http://127.0.0.1:1/closed")
    webhooks.enqueue_body(session, {"type": "bulk.completed"}, owner_id=first.owner_id, url="http://127.0.0.1:1/closed")
    session.commit()
    page = client.get(f"{API}/webhooks/deliveries", query_string={"limit": 2}).json
    assert [(item["type"], item["job_id"]) for item in page["items"]] == [
        ("bulk.completed", None),
        ("job.failed", str(second.id)),
    ]
    (last,) = log(client, cursor=page["next_cursor"])
    assert last["job_id"] == str(first.id)
    assert log(client, job_id=str(uuid4())) == []


def test_deliveries_of_another_owner_can_be_neither_seen_nor_redelivered(client: Client, session: Session) -> None:
    job = make_job(session, owner="other", webhook=Webhook(url="http://127.0.0.1:1/closed"))
    jobs.cancel(session, job.id, owner_id=job.owner_id)
    session.commit()
    assert log(client) == log(client, job_id=str(job.id)) == []
    for delivery_id in (only_delivery(session).id, uuid4()):
        answer = client.post(f"{API}/webhooks/deliveries/{delivery_id}/redeliver")
        assert (answer.status_code, answer.json["code"]) == (404, "not_found")


def test_an_owner_rotates_its_secret_and_sees_it_once(client: Client, session: Session, receiver: Receiver) -> None:
    job = ended_job(session, receiver.url)
    (old,) = webhooks.signing_secrets(session, job.owner_id)
    session.commit()
    answer = client.post(f"{API}/webhooks/secret/rotate")
    assert answer.status_code == 201
    assert answer.headers["Cache-Control"] == "no-store"
    deliver()
    ((headers, body),) = receiver.got
    for secret in (old, answer.json["secret"]):
        Verifier(secret).verify(body, headers)
    assert datetime.fromisoformat(answer.json["others_until"]) > datetime.now(UTC) + timedelta(hours=23)
