"""Embedding spaces: one per CLIP."""

import argparse
import sys
from collections import Counter
from datetime import timedelta

from scripts.admin.records import Commands, print_record
from shared.contracts.admin import AuditAction
from shared.db import audit, calibrations, space_backlog, spaces, workers
from shared.db.audit import OPERATOR
from shared.db.session import session_scope
from shared.db.spaces import Space


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("list-spaces", help="list embedding spaces with their progress and their workers")
    command.set_defaults(run=_list)
    command = commands.add_parser(
        "add-space", help="make the space of another CLIP known; its embed workers then embed the corpus for it"
    )
    command.add_argument("digest", help="as an embed worker with that CLIP logs it")
    command.add_argument("--model", required=True, help="name of the CLIP")
    command.add_argument("--dim", type=int, required=True, help="length of its vectors")
    command.set_defaults(run=_add)
    command = commands.add_parser(
        "activate-space", help="let searches use another space that has all vectors; the space before takes it back"
    )
    command.add_argument("digest", help="or at least its first 12 characters, as in the other commands")
    command.add_argument(
        "--force",
        action="store_true",
        help="also without a worker, or with images that lack a vector and stay pending until they are embedded",
    )
    command.set_defaults(run=_activate)
    command = commands.add_parser("retry-space", help="let the workers of a space try its failed images again")
    command.add_argument("digest")
    command.set_defaults(run=_retry)
    command = commands.add_parser("drop-space", help="delete a space that is not active, with its vectors")
    command.add_argument("digest")
    command.add_argument("--force", action="store_true", help="also while its workers run; they end")
    command.set_defaults(run=_drop)


def _list(_arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        for space, active in spaces.list_all(session):
            progress = space_backlog.get_progress(session, space)
            rate, remaining_s = progress.rate_per_s, progress.remaining_s
            states = Counter(f"{each.kind} {each.state}" for each in workers.list_of_space(session, space.digest))
            print_record(
                space.digest,
                {"model": space.model, "dim": space.dim, "active": "yes" if active else "no"},
                {"vectors": progress.vectors, "missing": progress.missing, "failed": progress.failed},
                {
                    "vectors per second": "" if rate is None else f"{rate:.1f}",
                    "remaining": "" if not remaining_s else str(timedelta(seconds=round(remaining_s))),
                },
                {"workers": " ".join(f"{count} {state}" for state, count in states.items()) or "none"},
                {"warning": calibrations.warning_about(session, space) or ""},
            )


def _add(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        is_new = spaces.find(session, arguments.digest) is None
        space = spaces.ensure(session, digest=arguments.digest, model=arguments.model, dim=arguments.dim)
        if is_new:
            audit.record(session, OPERATOR, action=AuditAction.SPACE_ADDED, subject=space.digest, model=space.model)
    print(space.digest)


def _activate(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        space = spaces.get(session, arguments.digest)
        progress = space_backlog.get_progress(session, space)
        if not arguments.force:
            if late := progress.missing - progress.recent:
                raise ValueError(
                    f"{late} ready images have no vector in this space. An embed worker with its CLIP embeds them. "
                    "With --force they are pending, and not found, until they are embedded."
                )
            if not workers.list_of_space(session, space.digest, kind="embed"):
                raise ValueError(
                    "No embed worker with the CLIP of this space runs, so searches would fail: see --force."
                )
        space_backlog.activate(session, space)
        audit.record(session, OPERATOR, action=AuditAction.SPACE_ACTIVATED, subject=space.digest, model=space.model)
    print(f"{_reopen(space)} images are pending until they are embedded", file=sys.stderr)


def _reopen(space: Space) -> int:
    """Make the images `pending` that have no vector in the active space, in short steps that delay no upload."""
    pending, after = 0, None
    while True:
        with session_scope() as session:
            step = space_backlog.reopen(session, space, after=after)
        pending, after = pending + len(step.image_ids), step.next_after
        if after is None:
            return pending


def _retry(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        print(space_backlog.retry_failed(session, spaces.get(session, arguments.digest)))


def _drop(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        space = spaces.get(session, arguments.digest)
        running = [each.id for each in workers.list_of_space(session, space.digest)]
        if running and not arguments.force:
            raise ValueError(
                f"Workers of this space run: {', '.join(running)}. Stop them first. With --force they end."
            )
        spaces.drop(session, space)
        audit.record(session, OPERATOR, action=AuditAction.SPACE_DROPPED, subject=space.digest, model=space.model)
