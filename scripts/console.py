"""What the scripts share towards whoever runs them: a person, or a program."""

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
from shared.contracts.common import Name


class Exit(IntEnum):
    DONE = 0
    INCOMPLETE = 1  # it ran to its end, and something in it failed
    WRONG = 2  # nothing was done: the options or the input make no sense
    STOPPED = 3  # the service refused or stayed away; the same command goes on from here
    INTERRUPTED = 130  # Ctrl-C or SIGTERM; the same command goes on from here


EXIT_CODES = """exit codes:
  0    everything is done
  1    it ran to its end, but something failed; the report says what and why
  2    nothing was done: the options or the input make no sense
  3    the service refused or stayed away; the same command goes on from here
  130  interrupted; the same command goes on from here"""


@dataclass(frozen=True)
class Output:
    """Words on the standard error for a person, or JSON Lines on the standard output for a program."""

    quiet: bool = False
    as_json: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True, highlight=False, soft_wrap=True))

    @property
    def shows_progress(self) -> bool:
        return self.console.is_terminal and not self.quiet and not self.as_json

    def say(self, text: str) -> None:
        """For people; markup is not read."""
        if not self.quiet and not self.as_json:
            self.console.print(text, markup=False)

    def event(self, name: str, **fields: Any) -> None:
        """For programs: one object per line."""
        if self.as_json:
            print(json.dumps({"event": name, **fields}, default=str), flush=True)

    def error(self, text: str) -> None:
        """For both, also when quiet."""
        if self.as_json:
            self.event("error", message=text)
        else:
            self.console.print(f"error: {text}", markup=False, style="red")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--quiet", action="store_true", help="say nothing but errors")
    group.add_argument("--json", action="store_true", dest="as_json", help="JSON Lines on the standard output")


def collection_name(text: str) -> str:
    """An option's value, if it can be the name of a collection."""
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is no name: lower-case letters, digits, - and _") from None


def add_service_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("service")
    group.add_argument("--url", help="where the API listens (default: $AFTERIMAGE_URL, else http://127.0.0.1:8000)")
    group.add_argument(
        "--api-key-file", type=Path, help="file that holds the API key (default: the key in $AFTERIMAGE_API_KEY)"
    )
    group.add_argument(
        "--retry-for",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to go on while the service is away or busy (default: %(default)g)",
    )


def service_of(arguments: argparse.Namespace) -> Afterimage:
    """
    Raises:
        ValueError: the address or the key cannot be right.
        OSError: the key's file cannot be read.
    """
    key = arguments.api_key_file.read_text().strip() if arguments.api_key_file else None
    return Afterimage(arguments.url, api_key=key, retry_for_s=arguments.retry_for)


def finish(
    work: Callable[[], Exit],
    output: Output,
    *,
    wrong: tuple[type[Exception], ...],
    stopped: type[Exception],
    interrupted: str = "Interrupted. The same command goes on from here.",
) -> NoReturn:
    """Do a script's work and end the process with what came of it.

    wrong: what is raised when options or input make no sense. stopped: what is raised when the service, or what it
    stands on, refused or stayed away.
    """
    try:
        with _stoppable():
            code = work()
    except wrong as error:
        output.error(str(error))
        code = Exit.WRONG
    except stopped as error:
        output.error(f"{error}\nThe same command goes on from here.")
        code = Exit.STOPPED
    except KeyboardInterrupt:
        output.say(interrupted)
        output.event("interrupted")
        code = Exit.INTERRUPTED
    raise SystemExit(int(code))


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends the script as Ctrl-C does, also where a shell started it with SIGINT ignored."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
