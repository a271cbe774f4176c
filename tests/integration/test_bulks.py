"""Bulks through the API: sending, resuming, limiting, controlling and reading them."""

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest
from prometheus_client import REGISTRY
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from api_service.services import bulk_items
from shared.concepts import split_prompt
from shared.contracts.common import ImageFormat
from shared.contracts.jobs import JobState
from shared.db import attempts, bulks, owners
from shared.db.session import session_scope
from shared.db.tables import Bulk, BulkItem, ImageUsage, Job, Output, WebhookDelivery
from shared.errors import ImageGenerationError
from shared.messaging import queue
from shared.settings import get_settings
from shared.storage import get_blobs, output_key
from tests import one_attempt
from tests.factories import make_image, make_job
from tests.integration.conftest import API, Client, messages
from worker_service.maintenance.reconciler import Reconciler

JSON_LINES = "application/jsonl"
KEY = {"Idempotency-Key": "bulk-17"}
WINDOW = 16
"""`queue.published_jobs_per_lane` as it is by default."""


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def header(**options: Any) -> dict[str, Any]:
    return {"bulk": options}


def prompts(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {number}", **fields} for number in range(count)]


def send(client: Client, *rows: Any, query: str = "", headers: dict[str, str] | None = None) -> Any:
    return client.post(f"{API}/bulks{query}", data=lines(*rows), content_type=JSON_LINES, headers=headers)


def accepted(client: Client, *rows: Any, query: str = "") -> dict[str, Any]:
    answer = send(client, *rows, query=query)
    assert answer.status_code == 202, answer.text
    return dict(answer.json)


def bulk_of(client: Client, bulk_id: str) -> dict[str, Any]:
    return dict(client.get(f"{API}/bulks/{bulk_id}").json)


def counts_of(client: Client, bulk_id: str) -> dict[str, int]:
    return {state: count for state, count in bulk_of(client, bulk_id)["counts"].items() if count}


def items_of(client: Client, bulk_id: str, **query: Any) -> list[dict[str, Any]]:
    answer = client.get(f"{API}/bulks/{bulk_id}/items", query_string=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json["items"])


def chained_digest(rows: Sequence[bytes]) -> str:
    digest = b""
    for row in rows:
        digest = hashlib.sha256(digest + row).digest()
    return digest.hex()


def queued_jobs(session: Session, bulk_id: str) -> list[Job]:
    session.rollback()
    statement = select(Job).where(Job.bulk_id == UUID(bulk_id), Job.state == JobState.QUEUED)
    return list(session.scalars(statement))


def run_one(bulk_id: str, *, fails: bool = False) -> UUID | None:
    """Take a worker's steps, except the model, for the bulk's next published job; return its id.

    `None`: the bulk has no published job that can be claimed.
    """
    with session_scope() as session:
        published = select(Job.id).where(
            Job.bulk_id == UUID(bulk_id), Job.state == JobState.QUEUED, Job.published_at.is_not(None)
        )
        job_id = session.scalar(published.limit(1))
    if job_id is None:
        return None
    with session_scope() as session:
        taken = one_attempt.claim(session, job_id, worker="w", lease_s=30)
    if taken is None:
        return None
    with session_scope() as session:
        ended = one_attempt.fail(session, taken[0], ImageGenerationError()) if fails else finish(session, taken)
    assert ended
    queue.dispatch_jobs("cheap")
    return job_id


def finish(session: Session, taken: tuple[attempts.Claim, attempts.ClaimedJob]) -> bool:
    claim, job = taken
    image = b"image of " + job.parameters["prompt"].encode()
    key = output_key(job.id, attempt=claim.attempt, index=0, image_format=ImageFormat.PNG)
    get_blobs().put(key, image, media_type="image/png")
    generation = Output(
        id=job.id,
        job_id=job.id,
        owner_id=job.owner_id,
        index=0,
        seed=job.parameters["seeds"][0],
        format="png",
        blob_key=key,
        thumbnail_key=key,
        width=32,
        height=32,
        size_bytes=len(image),
        sha256=hashlib.sha256(image).hexdigest(),
        pixels_sha256="",
        provenance={"everything": "that decided the pixels"},
    )
    return one_attempt.finish(session, claim, [attempts.StoredOutput(generation, [])], timings={})


def run_all(bulk_id: str, *, fails: bool = False) -> int:
    done = 0
    while run_one(bulk_id, fails=fails) is not None:
        done += 1
    return done


# --- sending ------------------------------------------------------------------------------------------------------


def test_a_bulk_runs_when_it_is_complete(client: Client) -> None:
    answer = send(client, *prompts(20))
    assert answer.status_code == 202
    bulk = answer.json
    assert answer.headers["Location"] == f"{API}/bulks/{bulk['id']}"
    assert (bulk["state"], bulk["total"], bulk["received_lines"], bulk["lane"]) == ("running", 20, 20, "bulk")
    assert len(messages("generate.cheap")) == WINDOW, "only a window of its jobs is published"
    assert run_all(bulk["id"]) == 20
    ended = bulk_of(client, bulk["id"])
    assert (ended["state"], ended["counts"]["succeeded"]) == ("completed", 20)
    assert ended["finished_at"] is not None


def test_many_received_items_update_the_statistics_of_the_planner(client: Client, session: Session) -> None:
    known = text("select reltuples from pg_class where relname = 'bulk_items'")
    accepted(client, *prompts(1))
    assert session.scalar(known) < 1
    accepted(client, *prompts(1000))
    session.rollback()
    assert session.scalar(known) == 1001


def test_nothing_runs_before_the_bulk_is_complete(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(3), query="?complete=false")
    assert (bulk["state"], bulk["counts"]["queued"]) == ("receiving", 3)
    Reconciler(get_settings().jobs).tick()
    assert messages("generate.cheap") == []
    url = f"{API}/bulks/{bulk['id']}/complete"
    early = client.post(url, json={"lines": 4})
    assert (early.status_code, early.json["code"]) == (409, "bulk_offset_mismatch")
    assert early.json["context"]["received_lines"] == 3
    for _ in range(2):
        answer = client.post(url, json={"lines": 3, "digest": bulk["digest"]})
        assert (answer.status_code, answer.json["state"]) == (200, "running")
    assert len(queued_jobs(session, bulk["id"])) == 3


def test_header_and_defaults_apply_to_all_items_and_an_item_may_override_them(client: Client, session: Session) -> None:
    defaults = {"kind": "generate", "width": 64, "seed": 5}
    options = header(name="fruit", lane="low", defaults=defaults, metadata={"order": "17"})
    bulk = accepted(client, options, {"prompt": "an apple", "custom_id": "a"}, {"prompt": "a pear", "seed": 6})
    assert (bulk["name"], bulk["lane"], bulk["metadata"], bulk["total"]) == ("fruit", "low", {"order": "17"}, 2)
    made = session.scalars(select(Job).order_by(Job.parameters["seeds"])).all()
    assert [job.parameters["seeds"] for job in made] == [[5], [6]]
    assert {(job.kind, job.lane, job.parameters["width"]) for job in made} == {("generate", 2, 64)}
    assert [(item["line"], item["custom_id"]) for item in items_of(client, bulk["id"])] == [(2, "a"), (3, None)]


def test_each_item_without_a_seed_gets_its_own_when_it_is_received(client: Client, session: Session) -> None:
    accepted(client, *prompts(5, num_images=2))
    seeds = [tuple(item.parameters["seeds"]) for item in session.scalars(select(BulkItem))]
    assert len(set(seeds)) == 5
    assert {len(each) for each in seeds} == {2}


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"lane": "fastest"}, "header.bulk.lane"),
        ({"colour": "red"}, "header.bulk.colour"),
        ({"defaults": {"width": "wide"}}, "header.bulk.defaults.width"),
        ({"defaults": {"lane": "high"}}, "header.bulk.defaults.lane"),
        ({"defaults": {"custom_id": "a"}}, "header.bulk.defaults.custom_id"),
    ],
)
def test_a_wrong_header_is_refused_at_once(
    client: Client, session: Session, options: dict[str, Any], field: str
) -> None:
    answer = send(client, header(**options), *prompts(2))
    assert (answer.status_code, answer.json["errors"][0]["field"]) == (422, field)
    assert session.scalar(select(func.count()).select_from(Bulk)) == 0


BAD_LINES = [
    (b'{"prompt": \n', "malformed_body"),
    (b'["a"]\n', "malformed_body"),
    (b'{"prompt": ""}\n', "validation_failed"),
    (b'{"prompt": "a", "width": "64"}\n', "validation_failed"),
    (b'{"prompt": "a", "colour": "red"}\n', "validation_failed"),
    (b'{"prompt": "a", "lane": "high"}\n', "validation_failed"),
    (b'{"prompt": "a", "kind": "generate", "mode": "auto"}\n', "validation_failed"),
    (b'{"prompt": "a", "model": "unknown"}\n', "model_not_found"),
    (b'{"prompt": "a", "filter": {"collection": "nowhere"}}\n', "validation_failed"),
    (b'{"prompt": "a", "reference_ids": ["00000000-0000-4000-8000-00000000abcd"]}\n', "reference_unavailable"),
    (b'{"prompt": "a", "custom_id": "same"}\n', "validation_failed"),
    (b'{"prompt": "' + b"a" * 70_000 + b'"}\n', "validation_failed"),
    (b'{"prompt": "\xff"}\n', "malformed_body"),
    (b'{"bulk": {}}\n', "validation_failed"),
    (b'{"prompt": "a", "key\\u0000": 1}\n', "validation_failed"),
    (b'{"prompt": "a", "metadata": {"key\\u0000": "b"}}\n', "validation_failed"),
    (b'{"prompt": "a", "filter": {"attributes": {"key\\u0000": "b"}}}\n', "validation_failed"),
    (b'{"prompt": "a", "reference_ids": ["\\u0000"]}\n', "validation_failed"),
    (b'{"prompt": "a", "custom_id": "b\\u0000"}\n', "validation_failed"),
    (b'{"prompt": "a", "key\\ud800": 1}\n', "malformed_body"),
    (b'{"prompt": "a", "key": ' + b"[" * 300 + b"]" * 300 + b"}\n", "malformed_body"),
]


def test_invalid_lines_are_reported_with_their_reasons_and_the_others_run(client: Client) -> None:
    rows: list[Any] = [header(on_invalid="skip"), b"\n", {"prompt": "first", "custom_id": "same"}]
    for text_of_line, _ in BAD_LINES:
        rows += [text_of_line, *prompts(1)]
    bulk = accepted(client, *rows)
    assert (bulk["state"], bulk["total"], bulk["invalid"]) == ("running", 1 + len(BAD_LINES), len(BAD_LINES))
    assert bulk["received_lines"] == 3 + 2 * len(BAD_LINES)
    found: list[dict[str, Any]] = []
    cursor = 0
    while True:
        page = client.get(f"{API}/bulks/{bulk['id']}/errors?limit=5&cursor={cursor}").json
        found += page["items"]
        if page["next_cursor"] is None:
            break
        cursor = int(page["next_cursor"])
    assert [(error["line"], error["code"]) for error in found] == [
        (4 + 2 * number, code) for number, (_, code) in enumerate(BAD_LINES)
    ]
    repeated = next(error for error in found if error["custom_id"] == "same")
    assert repeated["errors"][0]["message"] == "Line 3 has the same custom_id."
    assert run_all(bulk["id"]) == 1 + len(BAD_LINES)


def test_a_control_character_in_a_key_is_shown_as_an_escape(client: Client) -> None:
    answer = send(client, b'{"prompt": "a", "key\\u0000": 1}\n')
    assert (answer.status_code, answer.json["code"]) == (422, "bulk_invalid")
    assert [error["field"] for error in answer.json["errors"]] == ["line.1.key\\x00"]


def test_one_invalid_line_refuses_the_whole_bulk_unless_it_may_be_skipped(client: Client, session: Session) -> None:
    answer = send(client, *prompts(30), {"prompt": "a", "width": 1}, *prompts(3), headers=KEY)
    problem = answer.json
    assert (answer.status_code, problem["code"]) == (422, "bulk_invalid")
    assert problem["errors"] == [
        {
            "field": "line.31.width",
            "code": "greater_than_equal",
            "message": "Input should be greater than or equal to 16",
        }
    ]
    bulk = bulk_of(client, problem["context"]["bulk_id"])
    assert (bulk["state"], bulk["invalid"], bulk["counts"]["canceled"]) == ("refused", 1, 33)
    assert queued_jobs(session, bulk["id"]) == []
    again = send(client, *prompts(30), {"prompt": "a", "width": 1}, *prompts(3), headers=KEY)
    assert (again.status_code, again.json["code"]) == (422, "bulk_invalid")
    Reconciler(get_settings().jobs).tick()
    assert session.scalar(select(func.count()).select_from(BulkItem)) == 0, "items that never run are deleted"


@pytest.mark.parametrize("rows", [[b"\n\n"], [header(on_invalid="skip")], [header(on_invalid="skip"), b"no\n"]])
def test_a_bulk_without_a_valid_item_is_refused(client: Client, rows: list[Any]) -> None:
    answer = send(client, *rows)
    assert (answer.status_code, answer.json["code"]) == (422, "bulk_invalid")


def test_a_last_line_without_a_line_feed_counts_if_the_body_is_complete(client: Client) -> None:
    bulk = accepted(client, *prompts(2), b'{"prompt": "last"}')
    assert (bulk["total"], bulk["received_lines"]) == (3, 3)


def test_another_type_of_body_is_refused(client: Client) -> None:
    answer = client.post(f"{API}/bulks", json={"prompt": "a"})
    assert (answer.status_code, answer.json["code"]) == (415, "unsupported_media_type")


def test_pinned_references_are_looked_up(client: Client, session: Session) -> None:
    image = make_image(session, vector=[1] * 16)
    session.commit()
    bulk = accepted(client, {"prompt": "a", "reference_ids": [str(image.id)]})
    (item,) = session.scalars(select(BulkItem).where(BulkItem.bulk_id == UUID(bulk["id"])))
    assert item.parameters["references"] == [{"image_id": str(image.id), "weight": None}]


# --- resuming -----------------------------------------------------------------------------------------------------


def test_prompts_are_split_while_no_row_of_the_bulk_is_locked(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk_id = UUID(accepted(client, *prompts(1), query="?complete=false")["id"])
    unlocked: list[UUID] = []

    def split(prompt: str) -> list[str]:
        with session_scope() as session:
            unlocked.extend(session.scalars(select(Bulk.id).with_for_update(skip_locked=True)))
        return split_prompt(prompt)

    monkeypatch.setattr(bulk_items, "split_prompt", split)
    more = client.post(f"{API}/bulks/{bulk_id}/lines?from_line=1", data=lines(*prompts(2)), content_type=JSON_LINES)
    assert (more.status_code, more.json["total"]) == (202, 3), more.text
    assert unlocked == [bulk_id, bulk_id]


def test_a_bulk_is_resumed_by_line(client: Client) -> None:
    rows = [json.dumps(row).encode() for row in prompts(10)]
    bulk = accepted(client, *(row + b"\n" for row in rows[:4]), query="?complete=false")
    assert (bulk["received_lines"], bulk["digest"]) == (4, chained_digest(rows[:4]))
    url = f"{API}/bulks/{bulk['id']}/lines"
    rest = b"\n".join(rows[4:])
    wrong = client.post(f"{url}?from_line=3", data=rest, content_type=JSON_LINES)
    assert (wrong.status_code, wrong.json["code"]) == (409, "bulk_offset_mismatch")
    assert wrong.json["context"] == {"received_lines": 4, "digest": chained_digest(rows[:4])}
    done = client.post(f"{url}?from_line=4", data=rest, content_type=JSON_LINES)
    assert (done.status_code, done.json["state"], done.json["total"]) == (202, "running", 10)
    assert done.json["digest"] == chained_digest(rows)
    late = client.post(f"{url}?from_line=10", data=rest, content_type=JSON_LINES)
    assert (late.status_code, late.json["code"]) == (409, "bulk_state_conflict")


def test_a_bulk_sent_again_with_the_same_key_continues_where_it_stopped(client: Client, session: Session) -> None:
    rows = [header(name="n"), *prompts(9)]
    first = send(client, *rows[:4], query="?complete=false", headers=KEY)
    assert "Idempotent-Replayed" not in first.headers
    for _ in range(2):
        again = send(client, *rows, headers=KEY)
        assert again.status_code == 202
        assert again.headers["Idempotent-Replayed"] == "true"
        assert (again.json["id"], again.json["total"], again.json["state"]) == (first.json["id"], 9, "running")
    assert session.scalar(select(func.count()).select_from(BulkItem)) == 9
    assert session.scalar(select(func.count()).select_from(Bulk)) == 1


def test_a_header_with_the_same_key_finds_the_bulk(client: Client) -> None:
    rows = [header(name="n"), *prompts(5)]
    first = send(client, *rows, query="?complete=false", headers=KEY).json
    found = send(client, rows[0], query="?complete=false", headers=KEY).json
    assert (found["id"], found["received_lines"]) == (first["id"], 6)


@pytest.mark.parametrize("complete", ["true", "false"])
@pytest.mark.parametrize(
    "other",
    [
        [header(name="other"), *prompts(5)],
        [header(name="n"), *prompts(4), {"prompt": "another"}],
        [header(name="n"), {"prompt": "another"}, *prompts(6)],
    ],
)
def test_other_lines_with_the_same_key_are_refused(client: Client, complete: str, other: list[Any]) -> None:
    first = send(client, header(name="n"), *prompts(5), query=f"?complete={complete}", headers=KEY)
    refused = send(client, *other, headers=KEY)
    assert (refused.status_code, refused.json["code"]) == (422, "idempotency_key_reused")
    assert bulk_of(client, first.json["id"])["total"] == 5


def test_more_lines_with_the_key_of_a_running_bulk_are_refused(client: Client) -> None:
    send(client, *prompts(5), headers=KEY)
    refused = send(client, *prompts(6), headers=KEY)
    assert (refused.status_code, refused.json["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("complete", ["true", "false"])
@pytest.mark.parametrize(
    "other", [[header(name="n")], [header(name="n"), *prompts(2)], [header(name="n"), {"prompt": "another"}]]
)
def test_a_body_that_ends_early_is_another_body(client: Client, complete: str, other: list[Any]) -> None:
    first = send(client, header(name="n"), *prompts(5), query=f"?complete={complete}", headers=KEY).json
    refused = send(client, *other, headers=KEY)
    assert (refused.status_code, refused.json["code"]) == (422, "idempotency_key_reused")
    assert bulk_of(client, first["id"])["state"] == first["state"]


def test_a_part_of_the_lines_with_the_key_leaves_the_bulk_receiving(client: Client) -> None:
    rows = [header(name="n"), *prompts(5)]
    first = send(client, *rows, query="?complete=false", headers=KEY).json
    for part in (rows[:3], [rows[0], {"prompt": "another"}]):
        found = send(client, *part, query="?complete=false", headers=KEY)
        assert (found.status_code, found.json["id"]) == (202, first["id"])
        assert (found.json["state"], found.json["received_lines"]) == ("receiving", 6)
    assert send(client, *rows, headers=KEY).json["state"] == "running"
    refused = send(client, *rows[:3], query="?complete=false", headers=KEY)
    assert (refused.status_code, refused.json["code"]) == (422, "idempotency_key_reused")
    assert send(client, rows[0], query="?complete=false", headers=KEY).json["state"] == "running"


def test_a_bulk_that_receives_no_more_lines_is_abandoned(client: Client, session: Session) -> None:
    bulk = send(client, *prompts(3), query="?complete=false", headers=KEY).json
    reconciler = Reconciler(get_settings().jobs)
    reconciler.tick()
    assert bulk_of(client, bulk["id"])["state"] == "receiving"
    session.execute(text("update bulks set received_at = now() - interval '25 hours'"))
    session.commit()
    reconciler.tick()
    assert bulk_of(client, bulk["id"])["state"] == "abandoned"
    assert session.scalar(select(func.count()).select_from(BulkItem)) == 0
    answer = client.post(f"{API}/bulks/{bulk['id']}/lines?from_line=3", data=b"{}\n", content_type=JSON_LINES)
    assert (answer.status_code, answer.json["code"]) == (409, "bulk_state_conflict")
    done = client.post(f"{API}/bulks/{bulk['id']}/complete", json={"lines": 3})
    assert (done.status_code, done.json["code"]) == (409, "bulk_state_conflict")
    whole = send(client, *prompts(5), headers=KEY)
    assert (whole.status_code, whole.json["code"]) == (409, "bulk_state_conflict")


# --- bounds -------------------------------------------------------------------------------------------------------


def test_a_bulk_with_too_many_items_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_BULKS__MAX_ITEMS", "5")
    monkeypatch.setenv("AFTERIMAGE_BULKS__CHUNK_LINES", "2")
    get_settings.cache_clear()
    announced = send(client, header(items=6))
    assert (announced.status_code, announced.json["code"]) == (413, "bulk_too_large")
    found = send(client, *prompts(6))
    assert (found.status_code, found.json["code"]) == (413, "bulk_too_large")
    assert bulk_of(client, found.json["context"]["bulk_id"])["state"] == "receiving"
    assert send(client, *prompts(5)).status_code == 202


def test_a_custom_id_is_unique_in_the_whole_bulk(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_BULKS__CHUNK_LINES", "2")
    get_settings.cache_clear()
    same = {"prompt": "a", "custom_id": "same"}
    bulk = accepted(client, header(on_invalid="skip"), same, *prompts(6), same)
    (error,) = client.get(f"{API}/bulks/{bulk['id']}/errors").json["items"]
    assert (error["line"], error["errors"][0]["field"]) == (9, "line.9.custom_id")
    assert send(client, same).status_code == 202, "another bulk may use it"


def test_announced_items_count_towards_the_limit_of_open_items(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_BULKS__MAX_OPEN_ITEMS", "10")
    monkeypatch.setenv("AFTERIMAGE_BULKS__MAX_OPEN", "2")
    get_settings.cache_clear()
    first = accepted(client, header(items=8), *prompts(1), query="?complete=false")
    refused = send(client, header(items=3))
    assert (refused.status_code, refused.json["code"]) == (429, "bulk_quota_exceeded")
    assert "Retry-After" in refused.headers
    unannounced = send(client, *prompts(3))
    assert (unannounced.status_code, unannounced.json["code"]) == (429, "bulk_quota_exceeded")
    assert send(client, *prompts(1)).status_code == 429, "two are open: the second is still receiving"
    assert client.post(f"{API}/bulks/{first['id']}/cancel").status_code == 200
    assert send(client, header(items=10), *prompts(2)).status_code == 202, "an ended bulk does not count"


def test_items_of_a_model_that_is_gone_are_neither_started_nor_retried(client: Client, session: Session) -> None:
    waiting = accepted(client, *prompts(2), query="?complete=false")
    failed = accepted(client, *prompts(2))
    run_all(failed["id"], fails=True)
    session.execute(update(Bulk).values(models=["gone"]))
    session.execute(update(Job).values(model="gone"))
    session.commit()
    for refused in (
        client.post(f"{API}/bulks/{waiting['id']}/complete", json={"lines": 2}),
        client.post(f"{API}/bulks/{failed['id']}/retry-failed"),
    ):
        assert (refused.status_code, refused.json["code"]) == (422, "model_not_found")
    assert [bulk_of(client, each["id"])["state"] for each in (waiting, failed)] == ["receiving", "completed"]


def test_items_wait_outside_of_the_jobs_table(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(200))
    assert len(queued_jobs(session, bulk["id"])) == 2 * WINDOW
    assert counts_of(client, bulk["id"]) == {"queued": 200}
    for _ in range(WINDOW + 1):
        run_one(bulk["id"])
    assert len(queued_jobs(session, bulk["id"])) == 2 * WINDOW, "filled up again"
    assert counts_of(client, bulk["id"]) == {"queued": 200 - WINDOW - 1, "succeeded": WINDOW + 1}


def test_bulks_of_two_owners_progress_at_the_same_rate(client: Client, session: Session) -> None:
    mine = accepted(client, *prompts(100))
    bulk = session.get_one(Bulk, UUID(accepted(client, *prompts(100))["id"]))
    other = owners.ensure(session, "other")
    session.execute(text("update bulks set owner_id = :o where id = :b"), {"o": other, "b": bulk.id})
    session.execute(text("update jobs set owner_id = :o where bulk_id = :b"), {"o": other, "b": bulk.id})
    session.commit()
    for _ in range(20):
        run_one(mine["id"])
        run_one(str(bulk.id))
    done = [counts_of(client, mine["id"])["succeeded"]]
    done += [session.scalar(select(func.count()).where(Job.bulk_id == bulk.id, Job.state == "succeeded")) or 0]
    assert abs(done[0] - done[1]) <= 4


# --- controlling --------------------------------------------------------------------------------------------------


def test_a_paused_bulk_starts_no_job_until_it_is_resumed(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(50))
    run_one(bulk["id"])
    published = {message["headers"]["id"] for message in messages("generate.cheap")}
    queue.broker().flushall()
    for _ in range(2):
        assert client.post(f"{API}/bulks/{bulk['id']}/pause").json["state"] == "paused"
    with session_scope() as other:
        for job_id in published:
            assert one_attempt.claim(other, UUID(job_id), worker="w", lease_s=30) is None, (
                "also if its message is already published"
            )
    queue.dispatch_jobs("cheap")
    Reconciler(get_settings().jobs).tick()
    assert messages("generate.cheap") == []
    single = make_job(session)
    session.commit()
    queue.dispatch_jobs("cheap")
    assert [message["headers"]["id"] for message in messages("generate.cheap")] == [str(single.id)]
    for _ in range(2):
        assert client.post(f"{API}/bulks/{bulk['id']}/resume").json["state"] == "running"
    assert run_all(bulk["id"]) == 49
    assert bulk_of(client, bulk["id"])["state"] == "completed"


def test_a_bulk_may_be_canceled_while_it_receives_runs_or_is_paused(client: Client, session: Session) -> None:
    receiving = accepted(client, *prompts(3), query="?complete=false")
    running = accepted(client, *prompts(50))
    assert run_one(running["id"])
    paused = accepted(client, *prompts(50))
    client.post(f"{API}/bulks/{paused['id']}/pause")
    with session_scope() as other:
        job_id = queued_jobs(session, running["id"])[0].id
        assert one_attempt.claim(other, job_id, worker="w", lease_s=30)
    for bulk, counts in [
        (receiving, {"canceled": 3}),
        (running, {"canceled": 49, "succeeded": 1}),
        (paused, {"canceled": 50}),
    ]:
        for _ in range(2):
            answer = client.post(f"{API}/bulks/{bulk['id']}/cancel")
            assert (answer.status_code, answer.json["state"]) == (200, "canceled")
        assert counts_of(client, bulk["id"]) == counts
        assert queued_jobs(session, bulk["id"]) == []
    assert client.get(f"{API}/jobs/{job_id}").json["state"] == "canceled", "the running job, too"
    assert {item["state"] for item in items_of(client, running["id"], state="canceled")} == {"canceled"}
    for verb in ("pause", "resume", "retry-failed"):
        refused = client.post(f"{API}/bulks/{running['id']}/{verb}")
        assert (refused.status_code, refused.json["code"]) == (409, "bulk_state_conflict")


def test_a_completed_bulk_cannot_be_canceled_or_paused(client: Client) -> None:
    bulk = accepted(client, *prompts(2))
    run_all(bulk["id"])
    for verb in ("cancel", "pause", "resume"):
        assert client.post(f"{API}/bulks/{bulk['id']}/{verb}").json["code"] == "bulk_state_conflict"


def test_failed_items_are_retried_as_new_jobs(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(20))
    failed = {run_one(bulk["id"], fails=True) for _ in range(6)}
    assert run_all(bulk["id"]) == 14
    assert (bulk_of(client, bulk["id"])["state"], counts_of(client, bulk["id"])) == (
        "completed",
        {"failed": 6, "succeeded": 14},
    )
    assert {UUID(item["job_id"]) for item in items_of(client, bulk["id"], state="failed")} == failed
    answer = client.post(f"{API}/bulks/{bulk['id']}/retry-failed")
    assert (answer.json["state"], answer.json["finished_at"]) == ("running", None)
    assert counts_of(client, bulk["id"]) == {"queued": 6, "succeeded": 14}
    assert {job.retry_of for job in queued_jobs(session, bulk["id"])} == failed
    assert run_all(bulk["id"]) == 6
    assert (bulk_of(client, bulk["id"])["state"], counts_of(client, bulk["id"])) == ("completed", {"succeeded": 20})
    assert client.post(f"{API}/bulks/{bulk['id']}/retry-failed").json["state"] == "completed", "nothing to retry"
    assert client.get(f"{API}/jobs/{next(iter(failed))}").json["state"] == "failed", "the old ones stay"


FILL_FAILED = """
insert into jobs (
    id, owner_id, kind, state, lane, model, images, parameters, timeout_s, bulk_id, bulk_line, quota_day, finished_at
)
select gen_random_uuid(), owner_id, kind, 'failed', 3, model, 1, parameters, 60, bulk_id, bulk_line + n, quota_day,
    now() from jobs, generate_series(:first, :last) n where id = :template
"""
FILL_ITEMS = """
insert into bulk_items (bulk_id, line, kind, model, images, parameters, timeout_s, job_id)
select bulk_id, bulk_line, kind, model, 1, parameters, 60, id from jobs
where bulk_id = :bulk_id and bulk_line between :first and :last
"""


def bulk_of_failed_items(client: Client, session: Session, count: int) -> str:
    """A completed bulk of `count` failed items."""
    bulk = accepted(client, *prompts(1))
    template = run_one(bulk["id"], fails=True)
    for first in range(1, count, 2000):
        span = {"first": first, "last": min(first + 1999, count - 1)}
        session.execute(text(FILL_FAILED), {**span, "template": template})
        rows = {"first": span["first"] + 1, "last": span["last"] + 1, "bulk_id": bulk["id"]}
        session.execute(text(FILL_ITEMS), rows)
        session.commit()
    filled = {"total": count, "fed": count, "images": count}
    session.execute(update(Bulk).where(Bulk.id == UUID(bulk["id"])).values(**filled))
    session.commit()
    return str(bulk["id"])


def test_a_retry_of_many_failed_items_changes_only_those_that_run_next(client: Client, session: Session) -> None:
    bulk_id = bulk_of_failed_items(client, session, 20_000)
    assert counts_of(client, bulk_id) == {"failed": 20_000}
    answer = client.post(f"{API}/bulks/{bulk_id}/retry-failed")
    assert (answer.json["state"], answer.json["counts"]["queued"]) == ("running", 20_000)
    left = select(func.count()).where(Job.bulk_id == UUID(bulk_id), Job.state == JobState.FAILED)
    assert session.scalar(left) == 20_000 - 2 * WINDOW, "the others keep their jobs until their turn"
    assert {len(items_of(client, bulk_id, state=state, limit=100)) for state in ("queued", "failed")} == {100, 0}
    items = items_of(client, bulk_id, state="queued", limit=500)
    assert [item["line"] for item in items] == list(range(1, 501))
    assert sum(item["job_id"] is None for item in items) >= 500 - 2 * WINDOW
    # Each ended job lets the next item become a job. Items that fail again are not retried.
    assert run_one(bulk_id, fails=True)
    assert {run_one(bulk_id) is not None for _ in range(2 * WINDOW)} == {True}
    session.rollback()
    ended = 1 + 2 * WINDOW
    assert 20_000 - ended - 2 * WINDOW <= (session.scalar(left) or 0) - 1 < 20_000 - ended
    generated = select(func.count()).where(Job.bulk_id == UUID(bulk_id), Job.state == JobState.SUCCEEDED)
    assert session.scalar(generated) == 2 * WINDOW


def test_a_retried_bulk_ends_when_its_last_failed_item_has_run(client: Client, session: Session) -> None:
    bulk_id = bulk_of_failed_items(client, session, 3 * WINDOW)
    client.post(f"{API}/bulks/{bulk_id}/retry-failed")
    assert run_one(bulk_id, fails=True)
    assert client.post(f"{API}/bulks/{bulk_id}/retry-failed").json["counts"]["queued"] == 3 * WINDOW, "once more"
    assert run_all(bulk_id) == 3 * WINDOW
    assert (bulk_of(client, bulk_id)["state"], counts_of(client, bulk_id)) == ("completed", {"succeeded": 3 * WINDOW})


def test_a_cancel_leaves_items_failed_that_have_no_new_job_and_refunds_their_images(
    client: Client, session: Session
) -> None:
    bulk_id = bulk_of_failed_items(client, session, 4 * WINDOW)

    def counted() -> int:
        session.rollback()
        return session.scalars(select(ImageUsage.images)).one()

    before = counted()
    client.post(f"{API}/bulks/{bulk_id}/retry-failed")
    assert counted() == before + 4 * WINDOW
    client.post(f"{API}/bulks/{bulk_id}/cancel")
    assert counted() == before
    assert counts_of(client, bulk_id) == {"failed": 2 * WINDOW, "canceled": 2 * WINDOW}


def test_items_that_wait_longer_than_the_bulk_allows_expire_and_can_be_retried(
    client: Client, session: Session
) -> None:
    bulk = accepted(client, header(expires_in_s=3600), *prompts(60))
    assert run_one(bulk["id"])
    session.execute(text("update bulks set expires_at = now() - interval '1 s'"))
    session.execute(text("update jobs set expires_at = now() - interval '1 s' where state = 'queued'"))
    session.commit()
    Reconciler(get_settings().jobs).tick()
    assert bulk_of(client, bulk["id"])["state"] == "completed"
    assert counts_of(client, bulk["id"]) == {"succeeded": 1, "expired": 59}
    assert len(items_of(client, bulk["id"], state="expired")) == 59
    client.post(f"{API}/bulks/{bulk['id']}/retry-failed")
    assert run_all(bulk["id"]) == 59
    assert counts_of(client, bulk["id"]) == {"succeeded": 60}


def test_an_item_whose_job_was_deleted_gets_no_new_job(client: Client) -> None:
    bulk = accepted(client, *prompts(3))
    run_all(bulk["id"])
    deleted = items_of(client, bulk["id"])[0]["job_id"]
    assert client.delete(f"{API}/jobs/{deleted}").status_code == 204
    Reconciler(get_settings().jobs).tick()
    assert counts_of(client, bulk["id"]) == {"succeeded": 2, "deleted": 1}
    assert items_of(client, bulk["id"], state="deleted")[0]["job_id"] == deleted


def test_the_end_of_a_bulk_enqueues_one_webhook_delivery(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEBHOOKS__ALLOW_PRIVATE", "true")
    monkeypatch.setenv("AFTERIMAGE_WEBHOOKS__ALLOW_HTTP", "true")
    get_settings.cache_clear()
    url = "http://127.0.0.1:9/hook"
    bulk = accepted(client, header(webhook={"url": url}, metadata={"order": "17"}), *prompts(20))
    run_all(bulk["id"])
    Reconciler(get_settings().jobs).tick()
    (delivery,) = session.scalars(select(WebhookDelivery))
    assert (delivery.url, delivery.job_id) == (url, None)
    assert delivery.body is not None
    assert (delivery.body["type"], delivery.body["data"]["bulk_id"]) == ("bulk.completed", bulk["id"])
    assert delivery.body["data"]["counts"]["succeeded"] == 20
    assert delivery.body["data"]["metadata"] == {"order": "17"}


def test_a_bulk_with_a_forbidden_webhook_is_refused(client: Client) -> None:
    answer = send(client, header(webhook={"url": "http://127.0.0.1/hook"}), *prompts(1))
    assert (answer.status_code, answer.json["code"]) == (422, "forbidden_target")


def test_the_reconciler_completes_a_bulk_whose_worker_dispatched_no_more_jobs(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(1))
    (job,) = queued_jobs(session, bulk["id"])
    with session_scope() as other:
        taken = one_attempt.claim(other, job.id, worker="w", lease_s=30)
        assert taken is not None
        finish(other, taken)
    assert bulk_of(client, bulk["id"])["state"] == "running"
    Reconciler(get_settings().jobs).tick()
    assert bulk_of(client, bulk["id"])["state"] == "completed"


# --- reading ------------------------------------------------------------------------------------------------------


def test_a_bulk_of_another_owner_is_not_found(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(2))
    session.execute(text("update bulks set owner_id = :o"), {"o": owners.ensure(session, "other")})
    session.commit()
    url = f"{API}/bulks/{bulk['id']}"
    for path in ("", "/items", "/errors", "/manifest", "/archive"):
        assert client.get(url + path).status_code == 404, path
    for path in ("/pause", "/resume", "/cancel", "/retry-failed"):
        assert client.post(url + path).status_code == 404, path
    assert client.post(f"{url}/complete", json={"lines": 2}).status_code == 404
    assert client.post(f"{url}/lines?from_line=2", data=b"", content_type=JSON_LINES).status_code == 404
    assert client.get(f"{API}/bulks").json["items"] == []


def test_bulks_are_listed_newest_first(client: Client) -> None:
    ids = [accepted(client, *prompts(1))["id"] for _ in range(3)]
    client.post(f"{API}/bulks/{ids[1]}/cancel")
    first = client.get(f"{API}/bulks?limit=2").json
    second = client.get(f"{API}/bulks?limit=2&cursor={first['next_cursor']}").json
    assert [bulk["id"] for bulk in first["items"] + second["items"]] == ids[::-1]
    assert [bulk["id"] for bulk in client.get(f"{API}/bulks?state=canceled").json["items"]] == [ids[1]]


def test_items_are_paged_in_the_order_of_their_lines(client: Client) -> None:
    bulk = accepted(client, *prompts(7))
    run_one(bulk["id"])
    url = f"{API}/bulks/{bulk['id']}/items"
    first = client.get(f"{url}?limit=4").json
    second = client.get(f"{url}?limit=4&cursor={first['next_cursor']}").json
    assert (first["next_cursor"], second["next_cursor"]) == ("4", None)
    assert [item["line"] for item in first["items"] + second["items"]] == list(range(1, 8))
    (done,) = items_of(client, bulk["id"], state="succeeded")
    (output,) = done["outputs"]
    content = client.get(output["content_url"]).data
    assert hashlib.sha256(content).hexdigest() == output["sha256"]
    assert len(items_of(client, bulk["id"], state="queued")) == 6


def test_rate_and_estimated_end_are_shown_while_a_bulk_runs(client: Client) -> None:
    bulk = accepted(client, *prompts(50))
    for _ in range(10):
        run_one(bulk["id"])
    seen = bulk_of(client, bulk["id"])
    assert 0 < seen["rate_per_s"] <= 10
    assert seen["estimated_end"] > seen["created_at"]
    client.post(f"{API}/bulks/{bulk['id']}/pause")
    assert bulk_of(client, bulk["id"])["estimated_end"] is None


def test_the_manifest_has_every_item_and_an_end_line(client: Client) -> None:
    bulk = accepted(client, header(), *prompts(250, custom_id=None))
    for _ in range(3):
        run_one(bulk["id"])
    answer = client.get(f"{API}/bulks/{bulk['id']}/manifest")
    assert answer.mimetype == JSON_LINES
    *items, end = [json.loads(line) for line in answer.data.splitlines()]
    assert end == {"end": True, "items": 250}
    assert [item["line"] for item in items] == list(range(2, 252))
    done = [item for item in items if item["state"] == "succeeded"]
    assert len(done) == 3
    assert done[0]["outputs"][0]["provenance"] == {"everything": "that decided the pixels"}
    assert items[-1]["parameters"]["prompt"] == "prompt 249"
    rest = client.get(f"{API}/bulks/{bulk['id']}/manifest?cursor=249").data.splitlines()
    assert [json.loads(line).get("line") for line in rest] == [250, 251, None]


def test_the_archive_has_every_image_and_an_end_file(client: Client) -> None:
    bulk = accepted(client, *prompts(5))
    run_all(bulk["id"])
    gone = items_of(client, bulk["id"])[1]
    with session_scope() as session:
        get_blobs().delete(session.get_one(Output, UUID(gone["outputs"][0]["id"])).blob_key)
    answer = client.get(f"{API}/bulks/{bulk['id']}/archive")
    with tarfile.open(fileobj=io.BytesIO(answer.data)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert list(files)[:3] == ["000001-0.png", "000001.json", "000002.json"]
    assert files["000003-0.png"] == b"image of prompt 2"
    assert json.loads(files["000002.json"])["missing"] == [0]
    assert json.loads(files["end.json"]) == {"end": True, "items": 5}
    assert len(files) == 4 + 5 + 1


def test_transfers_are_limited_per_process(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    bulk = accepted(client, *prompts(1))
    monkeypatch.setenv("AFTERIMAGE_BULKS__MAX_TRANSFERS", "1")
    get_settings.cache_clear()
    from api_service.services import bulks as bulk_service

    bulk_service._transfer_slots.cache_clear()
    with bulk_service.transfer_slot():
        refused = client.get(f"{API}/bulks/{bulk['id']}/manifest")
        assert (refused.status_code, refused.json["code"]) == (503, "too_many_streams")
        assert send(client, *prompts(1)).status_code == 503
    for _ in range(2):
        answer = client.get(f"{API}/bulks/{bulk['id']}/manifest")
        assert answer.status_code == 200
        answer.close()


def test_jobs_name_their_bulk(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(3))
    make_job(session)
    session.commit()
    listed = client.get(f"{API}/jobs?bulk_id={bulk['id']}").json["items"]
    assert {job["bulk_id"] for job in listed} == {bulk["id"]}
    assert len(listed) == 3


def test_an_item_is_counted_once_while_it_becomes_a_job(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(2 * WINDOW + 2))
    row = session.get_one(Bulk, UUID(bulk["id"]))
    session.expunge(row)
    run_all(bulk["id"])
    counts = bulks.get_progress(session, [row])[row.id].counts.model_dump()
    assert min(counts.values()) == 0
    assert sum(counts.values()) == 2 * WINDOW + 2, "although the row was read before"


def test_images_of_a_bulk_count_towards_the_quota_when_it_is_complete(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFTERIMAGE_LIMITS__DAILY_IMAGES", "100")
    get_settings.cache_clear()

    def used() -> int:
        session.rollback()
        return session.scalar(select(func.sum(ImageUsage.images))) or 0

    bulk = accepted(client, *prompts(40, num_images=2), query="?complete=false")
    assert used() == 0
    assert client.post(f"{API}/bulks/{bulk['id']}/complete", json={"lines": 40}).json["state"] == "running"
    assert used() == 80
    too_many = send(client, *prompts(11, num_images=2), headers=KEY)
    assert (too_many.status_code, too_many.json["code"]) == (429, "quota_exceeded")
    run_one(bulk["id"], fails=True)
    assert used() == 78
    run_one(bulk["id"])
    client.post(f"{API}/bulks/{bulk['id']}/cancel")
    assert used() == 2, "images that were not generated are refunded"
    assert send(client, *prompts(11, num_images=2), headers=KEY).json["state"] == "running", "the quota allows it now"


def test_an_archive_that_cannot_be_completed_has_no_end_file(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(3))
    run_all(bulk["id"])
    broken = items_of(client, bulk["id"])[1]["outputs"][0]["id"]
    get_blobs().put(session.get_one(Output, UUID(broken)).blob_key, b"short", media_type="image/png")
    answer = client.get(f"{API}/bulks/{bulk['id']}/archive")
    assert b"000001.json" in answer.data
    assert b"end.json" not in answer.data


def test_jobs_of_a_paused_bulk_do_not_count_as_queue_depth(client: Client, session: Session) -> None:
    bulk = accepted(client, *prompts(100))
    Reconciler(get_settings().jobs).tick()
    assert REGISTRY.get_sample_value("queue_depth", {"queue": "cheap"}) == 2 * WINDOW
    assert REGISTRY.get_sample_value("bulk_items_waiting") == 100 - 2 * WINDOW
    client.post(f"{API}/bulks/{bulk['id']}/pause")
    Reconciler(get_settings().jobs).tick()
    assert REGISTRY.get_sample_value("queue_depth", {"queue": "cheap"}) == 0
    assert REGISTRY.get_sample_value("bulk_items_waiting") == 0
