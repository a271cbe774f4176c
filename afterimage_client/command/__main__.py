"""Draw images and use the corpus of an Afterimage service from a shell; `--help` shows the commands."""

import signal
import sys
from collections.abc import Sequence

import click

from afterimage_client.command.bulks import bulk
from afterimage_client.command.corpus import search, upload
from afterimage_client.command.generate import generate
from afterimage_client.command.jobs import jobs
from afterimage_client.command.login import login, logout
from afterimage_client.command.output import ExitCode, print_error
from afterimage_client.errors import AfterimageError, InvalidInputError, JobFailedError

HELP = """Draw images and use the corpus of an Afterimage service.

\b
    afterimage login http://127.0.0.1:8000
    afterimage generate "a green heart" --references a.png --out out/
    afterimage upload photos/*.jpg --collection photos

AFTERIMAGE_URL and AFTERIMAGE_API_KEY come before the stored login. Every command has --json for programs.

\b
Exit codes:
  0    done
  1    done, but something failed: a job, or some files
  2    wrong input; nothing was sent
  3    the service refused the request or did not answer
  130  interrupted
"""


@click.group(help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def afterimage() -> None:
    pass


for command in (generate, search, upload, jobs, bulk, login, logout):
    afterimage.add_command(command)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code. An error is one message, without a traceback."""
    as_json = "--json" in arguments
    try:
        code = afterimage.main(args=[*arguments], prog_name="afterimage", standalone_mode=False)
        return int(code or ExitCode.DONE)
    except click.ClickException as error:
        error.show()
        return ExitCode.INVALID_INPUT
    except InvalidInputError as error:
        print_error(error, as_json=as_json)
        return ExitCode.INVALID_INPUT
    except JobFailedError as error:
        print_error(error, as_json=as_json)
        return ExitCode.INCOMPLETE
    except AfterimageError as error:
        print_error(error, as_json=as_json)
        return ExitCode.SERVICE_ERROR
    except OSError as error:
        print_error(error, as_json=as_json)
        return ExitCode.INCOMPLETE
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        return ExitCode.INTERRUPTED


def main() -> None:
    # Also where a shell started the command with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
