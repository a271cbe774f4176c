"""Read rows from JSON Lines, CSV, TSV, Parquet, or a text file with one value per line."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FORMATS = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
MAX_CELL_CHARS = 16 * 2**20

Values = dict[str, Any]


class TableFileError(Exception):
    """The file as a whole cannot be read."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: from 1, as an editor counts lines; in a Parquet file it counts rows.
        problem: why the row could not be read; `values` is empty then.
    """

    number: int
    values: Values
    problem: str | None = None


def read_rows(path: Path, *, format: str | None = None, text_column: str = "prompt") -> Iterator[Row]:  # noqa: A002
    """Yield every row, one at a time. Empty cells are left out, so that defaults apply.

    Args:
        path: `-` is standard input, which needs a `format`.
        format: one of the values of `FORMATS`; None: by the suffix of the file name.
        text_column: column name for the lines of a text file.

    Raises:
        TableFileError: the file does not exist or is not of that format, or pyarrow is missing for a Parquet file.
    """
    kind = format or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise TableFileError(f"{path}: unknown format, name one of {', '.join(sorted(set(FORMATS.values())))}")
    if kind == "parquet":
        yield from _read_parquet(path)
        return
    with _open_text(path) as file:
        match kind:
            case "txt":
                yield from _read_text(file, text_column)
            case "jsonl":
                yield from _read_json_lines(file, text_column)
            case _:
                yield from _read_csv(file, "\t" if kind == "tsv" else ",")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    try:
        if str(path) == "-":
            yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except (OSError, UnicodeDecodeError) as error:
        raise TableFileError(f"{path}: {error}") from error


def _read_text(file: IO[str], column: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield Row(number, {column: text})


def _read_json_lines(file: IO[str], column: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield Row(number, {}, f"not valid JSON: {error}")
            continue
        if isinstance(value, str):
            value = {column: value}
        if isinstance(value, dict):
            yield Row(number, _without_empty(value))
        else:
            yield Row(number, {}, "it is neither a JSON object nor a string")


def _read_csv(file: IO[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL_CHARS)
    reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    names = reader.fieldnames
    if not names:
        raise TableFileError("the first line must name the columns")
    if len(set(names)) < len(names):
        raise TableFileError(f"two columns have the same name: {', '.join(names)}")
    before = reader.line_num
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(before + 1, {}, f"not valid CSV: {error}")
            before = reader.line_num
            continue
        first, before = before + 1, reader.line_num
        if None in values:
            yield Row(first, {}, f"more cells than the {len(names)} columns")
        else:
            yield Row(first, _without_empty(values))


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # imported here: 50 MB that other formats do not need
    except ImportError as error:
        raise TableFileError("Parquet files need pyarrow: pip install 'afterimage[scripts]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, _without_empty(values))
    except (OSError, ArrowException) as error:
        raise TableFileError(f"{path}: {error}") from error


def _without_empty(values: Mapping[str, Any]) -> Values:
    return {name: value for name, value in values.items() if value is not None and value != ""}
