"""Does retrieval help, and are its references right? Three parts, of which `--only` chooses some.

    python -m scripts.evaluate
    python -m scripts.evaluate --only gate concepts
    python -m scripts.evaluate --corpus photos/ --model sdxl --judge hf-hub:apple/DFN5B-CLIP-ViT-H-14

The part `arms` generates the same prompts and seeds with four choices of references, and judges the images. The part
`gate` plans the references of labelled queries for the starter corpus, and counts the right ones. 200 queries are for
tuning, and 200 for the test. The part `concepts` counts the prompts of several things for which all are among the
references. These two parts are measured together, on a Postgres of their own, and need no generator.

Arms: none (the prompt alone), random (the references of another prompt), retrieved (the references of the service),
oracle (images of the concept itself). Prompts are names of concepts: `seen`, and `held_out`, on which the generator was
not trained. Retrieval helps if `retrieved` beats both `none` and `random`. The models and the choice of references
follow the service's settings (AFTERIMAGE_...) and use the service's code; no server is needed.

A corpus is a WebDataset tar, or a folder of images with NAME.json (caption, tags, attributes) or NAME.txt (caption).
The attribute `concept` groups images of one thing; without it the caption does. The attribute `split` = held-out marks
concepts that the generator was not trained on.

The arms write summary.json, table.md, chart.png, sheet.png (references and arms by prompt) and queries.png (searches).
The other parts write relevance.json, relevance.md and relevance.jsonl (the references of each query).
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ops.local.stack import StackError
from scripts.evaluate import relevance, report
from scripts.evaluate.corpus import Corpus
from scripts.evaluate.evaluation import Models, Options, evaluate, read_store
from scripts.evaluate.queries import QUERIES as LABELLED_QUERIES
from scripts.evaluate.queries import QuerySet
from scripts.evaluate.report_files import write_report_files
from scripts.evaluate.store import Store
from shared.errors import BaseAppException, ConfigurationError
from shared.settings import STARTER, Settings, load_settings
from worker_service.models.clip import Clip

ARMS = "arms"
PARTS = (ARMS, "gate", "concepts")
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
    given, options = _arguments()
    console = Console()
    try:
        settings = load_settings()
        with Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress:
            if ARMS in given.only:
                models = Models.load(options, settings)
                evaluation = evaluate(options, settings, models, progress)
                clip, corpus, store = models.clip, evaluation.corpus, evaluation.full_store
            else:
                clip = Clip.load(settings.model)
                corpus, store = read_store(options.corpus, settings, clip, progress)
            found = _relevance(given, corpus, store, clip, settings, progress)
    except (BaseAppException, StackError) as error:
        raise SystemExit(f"scripts.evaluate: {error}") from error
    paths = []
    if ARMS in given.only:
        measured = report.summary(evaluation, report.conditions(evaluation, options, settings, models))
        console.print(Markdown(report.markdown_report(measured)))
        queries = given.query or QUERIES
        paths += write_report_files(
            evaluation, measured, out=given.out, queries=queries, models=models, settings=settings
        )
    if isinstance(found, str):
        console.print(f"gate and concepts: skipped, {found}")
    elif found is not None:
        console.print(Markdown(relevance.markdown_report(found.summary)))
        paths += relevance.write_files(found, given.out)
    for path in paths:
        console.print(f"wrote [bold]{path}")


def _relevance(
    given: argparse.Namespace, corpus: Corpus, store: Store, clip: Clip, settings: Settings, progress: Progress
) -> relevance.Relevance | str | None:
    """Measure the parts `gate` and `concepts`; return the reason if the default queries are for another corpus."""
    if not {"gate", "concepts"} & set(given.only):
        return None
    queries = {QuerySet.TEST: given.labelled_queries} if given.labelled_queries else LABELLED_QUERIES
    try:
        return relevance.measure(store, clip, settings, progress, queries=queries, corpus_digest=corpus.digest)
    except ConfigurationError as error:
        if given.labelled_queries is None and len(given.only) == len(PARTS):
            return str(error)
        raise


def _arguments() -> tuple[argparse.Namespace, Options]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    parser.add_argument(
        "--labelled-queries",
        type=Path,
        metavar="FILE",
        help="queries with their right captions, in the form of scripts/evaluate/queries.json, for the corpus",
    )
    parser.add_argument("--concepts", type=_positive, metavar="N", help=f"per split (default: {CONCEPTS})")
    parser.add_argument("--seeds", type=_positive, metavar="N", help=f"images per concept and arm (default: {SEEDS})")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_CONCEPTS} concepts per split: a tenth of the time"
    )
    parser.add_argument("--model", help="name of a configured generator (default: the service's default one)")
    parser.add_argument(
        "--corpus", type=Path, default=STARTER / "corpus.tar.gz", help="tar or folder (default: the starter corpus)"
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
    return given, options


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    main()
