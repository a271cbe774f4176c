"""Rows of a file: JSON Lines, CSV, TSV, Parquet, or a plain text with one value per line."""

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
LONGEST_CELL = 16 * 2**20

Values = dict[str, Any]


class RowsError(Exception):
    """The file as a whole cannot be read."""


@dataclass(frozen=True)
class Row:
    """One row. `number` counts from 1 as an editor counts lines (in a Parquet file: rows).

    `problem` says why a row that has no values has none.
    """

    number: int
    values: Values
    problem: str | None = None


def read_rows(path: Path, *, format: str | None = None, text_column: str = "prompt") -> Iterator[Row]:  # noqa: A002
    """Every row, one at a time. What is empty is left out, so that a default can take its place.

    Args:
        path: `-` is the standard input, which needs a `format`.
        format: one of the values of `FORMATS`; none: what the name ends in.
        text_column: what a line of a plain text is.

    Raises:
        RowsError: no such file, or not of that format; pyarrow is not there for a Parquet file.
    """
    kind = format or FORMATS.get(path.suffix.lower())
    if kind is None:
        raise RowsError(f"{path}: name its format, one of {', '.join(sorted(set(FORMATS.values())))}")
    if kind == "parquet":
        yield from _parquet(path)
        return
    with _opened(path) as file:
        match kind:
            case "txt":
                yield from _text(file, text_column)
            case "jsonl":
                yield from _json_lines(file, text_column)
            case _:
                yield from _separated(file, "\t" if kind == "tsv" else ",")


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    try:
        if str(path) == "-":
            yield io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
        else:
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield file
    except (OSError, UnicodeDecodeError) as error:
        raise RowsError(f"{path}: {error}") from error


def _text(file: IO[str], column: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        text = line.strip()
        if text and not text.startswith("#"):
            yield Row(number, {column: text})


def _json_lines(file: IO[str], column: str) -> Iterator[Row]:
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
            yield Row(number, _present(value))
        else:
            yield Row(number, {}, "neither an object nor a text")


def _separated(file: IO[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
    names = reader.fieldnames
    if not names:
        raise RowsError("the first line must name the columns")
    if len(set(names)) < len(names):
        raise RowsError(f"two columns have the same name: {', '.join(names)}")
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
            yield Row(first, _present(values))


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # only here: 50 MB that other formats do without
    except ImportError as error:
        raise RowsError("Parquet files need pyarrow: pip install 'afterimage[scripts]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, _present(values))
    except (OSError, ArrowException) as error:
        raise RowsError(f"{path}: {error}") from error


def _present(values: Mapping[str, Any]) -> Values:
    return {name: value for name, value in values.items() if value is not None and value != ""}
