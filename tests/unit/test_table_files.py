"""Tables are read as spreadsheets and other programs write them, and rows have the numbers that an editor shows."""

import io
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from afterimage_client import ImageDescription
from scripts import table_files
from scripts.bulk_generate.plan import PlannedItem, PlanOptions, RejectedRow, plan_items
from scripts.index_images.sources import SkippedFileError, read_source
from scripts.table_files import Row, TableFileError, read_rows

EXPECTED = [("a red apple", 1)]


def planned(path: Path, **options: Any) -> list[PlannedItem | RejectedRow]:
    return list(plan_items(read_rows(path), PlanOptions(first_seed=7, **options)))


def requests(path: Path, **options: Any) -> list[tuple[Any, Any]]:
    made = planned(path, **options)
    assert not [each for each in made if isinstance(each, RejectedRow)], made
    return [(each.request["prompt"], each.request["seed"]) for each in made if isinstance(each, PlannedItem)]


@pytest.mark.parametrize(
    "content",
    [
        b"prompt;seed\na red apple;1\n",
        b"prompt;seed;notes, if any\na red apple;1;\n",
        b"prompt\tseed\na red apple\t1\n",
        b"prompt|seed\na red apple|1\n",
        b"sep=,\nprompt,seed\na red apple,1\n",
        b"SEP=;\r\nprompt;seed\r\na red apple;1\r\n",
        b"\xef\xbb\xbfsep=\t\r\n\r\nprompt\tseed\r\na red apple\t1\r\n",
        b"Prompt,Seed\na red apple,1\n",
        b" PROMPT , seed \na red apple,1\n",
        b"prompt,seed,,\na red apple,1,,\n",
        b"prompt,seed\na red apple,1,,,\n",
        b"prompt,seed\na red apple,1\n,\n,\n , \n",
        b",prompt,seed\n0,a red apple,1\n",
        "prompt,seed\na red apple,1\n".encode("utf-16"),
        b"\xfe\xff" + "prompt,seed\r\na red apple,1\r\n".encode("utf-16-be"),
        "prompt,seed\na red apple,1\n".encode("utf-16-le"),
        "prompt,seed\na red apple,1\n".encode("utf-32"),
        b"prompt,seed\ra red apple,1\r",
    ],
)
def test_a_csv_file_is_read_in_the_form_that_programs_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p.csv").write_bytes(content)
    assert requests(tmp_path / "p.csv") == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_other_texts_and_standard_input_may_have_a_byte_order_mark(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = json.dumps({"Prompt": "a red apple", "SEED": 1})
    (tmp_path / "p.jsonl").write_bytes(line.encode(encoding))
    assert requests(tmp_path / "p.jsonl") == EXPECTED
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode(encoding))))
    (row,) = read_rows(Path("-"), format="jsonl")
    assert row.values["prompt"] == "a red apple"


def test_row_numbers_are_the_lines_of_an_editor(tmp_path: Path) -> None:
    content = 'sep=,\r\n\r\nprompt,seed\r\n\r\na red apple,1\r\n\r\n,2\r\n,\r\n"two\r\nlines",3\r\na pear,x\r\n'
    (tmp_path / "p.csv").write_bytes(content.encode())
    made = planned(tmp_path / "p.csv")
    assert [(each.row, isinstance(each, PlannedItem)) for each in made] == [
        (5, True),
        (7, False),
        (9, True),
        (11, False),
    ]


def test_a_line_break_in_a_text_is_a_line_feed_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'prompt,seed\r\n"a red apple\r\non a table",1\r\n')
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a red apple\r\non a table", "seed": 1}))
    table = pyarrow.table({"prompt": ["a red apple\r\non a table"], "seed": [1]})
    parquet.write_table(table, tmp_path / "p.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        assert requests(tmp_path / f"p.{kind}") == [("a red apple\non a table", 1)]


def test_a_line_break_in_a_request_is_a_line_feed() -> None:
    description = ImageDescription.model_validate({"caption": "a\r\nb\rc\n", "attributes": {"k": "d\r\ne"}})
    assert (description.caption, description.attributes) == ("a\nb\nc", {"k": "d\ne"})
    with pytest.raises(ValidationError, match="control characters"):
        ImageDescription.model_validate({"caption": "a\x0bb"})


def test_binary_text_in_parquet_is_decoded_and_other_bytes_are_rejected_where_they_are_used(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    columns = {"prompt": ["grün".encode(), b"\xff"], "photo": [b"\xff\xd8", b"\xff\xd8"], "sku": [b"A", b"B"]}
    parquet.write_table(pyarrow.table(columns), path)
    first, second = planned(path, metadata=["sku"])
    assert isinstance(first, PlannedItem)
    assert (first.request["prompt"], first.request["metadata"]) == ("grün", {"sku": "A"})
    assert second == RejectedRow(2, "`prompt` is not UTF-8 text")
    for options in ({"template": "{photo}"}, {"metadata": ["photo"]}, {"columns": {"custom_id": "photo"}}):
        refused = planned(path, **options)[0]
        assert isinstance(refused, RejectedRow), options
        assert "`photo` is not UTF-8 text" in refused.reason


def test_json_values_keep_their_json_form_in_metadata_and_templates(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"on": true, "list": ["a", null], "none": null, "n": 1.5}\n')
    (made,) = planned(tmp_path / "p.jsonl", template="{on} {list} {n}", metadata=["on", "list", "none", "n"])
    assert isinstance(made, PlannedItem)
    assert made.request["metadata"] == {"on": "true", "list": '["a", null]', "n": "1.5"}
    assert made.request["prompt"] == 'true ["a", null] 1.5'


def test_a_missing_column_is_reported_with_the_columns_that_were_found(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Text,seed\na,1\n")
    (refused,) = planned(tmp_path / "p.csv")
    assert refused == RejectedRow(2, "the row has no `prompt`; it has: Text, seed")
    (file,) = read_source(tmp_path / "p.csv")
    with pytest.raises(SkippedFileError, match="Text, seed"):
        file.read()


def test_columns_keep_their_own_names_beside_those_in_lower_case(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Product,SKU,sku\ncup,1,2\n")
    (row,) = read_rows(tmp_path / "p.csv")
    assert (row.values["Product"], row.values["product"], row.values["SKU"], row.values["sku"]) == (
        "cup",
        "cup",
        "1",
        "2",
    )
    (tmp_path / "files.csv").write_text("File;Caption\nmissing.png;a cup\n")
    (file,) = read_source(tmp_path / "files.csv")
    assert file.name == "row 2: missing.png"


@pytest.mark.parametrize("content", ["", "\n\n", ",,\n1,2,3\n", "sep=;\n", "prompt,seed,prompt\n", '"prompt'])
def test_a_table_without_a_readable_header_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(TableFileError):
        list(read_rows(tmp_path / "p.csv"))


def test_a_value_without_a_column_is_a_problem_of_its_row(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,seed,\na,1,lost\nb,2,\n")
    first, second = read_rows(tmp_path / "p.csv")
    assert (first.number, first.problem) == (2, "more cells than the 2 columns: prompt, seed")
    assert second == Row(3, {"prompt": "b", "seed": "2"})


@pytest.mark.parametrize("is_dictionary", [True, False])
def test_a_small_parquet_of_long_texts_is_read_in_little_memory(tmp_path: Path, is_dictionary: bool) -> None:
    text, count = "x" * 2**20, 300
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count), pyarrow.array([text]))
    table = pyarrow.table({"prompt": column if is_dictionary else column.cast(pyarrow.string())})
    parquet.write_table(table, tmp_path / "p.parquet", compression="zstd")
    del column, table
    assert (tmp_path / "p.parquet").stat().st_size < 10_000
    before, held = pyarrow.total_allocated_bytes(), 0
    tracemalloc.start()
    for read in read_rows(tmp_path / "p.parquet"):
        assert read.values["prompt"] == text
        held = max(held, pyarrow.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held + peak < 150 * 2**20


def test_a_parquet_cell_has_the_same_limit_as_one_of_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "MAX_CELL_CHARS", 1000)
    prompts, tags = ["é" * 1000, "x" * 1001, "y"], [[], [], ["z" * 1001]]
    parquet.write_table(pyarrow.table({"prompt": prompts, "tags": tags}), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(prompts[:2]))
    first, second, third = read_rows(tmp_path / "p.parquet")
    assert [each.problem is None for each in read_rows(tmp_path / "p.csv")] == [True, False]
    assert first.values["prompt"] == "é" * 1000
    for row, column in ((second, "prompt"), (third, "tags")):
        assert row.values == {}
        assert row.problem == f"`{column}` has more than 1000 characters"
