"""Read image files and their descriptions from a folder, a table, or a WebDataset tar."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from scripts.table_files import FORMATS, read_rows

IMAGE_SUFFIXES = (".webp", ".png", ".jpg", ".jpeg")
SIDECAR_SUFFIXES = (".json", ".txt")
FILE_COLUMNS = ("file", "path", "filename", "file_name", "image")
NOT_AN_IMAGE = "not_an_image"
DESCRIPTION_FIELDS = ("caption", "tags", "licence", "source", "attributes")


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
    """

    name: str
    read: Callable[[], Sample]
    stamp: str | None = None


def read_source(
    source: Path,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,  # noqa: A002
) -> Iterator[SourceFile]:
    """Yield every file in a folder, a tar, or a table of files.

    Args:
        columns: column by field, for columns of a table that are not named `file` or as in `DESCRIPTION_FIELDS`.
        format: of a table; None: by the suffix of its name.

    Raises:
        SourceError: the tar cannot be read, or is cut off; also in the middle.
        TableFileError: the table cannot be read; also in the middle.
    """
    if source.is_dir():
        yield from files_in_folder(source)
    elif format is not None or source.suffix.lower() in FORMATS:
        yield from _files_in_table(source, columns=columns or {}, format=format)
    else:
        yield from _files_in_tar(source)


def read_samples(tar: Path) -> Iterator[Sample]:
    """Yield the images of a WebDataset tar.

    Raises:
        SourceError: the tar cannot be read, or is cut off.
        SkippedFileError: a member is not an image, or its description cannot be read.
    """
    for file in _files_in_tar(tar):
        yield file.read()


# --- a folder -----------------------------------------------------------------------------------------------------


def files_in_folder(folder: Path, *, below: Path | None = None) -> Iterator[SourceFile]:
    """Yield the files in `folder`, or only those in its subfolder `below`, by name; no hidden files, no sidecars."""
    for parent, folders, files in os.walk(below or folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if is_candidate(path):
                yield source_file(path, folder)


def is_candidate(path: Path) -> bool:
    """Return False for hidden files and sidecars; any other suffix is a candidate, so that the report lists it."""
    return not path.name.startswith(".") and path.suffix.lower() not in SIDECAR_SUFFIXES


def source_file(path: Path, folder: Path) -> SourceFile:
    return SourceFile(
        _printable(path.relative_to(folder).as_posix()),
        lambda: Sample(_printable(path.name), _image_bytes(path), _read_sidecar(path)),
        stamp=_stamp_of(path, *(path.with_suffix(suffix) for suffix in SIDECAR_SUFFIXES)),
    )


def _printable(name: str) -> str:
    """Escape the bytes of a file name that are not valid UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def images_beside(sidecar: Path) -> Iterator[Path]:
    """Yield the paths of images that the sidecar may describe."""
    for suffix in IMAGE_SUFFIXES:
        yield sidecar.with_suffix(suffix)
        yield sidecar.with_suffix(suffix.upper())


def _read_sidecar(image: Path) -> dict[str, Any]:
    """Return the fields of NAME.json, else the caption in NAME.txt."""
    json_file, text_file = image.with_suffix(".json"), image.with_suffix(".txt")
    try:
        if json_file.exists():
            return _parse_description(json_file.read_bytes())
        if text_file.exists():
            return {"caption": text_file.read_text(encoding="utf-8-sig").strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise SkippedFileError("sidecar_unreadable", str(error)) from error
    return {}


def _image_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise SkippedFileError(NOT_AN_IMAGE, f"{path.suffix or 'no suffix'}: only {', '.join(IMAGE_SUFFIXES)} are read")
    try:
        if path.exists() and not path.is_file():  # reading a pipe would not end
            raise SkippedFileError(NOT_AN_IMAGE, "it is not a regular file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SkippedFileError("file_unreadable", str(error)) from error


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


def _files_in_table(table: Path, *, columns: Mapping[str, str], format: str | None) -> Iterator[SourceFile]:  # noqa: A002
    """Yield the files that the rows name, relative to the table's folder."""
    for row in read_rows(table, format=format, text_column="file"):
        if row.problem is not None:
            yield _skipped_file(f"row {row.number}", "invalid_row", row.problem)
            continue
        file_columns = [columns["file"]] if "file" in columns else [name for name in FILE_COLUMNS if name in row.values]
        if not file_columns or file_columns[0] not in row.values:
            yield _skipped_file(f"row {row.number}", "invalid_row", "the row does not name a file")
            continue
        path = table.parent / str(row.values[file_columns[0]])
        fields = {
            name: row.values[columns.get(name, name)]
            for name in DESCRIPTION_FIELDS
            if columns.get(name, name) in row.values
        }
        yield SourceFile(
            f"row {row.number}: {row.values[file_columns[0]]}", _sample_reader(path, fields), stamp=_stamp_of(path)
        )


def _sample_reader(path: Path, fields: dict[str, Any]) -> Callable[[], Sample]:
    return lambda: Sample(path.name, _image_bytes(path), {**_read_sidecar(path), **fields})


def _skipped_file(name: str, code: str, detail: str) -> SourceFile:
    def read() -> Sample:
        raise SkippedFileError(code, detail)

    return SourceFile(name, read)


# --- a tar --------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Consecutive members with the same name up to the suffix."""

    key: str
    image: tuple[str, bytes] | None = None
    json: bytes | None = None
    text: bytes | None = None
    others: list[str] = field(default_factory=list)

    def files(self) -> Iterator[SourceFile]:
        for name in self.others:
            yield _skipped_file(name, NOT_AN_IMAGE, f"only {', '.join(IMAGE_SUFFIXES)} are read")
        if self.image is not None:
            name, data = self.image
            yield SourceFile(name, lambda: Sample(PurePosixPath(name).name, data, self._fields()), stamp=str(len(data)))

    def _fields(self) -> dict[str, Any]:
        if self.json is not None:
            return _parse_description(self.json)
        if self.text is not None:
            return {"caption": self.text.decode("utf-8-sig", errors="replace").strip()}
        return {}


def _files_in_tar(path: Path) -> Iterator[SourceFile]:
    """Yield the files of a WebDataset; the members of one sample are consecutive."""
    group = _Group("")
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                member_path = PurePosixPath(member.name)
                if file is None or member_path.name.startswith("."):
                    continue
                key, suffix = str(member_path.with_suffix("")), member_path.suffix.lower()
                if key != group.key:
                    yield from group.files()
                    group = _Group(key)
                if suffix in IMAGE_SUFFIXES:
                    group.image = (member.name, file.read())
                elif suffix == ".json":
                    group.json = file.read()
                elif suffix == ".txt":
                    group.text = file.read()
                else:
                    group.others.append(member.name)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"{path}: {error}") from error
    yield from group.files()


def _parse_description(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SkippedFileError("sidecar_unreadable", f"its JSON is invalid: {error}") from error
    if not isinstance(fields, dict):
        raise SkippedFileError("sidecar_unreadable", "its JSON is not an object")
    return fields
