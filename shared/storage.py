"""The blob store: image bytes by key, in a folder, S3, GCS or Azure, as `settings.storage.url` says.

The key functions define the layout of the store. Bytes under a key never change. The key of a corpus image names the
upload and the stored bytes. The key of an output contains the attempt. Nothing here deletes a blob unless a caller
asks for it.
"""

import hashlib
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
from shared.singleton import process_singleton

IMAGES = "images/"
THUMBNAILS = "thumbnails/"
REFERENCES = "references/"
OUTPUTS = "outputs/"

CONTENT_KEY = re.compile(
    rf"(?:{IMAGES}|{THUMBNAILS}|{REFERENCES})[0-9a-f]{{2}}/([0-9a-f]{{64}})(?:-[0-9a-f]{{32}})?(?:\.thumbnail)?\.[a-z]+"
)
"""Keys of earlier releases name only the upload."""
ATTEMPT_KEY = re.compile(rf"{OUTPUTS}([0-9a-f-]{{36}})/(\d+)/\d+(?:\.thumbnail)?\.[a-z]+")
LEFTOVER = re.compile(r"#\d+$")

PROJECT = Path(__file__).resolve().parent.parent
STREAM_CHUNK_BYTES = 256 * 1024
# obstore takes these options in a separate argument, and panics when they are among the store's own options.
CLIENT_OPTIONS = ("allow_http", "proxy_url", "root_certificate")


def image_key(sha256: str, image_format: ImageFormat, stored: bytes) -> str:
    """The key of a corpus image. Equal uploads share one blob if they were encoded to equal bytes.

    Another release may encode the same upload to other bytes. They get a key of their own, because rows may name the
    blob of the first ones. sha256: of the upload's bytes, in hex. stored: the bytes to put under the key.
    """
    return f"{IMAGES}{sha256[:2]}/{sha256}-{_digest(stored)}.{image_format.value}"


def thumbnail_key(sha256: str, stored: bytes) -> str:
    """The key of a corpus image's thumbnail, as in `image_key`."""
    return f"{THUMBNAILS}{sha256[:2]}/{sha256}-{_digest(stored)}.webp"


def reference_key(sha256: str, image_format: ImageFormat, stored: bytes) -> str:
    """The key of a picture that a request brought. It never equals that of a corpus image: see `image_key`."""
    return f"{REFERENCES}{sha256[:2]}/{sha256}-{_digest(stored)}.{image_format.value}"


def reference_thumbnail_key(sha256: str, stored: bytes) -> str:
    return f"{REFERENCES}{sha256[:2]}/{sha256}-{_digest(stored)}.thumbnail.webp"


def output_key(job_id: UUID, *, attempt: int, index: int, image_format: ImageFormat) -> str:
    """The key of a generated image. Two attempts at a job never write the same key."""
    return f"{OUTPUTS}{job_id}/{attempt}/{index}.{image_format.value}"


def output_thumbnail_key(job_id: UUID, *, attempt: int, index: int) -> str:
    return f"{OUTPUTS}{job_id}/{attempt}/{index}.thumbnail.webp"


def parse_content_key(key: str) -> str | None:
    """The sha256 of the sent file in the key of a corpus image, a request's picture or a thumbnail; None for others."""
    match = CONTENT_KEY.fullmatch(key)
    return match[1] if match else None


def parse_output_key(key: str) -> tuple[UUID, int] | None:
    """The job and the attempt in the key of an output or of its thumbnail; None for any other key."""
    match = ATTEMPT_KEY.fullmatch(key)
    return (UUID(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class BlobInfo:
    key: str
    size_bytes: int
    last_modified: datetime
    """Time of the latest `put`, with time zone."""


class Blobs:
    """The blob store. Safe to share between threads.

    Every method raises StorageError when the store itself fails. No call waits longer than a few times
    `StorageSettings.timeout_s`.

    Raises:
        ConfigurationError: the store cannot be opened.
    """

    def __init__(self, settings: StorageSettings) -> None:
        self._root: Path | None = None
        try:
            if settings.url.startswith("file://"):
                self._root = local_folder(settings.url)
                self._store: Any = LocalStore(self._root, mkdir=True, automatic_cleanup=True)
            else:
                self._store = _open_remote(settings)
        except (BaseError, OSError, ValueError) as error:
            raise ConfigurationError(f"storage.url: cannot open the blob store: {_first_line(error)}") from error

    def put(self, key: str, data: bytes, *, media_type: str) -> None:
        """Store all of `data` under `key`, or nothing. It replaces an earlier blob and renews `last_modified`.

        In a folder, the bytes are written to a temporary file `<key>#<n>`, renamed to the key, and forced to disk. When
        the process is killed in between, the temporary file remains, and only `delete_leftovers` finds it.
        """
        # One request for any size: a multipart upload that is killed stays in the bucket, invisible and billed.
        attributes = None if self._root else {"Content-Type": media_type}
        with _translated_errors("put", key, missing_is_error=True):
            obstore.put(self._store, key, data, attributes=attributes, use_multipart=False)
            if self._root:
                _fsync(self._root / key)

    def get(self, key: str) -> bytes:
        """The bytes under `key`.

        Raises:
            ResourceNotFoundError: the store has no such key.
        """
        with _translated_errors("get", key):
            return bytes(obstore.get(self._store, key).bytes())

    def stream(self, key: str, positions: range | None = None) -> Iterator[bytes]:
        """The bytes under `key` in chunks of about 256 KiB, without the whole blob in memory.

        positions: only the bytes at these positions, at least one; None: all.

        Raises:
            ResourceNotFoundError: the store has no such key. The call raises it, not the first chunk.
        """
        with _translated_errors("get", key):
            wanted = None if positions is None else {"range": (positions.start, positions.stop)}
            found = obstore.get(self._store, key, options=wanted)  # type: ignore[arg-type]
            chunks = iter(found.stream(min_chunk_size=STREAM_CHUNK_BYTES))
        return _each_chunk(chunks, key)

    def info(self, key: str) -> BlobInfo | None:
        """The size and age of the blob under `key`; None when the store has no such key."""
        try:
            with _translated_errors("head", key):
                return _info(obstore.head(self._store, key))
        except ResourceNotFoundError:
            return None

    def exists(self, key: str) -> bool:
        return self.info(key) is not None

    def delete(self, key: str) -> None:
        """Delete the blob under `key`. A missing blob is ignored."""
        try:
            with _translated_errors("delete", key):
                obstore.delete(self._store, key)
        except ResourceNotFoundError:
            pass

    def delete_all(self, keys: Sequence[str]) -> None:
        """Delete the blobs under these keys, in one request where the store supports it. A missing blob is ignored."""
        try:
            with _translated_errors("delete", keys[0]):
                obstore.delete(self._store, keys)
        except ResourceNotFoundError:
            # In a folder, obstore stops at the first missing file.
            for key in keys:
                self.delete(key)

    def delete_leftovers(self, *, older_than: datetime) -> int:
        """Delete temporary files of killed writes from a folder; return how many. Other kinds of store have none."""
        removed = 0
        for folder, _, names in os.walk(self._root) if self._root else ():
            for path in (Path(folder, name) for name in names if LEFTOVER.search(name)):
                with _translated_errors("delete", path.name), suppress(FileNotFoundError):
                    if path.stat().st_mtime < older_than.timestamp():
                        path.unlink()
                        removed += 1
        return removed

    def list(self, prefix: str) -> Iterator[BlobInfo]:
        """Yield every blob below the folder `prefix`, in no order, fetched a thousand at a time.

        A prefix consists of whole path segments: `outputs/a` does not list `outputs/ab/...`.
        """
        with _translated_errors("list", prefix):
            pages = obstore.list(self._store, prefix, chunk_size=1000)
        while True:
            with _translated_errors("list", prefix):
                page = next(pages, None)
            if page is None:
                return
            yield from map(_info, page)

    def check(self) -> None:
        """List one key, as a health check.

        Raises:
            StorageError: the store does not answer, or its folder is missing or not writable.
        """
        if self._root and not os.access(self._root, os.W_OK):
            raise StorageError("The blob store's folder is gone or cannot be written.")
        next(self.list("health"), None)


@process_singleton
def get_blobs() -> Blobs:
    """The blob store of this process, opened at first use."""
    return Blobs(get_settings().storage)


def local_folder(url: str) -> Path:
    """The folder that a `file://` URL names.

    `file:///srv/blobs` is absolute. `file://var/blobs` is a relative path, because people write it so. It is relative
    to the folder that contains this package (the clone), not to the current directory. So every process of an
    installation uses the same folder.
    """
    parts = urlsplit(url)
    return PROJECT / unquote(parts.netloc + parts.path)


def _digest(stored: bytes) -> str:
    return hashlib.sha256(stored).hexdigest()[:32]


def _open_remote(settings: StorageSettings) -> Any:
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
def _translated_errors(operation: str, key: str, *, missing_is_error: bool = False) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        # "Not found" as the answer to a put means that the bucket is missing, not the key.
        if missing_is_error or "NoSuchBucket" in str(error):
            raise StorageError(f"The blob store failed at {operation}.") from error
        raise ResourceNotFoundError("The stored file is gone.", key=key) from error
    except (BaseError, OSError) as error:
        # The original text names hosts and folders, so it is only kept as the cause, for the log.
        raise StorageError(f"The blob store failed at {operation}.") from error


def _each_chunk(chunks: Iterator[Any], key: str) -> Iterator[bytes]:
    while True:
        with _translated_errors("get", key):
            chunk = next(chunks, None)
        if chunk is None:
            return
        yield bytes(chunk)


def _info(meta: Any) -> BlobInfo:
    return BlobInfo(key=meta["path"], size_bytes=meta["size"], last_modified=meta["last_modified"])


def _fsync(path: Path) -> None:
    """Force a file to disk, because the row that names it survives a power cut too (measured: 1.3 ms)."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
