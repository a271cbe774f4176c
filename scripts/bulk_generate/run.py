"""One run: plan the items, send them as a bulk, download the results, write the manifest."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from afterimage_client import Afterimage, BulkState, BulkView, InvalidRequestError, NotFoundError
from scripts.bulk_generate import options
from scripts.bulk_generate.downloads import HEADER_LINES, BulkDownloader, ItemCounts
from scripts.bulk_generate.folder import BulkFolder, FolderError, Run, describe_rejected
from scripts.bulk_generate.plan import PlanError, PlannedItem, RejectedRow
from scripts.bulk_generate.results import Record, write_results
from scripts.console import ConsoleOutput, ExitCode, client_from_options

DRY_RUN_EXAMPLES = 5


def run(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Plan, send and download, each step from where an earlier run in this folder stopped.

    Raises:
        PlanError, FolderError, ValueError: the options or the input are invalid.
        TableFileError, OSError: a file cannot be read or written.
        AfterimageError: the service refused a request or did not answer.
    """
    folder = BulkFolder(arguments.out)
    with folder.locked(), client_from_options(arguments) as service:
        saved_run = _load_or_plan_run(folder, arguments, output)
        plans = saved_run.slices(folder.load_plan(saved_run))
        bulks = []
        for number, plan in enumerate(plans):
            saved_run, bulk = _send_bulk(service, folder, saved_run, number, plan, output)
            bulks.append(bulk)
            if arguments.cancel and not bulk.state.is_final:
                service.bulks.cancel(bulk.id)
            if arguments.retry_failed:
                service.bulks.retry_failed(bulk.id)
        counts = ItemCounts()
        for number, plan in enumerate(plans):
            downloader = BulkDownloader(service, folder, plan, output, arguments.concurrency, counts)
            bulks[number] = downloader.run(bulks[number].id)
            rejected = _all_rejected(service, folder, bulks[number], plan)
        sent = list(zip(bulks, plans, strict=True))
        write_results(
            chain.from_iterable(_manifest_records(service, folder, bulk, plan) for bulk, plan in sent),
            manifest=folder.manifest,
            table=folder.table,
            sheet=folder.sheet,
            title=bulks[0].name or str(bulks[0].id),
        )
        return _print_summary(folder, bulks, counts, rejected, output)


def dry_run(arguments: argparse.Namespace, output: ConsoleOutput) -> ExitCode:
    """Print the planned items; contact no service and write no file."""
    items, images = 0, 0
    rejected: list[RejectedRow] = []
    comments: list[int] = []
    for item in options.planned_items(arguments, options.choose_first_seed(arguments), on_comment=comments.append):
        if isinstance(item, RejectedRow):
            rejected.append(item)
            continue
        items, images = items + 1, images + len(item.files)
        output.event("item", row=item.row, request=item.request, files=item.files)
        if items <= DRY_RUN_EXAMPLES:
            output.info(f"{item.files[0]}\n    {item.request['prompt']}")
    if items > DRY_RUN_EXAMPLES:
        output.info("...")
    output.info(f"{items} items, {images} images{_comment_lines(comments)}")
    if items and arguments.first_seed is None:
        output.info("In a run, rows without a seed get other seeds than here; --first-seed fixes them.")
    output.event("planned", items=items, images=images, rejected=len(rejected), comments=len(comments))
    if rejected:
        output.error(describe_rejected(rejected))
    return ExitCode.DONE if items and (not rejected or arguments.skip_invalid) else ExitCode.INVALID_INPUT


def _load_or_plan_run(folder: BulkFolder, arguments: argparse.Namespace, output: ConsoleOutput) -> Run:
    """Return the run in the folder, or plan a new one from the options."""
    run = folder.find_run()
    has_input = arguments.input is not None or arguments.template is not None
    if run is None:
        if not has_input or arguments.cancel or arguments.retry_failed:
            raise FolderError(f"{folder.path} has no run: name a file or a --template to start one")
        first_seed = options.choose_first_seed(arguments)
        comments: list[int] = []
        run = folder.save_plan(
            options.planned_items(arguments, first_seed, on_comment=comments.append),
            options.fixed_options(arguments),
            header=lambda items: options.header(arguments, items),
            skip_rejected=arguments.skip_invalid,
            first_seed=first_seed,
        )
        rejected = folder.load_rejected()
        left_out = f", {len(rejected)} rows left out" if rejected else ""
        output.info(f"{run.items} items planned{left_out}{_comment_lines(comments)}")
        output.event("planned", items=run.items, rejected=len(rejected), comments=len(comments))
    elif has_input:
        run = _continue_run(folder, run, arguments, output)
    elif ignored := options.changed_options(arguments, run.options):
        raise FolderError(
            f"{folder.path} has a run with another {', '.join(ignored)}: name its input too, or choose another --out"
        )
    return run


def _comment_lines(comments: Sequence[int]) -> str:
    return f", {len(comments)} lines with # left out" if comments else ""


def _continue_run(folder: BulkFolder, run: Run, arguments: argparse.Namespace, output: ConsoleOutput) -> Run:
    """Return the run of the folder; if the options give further items, add them.

    Raises:
        FolderError: the options or the input differ from those of the run, or begin with other items.
        PlanError: further rows are invalid, and `--skip-invalid` is not given.
    """
    given = options.fixed_options(arguments)
    changed = [name for name, value in given.items() if value != run.options.get(name) and value is not None]
    compared_by_items = set() if run.first_seed is None else {"input", "--limit"}
    if set(changed) - compared_by_items:
        names = ", ".join(changed)
        raise FolderError(f"{folder.path} has a run with another {names}: choose another --out")
    if run.first_seed is None:
        return run
    planned = list(options.planned_items(arguments, run.first_seed))
    items = [each for each in planned if isinstance(each, PlannedItem)]
    known = folder.load_plan(run)
    for before, now in zip_longest(known, items[: len(known)]):
        if now is None or (before.request, before.files) != (now.request, now.files):
            raise FolderError(
                f"{folder.path} has a run with another input: item {before.request['custom_id']} is missing or "
                "differs: choose another --out"
            )
    further = items[len(known) :]
    rejected = dict.fromkeys(folder.load_rejected())
    new_rejected = [each for each in planned if isinstance(each, RejectedRow) and each not in rejected]
    if arguments.cancel or not (further or new_rejected):
        return run
    if new_rejected and not arguments.skip_invalid:
        raise PlanError(
            f"{describe_rejected(new_rejected)}\nNothing was sent. Correct these rows, or add --skip-invalid."
        )
    folder.save_rejected([*rejected, *new_rejected])
    if not further:
        return run
    output.info(f"{len(further)} more items planned")
    output.event("planned", items=len(further), rejected=len(new_rejected))
    grown = replace(run, options=run.options | {name: given[name] for name in ("input", "--limit")})
    return folder.extend(grown, further, header=lambda items: options.header(arguments, items))


def _send_bulk(
    service: Afterimage,
    folder: BulkFolder,
    run: Run,
    number: int,
    plan: Sequence[PlannedItem],
    output: ConsoleOutput,
) -> tuple[Run, BulkView]:
    """Create the bulk of this part of the run if necessary, and send all of its lines. Return the run and the bulk."""
    header = run.parts[number].header.encode()
    while True:
        part = run.parts[number]
        bulk_id = part.bulk_id
        if bulk_id is None:
            bulk_id = service.bulks.create(header, idempotency_key=part.key).id
            run = folder.save_bulk_id(run, number, bulk_id)
            output.event("created", bulk_id=bulk_id)
        try:
            bulk = service.bulks.send(bulk_id, _lines(header, plan))
        except NotFoundError as error:
            raise FolderError(
                f"the service does not have bulk {bulk_id} any more: start again with another --out"
            ) from error
        except InvalidRequestError as error:
            if error.code != "bulk_invalid":
                raise
            bulk = service.bulks.get(bulk_id)
        if bulk.state is BulkState.REFUSED:
            refused = _all_rejected(service, folder, bulk, plan)
            folder.delete_part(run, number)
            raise PlanError(
                f"{describe_rejected(refused)}\nThe bulk was refused. Correct these rows, or add --skip-invalid."
            )
        if bulk.state is not BulkState.ABANDONED:
            output.info(f"bulk {bulk.id} has all {len(plan)} items")
            output.event("sent", bulk_id=bulk.id, items=len(plan))
            return run, bulk
        run = folder.restart(run, number)  # no item of an abandoned bulk has run


def _lines(header: bytes, plan: Sequence[PlannedItem]) -> Iterator[bytes]:
    yield header
    for item in plan:
        yield item.line


def _all_rejected(
    service: Afterimage, folder: BulkFolder, bulk: BulkView, plan: Sequence[PlannedItem]
) -> list[RejectedRow]:
    """Return the rows that the script or the service rejected, and write them to `rejected.jsonl`."""
    rejected = dict.fromkeys(folder.load_rejected())
    if bulk.invalid:
        for error in service.bulks.errors(bulk.id):
            fields = "; ".join(f"{problem.field}: {problem.message}" for problem in error.errors)
            row = plan[error.line - HEADER_LINES - 1].row
            rejected[RejectedRow(row, f"{error.code}: {fields or error.detail}")] = None
        folder.save_rejected(rejected)
    return list(rejected)


def _manifest_records(
    service: Afterimage, folder: BulkFolder, bulk: BulkView, plan: Sequence[PlannedItem]
) -> Iterator[Record]:
    """Yield the records of the service's manifest with row, request and files added."""
    for record in service.bulks.manifest(bulk.id):
        planned = plan[record["line"] - HEADER_LINES - 1]
        for image in record["outputs"]:
            path = folder.image_path(planned.files[image["index"]])
            image["file"] = str(path.relative_to(folder.path)) if path.exists() else None
        yield {"row": planned.row, **record, "request": planned.request}


def _print_summary(
    folder: BulkFolder,
    bulks: Sequence[BulkView],
    counts: ItemCounts,
    rejected: Sequence[RejectedRow],
    output: ConsoleOutput,
) -> ExitCode:
    bulk = next((each for each in bulks if each.state is not BulkState.COMPLETED), bulks[-1])
    complete = not (counts.failed or counts.missing or rejected)
    output.event(
        "done",
        bulk_id=bulk.id,
        state=bulk.state,
        succeeded=counts.succeeded,
        failed=counts.failed,
        missing=counts.missing,
        rejected=len(rejected),
        manifest=folder.manifest,
    )
    output.info(
        f"{bulk.state.value}: {counts.succeeded} succeeded, {counts.failed} failed, {counts.missing} files missing, "
        f"{len(rejected)} rows left out\nwrote {folder.manifest}, {folder.table.name} and {folder.sheet.name}"
    )
    if counts.failed:
        output.info("--retry-failed retries the failed items.")
    for row in rejected:
        output.event("rejected", row=row.row, reason=row.reason)
    if rejected:
        output.info(describe_rejected(rejected))
    return ExitCode.DONE if complete else ExitCode.INCOMPLETE
