"""Image bytes by key, on the folder, S3, GCS or Azure that `settings.storage.url` names.

Every layout decision of the store is in the key functions. A key is written once and never changed in place: corpus
keys are named after their content, output keys contain the attempt. Nothing here deletes on its own.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from uuid import UUID

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from shared.contracts.common import ImageFormat
from shared.errors import ConfigurationError, ResourceNotFoundError, StorageError
from shared.settings import StorageSettings, get_settings
from shared.singleton import once

IMAGES = "images/"
THUMBNAILS = "thumbnails/"
OUTPUTS = "outputs/"

CONTENT_KEY = re.compile(rf"(?:{IMAGES}|{THUMBNAILS})[0-9a-f]{{2}}/([0-9a-f]{{64}})\.[a-z]+")
ATTEMPT_KEY = re.compile(rf"{OUTPUTS}([0-9a-f-]{{36}})/(\d+)/\d+(?:\.thumbnail)?\.[a-z]+")
LEFTOVER = re.compile(r"#\d+$")

PROJECT = Path(__file__).resolve().parent.parent
STREAM_CHUNK_BYTES = 256 * 1024
# obstore takes these apart from a store's own options, and panics when they arrive among them.
CLIENT_OPTIONS = ("allow_http", "proxy_url", "root_certificate")


def image_key(sha256: str, image_format: ImageFormat) -> str:
    """Where a corpus image lies. `sha256` is of the upload, in hex; equal uploads share one blob."""
    return f"{IMAGES}{sha256[:2]}/{sha256}.{image_format.value}"


def thumbnail_key(sha256: str) -> str:
    return f"{THUMBNAILS}{sha256[:2]}/{sha256}.webp"


def output_key(job_id: UUID, *, attempt: int, index: int, image_format: ImageFormat) -> str:
    """Where one generated image lies; two attempts at a job never write the same key."""
    return f"{OUTPUTS}{job_id}/{attempt}/{index}.{image_format.value}"


def output_thumbnail_key(job_id: UUID, *, attempt: int, index: int) -> str:
    return f"{OUTPUTS}{job_id}/{attempt}/{index}.thumbnail.webp"


def content_of(key: str) -> str | None:
    """The sha256 in the key of a corpus image or of its thumbnail; None for any other key."""
    match = CONTENT_KEY.fullmatch(key)
    return match[1] if match else None


def attempt_of(key: str) -> tuple[UUID, int] | None:
    """Job and attempt in the key of an output or of its thumbnail; None for any other key."""
    match = ATTEMPT_KEY.fullmatch(key)
    return (UUID(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class BlobInfo:
    key: str
    size_bytes: int
    last_modified: datetime
    """Of the latest `put`, with time zone."""


class Blobs:
    """The blob store. Safe to share between threads.

    Every method raises StorageError when the store itself fails; nothing here waits longer than a few times
    `StorageSettings.timeout_s`.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._root: Path | None = None
        try:
            if settings.url.startswith("file://"):
                self._root = local_folder(settings.url)
                self._store: Any = LocalStore(self._root, mkdir=True, automatic_cleanup=True)
            else:
                self._store = _remote(settings)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigurationError(f"storage.url: cannot open the blob store: {_first_line(error)}") from error

    def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """Store `data` under `key`, whole or not at all; what was there is replaced and `last_modified` renewed.

        In a folder the bytes are written beside the key, renamed onto it, and forced to disk before this returns.
        A process killed in between leaves a `<key>#<n>` file, which only `delete_leftovers` sees.
        """
        # One request, however large: a multipart upload that is killed stays in the bucket, invisible and billed.
        attributes = None if self._root else {"Content-Type": media_type}
        with _faults("put", key, missing_is_fault=True):
            obstore.put(self._store, key, data, attributes=attributes, use_multipart=False)
            if self._root:
                _force_to_disk(self._root / key)

    def get(self, key: str) -> bytes:
        """The bytes under `key`.

        Raises:
            ResourceNotFoundError: nothing is stored there.
        """
        with _faults("get", key):
            return bytes(obstore.get(self._store, key).bytes())

    def stream(self, key: str) -> Iterator[bytes]:
        """The bytes under `key` in chunks of about 256 KiB, never the whole object in memory.

        Raises:
            ResourceNotFoundError: nothing is stored there (at the call, not at the first chunk).
        """
        with _faults("get", key):
            chunks = iter(obstore.get(self._store, key).stream(min_chunk_size=STREAM_CHUNK_BYTES))
        return _each_chunk(chunks, key)

    def info(self, key: str) -> BlobInfo | None:
        """Size and age of the blob under `key`; None when there is none."""
        try:
            with _faults("head", key):
                return _info(obstore.head(self._store, key))
        except ResourceNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.info(key) is not None

    def delete(self, key: str) -> None:
        """Remove the blob under `key`; nothing there is fine."""
        try:
            with _faults("delete", key):
                obstore.delete(self._store, key)
        except ResourceNotFoundError:
            pass

    def delete_all(self, keys: Sequence[str]) -> None:
        """Remove the blobs under these keys, in one request where the store can; nothing there is fine."""
        try:
            with _faults("delete", keys[0]):
                obstore.delete(self._store, keys)
        except ResourceNotFoundError:
            # A folder stops at the first that is missing.
            for key in keys:
                self.delete(key)

    def delete_leftovers(self, *, older_than: datetime) -> int:
        """Remove what killed processes left half written in a folder; how many files. Other stores leave nothing."""
        removed = 0
        for folder, _, names in os.walk(self._root) if self._root else ():
            for path in (Path(folder, name) for name in names if LEFTOVER.search(name)):
                with _faults("delete", path.name), suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than.timestamp():
                        path.unlink()
                        removed += 1
        return removed

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        """Every blob whose key starts with the folder `prefix`, in no order, fetched a thousand at a time.

        A prefix means whole path segments: `outputs/a` does not list `outputs/ab/...`.
        """
        with _faults("list", prefix):
            pages = obstore.list(self._store, prefix, chunk_size=1000)
        while True:
            with _faults("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            yield from map(_info, page)

    def check(self) -> None:
        """Ask the store for one key, for health answers. Raises StorageError when it does not answer."""
        if self._root and not os.access(self._root, os.W_OK):
            raise StorageError("The blob store's folder is gone or cannot be written.")
        next(self.list("health"), None)


@once
def get_blobs() -> Blobs:
    """The blob store of this process, opened at first use."""
    return Blobs(get_settings().storage)


def local_folder(url: str) -> Path:
    """The folder a `file://` URL names.

    Two slashes and no host is what people write, so `file://var/blobs` is read as a relative path. It starts at the
    folder that holds this package (the clone), not at the current directory: every process of an installation then
    means the same folder. `file:///srv/blobs` is absolute.
    """
    parts = urlsplit(url)
    return PROJECT / unquote(parts.netloc + parts.path)


def _remote(settings: StorageSettings) -> Any:
    options = {name.lower(): value.get_secret_value() for name, value in settings.options.items()}
    client: dict[str, Any] = {name: options.pop(name) for name in CLIENT_OPTIONS if name in options}
    if any(options.get(name, "").startswith("http://") for name in ("endpoint", "aws_endpoint")):
        client.setdefault("allow_http", True)
    timeout = timedelta(seconds=settings.timeout_s)
    return from_url(
        settings.url,
        config=options,  # type: ignore[call-overload]
        client_options={**client, "timeout": timeout, "connect_timeout": min(timeout, timedelta(seconds=5))},
        retry_config={"max_retries": 3, "retry_timeout": timeout},
    )


@contextmanager
def _faults(operation: str, key: str, *, missing_is_fault: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # A put answered by "not found" has lost its bucket, not its key.
        if missing_is_fault or "NoSuchBucket" in str(error):
            raise StorageError(f"The blob store failed at {operation}.") from error
        raise ResourceNotFoundError("The stored file is gone.", key=key) from error
    except (BaseError, OSError) as error:
        # Its text names hosts and folders, so it stays in the cause, for the log.
        raise StorageError(f"The blob store failed at {operation}.") from error


def _each_chunk(chunks: Iterator[Any], key: str) -> Iterator[bytes]:
    while True:
        with _faults("get", key):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield bytes(chunk)


def _info(meta: Any) -> BlobInfo:
    return BlobInfo(key=meta["path"], size_bytes=meta["size"], last_modified=meta["last_modified"])


def _force_to_disk(path: Path) -> None:
    """The row that names a blob survives a power cut, so must the blob (1.3 ms on the machine this was written on)."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
