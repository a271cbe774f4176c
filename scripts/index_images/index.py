"""Index files once, and wait until the collection is searchable."""

import time
from collections.abc import Iterable
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from afterimage_client import Afterimage
from scripts.console import ConsoleOutput, ExitCode
from scripts.index_images.report import Outcome, ReportEntry
from scripts.index_images.sources import NOT_AN_IMAGE, SourceFile
from scripts.index_images.upload import Uploader, has_pending_images, list_failed_images

MAX_LISTED = 20
SEARCHABLE_POLL_S = 0.2


def index_files(uploader: Uploader, files: Iterable[SourceFile], output: ConsoleOutput) -> list[ReportEntry]:
    """Upload the files that the collection lacks, and return the entries of skipped files.

    Raises:
        AfterimageError: the service refused a request or did not answer.
    """
    uploader.load_known_images()
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    skipped = []
    with Progress(*columns, console=output.console, disable=not output.shows_progress) as progress:
        task = progress.add_task("indexing", total=None)
        for entry in uploader.run(files):
            progress.advance(task)
            output.event("file", **vars(entry))
            if entry.outcome is Outcome.SKIPPED:
                skipped.append(entry)
        done = sum(uploader.counts.values())
        progress.update(task, total=done, completed=done)
    return skipped


def wait_until_searchable(service: Afterimage, collection: str, *, timeout_s: float) -> bool:
    """Wait until no image of the collection is pending; return False after `timeout_s`. Failed images do not count."""
    deadline = time.monotonic() + timeout_s
    while has_pending_images(service, collection):
        if time.monotonic() > deadline:
            return False
        service.sleep(SEARCHABLE_POLL_S)
    return True


def wait_and_print_summary(
    uploader: Uploader, skipped: list[ReportEntry], output: ConsoleOutput, *, source: Path, wait_s: float, strict: bool
) -> ExitCode:
    """Wait up to `wait_s` for the images to be searchable, then print the counts, skipped files and failed images.

    strict: images that were skipped make the run fail.
    """
    searchable = wait_s <= 0 or wait_until_searchable(uploader.service, uploader.collection, timeout_s=wait_s)
    failed = [
        image
        for image in list_failed_images(uploader.service, uploader.collection)
        if image.sha256 in uploader.known_images
    ]
    counts = {outcome.value: uploader.counts[outcome] for outcome in Outcome}
    output.event("done", **counts, not_embedded=len(failed), searchable=searchable)
    output.info(
        ", ".join(f"{number} {outcome}" for outcome, number in counts.items() if number)
        or f"nothing to index: {source} has no files, or only hidden ones"
    )
    # Other files beside the images never make the run fail.
    failures = sum(entry.code != NOT_AN_IMAGE for entry in skipped)
    if failures:
        result = f"so the exit code is {ExitCode.INCOMPLETE:d}" if strict else "which --strict makes an error"
        output.info(f"{failures} of the skipped files failed, {result}")
    for entry in sorted(skipped, key=lambda entry: entry.code == NOT_AN_IMAGE)[:MAX_LISTED]:
        outcome = "skipped" if entry.code == NOT_AN_IMAGE else "failed"
        output.info(f"{outcome} {entry.file}: {entry.code}: {entry.detail}")
    if len(skipped) > MAX_LISTED:
        output.info(f"and {len(skipped) - MAX_LISTED} more; --report FILE lists them all")
    for image in failed[:MAX_LISTED]:
        output.info(f"not searchable: {image.filename or image.id}: {image.error_code}")
    if not searchable:
        output.error(f"some images are not searchable after {wait_s:g} s: does an embed worker run?")
    return ExitCode.INCOMPLETE if (strict and failures) or failed or not searchable else ExitCode.DONE
