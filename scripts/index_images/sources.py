"""Read image files and their descriptions from a folder, a table, or a WebDataset tar."""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import sqlite3
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, cast

from scripts.table_files import FORMATS, decode_text, describe_columns, plain_newlines, read_rows

IMAGE_SUFFIXES = (".avif", ".webp", ".png", ".jpg", ".jpeg", ".jpe", ".jfif")
SIDECAR_SUFFIXES = (".json", ".txt")
FILE_COLUMNS = ("file", "path", "filename", "file_name", "image")
NOT_AN_IMAGE = "not_an_image"
DESCRIPTION_FIELDS = ("caption", "tags", "licence", "source", "attributes")
MAX_FILE_BYTES = 16 * 2**20
MAX_SIDECAR_BYTES = 2**20
MAX_TAR_HEADER_BYTES = 2**20
MAX_XZ_MEMORY_BYTES = 128 * 2**20
"""Memory of the xz decoder; the dictionary of `xz -9` needs 65 MiB."""
ORPHAN_SIDECAR = "no image has its name, so it describes nothing"

Sidecars = Mapping[str, list[str]]
"""Names of sidecar files by the name of their image without its suffix; the sidecar that is used is the first."""


class SourceError(Exception):
    """The source as a whole cannot be read."""


class SkippedFileError(Exception):
    """The file is not indexed. `code` is the reason in one word, the message says it in full."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        super().__init__(detail)


@dataclass(frozen=True)
class Sample:
    """The bytes of an image file, and its description: the `DESCRIPTION_FIELDS` that its source has."""

    filename: str
    data: bytes = field(repr=False)
    fields: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class SourceFile:
    """A file that may be an image.

    Attributes:
        name: its name in reports; unique in its source.
        read: returns the sample or raises SkippedFileError; may be called in another thread.
        stamp: changes when the file changes; None if the file must be read to find out.
        held_bytes: bytes that it holds in memory before `read` is called.
    """

    name: str
    read: Callable[[], Sample]
    stamp: str | None = None
    held_bytes: int = 0


def read_source(
    source: Path,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,  # noqa: A002
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Iterator[SourceFile]:
    """Yield every file in a folder, a tar, or a table of files.

    Args:
        columns: column by field, for columns of a table that are not named `file` or as in `DESCRIPTION_FIELDS`.
        format: of a table; None: by the suffix of its name.
        max_file_bytes: larger images are not read; their `read` raises SkippedFileError.

    Raises:
        SourceError: the tar cannot be read, is cut off or damaged, or its headers or decoder need too much memory.
        TableFileError: the table cannot be read; also in the middle.
    """
    if source.is_dir():
        yield from files_in_folder(source, max_file_bytes=max_file_bytes)
    elif format is not None or source.suffix.lower() in FORMATS:
        yield from _files_in_table(source, columns=columns or {}, format=format, max_file_bytes=max_file_bytes)
    else:
        yield from _files_in_tar(source, max_file_bytes)


def read_samples(source: Path) -> Iterator[Sample]:
    """Yield the images of a folder or a WebDataset tar with their descriptions; other files are left out.

    Raises:
        SourceError: the tar, an image or its description cannot be read.
    """
    files: Iterable[SourceFile] = read_source(source)
    if source.is_dir():
        files = sorted(files, key=lambda file: PurePosixPath(file.name))
    for file in files:
        try:
            yield file.read()
        except SkippedFileError as error:
            if error.code != NOT_AN_IMAGE:
                raise SourceError(f"{file.name}: {error}") from error


# --- a folder -----------------------------------------------------------------------------------------------------


def files_in_folder(
    folder: Path, *, below: Path | None = None, max_file_bytes: int = MAX_FILE_BYTES
) -> Iterator[SourceFile]:
    """Yield the files in `folder`, or only those in its subfolder `below`, by name; no hidden files.

    A sidecar is yielded only if no image has its name.
    """
    for parent, folders, files in os.walk(below or folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        sidecars = sidecars_among(files)
        stems = {PurePath(name).stem for name in files if is_image_name(name)}
        for name in sorted(files):
            path = Path(parent, name)
            if is_candidate(path):
                yield source_file(path, folder, sidecars, max_file_bytes=max_file_bytes)
            elif not name.startswith(".") and path.stem not in stems:
                yield _skipped_file(_printable(path.relative_to(folder).as_posix()), NOT_AN_IMAGE, ORPHAN_SIDECAR)


def is_candidate(path: Path) -> bool:
    """Return False for hidden files and sidecars; any other suffix is a candidate, so that the report lists it."""
    return not path.name.startswith(".") and path.suffix.lower() not in SIDECAR_SUFFIXES


def is_image_name(name: str) -> bool:
    return not name.startswith(".") and PurePath(name).suffix.lower() in IMAGE_SUFFIXES


def source_file(path: Path, folder: Path, sidecars: Sidecars, *, max_file_bytes: int = MAX_FILE_BYTES) -> SourceFile:
    """Return a file of `folder`; `sidecars` are those in the file's own folder."""
    own = _sidecar_paths(path, sidecars)
    return SourceFile(
        _printable(path.relative_to(folder).as_posix()),
        lambda: Sample(_printable(path.name), _image_bytes(path, max_file_bytes), _read_sidecar(own)),
        stamp=_stamp_of(path, *own),
    )


def sidecars_among(names: Iterable[str]) -> Sidecars:
    """Return the sidecars among the names of one folder. Suffixes may be in capitals; JSON comes before text."""
    found: dict[str, list[str]] = {}
    for suffix in SIDECAR_SUFFIXES:
        for path in map(PurePath, sorted(names)):
            if path.suffix.lower() == suffix:
                found.setdefault(path.stem, []).append(path.name)
    return found


def sidecars_in(folder: Path) -> Sidecars:
    """Return the sidecars in a folder; a folder that cannot be listed has none."""
    return sidecars_among(_names_in(folder))


def _names_in(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (OSError, ValueError):  # a name may have characters that a path cannot have
        return []


def _sidecar_paths(image: Path, sidecars: Sidecars) -> list[Path]:
    return [image.with_name(name) for name in sidecars.get(image.stem, ())]


def _printable(name: str) -> str:
    """Escape the bytes of a file name that are not valid UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def images_beside(sidecar: Path) -> Iterator[Path]:
    """Yield the paths of the images that the sidecar describes."""
    for name in _names_in(sidecar.parent):
        if is_image_name(name) and PurePath(name).stem == sidecar.stem:
            yield sidecar.with_name(name)


def _read_sidecar(paths: list[Path]) -> dict[str, Any]:
    """Return the fields of the first sidecar."""
    if not paths:
        return {}
    try:
        with paths[0].open("rb") as file:
            return _parse_sidecar(paths[0].suffix, file.read(MAX_SIDECAR_BYTES + 1))
    except OSError as error:
        raise SkippedFileError("sidecar_unreadable", str(error)) from error


def _image_bytes(path: Path, max_bytes: int) -> bytes:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise SkippedFileError(NOT_AN_IMAGE, f"{path.suffix or 'no suffix'}: only {', '.join(IMAGE_SUFFIXES)} are read")
    try:
        if path.exists() and not path.is_file():  # reading a pipe would not end
            raise SkippedFileError(NOT_AN_IMAGE, "it is not a regular file")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise SkippedFileError("file_unreadable", str(error)) from error
    if len(data) > max_bytes:
        raise _too_large(max_bytes)
    return data


def _too_large(max_bytes: int) -> SkippedFileError:
    return SkippedFileError("image_too_large", f"the file has more than {max_bytes} bytes")


def _stamp_of(*paths: Path) -> str | None:
    """Return size and modification time of each file that exists."""
    parts = []
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):  # a name may have characters that a path cannot have
            continue
        parts.append(f"{status.st_size}@{status.st_mtime_ns}")
    return " ".join(parts) or None


# --- a table ------------------------------------------------------------------------------------------------------


def _files_in_table(
    table: Path,
    *,
    columns: Mapping[str, str],
    format: str | None,  # noqa: A002
    max_file_bytes: int,
) -> Iterator[SourceFile]:
    """Yield the files that the rows name, relative to the table's folder."""
    list_sidecars = lru_cache(maxsize=16)(sidecars_in)
    for row in read_rows(table, format=format, text_column="file"):
        if row.problem is not None:
            yield _skipped_file(f"row {row.number}", "invalid_row", row.problem)
            continue
        file_columns = [columns["file"]] if "file" in columns else [name for name in FILE_COLUMNS if name in row.values]
        if not file_columns or file_columns[0] not in row.values:
            yield _skipped_file(
                f"row {row.number}",
                "invalid_row",
                f"the row does not name a file; it has: {describe_columns(row.values)}",
            )
            continue
        path = table.parent / str(row.values[file_columns[0]])
        fields = {
            name: row.values[columns.get(name, name)]
            for name in DESCRIPTION_FIELDS
            if columns.get(name, name) in row.values
        }
        own = _sidecar_paths(path, list_sidecars(path.parent)) if path.name else []
        yield SourceFile(
            f"row {row.number}: {row.values[file_columns[0]]}",
            _sample_reader(path, own, fields, max_file_bytes),
            stamp=_stamp_of(path),
        )


def _sample_reader(path: Path, sidecars: list[Path], fields: dict[str, Any], max_bytes: int) -> Callable[[], Sample]:
    return lambda: Sample(path.name, _image_bytes(path, max_bytes), {**_read_sidecar(sidecars), **fields})


def _skipped_file(name: str, code: str, detail: str) -> SourceFile:
    def read() -> Sample:
        raise SkippedFileError(code, detail)

    return SourceFile(name, read)


# --- a tar --------------------------------------------------------------------------------------------------------


def _files_in_tar(path: Path, max_file_bytes: int) -> Iterator[SourceFile]:
    """Yield the files of a WebDataset, whose sidecars may come before or after their images.

    The tar is read twice: first its sidecars, which are kept in a temporary file, then its images.
    """
    try:
        with closing(_TarIndex()) as index:
            for member, file in _members(path, max_file_bytes):
                index.add(member, file)
            for member, file in _members(path, max_file_bytes):
                yield from _tar_files(member, file, index, max_file_bytes)
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error, MemoryError) as error:
        raise SourceError(f"{path}: {error}") from error


def _tar_files(
    member: tarfile.TarInfo, file: IO[bytes] | None, index: "_TarIndex", max_file_bytes: int
) -> Iterator[SourceFile]:
    """Yield the member, unless it is the sidecar of an image."""
    key, suffix = _key_and_suffix(member.name)
    name = index.unique_name(_printable(member.name) or "(no name)")
    if file is None:
        yield _skipped_file(name, NOT_AN_IMAGE, "it is a link or a device; only regular files are read")
    elif suffix in SIDECAR_SUFFIXES:
        if not index.has_image(key):
            yield _skipped_file(name, NOT_AN_IMAGE, ORPHAN_SIDECAR)
    elif suffix not in IMAGE_SUFFIXES:
        yield _skipped_file(name, NOT_AN_IMAGE, f"only {', '.join(IMAGE_SUFFIXES)} are read")
    elif member.size > max_file_bytes:
        yield _too_large_file(name, max_file_bytes)
    else:
        yield _tar_image(name, PurePosixPath(_printable(member.name)).name, file.read(), index.find_sidecar(key))


def _tar_image(name: str, filename: str, data: bytes, sidecar: tuple[str, bytes] | None) -> SourceFile:
    return SourceFile(
        name,
        lambda: Sample(filename, data, _parse_sidecar(*sidecar) if sidecar else {}),
        stamp=hashlib.sha256(data + (sidecar[1] if sidecar else b"")).hexdigest(),
        held_bytes=len(data) + (len(sidecar[1]) if sidecar else 0),
    )


def _too_large_file(name: str, max_bytes: int) -> SourceFile:
    def read() -> Sample:
        raise _too_large(max_bytes)

    return SourceFile(name, read)


class _TarIndex:
    """The sidecars and the names of a tar, in a temporary database that SQLite moves to the disk when it grows."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF;
            CREATE TABLE images (key TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TABLE sidecars (key TEXT, suffix TEXT, data BLOB, PRIMARY KEY (key, suffix)) WITHOUT ROWID;
            CREATE TABLE names (name TEXT PRIMARY KEY, count INTEGER) WITHOUT ROWID;
            BEGIN;
            """
        )

    def close(self) -> None:
        self._database.close()

    def add(self, member: tarfile.TarInfo, file: IO[bytes] | None) -> None:
        key, suffix = _key_and_suffix(member.name)
        if file is not None and suffix in IMAGE_SUFFIXES:
            self._database.execute("INSERT OR IGNORE INTO images VALUES (?)", (key,))
        elif file is not None and suffix in SIDECAR_SUFFIXES:
            # Compressed, because the members of a small tar may be large and empty.
            data = zlib.compress(file.read(MAX_SIDECAR_BYTES + 1), 1)
            self._database.execute("INSERT OR REPLACE INTO sidecars VALUES (?, ?, ?)", (key, suffix, data))

    def has_image(self, key: str) -> bool:
        return self._database.execute("SELECT 1 FROM images WHERE key = ?", (key,)).fetchone() is not None

    def find_sidecar(self, key: str) -> tuple[str, bytes] | None:
        """Return suffix and content of the sidecar; JSON comes before text."""
        found = self._database.execute(
            "SELECT suffix, data FROM sidecars WHERE key = ? ORDER BY suffix LIMIT 1", (key,)
        ).fetchone()
        return None if found is None else (found[0], zlib.decompress(found[1]))

    def unique_name(self, name: str) -> str:
        """Return the name, with a number if an earlier member has it too."""
        statement = "INSERT INTO names VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET count = count + 1 RETURNING count"
        ((count,),) = self._database.execute(statement, (name,)).fetchall()
        return name if count == 1 else f"{name} ({count})"


def _key_and_suffix(name: str) -> tuple[str, str]:
    path = PurePosixPath(_printable(name))
    return str(path.with_suffix("")) if path.name else "", path.suffix.lower()


def _members(path: Path, max_file_bytes: int) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """Yield the members of a tar that are neither folders nor hidden; the file of a link or a device is `None`."""
    limit = max(max_file_bytes, MAX_SIDECAR_BYTES, MAX_TAR_HEADER_BYTES) + tarfile.BLOCKSIZE
    with _decompressed(path) as file:
        limited = cast(IO[bytes], _LimitedFile(file, limit))
        with tarfile.open(fileobj=limited, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # they would fill the memory
                if not member.isdir() and not PurePosixPath(member.name).name.startswith("."):
                    yield member, tar.extractfile(member) if member.isfile() else None
            # `tarfile` takes a damaged header for the end.
            limited.seek(tar.offset)
            if any(limited.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"it is damaged at byte {tar.offset}")


@contextmanager
def _decompressed(path: Path) -> Iterator[IO[bytes]]:
    with path.open("rb") as raw:
        start = raw.read(4096)
        raw.seek(0)
        if start.startswith(b"\x1f\x8b"):
            yield cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif start.startswith(b"BZh"):
            yield cast(IO[bytes], bz2.BZ2File(raw))
        elif start.startswith((b"\xfd7zXZ\0", b"\x5d\0\0")):
            yield cast(IO[bytes], io.BufferedReader(_XzReader(raw)))
        else:
            yield raw


class _XzReader(io.RawIOBase):
    """Reads the streams of an xz file in limited memory; `lzma.LZMAFile` has no such limit."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._position = 0
        self._decompressor = _xz_decompressor()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("seek from the end")
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target < self._position:
            self._file.seek(0)
            self._position, self._decompressor = 0, _xz_decompressor()
        while self._position < target and self.read(min(2**16, target - self._position)):
            pass
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            compressed = b""
            if self._decompressor.eof:
                compressed = self._start_of_next_stream()
                if not compressed:
                    return 0
                self._decompressor = _xz_decompressor()
            elif self._decompressor.needs_input:
                compressed = self._file.read(io.DEFAULT_BUFFER_SIZE)
                if not compressed:
                    raise EOFError("it is cut off")
            data = self._decompressor.decompress(compressed, max_length=len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _start_of_next_stream(self) -> bytes:
        """Return the bytes after the zeros that may stand between streams; empty at the end of the file."""
        compressed = self._decompressor.unused_data
        while not (start := compressed.lstrip(b"\0")):
            compressed = self._file.read(io.DEFAULT_BUFFER_SIZE)
            if not compressed:
                return b""
        return start


def _xz_decompressor() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(memlimit=MAX_XZ_MEMORY_BYTES)


class _LimitedFile:
    """A file of which at most `limit` bytes are read at once."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._limit = file, limit
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._limit:
            raise tarfile.ReadError(f"a header of {size} bytes is too large")
        return self._file.read(size)


def _parse_sidecar(suffix: str, data: bytes) -> dict[str, Any]:
    """Return the fields of a JSON file, or the caption in a text file."""
    if len(data) > MAX_SIDECAR_BYTES:
        raise SkippedFileError("sidecar_unreadable", f"it has more than {MAX_SIDECAR_BYTES} bytes")
    try:
        text = decode_text(data)
        if suffix.lower() != ".json":
            return {"caption": plain_newlines(text).strip()}
        fields = json.loads(text)
    except UnicodeDecodeError as error:
        raise SkippedFileError("sidecar_unreadable", str(error)) from error
    except (ValueError, RecursionError) as error:
        raise SkippedFileError("sidecar_unreadable", f"its JSON is invalid: {error}") from error
    if not isinstance(fields, dict):
        raise SkippedFileError("sidecar_unreadable", "its JSON is not an object")
    return {name: plain_newlines(value) for name, value in fields.items()}
