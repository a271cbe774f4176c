"""The audit: who deleted, withdrew or changed what."""

import argparse
from datetime import UTC, datetime

from scripts.admin.records import Commands, print_record
from shared.contracts.admin import AuditAction, AuditQuery
from shared.db import audit
from shared.db.session import session_scope

ROWS_PER_PAGE = 100


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("audit", help="print who deleted, withdrew or changed what, oldest first")
    command.add_argument(
        "--action", type=AuditAction, choices=list(AuditAction), metavar="ACTION", help="only this one"
    )
    command.add_argument("--subject", metavar="ID", help="only acts on the object with this id")
    command.add_argument("--after", type=_moment, metavar="TIME", help="from this time, such as 2026-01-31")
    command.add_argument("--before", type=_moment, metavar="TIME", help="until this time, excluded")
    command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object per line")
    command.set_defaults(run=_print)


def _print(arguments: argparse.Namespace) -> None:
    query = AuditQuery(
        action=arguments.action,
        subject_id=arguments.subject,
        created_after=arguments.after,
        created_before=arguments.before,
        limit=ROWS_PER_PAGE,
    )
    more = True
    while more:
        # A transaction for each page: the server ends one that waits for a pager.
        with session_scope() as session:
            rows, cursor = audit.list_page(session, query, oldest_first=True)
        query, more = query.model_copy(update={"cursor": cursor}), cursor is not None
        for row in rows:
            if arguments.as_json:
                print(audit.view(row).model_dump_json())
                continue
            print_record(
                f"{row.created_at:%Y-%m-%d %H:%M:%S} {row.action} {row.subject_id}",
                {"by": row.actor, "owner": row.owner_id, "key": row.key_prefix, "request": row.request_id},
                row.details,
            )


def _moment(text: str) -> datetime:
    """Read a time in ISO 8601, in UTC unless it says otherwise."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 2026-01-31T12:00:00Z") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
