"""Thousands of generations from a file of prompts, a template, or both; `--help` teaches it by examples."""

import argparse
from collections.abc import Iterator, Sequence

from afterimage_client import Afterimage, AfterimageError, BulkState, BulkView, InvalidRequestError, NotFoundError
from scripts.bulk_generate import options
from scripts.bulk_generate.collection import HEADER_LINES, Collection, Tally
from scripts.bulk_generate.folder import BulkFolder, FolderError, Run, some
from scripts.bulk_generate.plan import PlanError, PlannedItem, Rejected
from scripts.bulk_generate.results import Record, write_results
from scripts.console import Exit, Output, finish, service_of
from scripts.table_files import RowsError

SHOWN_OF_A_DRY_RUN = 5


def main() -> None:
    arguments = options.parser().parse_args()
    output = Output(quiet=arguments.quiet, as_json=arguments.as_json)
    finish(
        lambda: show(arguments, output) if arguments.dry_run else run(arguments, output),
        output,
        wrong=(PlanError, RowsError, FolderError, ValueError, OSError),
        stopped=AfterimageError,
        interrupted="Interrupted. What was sent goes on; the same command fetches it, --cancel stops it for good.",
    )


def run(arguments: argparse.Namespace, output: Output) -> Exit:
    """Plan, send, collect, write down: each of them from wherever an earlier run of this folder got.

    Raises:
        PlanError, RowsError, FolderError, ValueError, OSError: the options or the input make no sense.
        AfterimageError: the service refused or stayed away.
    """
    folder = BulkFolder(arguments.out)
    with folder.held(), service_of(arguments) as service:
        known = _planned(folder, arguments, output)
        plan = list(folder.plan())
        bulk = _sent(service, folder, known, plan, output)
        if arguments.cancel and not bulk.state.is_final:
            service.bulks.cancel(bulk.id)
        if arguments.retry_failed:
            service.bulks.retry_failed(bulk.id)
        collection = Collection(service, folder, plan, output, arguments.concurrency)
        bulk = collection.run(bulk.id)
        rejected = _with_lines_refused(service, folder, bulk, plan)
        write_results(
            _records(service, folder, bulk, plan),
            manifest=folder.manifest,
            table=folder.table,
            sheet=folder.sheet,
            title=bulk.name or str(bulk.id),
        )
        return _told(folder, bulk, collection.tally, rejected, output)


def show(arguments: argparse.Namespace, output: Output) -> Exit:
    """What would be made, without asking the service and without writing anything."""
    items, images = 0, 0
    rejected: list[Rejected] = []
    for each in options.planned(arguments):
        if isinstance(each, Rejected):
            rejected.append(each)
            continue
        items, images = items + 1, images + len(each.files)
        output.event("item", row=each.row, request=each.request, files=each.files)
        if items <= SHOWN_OF_A_DRY_RUN:
            output.say(f"{each.files[0]}\n    {each.request['prompt']}")
    if items > SHOWN_OF_A_DRY_RUN:
        output.say("...")
    output.say(f"{items} items, {images} images")
    output.event("planned", items=items, images=images, rejected=len(rejected))
    if rejected:
        output.error(some(rejected))
    return Exit.DONE if items and (not rejected or arguments.skip_invalid) else Exit.WRONG


def _planned(folder: BulkFolder, arguments: argparse.Namespace, output: Output) -> Run:
    """The run that the folder holds, or a new one by these options."""
    known = folder.known()
    given = arguments.input is not None or arguments.template is not None
    if known is None:
        if not given or arguments.cancel or arguments.retry_failed:
            raise FolderError(f"{folder.path} holds no run: name a file or a --template to begin one")
        known = folder.keep_plan(
            options.planned(arguments),
            options.deciding(arguments),
            header=lambda items: options.header(arguments, items),
            skip_rejected=arguments.skip_invalid,
        )
        rejected = folder.known_rejected()
        output.say(f"{known.items} items planned" + (f", {len(rejected)} rows left out" if rejected else ""))
        output.event("planned", items=known.items, rejected=len(rejected))
    elif given:
        now = options.deciding(arguments)
        if other := [name for name, value in now.items() if value != known.options.get(name) and value is not None]:
            raise FolderError(f"{folder.path} holds a run with another {', '.join(other)}: choose another --out")
    return known


def _sent(service: Afterimage, folder: BulkFolder, known: Run, plan: Sequence[PlannedItem], output: Output) -> BulkView:
    """The bulk of this run, with all of its lines."""
    header = known.header.encode()
    while True:
        if known.bulk_id is None:
            known = folder.keep_bulk(known, service.bulks.create(header, idempotency_key=known.key).id)
            output.event("created", bulk_id=known.bulk_id)
        assert known.bulk_id is not None
        try:
            bulk = service.bulks.send(known.bulk_id, _lines(header, plan))
        except NotFoundError as error:
            raise FolderError(
                f"the service knows bulk {known.bulk_id} no more: begin again in another --out"
            ) from error
        except InvalidRequestError as error:
            if error.code != "bulk_invalid":
                raise
            bulk = service.bulks.get(known.bulk_id)
        if bulk.state is BulkState.REFUSED:
            refused = _with_lines_refused(service, folder, bulk, plan)
            folder.forget()
            raise PlanError(
                f"{some(refused)}\nNothing runs. Correct these rows, or leave them out with --skip-invalid."
            )
        if bulk.state is not BulkState.ABANDONED:
            output.say(f"bulk {bulk.id} has all {len(plan)} items")
            output.event("sent", bulk_id=bulk.id, items=len(plan))
            return bulk
        known = folder.start_again(known)  # nothing of it ever ran


def _lines(header: bytes, plan: Sequence[PlannedItem]) -> Iterator[bytes]:
    yield header
    for item in plan:
        yield item.line


def _with_lines_refused(
    service: Afterimage, folder: BulkFolder, bulk: BulkView, plan: Sequence[PlannedItem]
) -> list[Rejected]:
    """All rows that are no items, by our own judgement and by the service's, also as `rejected.jsonl`."""
    rejected = dict.fromkeys(folder.known_rejected())
    if bulk.invalid:
        for error in service.bulks.errors(bulk.id):
            fields = "; ".join(f"{mistake.field}: {mistake.message}" for mistake in error.errors)
            row = plan[error.line - HEADER_LINES - 1].row
            rejected[Rejected(row, f"{error.code}: {fields or error.detail}")] = None
        folder.keep_rejected(rejected)
    return list(rejected)


def _records(service: Afterimage, folder: BulkFolder, bulk: BulkView, plan: Sequence[PlannedItem]) -> Iterator[Record]:
    """The service's manifest with what only this side knows: row, request, files."""
    for record in service.bulks.manifest(bulk.id):
        planned = plan[record["line"] - HEADER_LINES - 1]
        for output in record["outputs"]:
            target = folder.target(planned.files[output["index"]])
            output["file"] = str(target.relative_to(folder.path)) if target.exists() else None
        yield {"row": planned.row, **record, "request": planned.request}


def _told(folder: BulkFolder, bulk: BulkView, tally: Tally, rejected: Sequence[Rejected], output: Output) -> Exit:
    complete = not (tally.failed or tally.missing or rejected)
    output.event(
        "done",
        bulk_id=bulk.id,
        state=bulk.state,
        succeeded=tally.succeeded,
        failed=tally.failed,
        missing=tally.missing,
        rejected=len(rejected),
        manifest=folder.manifest,
    )
    output.say(
        f"{bulk.state.value}: {tally.succeeded} succeeded, {tally.failed} failed, {tally.missing} files missing, "
        f"{len(rejected)} rows left out\nwrote {folder.manifest}, {folder.table.name} and {folder.sheet.name}"
    )
    if tally.failed:
        output.say("What failed is tried again with --retry-failed.")
    for each in rejected:
        output.event("rejected", row=each.row, reason=each.reason)
    if rejected:
        output.say(some(rejected))
    return Exit.DONE if complete else Exit.INCOMPLETE


if __name__ == "__main__":
    main()
