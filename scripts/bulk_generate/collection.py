"""Fetch the files of a bulk's items as these end, and show how far it is."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from afterimage_client import Afterimage, BulkItemView, BulkView, ItemState, NotFoundError
from afterimage_client.download import is_whole
from scripts.bulk_generate.folder import BulkFolder
from scripts.bulk_generate.plan import PlannedItem
from scripts.console import Output

POLL_S = 1.0
ITEMS_A_PAGE = 200
UNBEGUN_IN_A_ROW = 2 * ITEMS_A_PAGE
"""Items begin in about their order: behind so many that have not begun, none is looked for until the bulk has ended."""
HEADER_LINES = 1


@dataclass(frozen=True)
class Fetched:
    """What is in the folder of one item; `missing`: outputs that were deleted before they could be fetched."""

    item: BulkItemView
    files: list[str]
    missing: int


@dataclass
class Tally:
    succeeded: int = 0
    failed: int = 0
    missing: int = 0
    last_file: str = ""

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed


@dataclass
class Collection:
    """One pass from wherever the bulk is to its end, into a folder; a file that is there and whole is not fetched."""

    service: Afterimage
    folder: BulkFolder
    plan: Sequence[PlannedItem]
    output: Output
    concurrency: int
    tally: Tally = field(default_factory=Tally)

    def run(self, bulk_id: UUID) -> BulkView:
        """The bulk once it has ended and everything of it is in the folder.

        Raises:
            AfterimageError: the service refused or stayed away; a later pass goes on from there.
        """
        taken: set[int] = set()
        behind = 0  # everything up to this line is taken
        fetching: set[Future[Fetched]] = set()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="fetch")
        try:
            with self._progress() as show:
                while True:
                    next_look = time.monotonic() + POLL_S
                    # Asked before its items: those of a bulk that has ended have ended too.
                    bulk = self.service.bulks.get(bulk_id)
                    show(bulk)
                    for item, gapless in self._ended(bulk, behind):
                        if item.line not in taken:
                            taken.add(item.line)
                            fetching.add(pool.submit(self._fetch, item))
                        if gapless:
                            behind = item.line
                        if len(fetching) >= 4 * self.concurrency:
                            fetching = self._settle(fetching, timeout_s=None)
                            show(bulk)
                    if bulk.state.is_final:
                        break
                    while (pause_s := next_look - time.monotonic()) > 0:
                        fetching = self._settle(fetching, timeout_s=pause_s)
                        show(bulk)
                while fetching:
                    fetching = self._settle(fetching, timeout_s=None)
                    show(bulk)
            return bulk
        except BaseException:
            self.service.close()  # ends the pauses of the threads, which the pool waits for
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _ended(self, bulk: BulkView, behind: int) -> Iterator[tuple[BulkItemView, bool]]:
        """Items that have ended, in the order of lines, and whether all before have."""
        gapless, unbegun = True, 0
        for item in self.service.bulks.items(bulk.id, after_line=behind, page_size=ITEMS_A_PAGE):
            if item.state.is_final:
                yield item, gapless
            else:
                gapless = False
            unbegun = unbegun + 1 if item.state is ItemState.QUEUED else 0
            if unbegun >= UNBEGUN_IN_A_ROW and not bulk.state.is_final:
                return

    def _fetch(self, item: BulkItemView) -> Fetched:
        names = self.plan[item.line - HEADER_LINES - 1].files
        files = []
        for output in item.outputs:
            target = self.folder.target(names[output.index])
            if not is_whole(target, sha256=output.sha256):
                try:
                    self.service.outputs.download(output, target)
                except NotFoundError:
                    continue
            files.append(str(target.relative_to(self.folder.path)))
        return Fetched(item, files, missing=len(item.outputs) - len(files))

    def _settle(self, fetching: set[Future[Fetched]], *, timeout_s: float | None) -> set[Future[Fetched]]:
        """Count what has come, after waiting for the next or for so long; what has not come is left."""
        if timeout_s is not None and not fetching:
            self.service.sleep(timeout_s)
            return fetching
        done, left = wait(fetching, timeout=timeout_s, return_when=FIRST_COMPLETED)
        for each in done:
            self._count(each.result())
        return left

    def _count(self, fetched: Fetched) -> None:
        item = fetched.item
        if item.state is ItemState.SUCCEEDED:
            self.tally.succeeded += 1
        else:
            self.tally.failed += 1
        self.tally.missing += fetched.missing
        if fetched.files:
            self.tally.last_file = fetched.files[-1]
        self.output.event(
            "item",
            line=item.line,
            row=self.plan[item.line - HEADER_LINES - 1].row,
            custom_id=item.custom_id,
            state=item.state,
            files=fetched.files,
            missing=fetched.missing,
            error=None if item.error is None else item.error.code,
        )

    @contextmanager
    def _progress(self) -> Iterator[Callable[[BulkView], None]]:
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}", markup=False, style="dim"),
        )
        with Progress(*columns, console=self.output.console, disable=not self.output.shows_progress) as progress:
            task = progress.add_task("waiting", total=None, told="", last="")

            def show(bulk: BulkView) -> None:
                rate = "" if bulk.rate_per_s is None else f"{bulk.rate_per_s:.1f}/s"
                failed = f"{self.tally.failed} failed" if self.tally.failed else ""
                progress.update(
                    task,
                    description=bulk.state.value,
                    total=bulk.total,
                    completed=self.tally.ended,
                    told="  ".join(filter(None, (failed, rate))),
                    last=self.tally.last_file,
                )

            yield show
