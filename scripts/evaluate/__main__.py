"""Does retrieval help? Draw the same prompts from the same seeds with four choices of references and judge the images.

    python -m scripts.evaluate                       # the configured models on the starter corpus
    python -m scripts.evaluate --quick               # a first look in a tenth of the time
    python -m scripts.evaluate --corpus photos/ --model sdxl --judge hf-hub:apple/DFN5B-CLIP-ViT-H-14

Arms: none (the prompt alone), random (what another prompt retrieves), retrieved (what the service does), oracle (the
concept's own images). Prompts are names of concepts: `seen` ones, and `held_out` ones that the generator was not
trained on. Retrieval helps if `retrieved` beats both `none` and `random`. The models and all that decides on
references come from the service's settings (AFTERIMAGE_...) and run through the service's code; no server is needed.

A corpus is a WebDataset tar, or a folder of images beside NAME.json (caption, tags, attributes) or NAME.txt (caption).
The attribute `concept` groups images of one thing (else the caption does); `split` = held-out marks what the generator
has not seen.

Writes summary.json, table.md, chart.png, sheet.png (references and arms, prompt by prompt), queries.png (searches).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts.evaluate import pictures, report
from scripts.evaluate.evaluation import Evaluation, Models, Options, evaluate
from scripts.evaluate.judging import unit
from shared.errors import BaseAppException
from shared.settings import STARTER, Settings, load_settings

CONCEPTS, QUICK_CONCEPTS, SEEDS = 100, 10, 2
QUERIES = (
    "sad face",
    "yellow fruit",
    "red vehicle",
    "green vegetable",
    "blue heart",
    "sea animal",
    "angry cat",
    "hot drink",
    "musical instrument",
    "cold weather",
    "party",
    "tool for cutting",
    "flower",
    "quarterly tax report",
)
"""Keywords, two words, and one that nothing should answer: for the sheet of searches."""


def main() -> None:
    options, out, queries = _arguments()
    console = Console()
    try:
        settings = load_settings()
        models = Models.load(options, settings)
        with Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            evaluation = evaluate(options, settings, models, progress)
    except BaseAppException as error:
        raise SystemExit(f"scripts.evaluate: {error}") from error
    measured = report.summary(evaluation, report.conditions(evaluation, options, settings, models))
    console.print(Markdown(report.table(measured)))
    for path in write(evaluation, measured, out=out, queries=queries, models=models, settings=settings):
        console.print(f"wrote [bold]{path}")


def write(
    evaluation: Evaluation,
    measured: dict[str, Any],
    *,
    out: Path,
    queries: Sequence[str],
    models: Models,
    settings: Settings,
) -> list[Path]:
    """Write figures and pictures into the folder `out`; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("summary.json", "table.md", "chart.png", "sheet.png", "queries.png")
    summary, table, chart, sheet, searches = paths = [out / name for name in names]
    summary.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    table.write_text(report.table(measured), encoding="utf-8")
    pictures.chart(measured, chart)
    pictures.contact_sheet(evaluation).save(sheet)
    vectors = dict(zip(queries, unit(models.clip.encode_text(queries)), strict=True))
    pictures.search_sheet(evaluation.whole, vectors, min_similarity=settings.retrieval.min_similarity).save(searches)
    return paths


def _arguments() -> tuple[Options, Path, Sequence[str]]:
    """Options, folder to write to, and the queries of the sheet of searches."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=_positive, metavar="N", help=f"per split (default: {CONCEPTS})")
    parser.add_argument("--seeds", type=_positive, metavar="N", help=f"images per concept and arm (default: {SEEDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_CONCEPTS} concepts per split")
    parser.add_argument("--model", help="name of a configured generator (default: the service's default one)")
    parser.add_argument(
        "--corpus", type=Path, default=STARTER / "corpus.tar", help="tar or folder (default: the starter corpus)"
    )
    parser.add_argument(
        "--judge",
        default=str(STARTER / "models" / "judge"),
        help="folder of an open_clip model, or hf-hub:ID; not the retriever (default: the starter's judge)",
    )
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--query", action="append", help="a search for queries.png instead of the built-in ones")
    parser.add_argument(
        "--no-unseen-style", dest="unseen_style", action="store_false", help="do not fetch Twemoji; see below"
    )
    parser.epilog = (
        "Twemoji (CC-BY-4.0), fetched with npm into var/packages, serves as the real images to compare with and as an\n"
        "unseen style to search in. Without it, one image of each concept is kept out of the store to compare with."
    )
    given = parser.parse_args()
    if not given.corpus.exists():
        parser.error(f"there is no {given.corpus}")
    from_hub = given.judge.startswith("hf-hub:")
    if not from_hub and not Path(given.judge).is_dir():
        parser.error(f"there is no judge in {given.judge}; name another one with --judge")
    options = Options(
        corpus=given.corpus,
        judge=given.judge if from_hub else f"local-dir:{given.judge}",
        model=given.model,
        concepts=given.concepts or (QUICK_CONCEPTS if given.quick else CONCEPTS),
        seeds=given.seeds or SEEDS,
        unseen_style=given.unseen_style,
    )
    return options, given.out, given.query or QUERIES


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
