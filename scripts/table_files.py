"""Read rows from JSON Lines, CSV, TSV, Parquet, or a text file with one value per line."""

import codecs
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

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
PARQUET_BATCH_BYTES = 32 * 2**20
DELIMITERS = (",", ";", "\t", "|")
FORMULA = re.compile(r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
"""Beginning of a cell that a spreadsheet may run as a formula, or that `plain_cell` has changed."""
PLAIN_CELL_COLUMNS = {"line", "row", "custom_id", "output_id"}
"""Columns of the tables that this project writes, whose texts went through `plain_cell`."""
SEPARATOR_LINE = re.compile(r'"?sep=([^\w\s"]|\t)"?', re.IGNORECASE)

Values = dict[str, Any]


class TableFileError(Exception):
    """The file as a whole cannot be read."""


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        number: line of the row's beginning, from 1, as an editor counts; in a Parquet file it counts rows.
        values: by column. A column such as `Prompt` is there as `prompt` too, unless another column has that name.
        problem: why the row could not be read; `values` is empty then.
    """

    number: int
    values: Values
    problem: str | None = None


def read_rows(
    path: Path,
    *,
    format: str | None = None,  # noqa: A002
    text_column: str = "prompt",
    on_comment: Callable[[int], object] = lambda number: None,
) -> Iterator[Row]:
    """Yield every row, one at a time. Empty cells are left out, so that defaults apply.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte-order mark. CSV cells may be separated by one of `DELIMITERS`, or by
    the character of a first line such as `sep=;`. CSV rows without content are left out. Line breaks in a text are
    line feeds. Parquet cells of bytes are decoded if they are UTF-8.

    Args:
        path: `-` is standard input, which needs a `format`.
        format: one of the values of `FORMATS`; None: by the suffix of the file name.
        text_column: column name for the lines of a text file. Empty lines and lines that begin with `#` are left out.
        on_comment: called with the number of each line of a text file that begins with `#`.

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
                yield from _read_text(file, text_column, on_comment)
            case "jsonl":
                yield from _read_json_lines(file, text_column)
            case _:
                yield from _read_csv(file, "\t" if kind == "tsv" else ",")


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    try:
        if str(path) == "-":
            yield _text_file(sys.stdin.buffer)
        else:
            with path.open("rb") as file:
                yield _text_file(file)
    except OSError as error:
        raise unreadable_file(path, error) from error
    except UnicodeDecodeError as error:
        raise TableFileError(f"{path}: {error}") from error


def unreadable_file(path: Path, error: OSError) -> TableFileError:
    """Return the error of a file that cannot be opened or read, with its reason in words."""
    return TableFileError(
        f"{path} does not exist" if isinstance(error, FileNotFoundError) else f"{path}: {error.strerror}"
    )


def decode_text(data: bytes) -> str:
    """Decode UTF-8, or UTF-16 or UTF-32 with a byte-order mark.

    Raises:
        UnicodeDecodeError: the text has another encoding.
    """
    return data.decode(_encoding_of(data))


def _encoding_of(start: bytes) -> str:
    # The mark of UTF-32 begins with that of UTF-16.
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    # Texts of several encodings without a mark begin with a character of ASCII.
    if start[1:2] == b"\0":
        return "utf-16-le"
    if start[:1] == b"\0":
        return "utf-16-be"
    return "utf-8-sig"


def plain_newlines(value: Any) -> Any:
    """Return the value with CRLF and CR as a line feed in every text in it."""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n")
    if isinstance(value, list):
        return [plain_newlines(each) for each in value]
    if isinstance(value, dict):
        return {plain_newlines(name): plain_newlines(each) for name, each in value.items()}
    return value


def plain_cell(value: Any) -> Any:
    """Return the value for a CSV cell. A text that a spreadsheet could run as a formula begins with an apostrophe."""
    return f"'{value}" if isinstance(value, str) and FORMULA.match(value) else value


def _original_text(cell: str) -> str:
    """Undo `plain_cell`."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell[1:]) else cell


def _text_file(file: BinaryIO) -> IO[str]:
    buffered = io.BufferedReader(cast(io.RawIOBase, file))
    return io.TextIOWrapper(buffered, encoding=_encoding_of(buffered.peek(4)), newline="")


def _read_text(file: IO[str], column: str, on_comment: Callable[[int], object]) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        text = line.strip()
        if text.startswith("#"):
            on_comment(number)
        elif text:
            yield Row(number, {column: text})


def _read_json_lines(file: IO[str], column: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(number, {}, f"not valid JSON: {error}")
            continue
        if isinstance(value, str):
            value = {column: value}
        if isinstance(value, dict):
            yield Row(number, _cleaned(value))
        else:
            yield Row(number, {}, "it is neither a JSON object nor a string")


def _read_csv(file: IO[str], usual_delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL_CHARS)
    # Lines before the header: empty ones, and `sep=;`, which Excel writes and reads.
    lines_before, delimiter = 0, None
    for header in file:
        if match := SEPARATOR_LINE.fullmatch(header.rstrip("\r\n")):
            delimiter = match[1]
        elif header.strip():
            break
        lines_before += 1
    else:
        raise TableFileError("the first line must name the columns")
    reader = csv.reader(
        chain([header], file),
        delimiter=delimiter or _delimiter_of(header, usual_delimiter),
        skipinitialspace=True,
        strict=True,
    )
    try:
        names = _without_empty_end([name.strip() for name in next(reader)])
    except csv.Error as error:
        raise TableFileError(f"the line of the column names is not valid CSV: {error}") from error
    if not names:
        raise TableFileError("the first line must name the columns")
    named = [name for name in names if name]
    if len(set(named)) < len(named):
        raise TableFileError(f"two columns have the same name: {', '.join(named)}")
    names_plain_cells = set(names) >= PLAIN_CELL_COLUMNS
    before = lines_before + reader.line_num
    while True:
        try:
            cells = _without_empty_end(next(reader))
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(before + 1, {}, f"not valid CSV: {error}")
            before = lines_before + reader.line_num
            continue
        first, before = before + 1, lines_before + reader.line_num
        if len(cells) > len(names):
            yield Row(first, {}, f"more cells than the {len(names)} columns: {', '.join(names)}")
        elif cells:
            if names_plain_cells:
                cells = [_original_text(cell) for cell in cells]
            yield Row(first, _cleaned({name: cell for name, cell in zip(names, cells, strict=False) if name}))


def _delimiter_of(header: str, usual: str) -> str:
    """Return the delimiter that gives the most columns; the usual one if several do."""

    def columns(delimiter: str) -> int:
        return len(next(csv.reader([header], delimiter=delimiter, skipinitialspace=True)))

    return max((usual, *DELIMITERS), key=columns)


def _without_empty_end(cells: list[str]) -> list[str]:
    while cells and not cells[-1].strip():
        cells.pop()
    return cells


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet  # imported here: 50 MB that other formats do not need
    except ImportError as error:
        raise TableFileError("Parquet files need pyarrow: pip install 'afterimage[scripts]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_rows_per_batch(file.metadata)):
                for values in batch.to_pylist():
                    number += 1
                    too_long = [name for name, value in values.items() if _longest_text(value) > MAX_CELL_CHARS]
                    if too_long:
                        yield Row(number, {}, f"`{too_long[0]}` has more than {MAX_CELL_CHARS} characters")
                    else:
                        yield Row(number, _cleaned(_decoded(values)))
    except FileNotFoundError as error:
        raise unreadable_file(path, error) from error
    except (OSError, ArrowException) as error:
        raise TableFileError(f"{path}: {error}") from error


def _rows_per_batch(metadata: Any) -> int:
    """Return how many rows fit into `PARQUET_BATCH_BYTES`, at most 1024.

    A row can be as large as its row group before compression: the file has an equal text once for all rows.
    """
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    largest = max((group.total_byte_size for group in groups), default=0)
    return max(1, min(1024, PARQUET_BATCH_BYTES // max(1, largest)))


def _longest_text(value: Any) -> int:
    """Return the length of the longest text or bytes in a Parquet value."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return 0
    return max(map(_longest_text, value), default=0)


def _cleaned(values: Mapping[str, Any]) -> Values:
    """Leave empty cells out, write line breaks as a line feed, and add each column under its name in lower case."""
    cells = {name: plain_newlines(value) for name, value in values.items() if value is not None}
    cells = {name: value for name, value in cells.items() if not isinstance(value, str) or value.strip()}
    lower = Counter(name.lower() for name in values)
    aliases = {name.lower(): value for name, value in cells.items() if lower[name.lower()] == 1}
    return cells | aliases


def describe_columns(values: Values) -> str:
    """Return the names of the columns in a row, as in the file."""
    names = [name for name in values if not any(name == other.lower() and name != other for other in values)]
    return ", ".join(names) or "no columns"


def cell_text(values: Mapping[str, Any], name: str) -> str:
    """Return a cell as text; lists, objects and booleans as JSON.

    Raises:
        ValueError: the cell holds bytes that are not UTF-8.
    """
    value = values[name]
    if isinstance(value, bytes):
        raise ValueError(f"`{name}` is not UTF-8 text")
    return json_text(value) if isinstance(value, bool | list | dict) else str(value)


def json_text(value: Any) -> str:
    """Return a text as it is, and any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _decoded(value: Any) -> Any:
    """Decode the UTF-8 text in a Parquet value; leave other bytes as they are."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    if isinstance(value, dict):
        return {name: _decoded(each) for name, each in value.items()}
    return value
