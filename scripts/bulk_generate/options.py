"""The command line options of `scripts.bulk_generate`."""

import argparse
import json
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest
from pathlib import Path
from typing import Any

from afterimage_client import BulkOptions, JobKind, Lane, OnInvalid, header_line
from scripts.bulk_generate.plan import (
    DEFAULT_NAME_TEMPLATE,
    PlanError,
    PlannedItem,
    PlanOptions,
    RejectedRow,
    plan_items,
)
from scripts.console import EXIT_CODES_HELP, add_output_options, add_service_options
from scripts.table_files import FORMATS, Row, read_rows, unreadable_file

DESCRIPTION = """\
Generate thousands of images from a file of prompts, a template, or both.

The script creates one bulk on the service and downloads its results into a folder: the images, a manifest (JSON Lines
and CSV) with the provenance of each image, and a contact sheet. After an interruption, a lost connection or a restart,
the same command with the same --out continues. No item is generated twice, and no file is missing or partial.

A longer input, or a higher --limit, adds its new items as one more bulk. It must begin with the same items; another
input needs another --out. Capitals in the names of columns do not matter.

In a TXT file each line is a prompt. Empty lines and lines that begin with # are left out, and the summary counts the
latter. A prompt that begins with # needs a CSV or JSONL file. In manifest.csv, an apostrophe precedes a text that a
spreadsheet would run as a formula. This script reads such a file with the original texts."""

EXAMPLES = f"""\
examples:
  one image for every line of a text file
    python -m scripts.bulk_generate prompts.txt --out out/first

  every combination of a grid with 4 seeds each, 3 x 2 x 4 images, without a file
    python -m scripts.bulk_generate --template "a {{color}} {{animal}}" \\
        --grid color=red,green,blue --grid animal=cat,dog --seeds 4 --out out/grid

  a table whose columns fill the template, name the files and become metadata of the images
    python -m scripts.bulk_generate products.csv --template "a photo of a {{product}}, {{style}}" \\
        --name "{{style}}/{{sku}}-{{seed}}.{{ext}}" --metadata sku --out out/products

  a Parquet file whose columns have other names, and fields for all of its rows
    python -m scripts.bulk_generate data.parquet --column prompt=caption --column seed=id \\
        --set num_inference_steps=8 --set format=webp --out out/data

  show the planned items without contacting the service
    python -m scripts.bulk_generate prompts.txt --limit 10 --dry-run --out out/first

  continue the run in a folder; cancel it; retry its failed items
    python -m scripts.bulk_generate --out out/first
    python -m scripts.bulk_generate --out out/first --cancel
    python -m scripts.bulk_generate --out out/first --retry-failed

Columns and grid variables named like a field of POST /rag/generate set that field: prompt, negative_prompt, seed,
width, height, mode, model, ... Cells with a JSON list or object are parsed. All rows without a seed get the same first
seed, so that the images of a grid can be compared.

{EXIT_CODES_HELP}"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=sys.argv[0] if sys.argv[0] == "afterimage bulk run" else "python -m scripts.bulk_generate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input", nargs="?", type=Path, help="JSONL, CSV, TSV, TXT or Parquet file; - for standard input"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of this run; created if it does not exist")

    group = parser.add_argument_group("items")
    group.add_argument("--format", choices=sorted(set(FORMATS.values())), help="of the input (default: by its suffix)")
    group.add_argument("--template", metavar="TEXT", help="the prompt, with {names} of columns and grid variables")
    group.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="values of a variable, or @FILE with one per line; every combination gives a prompt",
    )
    group.add_argument("--seeds", type=int, default=1, metavar="N", help="items per prompt, with different seeds")
    group.add_argument("--first-seed", type=int, metavar="SEED", help="seed of the first item (default: random)")
    group.add_argument(
        "--column", action="append", default=[], metavar="FIELD=COLUMN", help="column for a field with another name"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field for rows that do not have it"
    )
    group.add_argument(
        "--metadata", action="append", default=[], metavar="COLUMN", help="column that becomes metadata of the images"
    )
    group.add_argument(
        "--kind",
        choices=[kind.value for kind in JobKind],
        default=JobKind.RAG_GENERATE.value,
        help="with or without references from the corpus (default: %(default)s)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    group.add_argument("--skip-invalid", action="store_true", help="leave invalid rows out and run the others")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--dry-run", action="store_true", help="check and show the planned items without contacting the service"
    )
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="parallel downloads (default: 8)")
    group.add_argument(
        "--name",
        default=DEFAULT_NAME_TEMPLATE,
        metavar="TEXT",
        help="template of the file names below OUT/images: {index} {custom_id} {slug} {seed} {n} {ext} and columns "
        f"(default: {DEFAULT_NAME_TEMPLATE})",
    )
    group.add_argument(
        "--lane", choices=[lane.value for lane in Lane], default=Lane.BULK.value, help="default: %(default)s"
    )
    group.add_argument("--webhook", metavar="URL", help="notified once, when the bulk has ended")
    end = group.add_mutually_exclusive_group()
    end.add_argument("--cancel", action="store_true", help="cancel items that have not run; download the others")
    end.add_argument("--retry-failed", action="store_true", help="create new jobs for the items that failed")
    add_service_options(parser)
    add_output_options(parser)
    return parser


def choose_first_seed(arguments: argparse.Namespace) -> int:
    given: int | None = arguments.first_seed
    return secrets.randbelow(2**32) if given is None else given


def planned_items(
    arguments: argparse.Namespace, first_seed: int, *, on_comment: Callable[[int], object] = lambda number: None
) -> Iterator[PlannedItem | RejectedRow]:
    """Yield the items that the options describe.

    on_comment: called with the number of each line of a text file that begins with `#`.

    Raises:
        PlanError: the options are not valid.
        TableFileError: the input cannot be read; also in the middle.
    """
    if arguments.seeds < 1 or (arguments.limit is not None and arguments.limit < 1) or arguments.concurrency < 1:
        raise PlanError("--seeds, --limit and --concurrency must be at least 1")
    # Without an input file there is one row without columns, for the template.
    rows = (
        read_rows(arguments.input, format=arguments.format, on_comment=on_comment)
        if arguments.input
        else iter([Row(1, {})])
    )
    return _first(plan_items(rows, _plan_options(arguments, first_seed)), arguments.limit)


def fixed_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that a run is continued with; the input is given by its digest.

    Input and limit may grow if the plan begins with the same items.

    Raises:
        TableFileError: the input cannot be read.
    """
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


def changed_options(arguments: argparse.Namespace, saved: dict[str, Any]) -> list[str]:
    """Return the names of the options that differ from the saved ones and are not the default."""
    defaults = fixed_options(parser().parse_args(["--out", "."]))
    given = fixed_options(arguments)
    return [name for name, value in given.items() if value not in (defaults[name], saved.get(name))]


def header(arguments: argparse.Namespace, items: int) -> str:
    """Return the first line of the bulk's stream, for this number of items."""
    options: dict[str, Any] = {
        "name": arguments.out.resolve().name[:200] or "bulk",
        "on_invalid": OnInvalid.SKIP if arguments.skip_invalid else OnInvalid.REFUSE,
        "lane": arguments.lane,
        "items": items,
    }
    if arguments.webhook:
        options["webhook"] = {"url": arguments.webhook}
    return header_line(BulkOptions.model_validate(options)).decode()


def _plan_options(arguments: argparse.Namespace, first_seed: int) -> PlanOptions:
    return PlanOptions(
        first_seed=first_seed,
        template=arguments.template,
        grid={name: _grid_values(name, given) for name, given in _pairs("--grid", arguments.grid)},
        columns=dict(_pairs("--column", arguments.column)),
        fields={name: _parse_value(given) for name, given in _pairs("--set", arguments.set)},
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
        raise PlanError(f"--grid {name}: a value is empty")
    return values


def _parse_value(given: str) -> Any:
    """Parse JSON; return other text as it is."""
    try:
        return json.loads(given)
    except json.JSONDecodeError:
        return given


def _first(items: Iterator[PlannedItem | RejectedRow], limit: int | None) -> Iterator[PlannedItem | RejectedRow]:
    if limit is None:
        yield from items
        return
    left = limit
    while left and (item := next(items, None)) is not None:
        left -= isinstance(item, PlannedItem)
        yield item


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable_file(path, error) from error
