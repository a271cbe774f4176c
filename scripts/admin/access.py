"""Owners, API keys and webhook secrets."""

import argparse
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from scripts.admin.records import Commands, print_record
from shared.contracts.admin import AuditAction, Scope
from shared.contracts.common import Name
from shared.db import audit, collections, keys, owners, webhooks
from shared.db.audit import OPERATOR
from shared.db.session import session_scope
from shared.db.tables import Owner
from shared.errors import ResourceNotFoundError
from shared.settings import get_settings


def add_commands(commands: Commands) -> None:
    command = commands.add_parser("create-owner", help="create an owner; an existing owner is not changed")
    command.add_argument("name", type=_owner_name, help="lower-case letters, digits, - and _")
    command.set_defaults(run=_create_owner)
    command = commands.add_parser("create-key", help="create an API key and print its secret")
    command.add_argument("owner")
    command.add_argument("--name", required=True, help="purpose of the key")
    command.add_argument("--scopes", default="generate,search", help=f"comma-separated, of {', '.join(keys.SCOPES)}")
    command.add_argument("--expires-in-days", type=float)
    command.add_argument(
        "--collections", metavar="A,B", help="the only collections that the key can use, which must exist; default: all"
    )
    command.set_defaults(run=_create_key)
    commands.add_parser("list-keys", help="list keys without their secrets").set_defaults(run=_list_keys)
    command = commands.add_parser("rotate-key", help="replace a key; the old key stays valid for --overlap-s seconds")
    command.add_argument("key_id", type=UUID)
    command.add_argument("--overlap-s", type=float, default=86_400)
    command.set_defaults(run=_rotate_key)
    command = commands.add_parser("revoke-key", help="make a key invalid at once")
    command.add_argument("key_id", type=UUID)
    command.set_defaults(run=_revoke_key)
    command = commands.add_parser(
        "rotate-webhook-secret", help="print a new secret; for a while deliveries are signed with both"
    )
    command.add_argument("owner")
    command.set_defaults(run=_rotate_webhook_secret)


def _create_owner(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        owner_id, is_new = owners.add(session, arguments.name)
        if is_new:
            audit.record(session, OPERATOR, action=AuditAction.OWNER_CREATED, subject=owner_id, name=arguments.name)
    print(owner_id)


def _create_key(arguments: argparse.Namespace) -> None:
    days = arguments.expires_in_days
    with session_scope() as session:
        key, secret = keys.create(
            session,
            _owner_id(session, arguments.owner),
            name=arguments.name,
            scopes=frozenset(arguments.scopes.split(",")),
            expires_in_s=None if days is None else days * 86_400,
            collection_ids=_collection_ids(session, arguments),
        )
        session.refresh(key)
        audit.record_key(session, OPERATOR, key, action=AuditAction.KEY_CREATED)
    print(f"{key.id}\n{secret}")


def _list_keys(_arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        for key, owner in keys.list_all(session):
            limited_to = collections.names_for(session, key.collection_ids or [], owner_id=owner.id)
            only = "" if key.collection_ids is None else " ".join(sorted(limited_to.values())) or "none"
            expires, revoked = (f"{at:%Y-%m-%d %H:%M}" if at else "" for at in (key.expires_at, key.revoked_at))
            print_record(
                str(key.id),
                {"owner": owner.name, "name": key.name},
                {"begins with": key.prefix, "scopes": " ".join(key.scopes)},
                {"only in": only},
                {"expires": expires, "revoked": revoked},
            )


def _rotate_key(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        key, secret = keys.rotate(session, arguments.key_id, overlap_s=arguments.overlap_s)
        session.refresh(key)
        audit.record_key(session, OPERATOR, key, action=AuditAction.KEY_ROTATED, replaces=str(arguments.key_id))
    print(f"{key.id}\n{secret}")


def _revoke_key(arguments: argparse.Namespace) -> None:
    with session_scope() as session:
        keys.revoke(session, arguments.key_id)
        audit.record_key(session, OPERATOR, keys.get(session, arguments.key_id), action=AuditAction.KEY_REVOKED)


def _rotate_webhook_secret(arguments: argparse.Namespace) -> None:
    overlap_s = get_settings().webhooks.secret_overlap_s
    with session_scope() as session:
        owner_id = _owner_id(session, arguments.owner)
        secret, _ = webhooks.rotate_secret(session, owner_id, overlap_s=overlap_s)
        audit.record(session, OPERATOR, action=AuditAction.WEBHOOK_SECRET_ROTATED, subject=owner_id)
    print(secret)


def _owner_id(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}: create it with create-owner.")
    return owner_id


def _collection_ids(session: Session, arguments: argparse.Namespace) -> list[UUID] | None:
    if arguments.collections is None:
        return None
    if Scope.ADMIN in arguments.scopes.split(","):
        raise ValueError("a key with the scope admin cannot be limited: it could create keys without limits")
    return collections.ids_of(session, arguments.collections.split(","), owner_id=_owner_id(session, arguments.owner))


def _owner_name(text: str) -> str:
    """Apply the API's rule for names: the API cannot address an owner with another name."""
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid owner name") from None
