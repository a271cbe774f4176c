"""Download bytes into a file that is complete or does not exist."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

from afterimage_client.connection import Connection, translate_transport_errors
from afterimage_client.errors import CorruptDownloadError

PARTIAL_SUFFIX = ".part"
"""Suffix of an unfinished file, whose name starts with a dot. A killed process may leave such a file."""


def download_file(
    connection: Connection, path: str, target: Path, *, sha256: str | None = None, size_bytes: int | None = None
) -> None:
    """Download `path` into `target`, which appears only when all bytes have arrived and are correct.

    Raises:
        CorruptDownloadError: size or digest were wrong in every try.
        ProblemError: the service answered with an error.
        UnreachableError: no answer came.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    connection.retry(lambda: _download_once(connection, path, target, sha256, size_bytes))


def download_bytes(connection: Connection, path: str, *, sha256: str | None = None) -> bytes:
    """Download `path` into memory; raises as `download_file` does."""

    def attempt() -> bytes:
        data = connection.send_once("GET", path).content
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise CorruptDownloadError(f"{path}: the sha256 of the bytes is not the announced one")
        return data

    return connection.retry(attempt)


def is_complete(target: Path, *, sha256: str) -> bool:
    """Return whether the file exists with exactly these bytes."""
    try:
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _download_once(connection: Connection, path: str, target: Path, sha256: str | None, size_bytes: int | None) -> None:
    # In the folder of the target, because a rename is atomic only within one file system.
    part = target.with_name(f".{uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with part.open("xb") as file:
            digest = hashlib.sha256()
            for chunk in _chunks(connection, path):
                digest.update(chunk)
                file.write(chunk)
            if size_bytes is not None and file.tell() != size_bytes:
                raise CorruptDownloadError(f"{path}: {file.tell()} bytes arrived instead of {size_bytes}")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CorruptDownloadError(f"{path}: the sha256 of the bytes is not the announced one")
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _chunks(connection: Connection, path: str) -> Iterator[bytes]:
    with closing(connection.open("GET", path)) as response, translate_transport_errors("GET", path):
        yield from response.iter_bytes()
