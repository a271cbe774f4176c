"""Images as a Parquet file, with what is said of them, their bytes, and their vectors in one embedding space.

A file of outputs is a file of a corpus with more columns: what was generated can be remembered like anything else. Any
Parquet reader opens it. `embedding` is float32 with exactly the values of the 16-bit floats that are stored, so that
what comes back is what went out.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow
from pyarrow import parquet

from afterimage_client.download import PART

VERSION = 1
MARK = b"afterimage.corpus"
ROWS_A_GROUP = 1024
BYTES_A_GROUP = 32 * 2**20
"""A group is held in memory; the file's index, which is too, grows with the number of groups."""
ROWS_AT_A_TIME = 64
"""Read into memory at once."""

Row = dict[str, Any]


class ImageFileError(Exception):
    """The file is none that `scripts.export` wrote, or it is damaged."""


class Kind(StrEnum):
    CORPUS = "corpus"
    OUTPUTS = "outputs"


@dataclass(frozen=True)
class Header:
    """What holds for the whole file. `space` is the digest of the vectors' embedding space; none without vectors."""

    collection: str | None
    space: str | None
    model: str | None
    dim: int | None
    kind: Kind = Kind.CORPUS


IMAGE = [
    ("id", pyarrow.string()),
    ("sha256", pyarrow.string()),
    ("content_sha256", pyarrow.string()),
    ("format", pyarrow.string()),
    ("width", pyarrow.int32()),
    ("height", pyarrow.int32()),
    ("perceptual_hash", pyarrow.int64()),
    ("caption", pyarrow.string()),
    ("tags", pyarrow.list_(pyarrow.string())),
    ("source", pyarrow.string()),
    ("licence", pyarrow.string()),
    ("attributes", pyarrow.string()),  # a JSON object of strings
    ("filename", pyarrow.string()),
    ("created_at", pyarrow.timestamp("us", tz="UTC")),
    ("image", pyarrow.binary()),
    ("thumbnail", pyarrow.binary()),
    ("embedding", pyarrow.list_(pyarrow.float32())),
    ("norm", pyarrow.float32()),
]
REFERENCE = [
    ("image_id", pyarrow.string()),
    ("sha256", pyarrow.string()),
    ("similarity", pyarrow.float64()),
    ("weight", pyarrow.float64()),
    ("pinned", pyarrow.bool_()),
    ("caption", pyarrow.string()),
]
OUTPUT = [
    ("owner", pyarrow.string()),
    ("job_id", pyarrow.string()),
    ("index", pyarrow.int32()),
    ("kind", pyarrow.string()),
    ("retry_of", pyarrow.string()),
    ("bulk_id", pyarrow.string()),
    ("custom_id", pyarrow.string()),
    ("metadata", pyarrow.string()),  # a JSON object of strings
    ("prompt", pyarrow.string()),
    ("seed", pyarrow.int64()),
    ("mode", pyarrow.string()),
    ("parameters", pyarrow.string()),  # a JSON object: the request with every default resolved
    ("model", pyarrow.string()),
    ("model_revision", pyarrow.string()),
    ("model_digest", pyarrow.string()),
    ("references", pyarrow.list_(pyarrow.struct(REFERENCE))),
    ("versions", pyarrow.string()),  # a JSON object: library by version
    ("provenance", pyarrow.string()),  # a JSON object: the whole record, as it is in the image file too
    ("pixels_sha256", pyarrow.string()),
]


def schema(header: Header) -> Any:
    described = json.dumps({"version": VERSION, **vars(header)}).encode()
    columns = [*IMAGE, *OUTPUT] if header.kind is Kind.OUTPUTS else IMAGE
    return pyarrow.schema(columns, metadata={MARK: described})


class Writer:
    def __init__(self, file: Any, shape: Any) -> None:
        self._file, self._schema = file, shape
        self._rows: list[Row] = []
        self._bytes = 0
        self.rows = 0

    def add(self, row: Row) -> None:
        self._rows.append(row | {"content_sha256": hashlib.sha256(row["image"]).hexdigest()})
        self._bytes += len(row["image"]) + len(row["thumbnail"])
        self.rows += 1
        if len(self._rows) == ROWS_A_GROUP or self._bytes >= BYTES_A_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._bytes = [], 0


@contextmanager
def written(path: Path, header: Header) -> Iterator[Writer]:
    """A file that appears when all of it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}{PART}")
    shape = schema(header)
    try:
        # Images are compressed already; the rest is small beside them.
        with parquet.ParquetWriter(part, shape, compression="zstd", use_dictionary=False) as file:
            writer = Writer(file, shape)
            yield writer
            writer.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Header, int, Iterator[list[Row]]]]:
    """Header, number of rows, and the columns of images in groups that fit into memory.

    Raises:
        ImageFileError: also in the middle.
    """
    try:
        with parquet.ParquetFile(path) as file:
            described = json.loads((file.schema_arrow.metadata or {}).get(MARK, b"null"))
            if described is None or described.pop("version") != VERSION:
                raise ImageFileError(f"{path} is no file of images of this version")
            header = Header(**described | {"kind": Kind(described.get("kind", Kind.CORPUS))})
            yield header, file.metadata.num_rows, _groups(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ImageFileError(f"{path}: {error}") from error


def _groups(file: Any) -> Iterator[list[Row]]:
    for batch in file.iter_batches(batch_size=ROWS_AT_A_TIME, columns=[name for name, _ in IMAGE]):
        rows = batch.to_pylist()
        for row in rows:
            if hashlib.sha256(row["image"]).hexdigest() != row["content_sha256"]:
                raise ImageFileError(f"the bytes of image {row['id']} are damaged")
        yield rows
