"""Operator commands: owners, API keys, webhook secrets.

    python -m scripts.admin create-owner team-a
    python -m scripts.admin create-key team-a --name laptop --scopes generate,search
    python -m scripts.admin list-keys
    python -m scripts.admin rotate-key KEY_ID --overlap-s 86400
    python -m scripts.admin revoke-key KEY_ID
    python -m scripts.admin rotate-webhook-secret team-a

It speaks to the database that the settings name. A secret is printed once, at creation, and kept nowhere.
"""

import argparse
import sys
from uuid import UUID

from rich.console import Console
from rich.table import Table
from sqlalchemy import select
from sqlalchemy.orm import Session

from shared.db import keys, owners, webhooks
from shared.db.models import ApiKey, Owner
from shared.db.session import session_scope
from shared.errors import BaseAppException, ResourceNotFoundError
from shared.settings import get_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("create-owner", help="make an owner; one that exists stays as it is")
    command.add_argument("name")
    command = commands.add_parser("create-key", help="make an API key and print its secret")
    command.add_argument("owner")
    command.add_argument("--name", required=True, help="what the key is for")
    command.add_argument("--scopes", default="generate,search", help=f"comma-separated, of {', '.join(keys.SCOPES)}")
    command.add_argument("--expires-in-days", type=float)
    commands.add_parser("list-keys", help="show keys without their secrets")
    command = commands.add_parser("rotate-key", help="replace a key; the old one stays valid for a while")
    command.add_argument("key_id", type=UUID)
    command.add_argument("--overlap-s", type=float, default=86_400)
    command = commands.add_parser("revoke-key", help="end a key at once")
    command.add_argument("key_id", type=UUID)
    command = commands.add_parser("rotate-webhook-secret", help="print a new secret; the old one signs for a while too")
    command.add_argument("owner")
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except (BaseAppException, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _run(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        match arguments.command:
            case "create-owner":
                print(owners.ensure(session, arguments.name))
            case "create-key":
                days = arguments.expires_in_days
                key, secret = keys.create(
                    session,
                    _owner_id(session, arguments.owner),
                    name=arguments.name,
                    scopes=frozenset(arguments.scopes.split(",")),
                    expires_in_s=None if days is None else days * 86_400,
                )
                print(f"{key.id}\n{secret}")
            case "list-keys":
                _show(keys.listed(session))
            case "rotate-key":
                key, secret = keys.rotate(session, arguments.key_id, overlap_s=arguments.overlap_s)
                print(f"{key.id}\n{secret}")
            case "revoke-key":
                keys.revoke(session, arguments.key_id)
            case "rotate-webhook-secret":
                overlap_s = get_settings().webhooks.secret_overlap_s
                secret, _ = webhooks.rotate_secret(session, _owner_id(session, arguments.owner), overlap_s=overlap_s)
                print(secret)


def _owner_id(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}: make it with create-owner.")
    return owner_id


def _show(listed: list[tuple[ApiKey, Owner]]) -> None:
    table = Table("id", "owner", "name", "begins with", "scopes", "expires", "revoked")
    for key, owner in listed:
        moments = [f"{moment:%Y-%m-%d %H:%M}" if moment else "" for moment in (key.expires_at, key.revoked_at)]
        table.add_row(str(key.id), owner.name, key.name, key.prefix, " ".join(key.scopes), *moments)
    Console().print(table)


if __name__ == "__main__":
    main()
