"""Backup and restore on a real database and real stores: complete, intact, and never into something that is in use."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from uuid import UUID, uuid4

import boto3
import pytest
from moto.server import ThreadedMotoServer
from sqlalchemy import create_engine, delete, make_url, select, text
from sqlalchemy.orm import Session

from ops.backup import database
from ops.backup.backup_folder import Backup, BackupError, complete_backups, only_user
from ops.backup.create import create
from ops.backup.prune import prune
from ops.backup.restore import restore
from ops.backup.verify import verify
from ops.local.stack import LocalStack
from shared import blob_sweeper
from shared.cache import get_cache_manager
from shared.contracts.common import ImageFormat
from shared.db import blobs as blob_rows
from shared.db.session import session_scope
from shared.db.tables import Image, Job
from shared.settings import Settings
from shared.storage import get_blobs, image_key, output_key, output_thumbnail_key, thumbnail_key
from tests.conftest import forget_process_resources
from tests.factories import make_image, make_job
from tests.integration.test_jobs import an_output

IMAGES = 5
DAY_S = 86_400.0


def store(key: str, data: bytes) -> None:
    get_blobs().put(key, data, media_type="image/png")


def corpus_image(session: Session, name: str, *, vector: list[float] | None = None) -> Image:
    data, thumbnail = f"bytes of {name}".encode(), f"thumbnail of {name}".encode()
    digest = sha256(data).hexdigest()
    keys = image_key(digest, ImageFormat.PNG, data), thumbnail_key(digest, thumbnail)
    store(keys[0], data)
    store(keys[1], thumbnail)
    return make_image(session, sha256=digest, blob_key=keys[0], thumbnail_key=keys[1], caption=name, vector=vector)


def output_of(session: Session, job: Job) -> str:
    """Store an output of the job; return its key."""
    key = output_key(job.id, attempt=1, index=0, image_format=ImageFormat.PNG)
    thumbnail = output_thumbnail_key(job.id, attempt=1, index=0)
    store(key, b"an output")
    store(thumbnail, b"its thumbnail")
    stored = an_output(job)
    stored.output.blob_key, stored.output.thumbnail_key = key, thumbnail
    stored.output.sha256 = sha256(b"an output").hexdigest()
    session.add(stored.output)
    session.flush()
    session.add_all(stored.references)
    return key


@pytest.fixture
def installation(session: Session) -> str:
    """Images with vectors, and a job with one output, whose key it is."""
    for number in range(IMAGES):
        corpus_image(session, f"image {number}", vector=[1.0, float(number), *[0.0] * 14])
    key = output_of(session, make_job(session))
    store("outputs/no-row/1/0.png", b"of an attempt that died")
    session.commit()
    return key


@pytest.fixture
def backup(installation: str, tmp_path: Path) -> Backup:
    return create(tmp_path / "backups", copies_blobs=True, programs=None)


@contextmanager
def empty_database(servers: LocalStack) -> Iterator[str]:
    server = make_url(servers.environment()["AFTERIMAGE_DATABASE__URL"])
    name = f"restored_{uuid4().hex[:8]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
        yield server.set(database=name).render_as_string(hide_password=False)
        connection.execute(text(f"drop database {name} with (force)"))
    engine.dispose()


@pytest.fixture
def elsewhere(servers: LocalStack, backup: Backup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let this process use an empty database and an empty folder, which it is. The backup was made before."""
    with empty_database(servers) as url:
        monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", url)
        monkeypatch.setenv("AFTERIMAGE_STORAGE__URL", f"file://{tmp_path}/restored")
        forget_process_resources()
        yield tmp_path / "restored"
        forget_process_resources()


def stored() -> dict[str, bytes]:
    return {info.key: get_blobs().get(info.key) for info in get_blobs().list("")}


def content() -> list[tuple[UUID, str | None, str]]:
    with session_scope() as session:
        images = session.execute(select(Image.id, Image.caption, Image.state).order_by(Image.id))
        return [(row.id, row.caption, row.state) for row in images]


def test_a_restore_gives_the_same_rows_vectors_and_blobs(
    servers: LocalStack, backup: Backup, installation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, blobs = content(), stored()
    with session_scope() as session:
        vectors = session.execute(text("select * from vectors_1 order by image_id")).all()
    get_cache_manager().set("an answer", 1)
    with empty_database(servers) as url:
        monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", url)
        monkeypatch.setenv("AFTERIMAGE_STORAGE__URL", f"file://{tmp_path}/restored")
        forget_process_resources()
        manifest = restore(backup, programs=None)
        assert content() == rows
        with session_scope() as session:
            assert session.execute(text("select * from vectors_1 order by image_id")).all() == vectors
            indexes = session.scalars(text("select indexname from pg_indexes where tablename = 'vectors_1'")).all()
            assert "ix_vectors_1_embedding" in indexes
        # The blob that no row names is left out.
        assert stored() == {key: data for key, data in blobs.items() if "no-row" not in key}
        assert manifest.rows["images"] == IMAGES
        assert manifest.blobs == 2 * IMAGES + 2
        assert get_cache_manager().get("an answer") is None
        forget_process_resources()


def test_a_backup_is_verified_byte_by_byte(backup: Backup, installation: str) -> None:
    assert verify(backup, programs=None) == {}
    path = backup.path.parent / "blobs" / installation
    path.write_bytes(path.read_bytes().replace(b"an", b"AN"))
    assert verify(backup, programs=None) == {installation: "damaged"}
    path.unlink()
    assert verify(backup, programs=None) == {installation: "missing"}
    with backup.database.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(BackupError, match=r"database.dump is damaged"):
        verify(backup, programs=None)


def test_blobs_that_a_row_names_and_the_store_lacks_are_reported(installation: str, tmp_path: Path) -> None:
    (thumbnail,) = (key for key in stored() if key.startswith("outputs/") and "thumbnail" in key)
    store(installation, b"other bytes")
    get_blobs().delete(thumbnail)
    backup = create(tmp_path / "backups", copies_blobs=True, programs=None)
    assert backup.manifest().problems == {installation: "damaged", thumbnail: "missing"}
    assert verify(backup, programs=None) == backup.manifest().problems


def test_no_sweeper_deletes_a_blob_of_a_row_that_is_deleted_during_a_backup(session: Session) -> None:
    image = corpus_image(session, "soon deleted")
    key = image.blob_key
    session.commit()
    with database.deletions_paused():
        with database.snapshot() as now:
            session.execute(delete(Image))
            session.commit()
            swept = blob_sweeper.sweep(get_blobs(), older_than_s=0)
            assert key in {name for name, _ in blob_rows.iterate_named(now.session)}
        assert (swept.blobs, swept.stopped_by_backup) == (0, True)
        assert get_blobs().exists(key)
    assert blob_sweeper.sweep(get_blobs(), older_than_s=0).blobs == 2
    assert not get_blobs().exists(key)


def test_a_backup_waits_for_a_deletion_and_for_another_backup(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_WAIT_S", 1)
    with session_scope() as session:
        assert blob_rows.may_delete(session)
        with pytest.raises(BackupError, match="Another backup"), database.deletions_paused():
            pass
    with database.deletions_paused(), pytest.raises(BackupError, match="Another backup"), database.deletions_paused():
        pass
    with database.deletions_paused():
        pass


def test_a_later_backup_copies_only_new_blobs_and_pruning_keeps_what_it_needs(backup: Backup, session: Session) -> None:
    folder = backup.path.parent
    copies = {path: path.stat().st_mtime_ns for path in (folder / "blobs").rglob("*") if path.is_file()}
    (gone,) = session.scalars(delete(Image).where(Image.caption == "image 0").returning(Image.blob_key))
    added = corpus_image(session, "new").blob_key
    session.commit()
    second = create_later(folder, backup)
    assert {path: path.stat().st_mtime_ns for path in copies} == copies
    assert (folder / "blobs" / added).exists()
    (folder / "20200101T000000Z.partial").mkdir()
    with only_user(folder), pytest.raises(BackupError, match="Another command"):
        prune(folder, keep=2)
    assert prune(folder, keep=2) == (1, 0)
    assert prune(folder, keep=1) == (1, 2)
    assert [each.name for each in complete_backups(folder)] == [second.name]
    assert not (folder / "blobs" / gone).exists()
    assert verify(second, programs=None) == {}


def create_later(folder: Path, earlier: Backup) -> Backup:
    """Rename the earlier backup, because two of one second would have one name."""
    earlier.path.rename(folder / "20200101T000000Z")
    return create(folder, copies_blobs=True, programs=None)


def test_a_database_with_tables_is_refused(backup: Backup) -> None:
    with pytest.raises(BackupError, match="The database has tables"):
        restore(backup, programs=None)


def test_a_store_with_other_blobs_is_refused(backup: Backup, elsewhere: Path) -> None:
    store("images/ab/other.png", b"other")
    with pytest.raises(BackupError, match=r"not empty: it has images/ab/other.png"):
        restore(backup, programs=None)
    get_blobs().delete("images/ab/other.png")
    store(blob_sweeper.OWNER_KEY, b"1/another")
    with pytest.raises(BackupError, match="belongs to a database"):
        restore(backup, programs=None)
    assert database.is_empty()


def test_a_damaged_backup_changes_nothing_in_the_database(backup: Backup, installation: str, elsewhere: Path) -> None:
    copy = backup.path.parent / "blobs" / installation
    intact = copy.read_bytes()
    copy.write_bytes(b"other bytes")
    with pytest.raises(BackupError, match=rf"nothing was restored: {installation} \(damaged\)"):
        restore(backup, programs=None)
    assert database.is_empty()
    # The same command goes on where it stopped.
    copy.write_bytes(intact)
    restore(backup, programs=None)
    assert len(content()) == IMAGES


def test_a_backup_of_a_newer_release_is_refused(backup: Backup, elsewhere: Path) -> None:
    file = backup.path / "manifest.json"
    revision = backup.manifest().schema_revision
    file.write_text(file.read_text().replace(f'"schema_revision": "{revision}"', '"schema_revision": "9999"'))
    with pytest.raises(BackupError, match="newer release"):
        restore(backup, programs=None)


def test_a_folder_without_a_manifest_is_no_backup(backup: Backup) -> None:
    (backup.path / "manifest.json").unlink()
    with pytest.raises(BackupError, match=r"no manifest\.json"):
        verify(backup, programs=None)


def test_a_failed_dump_leaves_no_backup(installation: str, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "pg_dump").write_text(
        "#!/bin/sh\n"
        f'echo "$@" >{tmp_path}/arguments\n'
        f"printenv PGPASSWORD >{tmp_path}/password\n"
        'echo "server too new" >&2\n'
        "exit 1\n"
    )
    (programs / "pg_dump").chmod(0o755)
    with pytest.raises(BackupError, match="pg_dump failed: server too new"):
        create(tmp_path / "backups", copies_blobs=True, programs=programs)
    assert [path.name for path in (tmp_path / "backups").iterdir()] == [".lock"]
    password = (tmp_path / "password").read_text().strip()
    assert password
    assert password not in (tmp_path / "arguments").read_text()


def test_blobs_by_reference_stay_in_their_storage_and_are_compared(
    servers: LocalStack, installation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup = create(tmp_path / "backups", copies_blobs=False, programs=None)
    assert not (tmp_path / "backups" / "blobs").exists()
    assert verify(backup, programs=None) == {}
    blobs = stored()
    with empty_database(servers) as url:
        monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", url)
        forget_process_resources()
        store(installation, b"other bytes")
        with pytest.raises(BackupError, match=r"\(damaged\)"):
            restore(backup, programs=None)
        store(installation, blobs[installation])
        restore(backup, programs=None)
        assert len(content()) == IMAGES
        assert stored() == blobs
        forget_process_resources()


def test_blobs_of_a_bucket_are_backed_up_and_restored_into_another(
    servers: LocalStack, settings: Settings, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address, region = f"http://{host}:{port}", "us-east-1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", endpoint_url=address, region_name=region)
    options = {"endpoint": address, "region": region, "access_key_id": "test", "secret_access_key": "test"}
    monkeypatch.setenv("AFTERIMAGE_STORAGE__OPTIONS", json.dumps(options))
    try:
        for bucket in ("first", "second"):
            client.create_bucket(Bucket=bucket)
        monkeypatch.setenv("AFTERIMAGE_STORAGE__URL", "s3://first/prefix")
        forget_process_resources()
        corpus_image(session, "in a bucket")
        session.commit()
        backup, blobs = create(tmp_path / "backups", copies_blobs=True, programs=None), stored()
        with empty_database(servers) as url:
            monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", url)
            monkeypatch.setenv("AFTERIMAGE_STORAGE__URL", "s3://second/prefix")
            forget_process_resources()
            restore(backup, programs=None)
            assert stored() == blobs
            assert len(blobs) == 2
            forget_process_resources()
    finally:
        server.stop()


def test_the_manifest_says_which_release_and_schema_it_has(backup: Backup) -> None:
    manifest = backup.manifest()
    with session_scope() as session:
        assert manifest.schema_revision == session.scalar(database.SCHEMA_REVISION)
        assert manifest.rows == database.count_rows(session)
    assert manifest.postgres.startswith("18.")
    assert (datetime.now(UTC) - manifest.created_at).total_seconds() < DAY_S
