"""`afterimage bulk`: run one from a file of prompts, list, show, wait, pause, resume, cancel, retry."""

import sys
from collections.abc import Callable
from itertools import islice

import click

from afterimage_client.bulks import Bulks
from afterimage_client.command.output import Context, ExitCode, table, with_service
from afterimage_client.errors import InvalidInputError
from shared.contracts.bulks import BulkState, BulkView


@click.group()
def bulk() -> None:
    """Generate from a file of prompts, and control bulks."""


@bulk.command(context_settings={"ignore_unknown_options": True, "help_option_names": []}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Send a file of prompts as one bulk, and download the results: `afterimage bulk run --help`.

    It is the script `scripts.bulk_generate`, with all of its options. It needs the extra `scripts`.
    """
    try:
        from scripts.bulk_generate.__main__ import main
    except ImportError as error:
        raise InvalidInputError(f"bulk run needs `pip install 'afterimage[scripts]'`: {error}") from None
    # The script has a parser of its own, which reads the arguments of the process.
    sys.argv = ["afterimage bulk run", *arguments]
    main()


@bulk.command("list")
@click.option("--state", type=click.Choice([state.value for state in BulkState]))
@click.option("-n", "--limit", default=20, show_default=True, help="Largest number of bulks.")
@with_service
def list_bulks(context: Context, *, state: str | None, limit: int) -> int:
    """List your bulks, newest first."""
    rows = []
    for each in islice(context.service.bulks.list(state=BulkState(state) if state else None), limit):
        if context.as_json:
            context.result(each)
        rows.append([each.id, each.state.value, f"{each.created_at:%Y-%m-%d %H:%M}Z", each.name])
    if not context.as_json:
        context.result({}, *(table(rows) if rows else ["no bulks"]))
    return ExitCode.DONE


@bulk.command()
@click.argument("bulk_id")
@click.option("--timeout", type=float, metavar="SECONDS", help="Longest wait; the bulk then continues.")
@with_service
def wait(context: Context, *, bulk_id: str, timeout: float | None) -> int:
    """Wait until a bulk has ended."""
    found = context.service.bulks.get(bulk_id)
    if context.shows_progress:
        with click.progressbar(length=max(1, found.total), label="bulk", file=sys.stderr) as bar:
            found = context.service.bulks.wait(
                found, timeout_s=timeout, on_update=lambda each: bar.update(_ended(each) - bar.pos)
            )
    else:
        found = context.service.bulks.wait(found, timeout_s=timeout)
    context.result(found, *_describe(found))
    failed = found.state is not BulkState.COMPLETED or found.counts.succeeded < found.total
    return ExitCode.INCOMPLETE if failed else ExitCode.DONE


def _add(name: str, help: str, call: Callable[[Bulks, str], BulkView]) -> None:  # noqa: A002 - click's word
    @bulk.command(name, help=help)
    @click.argument("bulk_id")
    @with_service
    def command(context: Context, *, bulk_id: str) -> int:
        found = call(context.service.bulks, bulk_id)
        context.result(found, *_describe(found))
        return ExitCode.DONE


_add("show", "Show the progress of a bulk.", Bulks.get)
_add("pause", "Pause a bulk: running items continue to their end, no others start.", Bulks.pause)
_add("resume", "Continue a paused bulk.", Bulks.resume)
_add("cancel", "Cancel every item that has not ended.", Bulks.cancel)
_add("retry", "Create new jobs for the items that failed, died or expired.", Bulks.retry_failed)


def _ended(found: BulkView) -> int:
    return found.total - found.counts.queued - found.counts.processing


def _describe(found: BulkView) -> list[str]:
    counts = ", ".join(f"{number} {state}" for state, number in found.counts if number)
    rows: list[list[object]] = [["id", found.id], ["state", found.state.value], ["items", counts or "0"]]
    if found.invalid:
        rows.append(["invalid", f"{found.invalid} lines"])
    if found.rate_per_s is not None:
        rows.append(["rate", f"{found.rate_per_s:g} per second"])
    if found.estimated_end is not None:
        rows.append(["end", found.estimated_end.isoformat(timespec="seconds")])
    return table(rows)
