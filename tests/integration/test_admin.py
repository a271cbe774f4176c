"""The commands of operators: dead jobs, sweeping blobs, owners and keys."""

import os
import socket
import subprocess
import sys
from uuid import UUID

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from scripts.admin.__main__ import main as admin
from shared.contracts.jobs import JobState
from shared.db import attempts, collections, owners, spaces
from shared.db.tables import ApiKey, Job, Owner
from shared.settings import Settings
from shared.storage import get_blobs, thumbnail_key
from tests.factories import SHARED_COLLECTION, make_job
from tests.integration.conftest import API, Client
from tests.integration.test_jobs import claim, let_lease_expire


def dead_job(session: Session, **details: object) -> Job:
    job = make_job(session, **details)  # type: ignore[arg-type]
    assert attempts.mark_model_started(session, claim(session, job))
    let_lease_expire(session, job)
    assert attempts.take_back_expired(session, max_crashes=1) == [job.id]
    session.commit()
    session.refresh(job)
    assert job.state == JobState.DEAD
    return job


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["admin", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    admin()


def test_dead_jobs_are_listed_and_requeued_as_new_published_jobs(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = dead_job(session, prompt="a poisoned apple", owner="snow"), dead_job(session)
    make_job(session, state=JobState.CANCELED)
    session.commit()
    run(monkeypatch, "dead-jobs")
    shown = capsys.readouterr().out
    assert [str(job.id) in shown for job in (first, second)] == [True, True]
    assert "a poisoned apple" in shown
    assert "snow" in shown

    run(monkeypatch, "requeue", str(first.id))
    (new_id,) = capsys.readouterr().out.split()
    again = session.get_one(Job, UUID(new_id))
    assert (again.state, again.retry_of, again.owner_id) == ("queued", first.id, first.owner_id)
    assert (again.crashes, again.parameters) == (0, first.parameters)
    assert again.published_at is not None, "it is published without the reconciler"

    run(monkeypatch, "requeue", "--all")
    (other_id,) = capsys.readouterr().out.split()
    assert session.get_one(Job, UUID(other_id)).retry_of == second.id, "the first was requeued already"
    run(monkeypatch, "requeue", "--all")
    assert capsys.readouterr().out == ""


def test_only_dead_jobs_are_requeued_all_or_none(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dead, queued = dead_job(session), make_job(session)
    session.commit()
    with pytest.raises(SystemExit):
        run(monkeypatch, "requeue", str(dead.id), str(queued.id))
    assert str(queued.id) in capsys.readouterr().err
    assert session.scalars(select(Job.id).where(Job.retry_of.is_not(None))).all() == []
    for wrong in (("requeue",), ("requeue", str(dead.id), "--all")):
        with pytest.raises(SystemExit):
            run(monkeypatch, *wrong)


def test_an_owner_may_retry_its_own_dead_job(session: Session, client: Client) -> None:
    job = dead_job(session)
    answer = client.post(f"{API}/jobs/{job.id}/retry")
    assert answer.status_code == 202
    assert (answer.json["state"], answer.json["retry_of"]) == ("queued", str(job.id))


def test_the_sweep_command_lists_what_it_would_remove_and_removes_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = thumbnail_key("ab" * 32, b"12345")
    get_blobs().put(key, b"12345", media_type="image/webp")
    run(monkeypatch, "sweep")
    assert capsys.readouterr().out == "0 blobs, 0 bytes, 0 half-written files\n", "too young"
    run(monkeypatch, "sweep", "--dry-run", "--older-than-s", "0")
    shown = capsys.readouterr()
    assert shown.out == f"{key}\t5\n"
    assert shown.err == "1 blobs, 5 bytes would be deleted\n"
    run(monkeypatch, "sweep", "--dry-run")
    assert capsys.readouterr().err == "0 blobs, 0 bytes would be deleted\n"
    assert get_blobs().exists(key)
    path = os.path.join(settings.storage.url.removeprefix("file://"), key)
    os.utime(path, (0, 0))
    run(monkeypatch, "sweep")
    assert capsys.readouterr().out == "1 blobs, 5 bytes, 0 half-written files\n"
    assert not get_blobs().exists(key)


def test_the_sweep_command_refuses_a_store_of_another_database(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    get_blobs().put("swept-for", b"another", media_type="text/plain")
    with pytest.raises(SystemExit):
        run(monkeypatch, "sweep")
    assert "another database" in capsys.readouterr().err
    run(monkeypatch, "sweep", "--adopt")
    run(monkeypatch, "sweep")


@pytest.mark.parametrize("name", ["", "bad\x01name", "Team A", "x" * 64])
def test_an_owner_with_an_invalid_name_is_not_created(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "create-owner", name)
    assert ended.value.code == 2
    assert "is not a valid owner name" in capsys.readouterr().err
    assert name not in session.scalars(select(Owner.name)).all()


def test_a_key_is_limited_to_collections(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "create-owner", "team-a")
    create = ("create-key", "team-a", "--name", "shop", "--scopes", "search")
    with pytest.raises(SystemExit):
        run(monkeypatch, *create, "--collections", "shared,products")
    assert "There is no collection 'products'." in capsys.readouterr().err
    owner_id = owners.ensure(session, "team-a")
    products = collections.create(session, "products", owner_id=owner_id, most=None)
    session.commit()
    run(monkeypatch, *create, "--collections", "shared,products")
    key = session.scalars(select(ApiKey)).one()
    assert key.collection_ids == [SHARED_COLLECTION, products.id]
    capsys.readouterr()
    run(monkeypatch, "list-keys")
    assert "only in: products shared" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, *create[:-1], "admin", "--collections", "shared")
    assert "cannot be limited" in capsys.readouterr().err


def test_list_keys_and_list_spaces_fit_in_80_columns(
    session: Session, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "create-owner", "team-a")
    run(monkeypatch, "create-key", "team-a", "--name", "a laptop with a long name")
    key_id = capsys.readouterr().out.split()[1]
    digest = spaces.ensure(session, digest="ab" * 32, model="ViT-B-32/laion2b_s34b_b79k", dim=512).digest
    session.commit()
    monkeypatch.setenv("COLUMNS", "80")
    for command, expected in (
        ("list-keys", (key_id, "owner: team-a", "name: a laptop with a long name", "scopes: generate search")),
        ("list-spaces", (digest, "model: ViT-B-32/laion2b_s34b_b79k", "vectors: 0, missing: 0, failed: 0")),
    ):
        monkeypatch.setattr("sys.argv", ["admin", command])
        admin()
        shown = capsys.readouterr().out
        assert all(text in shown for text in expected)
        assert max(map(len, shown.splitlines())) <= 80


def test_an_unreachable_database_is_named_without_its_password() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        url = f"postgresql+psycopg2://user:secret@{address}/corpus"
        done = subprocess.run(
            [sys.executable, "-m", "scripts.admin", "list-keys"],
            env=os.environ | {"AFTERIMAGE_DATABASE__URL": url},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert f"{address}/corpus" in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr
