"""Console output, exit codes, and the options that several scripts share."""

import argparse
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from afterimage_client import Afterimage
from shared.contracts.common import CollectionName, Name


class ExitCode(IntEnum):
    DONE = 0
    INCOMPLETE = 1  # the script ran to its end, but something failed
    INVALID_INPUT = 2  # the options or the input are invalid
    SERVICE_ERROR = 3  # the service refused a request or did not answer; the same command continues from here
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; the same command continues from here


EXIT_CODES_HELP = """exit codes:
  0    everything is done
  1    the script ran to its end, but something failed; the report says what and why
  2    the options or the input are invalid
  3    the service refused a request or did not answer; the same command continues from here
  130  interrupted; the same command continues from here"""


@dataclass(frozen=True)
class ConsoleOutput:
    """Writes messages for people to standard error, or JSON Lines for programs to standard output."""

    quiet: bool = False
    as_json: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    @property
    def shows_progress(self) -> bool:
        return self.console.is_terminal and not self.quiet and not self.as_json

    def info(self, text: str) -> None:
        """Print a message for people; rich markup in it is printed as it is."""
        if not self.quiet and not self.as_json:
            self.console.print(text, markup=False)

    def event(self, name: str, **fields: Any) -> None:
        """Print an event for programs: one JSON object per line."""
        if self.as_json:
            print(json.dumps({"event": name, **fields}, default=str), flush=True)

    def error(self, text: str) -> None:
        """Print an error for people or as an event, also with `--quiet`."""
        if self.as_json:
            self.event("error", message=text)
        else:
            self.console.print(f"error: {text}", markup=False, style="red")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="print only errors")
    group.add_argument("--json", action="store_true", dest="as_json", help="print JSON Lines to standard output")


def collection_name(text: str) -> str:
    """Check that an option's value can be the name of a collection of one owner, for `argparse`.

    Raises:
        argparse.ArgumentTypeError: the name has other characters, or is too long.
    """
    return _checked_name(text, TypeAdapter(Name))


def shared_collection_name(text: str) -> str:
    """As `collection_name`, but the name may also be `owner/name`, for a collection that another owner shares."""
    return _checked_name(text, TypeAdapter(CollectionName))


def _checked_name(text: str, rule: TypeAdapter[str]) -> str:
    try:
        return rule.validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: use lower-case letters, digits, - and _") from None


def add_service_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("service")
    group.add_argument("--url", help="address of the API (default: $AFTERIMAGE_URL, else that of `afterimage login`)")
    group.add_argument(
        "--api-key-file", type=Path, help="file with the API key (default: $AFTERIMAGE_API_KEY, else that of the login)"
    )
    group.add_argument(
        "--retry-for",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to retry while the service is unreachable or busy (default: %(default)g)",
    )


def client_from_options(arguments: argparse.Namespace) -> Afterimage:
    """Return a client with the address and the key that the options name.

    Raises:
        ValueError: the address or the key is not valid.
        OSError: the key's file cannot be read.
    """
    key = arguments.api_key_file.read_text().strip() if arguments.api_key_file else None
    # A script may start while the service restarts.
    wait_s = arguments.retry_for
    return Afterimage(arguments.url, api_key=key, retry_for_s=wait_s, connect_for_s=wait_s)


def run_and_exit(
    work: Callable[[], ExitCode],
    output: ConsoleOutput,
    *,
    input_errors: tuple[type[Exception], ...],
    service_error: type[Exception],
    interrupt_message: str = "Interrupted. The same command continues from here.",
) -> NoReturn:
    """Run a script's work, print its errors, and end the process with its exit code.

    Args:
        input_errors: exceptions that mean invalid options or input; exit code 2.
        service_error: exception of the service, the database or the blob store; exit code 3.
    """
    try:
        with _interrupt_on_signals():
            code = work()
    except input_errors as error:
        output.error(str(error))
        code = ExitCode.INVALID_INPUT
    except service_error as error:
        output.error(f"{error}\nThe same command continues from here.")
        code = ExitCode.SERVICE_ERROR
    except KeyboardInterrupt:
        output.info(interrupt_message)
        output.event("interrupted")
        code = ExitCode.INTERRUPTED
    raise SystemExit(int(code))


@contextmanager
def _interrupt_on_signals() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on SIGTERM and SIGINT, also where a shell started the script with SIGINT ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
