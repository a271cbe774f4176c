"""Images and what is said of them, from a folder, a table, or a WebDataset tar."""

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
DESCRIBING = ("caption", "tags", "licence", "source", "attributes")


class SourceError(Exception):
    """The source as a whole cannot be read."""


class SkippedError(Exception):
    """This file is no image to index; the message says why, `code` in one word."""

    def __init__(self, code: str, detail: str) -> None:
        self.code = code
        super().__init__(detail)


@dataclass(frozen=True)
class Sample:
    """An image file as it is, and what its source says of it: caption, tags, licence, source, attributes."""

    filename: str
    data: bytes = field(repr=False)
    fields: dict[str, Any]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class Found:
    """A file that may be an image.

    Attributes:
        name: what reports call it; unique in its source.
        read: gives the sample or raises SkippedError; may be called in another thread.
        stamp: changes when the file does; none where that cannot be told without reading.
    """

    name: str
    read: Callable[[], Sample]
    stamp: str | None = None


def found_in(
    source: Path,
    *,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,  # noqa: A002
) -> Iterator[Found]:
    """Everything in a folder, a tar, or a table of files.

    columns: names of a table's columns where they are other than `file` and those of `DESCRIBING`.

    Raises:
        SourceError, RowsError: also in the middle, when a tar or a table breaks off.
    """
    if source.is_dir():
        yield from in_folder(source)
    elif format is not None or source.suffix.lower() in FORMATS:
        yield from _in_table(source, columns=columns or {}, format=format)
    else:
        yield from _in_tar(source)


def read_samples(tar: Path) -> Iterator[Sample]:
    """The images of a WebDataset tar.

    Raises:
        SourceError, SkippedError
    """
    for each in _in_tar(tar):
        yield each.read()


# --- a folder -----------------------------------------------------------------------------------------------------


def in_folder(folder: Path, *, below: Path | None = None) -> Iterator[Found]:
    """Every file in a folder, or only below one of its folders, that is neither hidden nor a sidecar, by name."""
    for parent, folders, files in os.walk(below or folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if is_candidate(path):
                yield file_in_folder(path, folder)


def is_candidate(path: Path) -> bool:
    """Whether the file is looked at: what is not an image by its name is, too, to be reported."""
    return not path.name.startswith(".") and path.suffix.lower() not in SIDECAR_SUFFIXES


def file_in_folder(path: Path, folder: Path) -> Found:
    return Found(
        _printable(path.relative_to(folder).as_posix()),
        lambda: Sample(_printable(path.name), _image_bytes(path), _beside(path)),
        stamp=_stamp(path, *(path.with_suffix(suffix) for suffix in SIDECAR_SUFFIXES)),
    )


def _printable(name: str) -> str:
    """A name that is no text, as file systems allow, with what cannot be written replaced."""
    return name.encode("utf-8", "backslashreplace").decode()


def images_of(sidecar: Path) -> Iterator[Path]:
    """The files that a sidecar may stand beside."""
    for suffix in IMAGE_SUFFIXES:
        yield sidecar.with_suffix(suffix)
        yield sidecar.with_suffix(suffix.upper())


def _beside(image: Path) -> dict[str, Any]:
    """What NAME.json says, else NAME.txt as the caption."""
    described, caption = image.with_suffix(".json"), image.with_suffix(".txt")
    try:
        if described.exists():
            return _described(described.read_bytes())
        if caption.exists():
            return {"caption": caption.read_text(encoding="utf-8-sig").strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise SkippedError("sidecar_unreadable", str(error)) from error
    return {}


def _image_bytes(path: Path) -> bytes:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise SkippedError(NOT_AN_IMAGE, f"{path.suffix or 'no suffix'}: only {', '.join(IMAGE_SUFFIXES)} are read")
    try:
        if path.exists() and not path.is_file():  # a pipe would be read for ever
            raise SkippedError(NOT_AN_IMAGE, "it is no file")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise SkippedError("file_unreadable", str(error)) from error


def _stamp(*paths: Path) -> str | None:
    """Size and time of each file that is there."""
    parts = []
    for path in paths:
        try:
            status = path.stat()
        except (OSError, ValueError):  # a name may hold what no path can
            continue
        parts.append(f"{status.st_size}@{status.st_mtime_ns}")
    return " ".join(parts) or None


# --- a table ------------------------------------------------------------------------------------------------------


def _in_table(table: Path, *, columns: Mapping[str, str], format: str | None) -> Iterator[Found]:  # noqa: A002
    """The files that the rows name, relative to the table's own folder."""
    for row in read_rows(table, format=format, text_column="file"):
        if row.problem is not None:
            yield _unreadable(f"row {row.number}", "invalid_row", row.problem)
            continue
        named = [columns["file"]] if "file" in columns else [name for name in FILE_COLUMNS if name in row.values]
        if not named or named[0] not in row.values:
            yield _unreadable(f"row {row.number}", "invalid_row", "it names no file")
            continue
        path = table.parent / str(row.values[named[0]])
        said = {
            name: row.values[columns.get(name, name)] for name in DESCRIBING if columns.get(name, name) in row.values
        }
        yield Found(f"row {row.number}: {row.values[named[0]]}", _reader(path, said), stamp=_stamp(path))


def _reader(path: Path, said: dict[str, Any]) -> Callable[[], Sample]:
    return lambda: Sample(path.name, _image_bytes(path), {**_beside(path), **said})


def _unreadable(name: str, code: str, detail: str) -> Found:
    def read() -> Sample:
        raise SkippedError(code, detail)

    return Found(name, read)


# --- a tar --------------------------------------------------------------------------------------------------------


@dataclass
class _Group:
    """Members that follow each other and have the same name up to the suffix."""

    key: str
    image: tuple[str, bytes] | None = None
    json: bytes | None = None
    text: bytes | None = None
    others: list[str] = field(default_factory=list)

    def found(self) -> Iterator[Found]:
        for name in self.others:
            yield _unreadable(name, NOT_AN_IMAGE, f"only {', '.join(IMAGE_SUFFIXES)} are read")
        if self.image is not None:
            name, data = self.image
            yield Found(name, lambda: Sample(PurePosixPath(name).name, data, self._fields()), stamp=str(len(data)))

    def _fields(self) -> dict[str, Any]:
        if self.json is not None:
            return _described(self.json)
        if self.text is not None:
            return {"caption": self.text.decode("utf-8-sig", errors="replace").strip()}
        return {}


def _in_tar(path: Path) -> Iterator[Found]:
    """The images of a WebDataset: members of one sample follow each other."""
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
                    yield from group.found()
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
    yield from group.found()


def _described(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SkippedError("sidecar_unreadable", f"its JSON cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise SkippedError("sidecar_unreadable", "its JSON is no object")
    return said
