"""Download the files of a bulk's items when they end, and show the progress."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afterimage_client import Afterimage, BulkItemView, BulkView, ItemState, NotFoundError
from afterimage_client.download import is_complete
from scripts.bulk_generate.folder import BulkFolder
from scripts.bulk_generate.plan import PlannedItem
from scripts.console import ConsoleOutput

POLL_S = 1.0
PAGE_SIZE = 200
MAX_QUEUED_IN_A_ROW = 2 * PAGE_SIZE
"""Items start roughly in order. After this many queued items in a row, the rest is not listed until the bulk ends."""
HEADER_LINES = 1


@dataclass(frozen=True)
class DownloadedItem:
    """An item and its files in the folder; `missing` counts outputs that were deleted before their download."""

    item: BulkItemView
    files: list[str]
    missing: int


@dataclass
class ItemCounts:
    succeeded: int = 0
    failed: int = 0
    missing: int = 0
    last_file: str = ""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed


@dataclass
class BulkDownloader:
    """Downloads the outputs of one bulk into a folder until the bulk has ended. Complete files are left as they are."""

    service: Afterimage
    folder: BulkFolder
    plan: Sequence[PlannedItem]
    output: ConsoleOutput
    concurrency: int
    counts: ItemCounts = field(default_factory=ItemCounts)

    def run(self, bulk_id: UUID) -> BulkView:
        """Return the bulk when it has ended and all of its outputs are in the folder.

        Raises:
            AfterimageError: the service refused a request or did not answer; a later call continues from there.
        """
        started: set[int] = set()  # lines whose downloads were started
        after_line = 0  # the downloads of all lines up to this one were started
        downloads: set[Future[DownloadedItem]] = set()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="download")
        try:
            with self._progress() as show:
                while True:
                    next_poll = time.monotonic() + POLL_S
                    # Read the bulk before its items: when the bulk has ended, all of its items have.
                    bulk = self.service.bulks.get(bulk_id)
                    show(bulk)
                    for item, no_gap in self._ended_items(bulk, after_line):
                        if item.line not in started:
                            started.add(item.line)
                            downloads.add(pool.submit(self._download_item, item))
                        if no_gap:
                            after_line = item.line
                        if len(downloads) >= 4 * self.concurrency:
                            downloads = self._count_finished(downloads, timeout_s=None)
                            show(bulk)
                    if bulk.state.is_final:
                        break
                    while (pause_s := next_poll - time.monotonic()) > 0:
                        downloads = self._count_finished(downloads, timeout_s=pause_s)
                        show(bulk)
                while downloads:
                    downloads = self._count_finished(downloads, timeout_s=None)
                    show(bulk)
            return bulk
        except BaseException:
            self.service.close()  # interrupts the pauses of the threads, so that the pool can end
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ended_items(self, bulk: BulkView, after_line: int) -> Iterator[tuple[BulkItemView, bool]]:
        """Yield ended items in the order of lines, each with whether all items before it have ended."""
        no_gap, queued_in_a_row = True, 0
        for item in self.service.bulks.items(bulk.id, after_line=after_line, page_size=PAGE_SIZE):
            if item.state.is_final:
                yield item, no_gap
            else:
                no_gap = False
            queued_in_a_row = queued_in_a_row + 1 if item.state is ItemState.QUEUED else 0
            if queued_in_a_row >= MAX_QUEUED_IN_A_ROW and not bulk.state.is_final:
                return

    def _download_item(self, item: BulkItemView) -> DownloadedItem:
        names = self.plan[item.line - HEADER_LINES - 1].files
        files = []
        for output in item.outputs:
            target = self.folder.image_path(names[output.index])
            if not is_complete(target, sha256=output.sha256):
                try:
                    self.service.outputs.download(output, target)
                except NotFoundError:
                    continue
            files.append(str(target.relative_to(self.folder.path)))
        return DownloadedItem(item, files, missing=len(item.outputs) - len(files))

    def _count_finished(
        self, downloads: set[Future[DownloadedItem]], *, timeout_s: float | None
    ) -> set[Future[DownloadedItem]]:
        """Wait until a download finishes, at most `timeout_s`; count the finished ones and return the others."""
        if timeout_s is not None and not downloads:
            self.service.sleep(timeout_s)
            return downloads
        done, remaining = wait(downloads, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for future in done:
            self._count(future.result())
        return remaining

    def _count(self, downloaded: DownloadedItem) -> None:
        item = downloaded.item
        if item.state is ItemState.SUCCEEDED:
            self.counts.succeeded += 1
        else:
            self.counts.failed += 1
        self.counts.missing += downloaded.missing
        if downloaded.files:
            self.counts.last_file = downloaded.files[-1]
        self.output.event(
            "item",
            line=item.line,
            row=self.plan[item.line - HEADER_LINES - 1].row,
            custom_id=item.custom_id,
            state=item.state,
            files=downloaded.files,
            missing=downloaded.missing,
            error=None if item.error is None else item.error.code,
        )

    @contextmanager
    def _progress(self) -> Iterator[Callable[[BulkView], None]]:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[details]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False, style="dim"),
        )
        with Progress(*columns, console=self.output.console, disable=not self.output.shows_progress) as progress:
            task = progress.add_task("waiting", total=None, details="", last="")

            def show(bulk: BulkView) -> None:
                rate = "" if bulk.rate_per_s is None else f"{bulk.rate_per_s:.1f}/s"
                failed = f"{self.counts.failed} failed" if self.counts.failed else ""
                progress.update(
                    task,
                    description=bulk.state.value,
                    total=bulk.total,
                    completed=self.counts.ended,
                    details="  ".join(filter(None, (failed, rate))),
                    last=self.counts.last_file,
                )

            yield show
