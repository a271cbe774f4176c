"""Does retrieval help? Generate the same prompts and seeds with four choices of references, and judge the images.

    python -m scripts.evaluate
    python -m scripts.evaluate --quick
    python -m scripts.evaluate --corpus photos/ --model sdxl --judge hf-hub:apple/DFN5B-CLIP-ViT-H-14

Arms: none (the prompt alone), random (the references of another prompt), retrieved (the references of the service),
oracle (images of the concept itself). Prompts are names of concepts: `seen`, and `held_out`, on which the generator was
not trained. Retrieval helps if `retrieved` beats both `none` and `random`. The models and the choice of references
follow the service's settings (AFTERIMAGE_...) and use the service's code; no server is needed.

A corpus is a WebDataset tar, or a folder of images with NAME.json (caption, tags, attributes) or NAME.txt (caption).
The attribute `concept` groups images of one thing; without it the caption does. The attribute `split` = held-out marks
concepts that the generator was not trained on.

Writes summary.json, table.md, chart.png, sheet.png (references and arms by prompt) and queries.png (searches).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts.evaluate import report
from scripts.evaluate.evaluation import Models, Options, evaluate
from scripts.evaluate.report_files import write_report_files
from shared.errors import BaseAppException
from shared.settings import STARTER, load_settings

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
"""Searches for queries.png: single keywords, two words, and one without a matching image."""


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
    console.print(Markdown(report.markdown_report(measured)))
    for path in write_report_files(evaluation, measured, out=out, queries=queries, models=models, settings=settings):
        console.print(f"wrote [bold]{path}")


def _arguments() -> tuple[Options, Path, Sequence[str]]:
    """Return the options, the output folder, and the queries for queries.png."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--concepts", type=_positive, metavar="N", help=f"per split (default: {CONCEPTS})")
    parser.add_argument("--seeds", type=_positive, metavar="N", help=f"images per concept and arm (default: {SEEDS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_CONCEPTS} concepts per split: a tenth of the time"
    )
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
        "--no-unseen-style", dest="unseen_style", action="store_false", help="do not download Twemoji; see below"
    )
    parser.epilog = (
        "Twemoji (CC-BY-4.0), downloaded with npm into var/packages, gives the real images for comparison and an\n"
        "unseen style for searches. Without it, one image of each concept is kept out of the store for comparison."
    )
    given = parser.parse_args()
    if not given.corpus.exists():
        parser.error(f"{given.corpus} does not exist")
    from_hub = given.judge.startswith("hf-hub:")
    if not from_hub and not Path(given.judge).is_dir():
        parser.error(f"{given.judge} has no judge; name another one with --judge")
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
