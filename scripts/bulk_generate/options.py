"""The command line of `scripts.bulk_generate`."""

import argparse
import json
import secrets
from collections.abc import Iterator, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

from afterimage_client import BulkOptions, JobKind, Lane, OnInvalid, header_line
from scripts.bulk_generate.plan import DEFAULT_NAME, PlanError, PlannedItem, Recipe, Rejected, plan
from scripts.console import EXIT_CODES, add_output_options, add_service_options
from scripts.table_files import FORMATS, Row, read_rows

DESCRIPTION = """\
Thousands of generations from a file of prompts, a template, or both: submit, watch, fetch.

It makes one bulk on the service and brings what comes of it into a folder: the images, a manifest (JSON Lines and CSV)
with the provenance of each, and a contact sheet. Interrupt it, lose the connection, restart either side: the same
command with the same --out goes on from there. No item is generated twice, no file is missing or partial."""

EXAMPLES = f"""\
examples:
  an image for every line of a text file
    python -m scripts.bulk_generate prompts.txt --out out/first

  every combination of a grid with 4 seeds each, 3 x 2 x 4 images; no file needed
    python -m scripts.bulk_generate --template "a {{color}} {{animal}}" \\
        --grid color=red,green,blue --grid animal=cat,dog --seeds 4 --out out/grid

  a table: its columns fill the template, name the files and stay with each image
    python -m scripts.bulk_generate products.csv --template "a photo of a {{product}}, {{style}}" \\
        --name "{{style}}/{{sku}}-{{seed}}.{{ext}}" --metadata sku --out out/products

  a Parquet file whose columns have other names, and fields for all of its rows
    python -m scripts.bulk_generate data.parquet --column prompt=caption --column seed=id \\
        --set num_inference_steps=8 --set format=webp --out out/data

  look first: what would be made, without asking the service
    python -m scripts.bulk_generate prompts.txt --limit 10 --dry-run --out out/first

  go on with what a folder holds; stop it for good; try again what failed
    python -m scripts.bulk_generate --out out/first
    python -m scripts.bulk_generate --out out/first --cancel
    python -m scripts.bulk_generate --out out/first --retry-failed

Columns and grid variables that are called like a field of POST /rag/generate are that field: prompt, negative_prompt,
seed, width, height, mode, model, ... Cells with a JSON list or object are read as such. Rows without a seed all get
the same first seed, so that a grid can be compared.

{EXIT_CODES}"""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m scripts.bulk_generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("input", nargs="?", type=Path, help="JSONL, CSV, TSV, TXT or Parquet file; - for standard input")
    made.add_argument("--out", type=Path, required=True, help="folder of this run, made if need be")

    group = made.add_argument_group("what is made")
    group.add_argument("--format", choices=sorted(set(FORMATS.values())), help="of the input, if not by its name")
    group.add_argument("--template", metavar="TEXT", help="prompt with {names} of columns and grid variables")
    group.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="values of a variable, or @FILE with one per line; every combination is made",
    )
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="items per prompt, with different seeds")
    group.add_argument("--first-seed", type=int, metavar="SEED", help="seed of the first of them (default: random)")
    group.add_argument(
        "--column", action="append", default=[], metavar="FIELD=COLUMN", help="column of a field with another name"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field for rows that do not say it"
    )
    group.add_argument(
        "--metadata", action="append", default=[], metavar="COLUMN", help="column that stays with the images"
    )
    group.add_argument(
        "--kind",
        choices=[kind.value for kind in JobKind],
        default=JobKind.RAG_GENERATE.value,
        help="with or without what the corpus remembers (default: %(default)s)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    group.add_argument("--skip-invalid", action="store_true", help="run the valid rows although others are not")

    group = made.add_argument_group("how")
    group.add_argument("--dry-run", action="store_true", help="check and show what would be made; ask nobody")
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="parallel downloads (default: 8)")
    group.add_argument(
        "--name",
        default=DEFAULT_NAME,
        metavar="TEXT",
        help="of the files, below OUT/images: {index} {custom_id} {slug} {seed} {n} {ext} and columns "
        f"(default: {DEFAULT_NAME})",
    )
    group.add_argument(
        "--lane", choices=[lane.value for lane in Lane], default=Lane.BULK.value, help="default: %(default)s"
    )
    group.add_argument("--webhook", metavar="URL", help="told once, when the bulk has ended")
    end = group.add_mutually_exclusive_group()
    end.add_argument("--cancel", action="store_true", help="cancel what has not run; fetch what has")
    end.add_argument("--retry-failed", action="store_true", help="new jobs for the items that failed")
    add_service_options(made)
    add_output_options(made)
    return made


def planned(arguments: argparse.Namespace) -> Iterator[PlannedItem | Rejected]:
    """The items that these options ask for.

    Raises:
        PlanError, RowsError: also while they are read.
    """
    if arguments.seeds < 1 or (arguments.limit is not None and arguments.limit < 1) or arguments.concurrency < 1:
        raise PlanError("--seeds, --limit and --concurrency are at least 1")
    # A template alone is one row without columns.
    rows = read_rows(arguments.input, format=arguments.format) if arguments.input else iter([Row(1, {})])
    return _first(plan(rows, _recipe(arguments)), arguments.limit)


def deciding(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run must have in common with the one that it continues."""
    return {
        "input": None if arguments.input is None or str(arguments.input) == "-" else _digest(arguments.input),
        "--template": arguments.template,
        "--grid": arguments.grid,
        "--seeds": arguments.seeds,
        "--first-seed": arguments.first_seed,
        "--column": arguments.column,
        "--set": arguments.set,
        "--metadata": arguments.metadata,
        "--kind": arguments.kind,
        "--limit": arguments.limit,
        "--name": arguments.name,
        "--lane": arguments.lane,
        "--webhook": arguments.webhook,
    }


def header(arguments: argparse.Namespace, items: int) -> str:
    """The bulk's first line."""
    options: dict[str, Any] = {
        "name": arguments.out.resolve().name[:200] or "bulk",
        "on_invalid": OnInvalid.SKIP if arguments.skip_invalid else OnInvalid.REFUSE,
        "lane": arguments.lane,
        "items": items,
    }
    if arguments.webhook:
        options["webhook"] = {"url": arguments.webhook}
    return header_line(BulkOptions.model_validate(options)).decode()


def _recipe(arguments: argparse.Namespace) -> Recipe:
    return Recipe(
        first_seed=secrets.randbelow(2**32) if arguments.first_seed is None else arguments.first_seed,
        template=arguments.template,
        grid={name: _grid_values(name, given) for name, given in _pairs("--grid", arguments.grid)},
        columns=dict(_pairs("--column", arguments.column)),
        fields={name: _value(given) for name, given in _pairs("--set", arguments.set)},
        metadata=arguments.metadata,
        seeds=arguments.seeds,
        kind=JobKind(arguments.kind),
        name=arguments.name,
    )


def _pairs(option: str, given: Sequence[str]) -> Iterator[tuple[str, str]]:
    seen = set()
    for pair in given:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise PlanError(f"{option} {pair}: write NAME=...")
        if name in seen:
            raise PlanError(f"{option}: {name} is given twice")
        seen.add(name)
        yield name, value


def _grid_values(name: str, given: str) -> list[str]:
    if given.startswith("@"):
        values = [str(row.values["value"]) for row in read_rows(Path(given[1:]), format="txt", text_column="value")]
    else:
        values = [value.strip() for value in given.split(",")]
    if not all(values) or not values:
        raise PlanError(f"--grid {name}: there is an empty value")
    return values


def _value(given: str) -> Any:
    """JSON where it is JSON, else the text as it stands."""
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return given


def _first(items: Iterator[PlannedItem | Rejected], limit: int | None) -> Iterator[PlannedItem | Rejected]:
    if limit is None:
        yield from items
        return
    left = limit
    while left and (item := next(items, None)) is not None:
        left -= isinstance(item, PlannedItem)
        yield item


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
