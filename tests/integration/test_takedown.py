"""Withdrawn outputs: `DELETE /images/{id}?cascade=withdraw` hides everything that drew from an image, everywhere."""

import base64
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from pyarrow import parquet
from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from scripts.export.image_file import open_image_file
from scripts.export.import_rows import import_rows
from shared import blob_sweeper
from shared.contracts.generation import PinnedReference, Webhook
from shared.contracts.jobs import JobState
from shared.db import attempts, collections, outputs, owners, withdrawals
from shared.db.blobs import list_unneeded
from shared.db.session import session_scope
from shared.db.tables import (
    AuditEvent,
    BulkItem,
    Collection,
    DerivedImage,
    Image,
    Job,
    Output,
    OutputReference,
    ReferenceImage,
    WebhookDelivery,
    WithdrawnImage,
)
from shared.errors import ReferenceDeletedError
from shared.settings import Settings
from shared.storage import get_blobs
from tests import one_attempt
from tests.factories import make_image, make_job, make_output_row
from tests.integration.conftest import API, Client, a_key, picture, waiting
from tests.integration.test_api_search import towards
from tests.integration.test_export import run as export
from tests.integration.test_export_outputs import make_output
from tests.integration.test_generation import add_embedded_image
from tests.recording_generator import RecordingGenerator
from worker_service.jobs.attempt import Outcome
from worker_service.jobs.leases import JobLeases
from worker_service.jobs.run import run_job
from worker_service.models.worker_models import Models

REASON = "The photographer asked for it."
SAME_ORIGIN = {"Origin": "http://localhost"}
PARAMETERS = {
    *("generation_id", "job_id", "bulk_id", "image_id", "reference_id", "delivery_id", "collection_id"),
    *("owner_id", "key_id", "filename", "digest", "owner", "action"),
}
"""Parameters of all paths. A new one that names an output must be walked below."""


def drawn_from(session: Session, *image_ids: UUID, number: int = 7, owner: str = "local") -> Output:
    """An output of a finished job that drew from these images."""
    output = make_output(session, number, owner=owner)
    session.execute(delete(OutputReference).where(OutputReference.generation_id == output.id))
    for position, image_id in enumerate(image_ids):
        session.add(
            OutputReference(
                generation_id=output.id,
                position=position,
                image_id=image_id,
                sha256="ab" * 32,
                similarity=0.5,
                weight=1 / len(image_ids),
                pinned=False,
                caption="a face",
            )
        )
    session.commit()
    return output


def withdraw(client: Client, image_id: UUID, headers: dict[str, str] | None = None, **query: str) -> Any:
    sent = {"cascade": "withdraw", "reason": REASON, **query}
    return client.delete(f"{API}/images/{image_id}", query_string=sent, headers=headers)


def is_withdrawn(session: Session, output: Output) -> bool:
    session.rollback()
    return output.id in withdrawals.find(session, [output.id])


def count(session: Session, table: Any) -> int:
    session.rollback()
    return session.scalar(select(func.count()).select_from(table)) or 0


@pytest.fixture
def image(session: Session) -> Image:
    image = make_image(session, vector=towards(a0=1), caption="a face")
    session.commit()
    return image


@pytest.fixture
def output(session: Session, image: Image) -> Output:
    return drawn_from(session, image.id, number=9)


@pytest.fixture
def ids(client: Client, session: Session, image: Image, output: Output) -> dict[str, str]:
    """The path parameters of `output`, of its job in a bulk, and of what else belongs to it."""
    sent = client.post(f"{API}/bulks", data=b'{"prompt": "a face"}\n', content_type="application/jsonl")
    bulk_id = UUID(sent.json["id"])
    line = session.scalars(select(BulkItem.line).where(BulkItem.bulk_id == bulk_id)).one()
    session.execute(update(BulkItem).where(BulkItem.bulk_id == bulk_id).values(job_id=output.job_id))
    session.execute(update(Job).where(Job.id == output.job_id).values(bulk_id=bulk_id, bulk_line=line))
    session.commit()
    unknown = {name: str(uuid4()) for name in PARAMETERS}
    known = {"generation_id": output.id, "job_id": output.job_id, "bulk_id": bulk_id, "image_id": image.id}
    return unknown | {name: str(value) for name, value in known.items()}


# --- a withdrawn output cannot be met -----------------------------------------------------------------------------


def test_every_operation_on_a_withdrawn_output_gets_410_with_the_reason(client: Client, ids: dict[str, str]) -> None:
    rules = [rule for rule in client.application.url_map.iter_rules() if "generation_id" in rule.arguments]
    named = {name for rule in client.application.url_map.iter_rules() for name in rule.arguments}
    assert named <= PARAMETERS, "does a new parameter name an output?"

    def answers(methods: set[str]) -> Iterator[tuple[str, Any]]:
        for rule in rules:
            for method in sorted((rule.methods or set()) & methods):
                path = re.sub(r"<(?:\w+:)?(\w+)>", lambda match: ids[match[1]], rule.rule)
                body = {"favourite": True} if method == "PATCH" else None
                with client.open(
                    path, method=method, json=body, headers=SAME_ORIGIN, follow_redirects=rule.alias
                ) as answer:
                    yield f"{method} {path}", answer

    assert {answer.status_code for _, answer in answers({"GET"})} == {200}
    assert withdraw(client, UUID(ids["image_id"])).status_code == 200
    walked = list(answers({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"}))
    assert len(walked) >= 14
    for name, answer in walked:
        assert answer.status_code == 410, name
        if name.startswith("HEAD"):
            continue  # it has no body
        if answer.mimetype == "application/problem+json":
            assert answer.json["code"] == "output_withdrawn", name
            assert answer.json["context"]["reason"] == REASON
        else:
            assert "output_withdrawn" in answer.text, name
            assert REASON in answer.text, name


def test_no_other_answer_contains_a_withdrawn_output(
    client: Client, session: Session, ids: dict[str, str], output: Output
) -> None:
    file, small = get_blobs().get(output.blob_key), get_blobs().get(output.thumbnail_key)
    traces = [file, small, f"/generations/{output.id}/content".encode(), f"/generations/{output.id}/thumbnail".encode()]

    def found() -> dict[str, list[int]]:
        met = {}
        for rule in client.application.url_map.iter_rules():
            if "GET" not in (rule.methods or set()) or "generation_id" in rule.arguments or rule.endpoint == "static":
                continue
            path = re.sub(r"<(?:\w+:)?(\w+)>", lambda match: ids[match[1]], rule.rule)
            with client.get(path, follow_redirects=True) as answer:
                # A stream of events ends with its reader. Its first event comes at once.
                is_endless = rule.rule == "/queue/events"
                data = next(iter(answer.response)) if is_endless else answer.data
                if places := [index for index, trace in enumerate(traces) if trace in data]:
                    met[path] = places
        return met

    before = found()
    assert len(before) >= 8, "lists, the job, its bulk, the archive, the manifest and pages of Studio"
    assert any(0 in places for places in before.values()), "the archive has the file"
    assert withdraw(client, UUID(ids["image_id"])).status_code == 200
    assert found() == {}


def test_lists_show_a_withdrawn_output_to_its_owner_as_withdrawn(
    client: Client, ids: dict[str, str], output: Output
) -> None:
    assert withdraw(client, UUID(ids["image_id"])).status_code == 200
    job = client.get(f"{API}/jobs/{output.job_id}").json
    listed = client.get(f"{API}/generations").json["items"]
    of_image = client.get(f"{API}/images/{ids['image_id']}/generations").json["items"]
    manifest = [json.loads(line) for line in client.get(f"{API}/bulks/{ids['bulk_id']}/manifest").data.splitlines()]
    (bulk_item,) = client.get(f"{API}/bulks/{ids['bulk_id']}/items").json["items"]
    assert job["state"] == "succeeded"
    for (shown,) in (job["outputs"], listed, of_image, manifest[0]["outputs"]):
        assert shown["withdrawn"]["reason"] == REASON
        assert (shown["id"], shown["content_url"], shown["thumbnail_url"]) == (str(output.id), None, None)
        assert (shown["provenance"], shown["references"][0]["caption"]) == ({}, None)
        assert shown["references"][0]["image_id"] == ids["image_id"]
    assert bulk_item["outputs"][0]["withdrawn"]["reason"] == REASON
    assert bulk_item["outputs"][0]["content_url"] is None


def test_the_archive_leaves_a_withdrawn_file_out_and_is_complete(client: Client, ids: dict[str, str]) -> None:
    def members() -> list[str]:
        archive = client.get(f"{API}/bulks/{ids['bulk_id']}/archive").data
        return tarfile.open(fileobj=io.BytesIO(archive)).getnames()

    assert members() == ["000001-0.png", "000001.json", "end.json"]
    assert withdraw(client, UUID(ids["image_id"])).status_code == 200
    assert members() == ["000001.json", "end.json"]


def test_an_export_leaves_withdrawn_outputs_out(
    client: Client, session: Session, image: Image, output: Output, tmp_path: Path
) -> None:
    other = drawn_from(session, uuid4(), number=3)
    assert withdraw(client, image.id).status_code == 200
    export("outputs", str(tmp_path / "all.parquet"))
    assert parquet.read_table(tmp_path / "all.parquet")["id"].to_pylist() == [str(other.id)]


def test_an_import_of_an_earlier_export_does_not_bring_withdrawn_things_back(
    client: Client, session: Session, tmp_path: Path
) -> None:
    files = {"file": (io.BytesIO(picture()), "a.png")}
    image_id = UUID(client.post(f"{API}/upload", data=files).json["images"][0]["id"])
    output = drawn_from(session, image_id)
    for kind in ("corpus", "outputs"):
        assert export(kind, str(tmp_path / kind))["images"] == 1
    assert withdraw(client, image_id).json["images"] == 1
    for kind in ("corpus", "outputs"):
        report = export("import", str(tmp_path / kind), "--owner", "local", "--collection", "again")
        assert (report["new"], report["withdrawn"]) == (0, 1), kind
    assert is_withdrawn(session, output)
    assert count(session, Image) == 0


def test_a_known_etag_gets_410_and_not_304(client: Client, image: Image, output: Output) -> None:
    paths = [f"{API}/generations/{output.id}{part}" for part in ("", "/content", "/thumbnail")]
    tags = [client.get(path).headers["ETag"] for path in paths]
    for path, tag in zip(paths, tags, strict=True):
        known = client.get(path, headers={"If-None-Match": tag})
        assert known.status_code == 304
        assert known.headers["Cache-Control"] == "private, no-cache", "a browser asks before it shows its copy"
    listed = client.get(f"{API}/generations").headers["ETag"]
    assert withdraw(client, image.id).status_code == 200
    for path, tag in zip(paths, tags, strict=True):
        assert client.get(path, headers={"If-None-Match": tag}).status_code == 410
        assert client.get(path, headers={"Range": "bytes=0-3"}).status_code == 410
    assert client.get(f"{API}/generations", headers={"If-None-Match": listed}).status_code == 200


def test_a_stored_answer_of_an_idempotency_key_is_not_sent_again(client: Client, image: Image, output: Output) -> None:
    key = {"Idempotency-Key": "once"}
    paths = [f"{API}/generations/{output.id}/{verb}" for verb in ("replay", "remember")]
    assert [client.post(path, headers=key).status_code for path in paths] == [202, 201]
    assert [client.post(path, headers=key).status_code for path in paths] == [202, 201]
    assert withdraw(client, image.id).status_code == 200
    for path in paths:
        answer = client.post(path, headers=key)
        assert (answer.status_code, answer.json["code"]) == (410, "output_withdrawn"), path


def test_a_late_webhook_names_the_output_and_shows_nothing_of_it(
    client: Client, session: Session, image: Image
) -> None:
    job = make_job(session, webhook=Webhook(url="https://receiver.example/hook", events=["succeeded"]))
    taken = one_attempt.claim(session, job.id, worker="w", lease_s=30)
    assert taken is not None
    output = drawn_from(session, image.id)
    session.execute(update(Output).where(Output.id == output.id).values(job_id=job.id))
    assert one_attempt.finish(session, taken[0], [], timings={})
    session.commit()
    assert count(session, WebhookDelivery) == 1
    assert withdraw(client, image.id).status_code == 200
    delivery = client.get(f"{API}/webhooks/deliveries").text
    assert "content" not in delivery
    assert REASON not in delivery


def test_the_files_go_with_the_next_sweep_and_the_rows_stay(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    kept = drawn_from(session, uuid4(), number=3)
    assert withdraw(client, image.id).status_code == 200
    assert get_blobs().exists(output.blob_key), "requests never delete a blob"
    blob_sweeper.sweep(get_blobs(), older_than_s=0)
    assert [get_blobs().exists(key) for key in (output.blob_key, output.thumbnail_key)] == [False, False]
    assert get_blobs().exists(kept.blob_key)
    session.expire_all()
    row = session.get_one(Output, output.id)
    assert row.provenance["parameters"]["prompt"] == "apfel „9“"
    assert outputs.list_references(session, [row.id])[row.id][0].caption == "a face"


def test_studio_offers_the_withdrawal_with_its_number_and_shows_what_is_withdrawn(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    drawn_from(session, image.id, number=8)
    address = f"/corpus/{image.id}/withdraw"
    assert address in client.get(f"/corpus/{image.id}").text
    assert "withdraw 2 generated images" in client.get(address).text
    form = {"cascade": "withdraw", "reason": REASON}
    assert client.post(f"/corpus/{image.id}/delete", data=form, headers=SAME_ORIGIN).status_code == 303
    assert is_withdrawn(session, output)
    shown = client.get(f"/gallery/{output.id}")
    assert shown.status_code == 410
    assert f"This output was withdrawn: {REASON}" in shown.text
    gallery = client.get("/gallery").text
    assert gallery.count("<b>withdrawn</b>") == 2
    assert "withdrawn" in client.get("/queue").text


# --- what is withdrawn --------------------------------------------------------------------------------------------


def test_a_plain_delete_leaves_the_outputs(client: Client, session: Session, image: Image, output: Output) -> None:
    assert client.delete(f"{API}/images/{image.id}").status_code == 204
    assert not is_withdrawn(session, output)
    assert client.get(f"{API}/generations/{output.id}/content").status_code == 200


def test_outputs_of_other_images_and_of_sent_pictures_stay(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    other = drawn_from(session, uuid4(), number=3)
    sent = drawn_from(session, image.id, number=4)
    session.execute(update(OutputReference).where(OutputReference.generation_id == sent.id).values(kind="request"))
    session.commit()
    answer = withdraw(client, image.id)
    assert (answer.json["outputs"], answer.json["owners"], answer.json["images"]) == (1, 1, 1)
    assert [is_withdrawn(session, each) for each in (output, other, sent)] == [True, False, False]


def test_a_remembered_output_goes_with_what_was_drawn_from_it_and_so_on(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    first = UUID(client.post(f"{API}/generations/{output.id}/remember").json["id"])
    drawn = drawn_from(session, first, number=4)
    second = UUID(client.post(f"{API}/generations/{drawn.id}/remember", json={"collection": "own"}).json["id"])
    last = drawn_from(session, uuid4(), second, number=5)
    before = dict(session.execute(select(Collection.name, Collection.version)).all())
    assert client.delete(f"{API}/jobs/{drawn.job_id}").status_code == 204, "the output between them is gone"
    image_id = image.id
    answer = withdraw(client, image_id)
    assert (answer.json["outputs"], answer.json["images"]) == (2, 3)
    session.rollback()
    assert session.scalars(select(Image.id)).all() == []
    assert [is_withdrawn(session, each) for each in (output, last)] == [True, True]
    causes = session.scalars(select(WithdrawnImage.cause_id)).all()
    assert causes == [image_id] * 3
    after = dict(session.execute(select(Collection.name, Collection.version)).all())
    assert [after[name] > before[name] for name in ("shared", "own")] == [True, True], "cached searches end"


def test_the_images_between_may_have_been_deleted_before(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    remembered = UUID(client.post(f"{API}/generations/{output.id}/remember").json["id"])
    last = drawn_from(session, remembered, number=5)
    assert client.delete(f"{API}/images/{remembered}").status_code == 204
    assert withdraw(client, image.id).status_code == 200
    assert is_withdrawn(session, last)


def test_an_upload_of_the_output_s_own_file_goes_too(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    file = io.BytesIO(get_blobs().get(output.blob_key))
    uploaded = client.post(f"{API}/upload", data={"file": (file, "a.png"), "collection": "own"}).json["images"][0]
    assert withdraw(client, image.id).json["images"] == 2
    assert client.get(uploaded["url"]).status_code == 404


def test_two_images_that_are_made_of_each_other_end(client: Client, session: Session, image: Image) -> None:
    other = make_image(session)
    pairs = [(image.id, other.id), (other.id, image.id)]
    session.add_all(DerivedImage(image_id=made, source_id=source) for made, source in pairs)
    session.commit()
    assert withdraw(client, other.id).json["images"] == 2


def test_a_dry_run_counts_and_changes_nothing(client: Client, session: Session, image: Image, output: Output) -> None:
    drawn_from(session, image.id, number=3, owner="other")
    answer = withdraw(client, image.id, dry_run="true")
    assert answer.status_code == 200
    counted = {name: answer.json[name] for name in ("dry_run", "outputs", "owners", "images", "running_jobs")}
    assert counted == {"dry_run": True, "outputs": 2, "owners": 2, "images": 1, "running_jobs": 0}
    assert not is_withdrawn(session, output)
    assert count(session, Image) == 1
    assert count(session, AuditEvent) == 0


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ({"cascade": "everything"}, "enum"),
        ({"reason": "why"}, "value_error"),
        ({"dry_run": "true"}, "value_error"),
        ({"cascade": "withdraw", "reason": ""}, "too_short"),
        ({"cascade": "withdraw", "reason": "x" * 501}, "too_long"),
        ({"cascade": "withdraw", "force": "true"}, "extra_forbidden"),
    ],
)
def test_a_wrong_query_is_refused_and_deletes_nothing(
    client: Client, session: Session, image: Image, query: dict[str, str], code: str
) -> None:
    answer = client.delete(f"{API}/images/{image.id}", query_string=query)
    assert (answer.status_code, answer.json["errors"][0]["code"]) == (422, code)
    assert count(session, Image) == 1


# --- who may ------------------------------------------------------------------------------------------------------


def test_outputs_of_other_owners_need_the_scope_admin(keyed_client: Client, session: Session, image: Image) -> None:
    own, other = drawn_from(session, image.id, owner="mine"), drawn_from(session, image.id, number=3, owner="theirs")
    mine = a_key(session, "corpus:write", "search", "generate", owner="mine")
    counted = withdraw(keyed_client, image.id, mine, dry_run="true").json
    assert (counted["outputs"], counted["owners"], counted["needs_admin"]) == (2, 2, True)
    refused = withdraw(keyed_client, image.id, mine)
    assert (refused.status_code, refused.json["context"]) == (403, {"scope": "admin"})
    assert [is_withdrawn(session, each) for each in (own, other)] == [False, False]
    admin = a_key(session, "corpus:write", "admin", owner="mine")
    assert withdraw(keyed_client, image.id, admin).status_code == 200
    assert [is_withdrawn(session, each) for each in (own, other)] == [True, True]
    theirs = a_key(session, "generate", owner="theirs")
    assert keyed_client.get(f"{API}/generations/{other.id}", headers=theirs).json["context"]["reason"] == REASON
    assert keyed_client.get(f"{API}/generations/{other.id}", headers=mine).status_code == 404


def test_an_owner_withdraws_its_own_outputs_without_the_scope_admin(
    keyed_client: Client, session: Session, image: Image
) -> None:
    output = drawn_from(session, image.id, owner="mine")
    assert withdraw(keyed_client, image.id, a_key(session, "corpus:write", owner="mine")).status_code == 200
    assert is_withdrawn(session, output)


def test_a_remembered_image_in_a_collection_of_another_owner_needs_the_scope_admin(
    keyed_client: Client, session: Session, image: Image
) -> None:
    theirs = collections.ensure(session, "theirs", owner_id=owners.ensure(session, "theirs"))
    made = make_image(session, collection_id=theirs.id)
    session.add(DerivedImage(image_id=made.id, source_id=image.id))
    session.commit()
    assert withdraw(keyed_client, image.id, a_key(session, "corpus:write", owner="mine")).status_code == 403
    assert count(session, Image) == 2


def test_a_deleted_image_can_be_withdrawn_later_with_the_scope_admin(
    keyed_client: Client, session: Session, image: Image
) -> None:
    output = drawn_from(session, image.id, owner="mine")
    writer, admin = a_key(session, "corpus:write", owner="mine"), a_key(session, "corpus:write", "admin", owner="mine")
    assert keyed_client.delete(f"{API}/images/{image.id}", headers=writer).status_code == 204
    assert withdraw(keyed_client, image.id, writer).status_code == 404
    assert withdraw(keyed_client, image.id, admin).json["outputs"] == 1
    assert is_withdrawn(session, output)
    assert withdraw(keyed_client, uuid4(), admin).status_code == 404


def test_the_scope_admin_does_not_open_private_collections(keyed_client: Client, session: Session) -> None:
    theirs = collections.ensure(session, "theirs", owner_id=owners.ensure(session, "theirs"))
    private = make_image(session, collection_id=theirs.id)
    drawn_from(session, private.id, owner="theirs")
    assert withdraw(keyed_client, private.id, a_key(session, "corpus:write", "admin", owner="mine")).status_code == 404


# --- imports, jobs and withdrawals at the same time ---------------------------------------------------------------


def test_an_import_that_began_before_a_withdrawal_adds_nothing_of_it(
    client: Client, session: Session, tmp_path: Path
) -> None:
    files = {"file": (io.BytesIO(picture()), "a.png")}
    image_id = UUID(client.post(f"{API}/upload", data=files).json["images"][0]["id"])
    assert export("corpus", str(tmp_path / "corpus"))["images"] == 1
    withdrawals.lock(session)
    withdrawals.withdraw(session, [image_id], cause_id=image_id, reason=REASON)
    with waiting(lambda: import_rows_of(tmp_path / "corpus")) as report:
        session.commit()
        assert report.result(10) == (0, 1)
    assert count(session, Image) == 0


def test_a_withdrawal_waits_for_an_import_of_an_output_and_takes_its_image(
    client: Client, session: Session, image: Image, output: Output, tmp_path: Path
) -> None:
    assert export("outputs", str(tmp_path / "outputs"))["images"] == 1
    again = collections.ensure(session, "again", owner_id=output.owner_id)
    session.commit()
    session.refresh(again, with_for_update={"key_share": True})
    with (
        waiting(lambda: import_rows_of(tmp_path / "outputs")) as report,
        waiting(lambda: withdraw(client, image.id), count=2) as answer,
    ):
        session.commit()
        assert report.result(10) == (1, 0)
        assert answer.result(10).json["images"] == 2
    assert count(session, Image) == 0


def import_rows_of(file: Path) -> tuple[int, int]:
    """Import a file, as the script does; return the counts of new and of withdrawn images."""
    with session_scope() as session:
        again = collections.ensure(session, "again", owner_id=owners.ensure(session, "local"))
    with open_image_file(file) as (_, _, groups):
        counts = [import_rows(rows, again.id, None) for rows in groups]
    return sum(each["new"] for each in counts), sum(each["withdrawn"] for each in counts)


def resolution_with(image_id: UUID) -> dict[str, Any]:
    return {"mode": "image_prompt", "references": [{"image_id": str(image_id), "used": True}]}


def running(session: Session) -> tuple[Job, attempts.Claim]:
    job = make_job(session, state=JobState.PROCESSING)
    session.commit()
    return job, attempts.Claim(job.id, job.attempt)


def stored(job: Job, image_id: UUID) -> attempts.StoredOutput:
    output = make_output_row(job.id, job.owner_id)
    used = OutputReference(
        generation_id=output.id, position=0, image_id=image_id, sha256="ab" * 32, weight=1.0, pinned=False
    )
    return attempts.StoredOutput(output=output, references=[used])


def test_a_running_job_that_draws_from_the_image_fails_at_once(client: Client, session: Session, image: Image) -> None:
    job, claim = running(session)
    other, other_claim = running(session)
    assert one_attempt.record_resolution(session, claim, resolution_with(image.id))
    refused = {**resolution_with(image.id), "references": [{"image_id": str(image.id), "used": False}]}
    assert one_attempt.record_resolution(session, other_claim, refused)
    session.commit()
    assert withdraw(client, image.id).json["running_jobs"] == 1
    view = client.get(f"{API}/jobs/{job.id}").json
    assert (view["state"], view["error"]["code"]) == ("failed", "reference_deleted")
    assert client.get(f"{API}/jobs/{other.id}").json["state"] == "processing"


def test_a_job_that_had_loaded_the_image_before_publishes_nothing(
    client: Client, session: Session, image: Image
) -> None:
    job, claim = running(session)
    assert withdraw(client, image.id).status_code == 200
    with pytest.raises(ReferenceDeletedError):
        one_attempt.finish(session, claim, [stored(job, image.id)], timings={})
    session.rollback()
    assert count(session, Output) == 0


def test_an_output_whose_job_ends_beside_the_withdrawal_is_born_withdrawn(
    client: Client, session: Session, image: Image
) -> None:
    """The job checks its references, then the withdrawal commits, then the job: on two connections."""
    job, claim = running(session)
    new = stored(job, image.id)
    assert one_attempt.finish(session, claim, [new], timings={}), "not committed yet"
    assert withdraw(client, image.id).status_code == 200
    session.commit()
    assert client.get(f"{API}/jobs/{job.id}").json["outputs"][0]["withdrawn"]["reason"] == REASON
    assert client.get(f"{API}/generations/{new.output.id}").status_code == 410


def test_a_withdrawal_waits_for_a_job_that_is_ending_and_withdraws_its_output(
    client: Client, session: Session, image: Image
) -> None:
    job, claim = running(session)
    assert one_attempt.record_resolution(session, claim, resolution_with(image.id))
    session.commit()
    new = stored(job, image.id)
    assert one_attempt.finish(session, claim, [new], timings={}), "not committed yet: its row is locked"
    with waiting(lambda: withdraw(client, image.id)) as answer:
        session.commit()
        assert answer.result(10).json["running_jobs"] == 0
    view = client.get(f"{API}/jobs/{job.id}").json
    assert (view["state"], view["outputs"][0]["withdrawn"]["reason"]) == ("succeeded", REASON)


def test_a_withdrawal_waits_for_an_output_that_is_being_remembered_and_takes_it(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    withdrawals.delay_withdrawals(session)
    withdrawals.refuse_withdrawn(session, output.id)
    made = make_image(session)
    withdrawals.record_sources(session, made.id, generation_id=output.id)
    with waiting(lambda: withdraw(client, image.id)) as answer:
        session.commit()
        assert answer.result(10).json["images"] == 2
    assert count(session, Image) == 0


def test_an_output_that_is_being_withdrawn_cannot_be_remembered_any_more(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    withdrawals.lock(session)
    withdrawals.withdraw(session, [image.id], cause_id=image.id, reason=REASON)
    with waiting(lambda: client.post(f"{API}/generations/{output.id}/remember")) as answer:
        session.commit()
        assert answer.result(10).status_code == 410
    assert count(session, Image) == 0


def test_a_withdrawal_locks_images_in_one_order_with_embed_workers(
    client: Client, session: Session, image: Image
) -> None:
    """It holds no image while it waits for the one with the lowest id, so the two cannot wait for each other."""
    made = [make_image(session) for _ in range(8)]
    session.add_all(DerivedImage(image_id=each.id, source_id=image.id) for each in made)
    session.commit()
    every = sorted([image.id, *(each.id for each in made)])
    session.scalars(select(Image.id).where(Image.id == every[0]).with_for_update()).one()
    with waiting(lambda: withdraw(client, image.id)) as answer:
        with session_scope() as observer:
            free = select(Image.id).where(Image.id.in_(every[1:])).with_for_update(skip_locked=True)
            assert len(observer.scalars(free).all()) == len(every) - 1
        session.commit()
        assert answer.result(10).json["images"] == len(every)


def test_a_worker_that_draws_while_the_image_is_withdrawn_publishes_nothing(
    client: Client,
    session: Session,
    models: Models,
    model: RecordingGenerator,
    leases: JobLeases,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference_id = add_embedded_image(session, models, "red", "a face")
    job = make_job(session, references=[PinnedReference(image_id=reference_id)])
    session.commit()
    answers: list[Any] = []
    monkeypatch.setattr(model, "before", lambda: answers.append(withdraw(client, reference_id)))
    outcome = run_job(job.id, models=models, leases=leases, settings=settings, worker="w")
    assert [answer.json["running_jobs"] for answer in answers] == [1]
    assert outcome is Outcome.LOST
    view = client.get(f"{API}/jobs/{job.id}").json
    assert (view["state"], view["error"]["code"], view["outputs"]) == ("failed", "reference_deleted", [])


# --- pictures of requests that are outputs ------------------------------------------------------------------------


@pytest.mark.parametrize("first_is_deleted", [False, True])
def test_an_output_used_as_a_picture_is_followed(
    client: Client, session: Session, image: Image, output: Output, first_is_deleted: bool
) -> None:
    file = picture("navy")
    output.sha256 = hashlib.sha256(file).hexdigest()
    session.commit()
    body = {"prompt": "again", "reference_images": [{"data": base64.b64encode(file).decode()}]}
    job = client.post(f"{API}/rag/generate", json=body).json
    (sent,) = job["reference_images"]
    second = drawn_from(session, UUID(sent["id"]), number=11)
    session.execute(update(OutputReference).where(OutputReference.generation_id == second.id).values(kind="request"))
    session.commit()
    remembered = client.post(f"{API}/generations/{second.id}/remember").json
    third = drawn_from(session, UUID(remembered["id"]), number=12)
    if first_is_deleted:
        assert client.delete(f"{API}/generations/{output.id}").status_code == 204
    row = session.get_one(ReferenceImage, UUID(sent["id"]))
    keys = [row.blob_key, row.thumbnail_key]
    assert list_unneeded(session, keys) == []
    assert client.get(sent["content_url"]).headers["Cache-Control"] == "private, no-cache"

    assert withdraw(client, image.id).json["outputs"] == (2 if first_is_deleted else 3)
    assert is_withdrawn(session, second)
    assert is_withdrawn(session, third)
    assert client.get(f"{API}/images/{remembered['id']}").status_code == 404
    for address in (sent["content_url"], sent["thumbnail_url"]):
        answer = client.get(address)
        assert (answer.status_code, answer.json["code"]) == (410, "output_withdrawn")
    assert list_unneeded(session, keys) == keys, "the sweeper deletes the files"
    assert client.post(f"{job['url']}/cancel").status_code == 200
    again = [client.post(f"{job['url']}/retry")]
    if not first_is_deleted:
        again.append(client.post(f"{API}/rag/generate", json=body))
    for answer in again:
        assert (answer.status_code, answer.json["code"]) == (422, "reference_unavailable")
        assert "withdrawn" in answer.json["detail"]


def test_a_copy_of_a_picture_follows_the_same_images(
    client: Client, session: Session, image: Image, output: Output
) -> None:
    file = picture("navy")
    output.sha256 = hashlib.sha256(file).hexdigest()
    session.commit()
    body = {"prompt": "again", "reference_images": [{"data": base64.b64encode(file).decode()}]}
    job = client.post(f"{API}/rag/generate", json=body).json
    assert client.post(f"{job['url']}/cancel").status_code == 200
    retried = client.post(f"{job['url']}/retry").json
    assert client.delete(f"{API}/generations/{output.id}").status_code == 204
    (copied,) = retried["reference_images"]
    assert client.get(copied["content_url"]).status_code == 200
    assert withdraw(client, image.id).status_code == 200
    assert client.get(copied["content_url"]).status_code == 410
