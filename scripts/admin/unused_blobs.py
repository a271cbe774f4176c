"""Blobs that no row names."""

import argparse
import sys

from scripts.admin.records import Commands
from shared import blob_sweeper
from shared.settings import get_settings
from shared.storage import get_blobs


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("sweep", help="delete unused blobs, as the reconciler does periodically")
    command.add_argument("--dry-run", action="store_true", help="only print the blobs that would be deleted")
    command.add_argument(
        "--older-than-s",
        type=float,
        metavar="S",
        help="minimum age of a blob; uploads that take longer fail",
    )
    command.add_argument(
        "--adopt",
        action="store_true",
        help="take over a store that another database used; its blobs are swept for this one",
    )
    command.set_defaults(run=_sweep)


def _sweep(arguments: argparse.Namespace) -> None:
    blobs, older_than_s = get_blobs(), arguments.older_than_s
    if older_than_s is None:
        older_than_s = blob_sweeper.grace_s(get_settings())
    if arguments.dry_run:
        count = size_bytes = 0
        for info in blob_sweeper.list_unneeded(blobs, older_than_s=older_than_s):
            print(f"{info.key}\t{info.size_bytes}")
            count, size_bytes = count + 1, size_bytes + info.size_bytes
        # Not on standard output, whose lines are for programs.
        print(f"{count} blobs, {size_bytes} bytes would be deleted", file=sys.stderr)
        return
    if arguments.adopt:
        blob_sweeper.adopt(blobs)
    swept = blob_sweeper.sweep(blobs, older_than_s=older_than_s)
    print(f"{swept.blobs} blobs, {swept.size_bytes} bytes, {swept.leftovers} half-written files")
    if swept.stopped_by_backup:
        print("A backup runs. Sweep again after it.", file=sys.stderr)
