"""`afterimage login` and `afterimage logout`."""

import sys
from contextlib import suppress
from typing import TextIO

import click

from afterimage_client import login as stored
from afterimage_client.client import Afterimage
from afterimage_client.command.output import ExitCode
from afterimage_client.errors import PermissionDeniedError


@click.command()
@click.argument("url", default=stored.DEFAULT_URL)
@click.option("--api-key-file", type=click.File("r"), help="File with the API key, - for standard input.")
def login(url: str, api_key_file: TextIO | None) -> int:
    """Store the address and API key of a service for later commands and for Python's `Afterimage()`.

    The key is asked for on a terminal; a service without keys needs none. Both are checked before they are stored, in
    a file that only you can read. AFTERIMAGE_URL and AFTERIMAGE_API_KEY come before it.
    """
    if api_key_file is not None:
        key = api_key_file.read().strip()
    elif sys.stdin.isatty():
        key = click.prompt("API key (Enter: the service needs none)", default="", hide_input=True, show_default=False)
    else:
        key = ""
    # An empty text, not `None`: the key of the environment belongs to another login.
    with Afterimage(url, api_key=key) as service:
        with suppress(PermissionDeniedError):  # a valid key of another scope
            next(service.jobs.list(page_size=1), None)
        stored.save(stored.Login(service.url, key or None))
        click.echo(f"logged in to {service.url}: {stored.path()}", err=True)
    return ExitCode.DONE


@click.command()
def logout() -> int:
    """Delete the stored address and key."""
    stored.path().unlink(missing_ok=True)
    return ExitCode.DONE
