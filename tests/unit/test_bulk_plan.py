"""From files, templates and grids to items, before anything is sent."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ops.local.stack import REPOSITORY
from scripts.bulk_generate.plan import PlannedItem, Recipe, Rejected, plan, slug
from scripts.table_files import Row, RowsError, read_rows
from shared.contracts.jobs import JobKind


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(number, each) for number, each in enumerate(values, 1)]


def items(given: list[Row], **recipe: Any) -> list[PlannedItem]:
    made = list(plan(given, Recipe(**{"first_seed": 7} | recipe)))
    assert not [each for each in made if isinstance(each, Rejected)]
    return [each for each in made if isinstance(each, PlannedItem)]


# --- reading ------------------------------------------------------------------------------------------------------

EXPECTED: list[dict[str, Any]] = [{"prompt": "a red apple", "seed": 3}, {"prompt": "schöne, grüne Birne"}]


def written(folder: Path, kind: str) -> Path:
    path = folder / f"prompts.{kind}"
    match kind:
        case "txt":
            path.write_text("# fruit\n\na red apple\r\n  schöne, grüne Birne \n", encoding="utf-8-sig")
        case "csv" | "tsv":
            mark = "," if kind == "csv" else "\t"
            lines = [["prompt", "seed"], ["a red apple", "3"], ['"schöne, grüne Birne"', ""]]
            path.write_text("\n".join(mark.join(line) for line in lines), encoding="utf-8-sig")
        case "jsonl":
            path.write_text('{"prompt": "a red apple", "seed": 3}\n\n"schöne, grüne Birne"\n')
        case "parquet":
            import pyarrow
            from pyarrow import parquet

            parquet.write_table(pyarrow.Table.from_pylist([EXPECTED[0], EXPECTED[1] | {"seed": None}]), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    read = [row.values for row in read_rows(written(tmp_path, kind))]
    if kind == "txt":
        read = [values | ({"seed": 3} if index == 0 else {}) for index, values in enumerate(read)]
    assert [{**values, **({"seed": int(values["seed"])} if "seed" in values else {})} for values in read] == EXPECTED


def test_a_broken_line_is_named_by_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n[1]\n\n{"prompt": "b"}\n')
    read = list(read_rows(path))
    assert [(row.number, row.problem is None) for row in read] == [(1, True), (2, False), (3, False), (5, True)]
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,seed\n"a\nb",1\nc,2,3\nd,4\n')
    assert [(row.number, row.problem is None) for row in read_rows(path)] == [(2, True), (4, False), (5, True)]


@pytest.mark.parametrize("name", ["missing.txt", "image.png", "broken.parquet", "latin.txt"])
def test_a_file_that_cannot_be_read_at_all_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(RowsError):
        list(read_rows(tmp_path / name))


# --- items --------------------------------------------------------------------------------------------------------


def test_every_combination_of_a_grid_is_made_with_every_seed() -> None:
    made = items(
        rows({}),
        template="a {color} {animal}",
        grid={"color": ["red", "green"], "animal": ["cat", "dog"]},
        seeds=2,
    )
    assert [(item.request["prompt"], item.request["seed"]) for item in made] == [
        (f"a {color} {animal}", seed) for color in ("red", "green") for animal in ("cat", "dog") for seed in (7, 8)
    ]
    assert [item.request["custom_id"] for item in made] == [f"{number:06d}" for number in range(1, 9)]
    assert made[3].files == ["000004-a-red-dog-8.png"]


def test_the_seeds_of_an_item_with_several_images_do_not_overlap_with_those_of_the_next() -> None:
    made = items(rows({"prompt": "a", "num_images": 3, "seed": 2**32 - 4}), seeds=2)
    assert [item.request["seed"] for item in made] == [2**32 - 4, 2**32 - 1]
    assert made[1].files == ["000002-a-4294967295.png", "000002-a-0.png", "000002-a-1.png"]


def test_columns_are_fields_variables_and_metadata() -> None:
    (made,) = items(
        rows(
            {"caption": "a {brace}", "id": "A/1", "steps": "4", "filter": '{"tags": ["x"]}', "other": 1, "width": "64"}
        ),
        columns={"prompt": "caption", "num_inference_steps": "steps", "custom_id": "id"},
        metadata=["id"],
        fields={"width": 32, "format": "jpeg"},
        name="{id}/{custom_id}-{seed}.{ext}",
    )
    assert made.request == {
        "kind": "rag_generate",
        "custom_id": "A/1",
        "prompt": "a {brace}",
        "seed": 7,
        "num_inference_steps": 4,
        "filter": {"tags": ["x"]},
        "width": 64,
        "format": "jpeg",
        "metadata": {"id": "A/1"},
    }
    assert made.files == ["A-1/A-1-7.jpg"]


def test_a_template_that_reaches_for_more_than_names_is_refused() -> None:
    for template in ("{prompt.__class__}", "{prompt[0]}", "{0}", "{missing}", "{prompt"):
        (rejected,) = plan(rows({"prompt": "a"}), Recipe(first_seed=1, template=template))
        assert isinstance(rejected, Rejected), template
    (item,) = items(rows({"prompt": "a"}), template="{{{prompt}}}")
    assert item.request["prompt"] == "{a}"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "there is no `prompt`"),
        ({"prompt": "x" * 3000}, "prompt"),
        ({"prompt": "a", "width": "wide"}, "width"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "lane": "high"}, "lane"),
        ({"prompt": "a", "filter": "{not json"}, "filter"),
    ],
)
def test_a_row_that_is_no_request_is_left_out_with_its_reason(values: dict[str, Any], reason: str) -> None:
    made = list(plan(rows({"prompt": "before"}, values, {"prompt": "after"}), Recipe(first_seed=1)))
    assert [type(each) for each in made] == [PlannedItem, Rejected, PlannedItem]
    assert isinstance(made[1], Rejected)
    assert (made[1].row, reason in made[1].reason) == (2, True)


def test_a_kind_without_references_knows_no_fields_of_references() -> None:
    (made,) = items(rows({"prompt": "a", "mode": "none"}), kind=JobKind.GENERATE)
    assert "mode" not in made.request


@pytest.mark.parametrize(
    "recipe", [{"name": "{slug}.{ext}"}, {"columns": {"custom_id": "prompt"}}], ids=["names", "ids"]
)
def test_two_items_never_share_a_file_or_an_id(recipe: dict[str, Any]) -> None:
    twice = rows({"prompt": "A", "seed": 1}, {"prompt": "A", "seed": 2}, {"prompt": "B", "seed": 3})
    first, second, third = plan(twice, Recipe(first_seed=1, **recipe))
    assert isinstance(first, PlannedItem)
    assert isinstance(second, Rejected)
    assert re.fullmatch(r"it would have the same (file name 'a.png'|custom_id 'A') as row 1", second.reason)
    assert isinstance(third, PlannedItem), "one that is left out harms no other"


def test_of_a_row_whose_items_clash_with_each_other_none_is_made() -> None:
    (made,) = plan(rows({"prompt": "A"}), Recipe(first_seed=1, seeds=2, name="{slug}.{ext}"))
    assert isinstance(made, Rejected)
    assert made.reason == "it would have the same file name 'a.png' as row 1"


@pytest.mark.parametrize("name", ["../{seed}.png", "/tmp/{seed}.png", ".{seed}.png", "{prompt}/../{seed}.png"])
def test_no_name_leads_out_of_the_folder(name: str) -> None:
    (made,) = plan(rows({"prompt": "a"}), Recipe(first_seed=1, name=name))
    assert isinstance(made, Rejected)


def test_no_value_leads_out_of_the_folder() -> None:
    (made,) = items(rows({"prompt": "../../etc/passwd", "who": ".."}), name="{who}/{prompt}-{seed}")
    assert made.files == ["-/etc-passwd-7"]
    assert slug("\N{RED APPLE}!") == "image"


# --- the command, without a service -------------------------------------------------------------------------------


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "scripts.bulk_generate", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_a_dry_run_shows_what_would_be_made_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["--template", "a {color} cat", "--grid", "color=red,green", "--first-seed", "5", "--limit", "1"]
    done = command(*asked, "--dry-run", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    item, planned = map(json.loads, done.stdout.splitlines())
    assert (item["request"]["prompt"], item["request"]["seed"]) == ("a red cat", 5)
    assert (planned["event"], planned["items"], planned["images"]) == ("planned", 1, 1)
    assert not out.exists()


def test_invalid_rows_stop_a_run_before_anything_is_sent_and_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,width\na,64\nb,huge\nc,1\n")
    done = command(str(tmp_path / "p.csv"), "--out", str(tmp_path / "out"), "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "row 3: width" in done.stderr
    assert "row 4: width" in done.stderr
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in rejected] == [3, 4]


def test_help_teaches_by_examples_that_are_valid(tmp_path: Path) -> None:
    told = command("--help").stdout
    examples = told.partition("examples:")[2].partition("Columns and")[0].replace("\\\n", " ")
    lines = [
        line.split("scripts.bulk_generate")[1] for line in examples.splitlines() if "scripts.bulk_generate" in line
    ]
    assert len(lines) >= 7
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "products.csv").write_text("product,style,sku\ncup,oil,A1\n")
    for line in lines[:3]:
        script = f"cd {tmp_path}; PYTHONPATH={REPOSITORY} {sys.executable} -m scripts.bulk_generate {line} --dry-run"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
