"""Bytes from the service into a file that is whole or not there."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

from afterimage_client.connection import Connection, transport_errors_named
from afterimage_client.errors import CorruptDownloadError

PART = ".part"
"""How the name of an unfinished file ends, which begins with a dot; one that is left was left by a killed process."""


def save(
    connection: Connection, path: str, target: Path, *, sha256: str | None = None, size_bytes: int | None = None
) -> None:
    """Stream what lies under `path` into `target`, which appears only when every byte is there and right.

    Raises:
        CorruptDownloadError: still, after all tries.
        ProblemError, UnreachableError
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    connection.again_while_passing(lambda: _save_once(connection, path, target, sha256, size_bytes))


def is_whole(target: Path, *, sha256: str) -> bool:
    """Whether the file is there with exactly these bytes."""
    try:
        with target.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _save_once(connection: Connection, path: str, target: Path, sha256: str | None, size_bytes: int | None) -> None:
    # Beside the target, because a rename is atomic only within a file system.
    part = target.with_name(f".{uuid4().hex}{PART}")
    try:
        with part.open("xb") as file:
            digest = hashlib.sha256()
            for chunk in _chunks(connection, path):
                digest.update(chunk)
                file.write(chunk)
            if size_bytes is not None and file.tell() != size_bytes:
                raise CorruptDownloadError(f"{path}: {file.tell()} bytes came instead of {size_bytes}")
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CorruptDownloadError(f"{path}: other bytes came than announced")
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _chunks(connection: Connection, path: str) -> Iterator[bytes]:
    with closing(connection.open("GET", path)) as response, transport_errors_named("GET", path):
        yield from response.iter_bytes()
