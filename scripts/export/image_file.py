"""The Parquet file format for images: description, bytes, and vectors of one embedding space.

A file of outputs has the columns of a corpus file and more, so outputs can be imported into a collection. Any Parquet
reader opens it. `embedding` is float32 with exactly the values of the stored 16-bit floats, so an import restores them.
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

from afterimage_client.download import PARTIAL_SUFFIX

VERSION = 1
METADATA_KEY = b"afterimage.corpus"
MAX_GROUP_ROWS = 1024
MAX_GROUP_BYTES = 32 * 2**20
"""A group is kept in memory. So is the file's index, which grows with the number of groups."""
READ_BATCH_ROWS = 64
"""Rows in memory while a file is read."""

Row = dict[str, Any]


class ImageFileError(Exception):
    """The file was not written by `scripts.export`, or it is damaged."""


class Kind(StrEnum):
    CORPUS = "corpus"
    OUTPUTS = "outputs"


@dataclass(frozen=True)
class Header:
    """Metadata of the whole file. `space` is the digest of the vectors' embedding space; None without vectors."""

    collection: str | None
    space: str | None
    model: str | None
    dim: int | None
    kind: Kind = Kind.CORPUS


IMAGE_COLUMNS = [
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
    ("file_description", pyarrow.string()),  # a JSON object, or null; files of earlier releases have no such column
    ("filename", pyarrow.string()),
    ("created_at", pyarrow.timestamp("us", tz="UTC")),
    ("image", pyarrow.binary()),
    ("thumbnail", pyarrow.binary()),
    ("embedding", pyarrow.list_(pyarrow.float32())),
    ("norm", pyarrow.float32()),
]
REFERENCE_FIELDS = [
    ("image_id", pyarrow.string()),
    ("sha256", pyarrow.string()),
    ("similarity", pyarrow.float64()),
    ("weight", pyarrow.float64()),
    ("pinned", pyarrow.bool_()),
    ("caption", pyarrow.string()),
]
OUTPUT_COLUMNS = [
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
    ("references", pyarrow.list_(pyarrow.struct(REFERENCE_FIELDS))),
    ("versions", pyarrow.string()),  # a JSON object: library by version
    ("provenance", pyarrow.string()),  # a JSON object: the whole record, as it is in the image file too
    ("pixels_sha256", pyarrow.string()),
]


def build_schema(header: Header) -> Any:
    described = json.dumps({"version": VERSION, **vars(header)}).encode()
    columns = [*IMAGE_COLUMNS, *OUTPUT_COLUMNS] if header.kind is Kind.OUTPUTS else IMAGE_COLUMNS
    return pyarrow.schema(columns, metadata={METADATA_KEY: described})


class Writer:
    def __init__(self, file: Any, schema: Any) -> None:
        self._file, self._schema = file, schema
        self._rows: list[Row] = []
        self._bytes = 0
        self.rows = 0

    def add(self, row: Row) -> None:
        self._rows.append(row | {"content_sha256": hashlib.sha256(row["image"]).hexdigest()})
        self._bytes += len(row["image"]) + len(row["thumbnail"])
        self.rows += 1
        if len(self._rows) == MAX_GROUP_ROWS or self._bytes >= MAX_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows, self._bytes = [], 0


@contextmanager
def write_image_file(path: Path, header: Header) -> Iterator[Writer]:
    """Write a file that appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}{PARTIAL_SUFFIX}")
    schema = build_schema(header)
    try:
        # Images are already compressed, and the other columns are small.
        with parquet.ParquetWriter(part, schema, compression="zstd", use_dictionary=False) as file:
            writer = Writer(file, schema)
            yield writer
            writer.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def open_image_file(path: Path) -> Iterator[tuple[Header, int, Iterator[list[Row]]]]:
    """Return the header, the number of rows, and the image columns in groups of rows that fit in memory.

    Raises:
        ImageFileError: the file was not written by `scripts.export`, or is damaged; also in the middle.
    """
    try:
        with parquet.ParquetFile(path) as file:
            described = json.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"null"))
            if described is None or described.pop("version") != VERSION:
                raise ImageFileError(f"{path} was not written by this version of scripts.export")
            header = Header(**described | {"kind": Kind(described.get("kind", Kind.CORPUS))})
            yield header, file.metadata.num_rows, _groups(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ImageFileError(f"{path}: {error}") from error


def _groups(file: Any) -> Iterator[list[Row]]:
    for batch in file.iter_batches(batch_size=READ_BATCH_ROWS, columns=[name for name, _ in IMAGE_COLUMNS]):
        rows = batch.to_pylist()
        for row in rows:
            if hashlib.sha256(row["image"]).hexdigest() != row["content_sha256"]:
                raise ImageFileError(f"the bytes of image {row['id']} are damaged")
        yield rows
