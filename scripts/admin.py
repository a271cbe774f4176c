"""Operator commands for owners, API keys, webhook secrets, dead jobs, embedding spaces and unused blobs.

    python -m scripts.admin create-owner team-a
    python -m scripts.admin create-key team-a --name laptop --scopes generate,search
    python -m scripts.admin list-keys

    python -m scripts.admin rotate-key KEY_ID --overlap-s 86400
    python -m scripts.admin revoke-key KEY_ID
    python -m scripts.admin rotate-webhook-secret team-a

    python -m scripts.admin dead-jobs
    python -m scripts.admin requeue JOB_ID [JOB_ID ...]
    python -m scripts.admin requeue --all

    python -m scripts.admin list-spaces
    python -m scripts.admin add-space DIGEST --model NAME --dim 512
    python -m scripts.admin activate-space DIGEST

    python -m scripts.admin sweep --dry-run

The commands use the database and the blob store that the settings name. A secret is printed once, at its creation.
The service cannot show it again.
"""

import argparse
import sys
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url, select
from sqlalchemy.orm import Session

from shared import blob_sweeper
from shared.contracts.common import Name
from shared.contracts.jobs import JobState
from shared.db import images, jobs, keys, owners, spaces, webhooks
from shared.db.jobs import DeadJob
from shared.db.session import session_scope
from shared.db.tables import ApiKey, Job, Owner
from shared.errors import BaseAppException, DatabaseConnectionError, ResourceNotFoundError
from shared.messaging import queue
from shared.settings import get_settings
from shared.storage import get_blobs

MAX_REQUEUED_JOBS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("create-owner", help="create an owner; an existing owner is not changed")
    command.add_argument("name", type=_owner_name, help="lower-case letters, digits, - and _")
    command = commands.add_parser("create-key", help="create an API key and print its secret")
    command.add_argument("owner")
    command.add_argument("--name", required=True, help="purpose of the key")
    command.add_argument("--scopes", default="generate,search", help=f"comma-separated, of {', '.join(keys.SCOPES)}")
    command.add_argument("--expires-in-days", type=float)
    commands.add_parser("list-keys", help="list keys without their secrets")
    command = commands.add_parser("rotate-key", help="replace a key; the old key stays valid for --overlap-s seconds")
    command.add_argument("key_id", type=UUID)
    command.add_argument("--overlap-s", type=float, default=86_400)
    command = commands.add_parser("revoke-key", help="make a key invalid at once")
    command.add_argument("key_id", type=UUID)
    command = commands.add_parser(
        "rotate-webhook-secret", help="print a new secret; for a while deliveries are signed with both"
    )
    command.add_argument("owner")
    command = commands.add_parser("dead-jobs", help="list jobs that crashed their worker too often, latest first")
    command.add_argument("--limit", type=int, default=50)
    command = commands.add_parser("requeue", help="retry dead jobs, each as a new job; prints the new ids")
    command.add_argument("job_ids", type=UUID, nargs="*", metavar="JOB_ID")
    command.add_argument("--all", action="store_true", help="every dead job that was not retried yet")
    commands.add_parser("list-spaces", help="list embedding spaces, with how many ready images each lacks")
    command = commands.add_parser(
        "add-space", help="make the space of another CLIP known; its embed workers then embed the corpus for it"
    )
    command.add_argument("digest", help="as an embed worker with that CLIP logs it")
    command.add_argument("--model", required=True, help="name of the CLIP")
    command.add_argument("--dim", type=int, required=True, help="length of its vectors")
    command = commands.add_parser("activate-space", help="let searches use another space that has all vectors")
    command.add_argument("digest")
    command.add_argument(
        "--force", action="store_true", help="images without a vector there become pending until they are embedded"
    )
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
    arguments = parser.parse_args()
    try:
        _run(arguments)
    except DatabaseConnectionError as error:
        print(f"error: {error} {_database_address()}", file=sys.stderr)
        raise SystemExit(1) from error
    except (BaseAppException, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "requeue":
            _requeue(arguments.job_ids, all_jobs=arguments.all)
        case "sweep":
            _sweep(arguments)
        case _:
            with session_scope() as session:
                _in_one_transaction(session, arguments)


def _in_one_transaction(session: Session, arguments: argparse.Namespace) -> None:
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
            _print_keys(keys.list_all(session))
        case "rotate-key":
            key, secret = keys.rotate(session, arguments.key_id, overlap_s=arguments.overlap_s)
            print(f"{key.id}\n{secret}")
        case "revoke-key":
            keys.revoke(session, arguments.key_id)
        case "rotate-webhook-secret":
            overlap_s = get_settings().webhooks.secret_overlap_s
            secret, _ = webhooks.rotate_secret(session, _owner_id(session, arguments.owner), overlap_s=overlap_s)
            print(secret)
        case "list-spaces":
            _print_spaces(session)
        case "add-space":
            print(spaces.ensure(session, digest=arguments.digest, model=arguments.model, dim=arguments.dim).digest)
        case "activate-space":
            _activate_space(session, arguments.digest, force=arguments.force)
        case "dead-jobs":
            _print_dead_jobs(jobs.list_dead(session, limit=arguments.limit))


def _requeue(job_ids: list[UUID], *, all_jobs: bool) -> None:
    if all_jobs == bool(job_ids):
        raise ValueError("give job ids or --all, not both")
    with session_scope() as session:
        old = [_get_dead_job(session, job_id) for job_id in job_ids]
        if all_jobs:
            old = [each.job for each in jobs.list_dead(session, limit=MAX_REQUEUED_JOBS) if not each.retried]
        new = [jobs.insert_retry(session, job) for job in old]
    # After the commit. The reconciler dispatches jobs that the broker does not accept now.
    for model in {job.model for job in new}:
        queue.dispatch_jobs(model)
    for job in new:
        print(job.id)


def _get_dead_job(session: Session, job_id: UUID) -> Job:
    job = session.get(Job, job_id)
    if job is None or job.state != JobState.DEAD:
        raise ResourceNotFoundError(f"There is no dead job {job_id}.")
    return job


def _print_spaces(session: Session) -> None:
    for space, active, vectors in spaces.list_all(session):
        missing = images.count_without_vector(session, space)
        _print_record(
            space.digest,
            {"model": space.model, "dim": space.dim, "active": "yes" if active else "no"},
            {"vectors": vectors, "images without": missing},
        )


def _activate_space(session: Session, digest: str, *, force: bool) -> None:
    space = spaces.find(session, digest)
    if space is None:
        raise ResourceNotFoundError(f"There is no embedding space {digest!r}: list-spaces shows all.")
    missing = images.count_without_vector(session, space)
    if missing and not force:
        raise ValueError(
            f"{missing} ready images have no vector in this space. An embed worker with its CLIP embeds them. "
            "With --force they are pending, and not found, until they are embedded."
        )
    spaces.activate(session, space)
    after: UUID | None = None
    while (found := images.reopen_without_vector(session, space, after=after, limit=10_000)).next_after is not None:
        after = found.next_after


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


def _owner_id(session: Session, name: str) -> UUID:
    owner_id = session.scalar(select(Owner.id).where(Owner.name == name))
    if owner_id is None:
        raise ResourceNotFoundError(f"There is no owner {name!r}: create it with create-owner.")
    return owner_id


def _print_dead_jobs(dead: list[DeadJob]) -> None:
    table = Table("id", "owner", "model", "ended", "crashes", "retried", "prompt")
    for each in dead:
        job, ended = each.job, each.job.finished_at
        moment = f"{ended:%Y-%m-%d %H:%M}" if ended else ""
        again = "yes" if each.retried else ""
        table.add_row(
            str(job.id), each.owner, job.model, moment, str(job.crashes), again, job.parameters["prompt"][:60]
        )
    Console().print(table)


def _owner_name(text: str) -> str:
    """Apply the API's rule for names: the API cannot address an owner with another name."""
    try:
        return TypeAdapter(Name).validate_python(text)
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid owner name") from None


def _print_keys(listed: list[tuple[ApiKey, Owner]]) -> None:
    for key, owner in listed:
        expires, revoked = (f"{at:%Y-%m-%d %H:%M}" if at else "" for at in (key.expires_at, key.revoked_at))
        _print_record(
            str(key.id),
            {"owner": owner.name, "name": key.name},
            {"begins with": key.prefix, "scopes": " ".join(key.scopes)},
            {"expires": expires, "revoked": revoked},
        )


def _print_record(title: str, *lines: dict[str, object]) -> None:
    """Print an entry that is too wide for a table in a terminal of 80 columns; empty fields are left out."""
    print(title)
    for line in lines:
        if shown := ", ".join(f"{name}: {value}" for name, value in line.items() if value != ""):
            print(f"  {shown}")


def _database_address() -> str:
    url = make_url(get_settings().database.url.get_secret_value()).set(username=None, password=None, query={})
    return f"AFTERIMAGE_DATABASE__URL names {url.render_as_string()}."


if __name__ == "__main__":
    main()
