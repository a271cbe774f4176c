"""Calibrate the relevance gate: measure which cosines right and wrong images have, and store thresholds.

    python -m scripts.calibrate
    python -m scripts.calibrate --dry-run
    python -m scripts.calibrate --owner team-a --collection products --prompts prompts.csv
    python -m scripts.calibrate --reset

The command searches captions and tags of the collection, as the service searches concepts of a prompt. The images with
the caption or the tag are right. Images that share half of the words may be right, and do not count. To see how it
looks when nothing fits, it leaves both kinds out of the results. Three thresholds follow:

  min_similarity: the lowest cosine with a precision of at least 90 %. At most 10 % of the queries that nothing fits may
    get a reference.
  max_gap: the largest distance below the best hit. It keeps 95 % of the right images.
  matched_min_similarity: the lowest cosine of an image that has all words of the query.

A file of --prompts has the columns `prompt` and `caption` or `image_id`, the right image. A prompt without both fits
nothing. A text file has one such prompt per line.

The thresholds are stored with the embedding space. They replace an earlier calibration, and apply where neither
the request, nor its collection, nor `retrieval.min_similarity` says otherwise. `GET /models` shows them. An embed
worker must run.
"""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table
from sqlalchemy.orm import Session

from scripts.calibrate.sample import SampleError, count_images, read_prompts, sample_queries, search_all
from scripts.calibrate.thresholds import MAX_FALSE_ACCEPTS, MIN_PRECISION, Choice, choose
from scripts.console import EXIT_CODES_HELP, ConsoleOutput, ExitCode, add_output_options, collection_name, run_and_exit
from scripts.export.lookup import get_collection, progress_bar
from scripts.table_files import TableFileError
from shared.contracts.calibration import Calibration, Thresholds
from shared.db import calibrations, spaces
from shared.db.session import session_scope
from shared.db.spaces import Space
from shared.errors import BaseAppException, ResourceNotFoundError
from shared.settings import get_settings

SAMPLE = 300


def main() -> None:
    arguments = _parser().parse_args()
    output = ConsoleOutput(quiet=arguments.quiet, as_json=arguments.as_json)
    run_and_exit(
        lambda: reset(arguments, output) if arguments.reset else calibrate(arguments, output),
        output,
        input_errors=(SampleError, TableFileError, ResourceNotFoundError, ValueError),
        service_error=BaseAppException,
        interrupt_message="Interrupted. Nothing was stored.",
    )


def calibrate(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Measure the thresholds on a collection, and store them unless `--dry-run`.

    Raises:
        SampleError: the collection has too few captions, or the prompts are not usable.
        TableFileError: the file with prompts cannot be read.
        ResourceNotFoundError: the owner, the collection or an embedding space does not exist.
        EmbeddingUnavailableError: no embed worker of the active space answered.
    """
    settings = get_settings().retrieval
    with session_scope() as session:
        space = _space(session, arguments.space)
        collection = get_collection(session, arguments.collection, owner=arguments.owner)
        before = calibrations.find(session, space)
        images = count_images(session, collection.id)
        queries = sample_queries(session, collection.id, most=arguments.sample)
        if arguments.prompts is not None:
            queries += read_prompts(session, arguments.prompts, collection_id=collection.id)
    with progress_bar(output) as progress:
        searching = progress.add_task("searching", total=len(queries))
        searches = search_all(
            space,
            queries,
            collection_id=collection.id,
            settings=settings,
            on_progress=lambda done: progress.update(searching, completed=done),
        )
    choice = choose(searches, k=settings.default_k)
    calibration = Calibration(
        **choice.thresholds.model_dump(),
        measured_at=datetime.now(UTC),
        collection_id=collection.id,
        images=images,
        queries=len(queries),
        references=settings.default_k,
        precision=round(choice.figures.precision, 4),
        recall=round(choice.figures.recall, 4),
        recall_without_words=round(choice.figures.recall_without_words, 4),
        false_accepts=round(choice.figures.false_accepts, 4),
        separable=choice.separable,
    )
    if not arguments.dry_run:
        with session_scope() as session:
            calibrations.store(session, space, calibration)
    _print(calibration, choice, before, output, unfitting=len(searches.unfitting), stored=not arguments.dry_run)
    output.event("calibration", space=space.digest, stored=not arguments.dry_run, **calibration.model_dump(mode="json"))
    return ExitCode.DONE


def reset(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Remove the calibration of the space.

    Raises:
        ResourceNotFoundError: there is no such embedding space.
    """
    with session_scope() as session:
        space = _space(session, arguments.space)
        if not arguments.dry_run:
            calibrations.store(session, space, None)
        shipped = calibrations.shipped(space.digest)
    rest = "the one that ships with this CLIP applies" if shipped else "the built-in threshold applies"
    removed = "would be removed" if arguments.dry_run else "is removed"
    output.info(f"The calibration of {space.digest[:12]} {removed}, and {rest}.")
    output.event("reset", space=space.digest, stored=not arguments.dry_run)
    return ExitCode.DONE


def _space(session: Session, name: str | None) -> Space:
    space = spaces.find_active(session) if name is None else spaces.get(session, name)
    if space is None:
        raise ResourceNotFoundError("No embedding space is active: no embed worker has started yet.")
    return space


def _print(
    calibration: Calibration,
    choice: Choice,
    before: Thresholds | None,
    output: ConsoleOutput,
    *,
    unfitting: int,
    stored: bool,
) -> None:
    if output.quiet or output.as_json:
        return
    thresholds = Table("threshold", "before", "now", "an image is used if its cosine")
    meanings = {
        "min_similarity": "reaches this value",
        "max_gap": "is not further below that of the best hit",
        "matched_min_similarity": "reaches this value, for an image with all words",
    }
    for name, meaning in meanings.items():
        old, new = (getattr(each, name) if each is not None else None for each in (before, calibration))
        thresholds.add_row(name, "-" if old is None else f"{old:g}", f"{new:g}", meaning)
    figures = Table("measured", "value", "wanted")
    figures.add_row("precision of used references", f"{calibration.precision:.1%}", f"{MIN_PRECISION:.0%} or more")
    figures.add_row("queries with a right reference", f"{calibration.recall:.1%}", "as many as possible")
    figures.add_row("  by the vectors alone", f"{calibration.recall_without_words:.1%}", "")
    figures.add_row(
        f"references though nothing fits ({unfitting} queries)",
        f"{calibration.false_accepts:.1%}",
        f"{MAX_FALSE_ACCEPTS:.0%} or less",
    )
    output.console.print(thresholds, figures)
    output.info(
        f"{calibration.queries} queries, {calibration.images} images; " + ("stored" if stored else "not stored")
    )
    if not choice.separable:
        output.info(
            "warning: this CLIP does not separate right from wrong images of this collection well. The thresholds are "
            "a compromise. Look at GET /rag/search, or set retrieval.min_similarity."
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.calibrate",
        description=__doc__,
        epilog=EXIT_CODES_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--owner", help="owner of the collection (default: a shared collection)")
    parser.add_argument("--collection", type=collection_name, default="shared", help="default: %(default)s")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of your own: CSV, TSV, JSONL or text")
    parser.add_argument(
        "--sample",
        type=_positive,
        default=SAMPLE,
        metavar="N",
        help="captions, and as many tags (default: %(default)s)",
    )
    parser.add_argument("--space", metavar="DIGEST", help="another embedding space than the active one")
    parser.add_argument("--reset", action="store_true", help="remove the calibration of the embedding space")
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    add_output_options(parser)
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    main()
