"""Output of the command for people and for programs, its exit codes, and the options that all commands share."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import click
from pydantic import BaseModel

from afterimage_client.client import Afterimage
from afterimage_client.errors import InvalidInputError, JobFailedError, ProblemError
from afterimage_client.jobs import Update

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ExitCode(IntEnum):
    """As those of the scripts."""

    DONE = 0
    INCOMPLETE = 1
    INVALID_INPUT = 2
    SERVICE_ERROR = 3
    INTERRUPTED = 130


@dataclass(frozen=True)
class Context:
    """The service, and how a command prints: lines for people, or JSON Lines for programs, to standard output."""

    service: Afterimage
    as_json: bool
    quiet: bool

    @property
    def shows_progress(self) -> bool:
        return sys.stderr.isatty() and not self.quiet and not self.as_json

    def result(self, value: BaseModel | dict[str, Any], *lines: str) -> None:
        """Print a result: `value` for programs, the lines for people."""
        if self.as_json:
            shown = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
            click.echo(json.dumps(shown, ensure_ascii=False, default=str))
        else:
            for line in lines:
                click.echo(line)

    def note(self, text: str) -> None:
        """Print a remark for people to standard error."""
        if not self.quiet and not self.as_json:
            click.echo(text, err=True)


def with_service(
    command: Callable[Concatenate[Context, Parameters], Result],
) -> Callable[Parameters, Result]:
    """Add the options that all commands share, and call the command with a `Context`."""

    @click.option("--url", metavar="URL", help="Address of the service [default: AFTERIMAGE_URL, else the login].")
    @click.option(
        "--api-key-file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help="File with the API key [default: AFTERIMAGE_API_KEY, else the login].",
    )
    @click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    @click.option("--quiet", is_flag=True, help="Print only results and errors.")
    @wraps(command)
    def run(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        options: dict[str, Any] = named
        file, url = options.pop("api_key_file"), options.pop("url")
        as_json, quiet = options.pop("as_json"), options.pop("quiet")
        key = file.read_text().strip() if file else None
        with Afterimage(url, api_key=key) as service:
            return command(Context(service, as_json, quiet), *arguments, **named)

    return run


def print_error(error: Exception, *, as_json: bool) -> None:
    if not as_json:
        click.secho(f"error: {error}", fg="red", err=True)
        return
    shown: dict[str, Any] = {"message": str(error)}
    if isinstance(error, ProblemError):
        shown |= {"code": error.code, "status": error.status, "request": error.request}
    if isinstance(error, ProblemError | InvalidInputError):
        shown["errors"] = [each.model_dump(mode="json") for each in error.errors]
    if isinstance(error, JobFailedError):
        shown |= {"job": str(error.job.id), "code": error.job.error.code if error.job.error else None}
    click.echo(json.dumps({"error": shown}, ensure_ascii=False), err=True)


@contextmanager
def job_progress(context: Context) -> Iterator[Callable[[Update], None]]:
    """Show the steps of a job on a terminal; elsewhere nothing."""
    if not context.shows_progress:
        yield lambda update: None
        return
    with click.progressbar(length=1, label="waiting", file=sys.stderr, show_eta=False) as bar:

        def show(update: Update) -> None:
            bar.label = "waiting" if update.state.value == "queued" else update.state.value
            if update.progress is not None:
                bar.length = max(1, update.progress.total_steps)
                bar.pos = update.progress.step
            elif update.state.is_final:
                bar.pos = bar.length or 1
            bar.render_progress()

        yield show


def table(rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*texts, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in texts]
