"""The bulk command plans items from files, templates and grids before it sends anything."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from uuid import UUID

import pytest

from afterimage_client import BulkState, ItemState
from ops.local.stack import REPOSITORY
from scripts.bulk_generate import options
from scripts.bulk_generate.__main__ import main
from scripts.bulk_generate.plan import PlannedItem, PlanOptions, RejectedRow, plan_items, slug
from scripts.bulk_generate.results import write_results
from scripts.bulk_generate.run import run
from scripts.console import ConsoleOutput, ExitCode
from scripts.table_files import Row, TableFileError, read_rows
from shared.contracts.jobs import JobKind


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(number, each) for number, each in enumerate(values, 1)]


def items(given: list[Row], **options: Any) -> list[PlannedItem]:
    made = list(plan_items(given, PlanOptions(**{"first_seed": 7} | options)))
    assert not [each for each in made if isinstance(each, RejectedRow)]
    return [each for each in made if isinstance(each, PlannedItem)]


# --- reading ------------------------------------------------------------------------------------------------------

EXPECTED: list[dict[str, Any]] = [{"prompt": "a red apple", "seed": 3}, {"prompt": "schöne, grüne Birne"}]


def write_prompts(folder: Path, kind: str) -> Path:
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
    read = [row.values for row in read_rows(write_prompts(tmp_path, kind))]
    if kind == "txt":
        read = [values | ({"seed": 3} if index == 0 else {}) for index, values in enumerate(read)]
    assert [{**values, **({"seed": int(values["seed"])} if "seed" in values else {})} for values in read] == EXPECTED


def test_a_broken_line_is_reported_by_its_number_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n[1]\n\n{"prompt": "b"}\n')
    read = list(read_rows(path))
    assert [(row.number, row.problem is None) for row in read] == [(1, True), (2, False), (3, False), (5, True)]
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,seed\n"a\nb",1\nc,2,3\nd,4\n')
    assert [(row.number, row.problem is None) for row in read_rows(path)] == [(2, True), (4, False), (5, True)]


@pytest.mark.parametrize("name", ["missing.txt", "image.png", "broken.parquet", "latin.txt"])
def test_an_unreadable_file_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(TableFileError):
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


def test_items_with_several_images_get_seeds_that_do_not_overlap() -> None:
    made = items(rows({"prompt": "a", "num_images": 3, "seed": 2**32 - 4}), seeds=2)
    assert [item.request["seed"] for item in made] == [2**32 - 4, 2**32 - 1]
    assert made[1].files == ["000002-a-4294967295.png", "000002-a-0.png", "000002-a-1.png"]


def test_columns_can_be_fields_template_variables_and_metadata() -> None:
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


def test_a_template_may_only_use_plain_column_names() -> None:
    for template in ("{prompt.__class__}", "{prompt[0]}", "{0}", "{missing}", "{prompt"):
        (rejected,) = plan_items(rows({"prompt": "a"}), PlanOptions(first_seed=1, template=template))
        assert isinstance(rejected, RejectedRow), template
    (item,) = items(rows({"prompt": "a"}), template="{{{prompt}}}")
    assert item.request["prompt"] == "{a}"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "the row has no `prompt`"),
        ({"prompt": "x" * 3000}, "prompt"),
        ({"prompt": "a", "width": "wide"}, "width"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "lane": "high"}, "lane"),
        ({"prompt": "a", "filter": "{not json"}, "filter"),
    ],
)
def test_an_invalid_row_is_rejected_with_its_reason(values: dict[str, Any], reason: str) -> None:
    made = list(plan_items(rows({"prompt": "before"}, values, {"prompt": "after"}), PlanOptions(first_seed=1)))
    assert [type(each) for each in made] == [PlannedItem, RejectedRow, PlannedItem]
    assert isinstance(made[1], RejectedRow)
    assert (made[1].row, reason in made[1].reason) == (2, True)


def test_a_kind_without_references_drops_the_fields_of_references() -> None:
    (made,) = items(rows({"prompt": "a", "mode": "none"}), kind=JobKind.GENERATE)
    assert "mode" not in made.request


@pytest.mark.parametrize(
    "options", [{"name": "{slug}.{ext}"}, {"columns": {"custom_id": "prompt"}}], ids=["names", "ids"]
)
def test_two_items_never_share_a_file_or_an_id(options: dict[str, Any]) -> None:
    twice = rows({"prompt": "A", "seed": 1}, {"prompt": "A", "seed": 2}, {"prompt": "B", "seed": 3})
    first, second, third = plan_items(twice, PlanOptions(first_seed=1, **options))
    assert isinstance(first, PlannedItem)
    assert isinstance(second, RejectedRow)
    assert re.fullmatch(r"row 1 already uses the (file name 'a.png'|custom_id 'A')", second.reason)
    assert isinstance(third, PlannedItem), "a rejected row does not affect the next one"


def test_a_row_whose_own_items_clash_is_rejected_as_a_whole() -> None:
    (made,) = plan_items(rows({"prompt": "A"}), PlanOptions(first_seed=1, seeds=2, name="{slug}.{ext}"))
    assert isinstance(made, RejectedRow)
    assert made.reason == "row 1 already uses the file name 'a.png'"


@pytest.mark.parametrize("name", ["../{seed}.png", "/tmp/{seed}.png", ".{seed}.png", "{prompt}/../{seed}.png"])
def test_a_file_name_cannot_lead_out_of_the_output_folder(name: str) -> None:
    (made,) = plan_items(rows({"prompt": "a"}), PlanOptions(first_seed=1, name=name))
    assert isinstance(made, RejectedRow)


def test_a_column_value_cannot_lead_out_of_the_output_folder() -> None:
    (made,) = items(rows({"prompt": "../../etc/passwd", "who": ".."}), name="{who}/{prompt}-{seed}")
    assert made.files == ["-/etc-passwd-7"]
    assert slug("\N{RED APPLE}!") == "image"


# --- the command, without a service -------------------------------------------------------------------------------


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "scripts.bulk_generate", *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_a_dry_run_prints_the_planned_items_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options_given = ["--template", "a {color} cat", "--grid", "color=red,green", "--first-seed", "5", "--limit", "1"]
    done = command(*options_given, "--dry-run", "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    item, planned = map(json.loads, done.stdout.splitlines())
    assert (item["request"]["prompt"], item["request"]["seed"]) == ("a red cat", 5)
    assert (planned["event"], planned["items"], planned["images"]) == ("planned", 1, 1)
    assert not out.exists()


def test_a_dry_run_says_that_a_run_has_other_seeds(tmp_path: Path) -> None:
    given = ["--template", "a cat", "--dry-run", "--out", str(tmp_path / "out")]
    assert "get other seeds" in command(*given).stderr
    assert "get other seeds" not in command(*given, "--first-seed", "5").stderr


@pytest.mark.parametrize("dry_run", [["--dry-run"], []])
def test_a_missing_file_is_told_in_words(tmp_path: Path, dry_run: list[str]) -> None:
    path = tmp_path / "absent.csv"
    for given in ([str(path)], ["--template", "a {x}", "--grid", f"x=@{path}"]):
        done = command(*given, *dry_run, "--out", str(tmp_path / "out"))
        assert (done.returncode, done.stderr.strip()) == (2, f"error: {path} does not exist")


def test_a_bad_row_is_listed_once_for_all_values_of_a_grid(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,width\na {c} cat,64\na {c} dog,1\n")
    done = command(str(tmp_path / "p.csv"), "--grid", "c=red,green,blue", "--dry-run", "--out", str(tmp_path / "out"))
    assert done.stderr.count("row 3: width") == 1


def test_a_typo_in_a_template_is_one_line_for_all_rows(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("colour\n" + "red\n" * 30)
    done = command(str(tmp_path / "p.csv"), "--template", "a {color} cat", "--out", str(tmp_path / "out"))
    first, last = done.stderr.strip().splitlines()
    assert first.startswith("error: rows 2, 3, 4, 5, 6 and 25 more: ")
    assert "color" in first
    assert last.startswith("Nothing was sent.")


def test_invalid_rows_stop_a_run_before_anything_is_sent_and_are_all_listed(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,width\na,64\nb,huge\nc,1\n")
    done = command(str(tmp_path / "p.csv"), "--out", str(tmp_path / "out"), "--url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "row 3: width" in done.stderr
    assert "row 4: width" in done.stderr
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in rejected] == [3, 4]


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str


def run_unreachable(out: Path, *arguments: str, stdin: str = "") -> Ended:
    """Run the command until it needs the service: code 3 means that the plan was accepted."""
    service = ["--out", str(out), "--url", "http://127.0.0.1:9", "--retry-for", "0", "--json"]
    given = ["bulk_generate", *arguments, *service]
    standard_input = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with (
        patch.object(sys, "argv", given),
        patch.object(sys, "stdin", standard_input),
        redirect_stdout(io.StringIO()) as output,
        pytest.raises(SystemExit) as ended,
    ):
        main()
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, output.getvalue())


def planned_prompts(out: Path) -> list[str]:
    return [json.loads(line)["request"]["prompt"] for line in (out / ".run" / "plan.jsonl").read_text().splitlines()]


STDIN = ["-", "--format", "txt"]


@pytest.mark.parametrize(
    ("first", "first_stdin", "second", "second_stdin"),
    [
        (STDIN, "a cat\na dog\n", STDIN, "a cow\na dog\n"),
        (STDIN, "a cat\na dog\n", STDIN, "a cat\na cow\na dog\n"),
        (STDIN, "a cat\na dog\n", STDIN, "a cat\n"),
        (STDIN, "a cat\na dog\n", STDIN, ""),
        ([*STDIN, "--template", "a {prompt}"], "cat\n", STDIN, "cat\n"),
        (STDIN, "a cat\na dog\n", [*STDIN, "--limit", "1"], "a cat\na dog\n"),
        ([*STDIN, "--limit", "1"], "a cat\na dog\n", ["--limit", "2"], ""),
        (STDIN, "a cat\na dog\n", ["--seeds", "2"], ""),
    ],
)
def test_a_folder_refuses_another_input(
    tmp_path: Path, first: list[str], first_stdin: str, second: list[str], second_stdin: str
) -> None:
    assert run_unreachable(tmp_path, *first, stdin=first_stdin).returncode == 3
    before = planned_prompts(tmp_path)
    done = run_unreachable(tmp_path, *second, stdin=second_stdin)
    assert (done.returncode, planned_prompts(tmp_path)) == (2, before)
    assert "choose another --out" in done.stdout
    assert run_unreachable(tmp_path, *first, stdin=first_stdin).returncode == 3, "the run itself continues"


def test_the_input_is_named_too_when_it_and_an_option_differ(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    out = tmp_path / "out"
    run_unreachable(out, str(tmp_path / "cats.txt"))
    assert "with another --seeds:" in run_unreachable(out, str(tmp_path / "cats.txt"), "--seeds", "2").stdout
    assert "with another input, --seeds:" in run_unreachable(out, str(tmp_path / "dogs.txt"), "--seeds", "2").stdout


def test_a_larger_input_goes_on_with_its_new_items(tmp_path: Path) -> None:
    lines = "a cat\na dog\na cow\n"
    for limit, count in (("1", 1), ("2", 2), (None, 3)):
        given = [*STDIN, *(["--limit", limit] if limit else [])]
        assert run_unreachable(tmp_path / "stdin", *given, stdin=lines).returncode == 3
        assert planned_prompts(tmp_path / "stdin") == lines.splitlines()[:count]
    file, out = tmp_path / "p.txt", tmp_path / "file"
    for text in ("a cat\n", lines, lines):
        file.write_text(text)
        assert run_unreachable(out, str(file)).returncode == 3
        assert planned_prompts(out) == text.splitlines()
    file.write_text(lines + "x" * 3000 + "\n")
    done = run_unreachable(out, str(file))
    assert (done.returncode, "row 4: prompt" in done.stdout) == (2, True)
    assert planned_prompts(out) == lines.splitlines()
    file.write_text(file.read_text() + "a fish\n")
    assert run_unreachable(out, str(file), "--skip-invalid").returncode == 3
    assert planned_prompts(out) == [*lines.splitlines(), "a fish"]
    run = json.loads((out / ".run" / "run.json").read_text())
    assert [part["items"] for part in (run, *run["more"])] == [1, 2, 1]


def test_a_folder_of_the_earlier_version_is_continued(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n")
    out, saved = tmp_path / "out", tmp_path / "out" / ".run" / "run.json"
    assert run_unreachable(out, str(tmp_path / "p.txt")).returncode == 3
    run = json.loads(saved.read_text())
    del run["first_seed"], run["more"]
    saved.write_text(json.dumps(run | {"version": 1}))
    assert run_unreachable(out, str(tmp_path / "p.txt")).returncode == 3
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert run_unreachable(out, str(tmp_path / "p.txt")).returncode == 2


class SmallService:
    """The bulks of a service whose items all succeed at once, without images."""

    def __init__(self) -> None:
        self.bulks = self
        self.sent: dict[UUID, list[dict[str, Any]]] = {}

    def __enter__(self) -> "SmallService":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def create(self, header: bytes, *, idempotency_key: str) -> Any:
        return self.get(UUID(idempotency_key))

    def send(self, bulk_id: UUID, lines: Iterable[bytes]) -> Any:
        self.sent[bulk_id] = [json.loads(line) for line in lines][1:]
        return self.get(bulk_id)

    def get(self, bulk_id: UUID) -> Any:
        total = len(self.sent.get(bulk_id, []))
        return SimpleNamespace(id=bulk_id, state=BulkState.COMPLETED, invalid=0, name="b", total=total, rate_per_s=None)

    def items(self, bulk_id: UUID, **_: Any) -> list[Any]:
        return [
            SimpleNamespace(
                line=line, state=ItemState.SUCCEEDED, outputs=[], custom_id=request["custom_id"], error=None
            )
            for line, request in enumerate(self.sent[bulk_id], 2)
        ]

    def manifest(self, bulk_id: UUID) -> list[dict[str, Any]]:
        return [
            {"line": line, "custom_id": request["custom_id"], "state": "succeeded", "outputs": []}
            for line, request in enumerate(self.sent[bulk_id], 2)
        ]


def test_the_manifest_has_the_items_of_all_bulks_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = SmallService()
    monkeypatch.setattr("scripts.bulk_generate.run.client_from_options", lambda arguments: service)
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("a cat\na dog\na cow\n")
    for limit in (["--limit", "2"], []):
        given = options.parser().parse_args([str(file), "--out", str(out), *limit, "--quiet"])
        assert run(given, ConsoleOutput(quiet=True)) == ExitCode.DONE
    assert [[request["prompt"] for request in sent] for sent in service.sent.values()] == [
        ["a cat", "a dog"],
        ["a cow"],
    ]
    seeds = {request["seed"] for sent in service.sent.values() for request in sent}
    assert len(seeds) == 1, "new items get the same first seed"
    records = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [(record["row"], record["custom_id"]) for record in records] == [(1, "000001"), (2, "000002"), (3, "000003")]


FORMULAS = [
    '=HYPERLINK("http://a.example")',
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\uff1d1+1",
    "'=already with an apostrophe",
    "''-two",
    "'tis a text",
    "a = b",
    "-",
]


def test_formulas_in_the_table_are_texts_and_are_read_back_as_they_were(tmp_path: Path) -> None:
    table = tmp_path / "manifest.csv"
    records = [
        {
            "line": number,
            "row": number,
            "custom_id": text,
            "state": "failed",
            "prompt": text,
            "parameters": {"negative_prompt": text},
            "error": {"code": "x", "detail": text},
            "outputs": [],
        }
        for number, text in enumerate(FORMULAS, 2)
    ]
    write_results(records, manifest=tmp_path / "manifest.jsonl", table=table, sheet=tmp_path / "sheet.html", title="x")
    with table.open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if re.match(r"[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]", cell)]
    read = list(read_rows(table))
    for column in ("custom_id", "prompt", "negative_prompt", "error_detail"):
        assert [row.values[column] for row in read] == FORMULAS


def test_an_apostrophe_in_a_table_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\n'-_-' a face\n")
    assert [row.values["prompt"] for row in read_rows(tmp_path / "p.csv")] == ["'-_-' a face"]


def test_lines_with_a_number_sign_are_counted(tmp_path: Path) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("# fruit\na red apple\n\n   # a note\na #red pear\n")
    shown = command(str(file), "--dry-run", "--out", str(out))
    assert "2 items, 2 images, 2 lines with # left out" in shown.stderr
    planned = json.loads(run_unreachable(out, str(file)).stdout.splitlines()[0])
    assert (planned["event"], planned["items"], planned["comments"]) == ("planned", 2, 2)
    assert planned_prompts(out) == ["a red apple", "a #red pear"]


def test_the_examples_of_the_help_are_valid(tmp_path: Path) -> None:
    help_text = command("--help").stdout
    examples = help_text.partition("examples:")[2].partition("Columns and")[0].replace("\\\n", " ")
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
