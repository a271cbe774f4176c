"""A corpus as a Parquet file: images with what is said of them, their bytes, and their vectors in one embedding space.

Any Parquet reader opens it. `embedding` is float32 with exactly the values of the 16-bit floats that are stored, so
that what comes back is what went out.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow
from pyarrow import parquet

from afterimage_client.download import PART

VERSION = 1
MARK = b"afterimage.corpus"
ROWS_A_GROUP = 64

Row = dict[str, Any]


class CorpusFileError(Exception):
    """The file is none that `scripts.export` wrote, or it is damaged."""


@dataclass(frozen=True)
class Header:
    """What holds for the whole file. `space` is the digest of the vectors' embedding space; none without vectors."""

    collection: str
    space: str | None
    model: str | None
    dim: int | None


def schema(header: Header) -> Any:
    described = json.dumps({"version": VERSION, **vars(header)}).encode()
    return pyarrow.schema(
        [
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
        ],
        metadata={MARK: described},
    )


class Writer:
    def __init__(self, file: Any, shape: Any) -> None:
        self._file, self._schema = file, shape
        self._rows: list[Row] = []
        self.rows = 0

    def add(self, row: Row) -> None:
        self._rows.append(row | {"content_sha256": hashlib.sha256(row["image"]).hexdigest()})
        self.rows += 1
        if len(self._rows) == ROWS_A_GROUP:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


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
    """Header, number of rows, and the rows in groups that fit into memory.

    Raises:
        CorpusFileError: also in the middle.
    """
    try:
        with parquet.ParquetFile(path) as file:
            described = json.loads((file.schema_arrow.metadata or {}).get(MARK, b"null"))
            if described is None or described.pop("version") != VERSION:
                raise CorpusFileError(f"{path} is no corpus of this version")
            yield Header(**described), file.metadata.num_rows, _groups(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise CorpusFileError(f"{path}: {error}") from error


def _groups(file: Any) -> Iterator[list[Row]]:
    for batch in file.iter_batches(batch_size=ROWS_A_GROUP):
        rows = batch.to_pylist()
        for row in rows:
            if hashlib.sha256(row["image"]).hexdigest() != row["content_sha256"]:
                raise CorpusFileError(f"the bytes of image {row['id']} are damaged")
        yield rows
