"""The blob store, on a real folder and on a real S3-compatible server."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from shared.contracts.common import ImageFormat
from shared.errors import ConfigurationError, ResourceNotFoundError, StorageError
from shared.settings import StorageSettings
from shared.storage import PROJECT, Blobs, image_key, local_folder, output_key, output_thumbnail_key, thumbnail_key

JOB = UUID("0192d1f8-0000-7000-8000-000000000001")
SHA = "ab" * 32


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _s3_settings(endpoint: str, *, bucket: str = "images", timeout_s: float = 5) -> StorageSettings:
    options = {
        "endpoint": endpoint,
        "region": "us-east-1",
        "access_key_id": "test",
        "secret_access_key": "test",
    }
    return StorageSettings(
        url=f"s3://{bucket}/some/prefix",
        options={name: SecretStr(value) for name, value in options.items()},
        timeout_s=timeout_s,
    )


@pytest.fixture(params=["folder", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return Blobs(StorageSettings(url=f"file://{tmp_path}/blobs"))
    endpoint = request.getfixturevalue("s3_endpoint")
    _create_bucket(endpoint)
    return Blobs(_s3_settings(endpoint))


def _s3_client(endpoint: str) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def _create_bucket(endpoint: str) -> None:
    with closing(_s3_client(endpoint)) as client:
        client.create_bucket(Bucket="images")
        for item in client.list_objects_v2(Bucket="images").get("Contents", []):
            client.delete_object(Bucket="images", Key=item["Key"])


def test_a_blob_is_read_back_as_it_was_written(blobs: Blobs) -> None:
    blobs.put("images/a.png", b"pixels", media_type="image/png")
    assert blobs.get("images/a.png") == b"pixels"
    assert blobs.exists("images/a.png")
    assert not blobs.exists("images/b.png")


def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    blobs.put("images/empty", b"", media_type="image/png")
    assert blobs.get("images/empty") == b""
    assert b"".join(blobs.stream("images/empty")) == b""


def test_a_second_put_replaces_the_first(blobs: Blobs) -> None:
    blobs.put("a", b"first, longer", media_type="image/png")
    blobs.put("a", b"second", media_type="image/png")
    assert blobs.get("a") == b"second"


def test_a_large_blob_streams_in_small_chunks(blobs: Blobs) -> None:
    data = os.urandom(3 * 2**20 + 17)
    blobs.put("big", data, media_type="image/png")
    chunks = list(blobs.stream("big"))
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= 2**20


def test_a_missing_key_is_not_found_before_the_first_chunk(blobs: Blobs) -> None:
    with pytest.raises(ResourceNotFoundError):
        blobs.get("nothing/here")
    with pytest.raises(ResourceNotFoundError):
        blobs.stream("nothing/here")
    assert blobs.info("nothing/here") is None


def test_delete_is_idempotent(blobs: Blobs) -> None:
    blobs.put("a", b"1", media_type="image/png")
    blobs.delete("a")
    blobs.delete("a")
    assert not blobs.exists("a")


def test_deleting_many_keys_ignores_missing_ones(blobs: Blobs) -> None:
    for key in ("a/1", "a/2", "a/3", "b/1"):
        blobs.put(key, b"1", media_type="image/png")
    blobs.delete_all(["a/1", "a/0", "a/3"])
    blobs.delete_all(["b/2"])
    assert {blob.key for blob in blobs.list("")} == {"a/2", "b/1"}


def test_list_gives_the_sizes_and_times_of_one_folder(blobs: Blobs) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    for key in ("outputs/a/1", "outputs/a/2", "outputs/ab/1", "images/a"):
        blobs.put(key, b"12345", media_type="image/png")
    found = {blob.key: blob for blob in blobs.list("outputs/a")}
    assert set(found) == {"outputs/a/1", "outputs/a/2"}
    assert {blob.size_bytes for blob in found.values()} == {5}
    assert all(before <= blob.last_modified <= datetime.now(UTC) + timedelta(seconds=2) for blob in found.values())
    assert list(blobs.list("absent/")) == []


def test_check_passes_on_a_working_store(blobs: Blobs) -> None:
    blobs.check()


def test_concurrent_puts_of_the_same_content_leave_it_whole(blobs: Blobs) -> None:
    data = os.urandom(200_000)
    threads = [
        threading.Thread(target=blobs.put, args=("same", data), kwargs={"media_type": "image/png"}) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blobs.get("same") == data
    assert [blob.key for blob in blobs.list("")] == ["same"]


def test_the_s3_object_carries_its_media_type(s3_endpoint: str) -> None:
    _create_bucket(s3_endpoint)
    Blobs(_s3_settings(s3_endpoint)).put("a.webp", b"x", media_type="image/webp")
    with closing(_s3_client(s3_endpoint)) as client:
        assert client.head_object(Bucket="images", Key="some/prefix/a.webp")["ContentType"] == "image/webp"


def test_an_unreachable_server_is_a_storage_error_in_bounded_time() -> None:
    blobs = Blobs(_s3_settings("http://127.0.0.1:9", timeout_s=1))
    started = datetime.now(UTC)
    with pytest.raises(StorageError):
        blobs.put("a", b"1", media_type="image/png")
    with pytest.raises(StorageError):
        blobs.get("a")
    with pytest.raises(StorageError):
        blobs.check()
    assert datetime.now(UTC) - started < timedelta(seconds=20)


def test_a_missing_bucket_is_a_storage_error_and_not_a_missing_key(s3_endpoint: str) -> None:
    blobs = Blobs(_s3_settings(s3_endpoint, bucket="nobody-made-this"))
    with pytest.raises(StorageError):
        blobs.put("a", b"1", media_type="image/png")
    with pytest.raises(StorageError):
        blobs.get("a")


def test_an_error_message_does_not_show_the_path(tmp_path: Path) -> None:
    blobs = Blobs(StorageSettings(url=f"file://{tmp_path}/blobs"))
    (tmp_path / "blobs" / "a").write_bytes(b"a file where a folder is needed")
    with pytest.raises(StorageError) as caught:
        blobs.put("a/b", b"1", media_type="image/png")
    assert str(tmp_path) not in str(caught.value.body())


def test_a_deleted_folder_fails_the_check(tmp_path: Path) -> None:
    blobs = Blobs(StorageSettings(url=f"file://{tmp_path}/blobs"))
    (tmp_path / "blobs").rmdir()
    with pytest.raises(StorageError):
        blobs.check()


@pytest.mark.parametrize("key", ["../outside", "a/../../outside", "a//b", "."])
def test_no_key_leads_out_of_the_folder(tmp_path: Path, key: str) -> None:
    blobs = Blobs(StorageSettings(url=f"file://{tmp_path}/blobs"))
    with pytest.raises(ValueError, match="path"):
        blobs.put(key, b"1", media_type="image/png")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_deleting_the_last_output_of_a_job_removes_its_folder(tmp_path: Path) -> None:
    blobs = Blobs(StorageSettings(url=f"file://{tmp_path}/blobs"))
    key = output_key(JOB, attempt=1, index=0, image_format=ImageFormat.PNG)
    blobs.put(key, b"1", media_type="image/png")
    blobs.delete(key)
    assert list((tmp_path / "blobs").rglob("*")) == []


WRITER = """
import sys
from shared.settings import StorageSettings
from shared.storage import Blobs
blobs = Blobs(StorageSettings(url=sys.argv[1]))
data = b"x" * (32 * 2**20)
print("ready", flush=True)
for n in range(10_000):
    blobs.put(f"keys/{n}", data, media_type="image/png")
"""


def test_a_killed_writer_leaves_no_partial_blob(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/blobs"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, cwd=PROJECT)
    assert writer.stdout is not None
    writer.stdout.readline()
    blobs = Blobs(StorageSettings(url=url))
    while not blobs.exists("keys/1"):
        assert writer.poll() is None
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert {blob.size_bytes for blob in blobs.list("keys")} == {32 * 2**20}


def test_keys_differ_by_attempt_format_and_kind() -> None:
    keys = [
        image_key(SHA, ImageFormat.PNG, b"1"),
        image_key(SHA, ImageFormat.WEBP, b"1"),
        thumbnail_key(SHA, b"1"),
        *(
            output_key(JOB, attempt=attempt, index=index, image_format=image_format)
            for attempt in (1, 2, 11)
            for index in (0, 1, 11)
            for image_format in ImageFormat
        ),
        *(output_thumbnail_key(JOB, attempt=attempt, index=index) for attempt in (1, 2, 11) for index in (0, 1, 11)),
    ]
    assert len(set(keys)) == len(keys)


def test_a_relative_url_means_the_same_folder_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = local_folder("file://var/blobs")
    monkeypatch.chdir(tmp_path)
    assert local_folder("file://var/blobs") == here == PROJECT / "var" / "blobs"
    assert local_folder("file:///srv/blobs") == Path("/srv/blobs")
    assert local_folder("file:///srv/my%20blobs") == Path("/srv/my blobs")


@pytest.mark.parametrize("url", ["nonsense://x", "not a url", "file:///proc/no-such-folder"])
def test_a_url_that_cannot_be_opened_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"storage\.url"):
        Blobs(StorageSettings(url=url))


def test_an_unknown_store_option_is_a_configuration_error_without_its_value() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Blobs(StorageSettings(url="s3://bucket", options={"acess_key": SecretStr("hunter2")}))
    assert "hunter2" not in str(caught.value)
