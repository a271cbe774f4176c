"""Operator commands for owners, API keys, webhook secrets, dead jobs, embedding spaces, unused blobs and the audit.

    python -m scripts.admin create-owner team-a
    python -m scripts.admin create-key team-a --name laptop --scopes generate,search

    python -m scripts.admin create-key team-a --name shop --scopes search --collections products,team-b/logos
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

    python -m scripts.admin retry-space DIGEST
    python -m scripts.admin drop-space DIGEST

    python -m scripts.admin tune-search --recall 0.98
    python -m scripts.admin rebuild-index --m 32 --memory-mb 4096

    python -m scripts.admin set-text-language german

    python -m scripts.admin sweep --dry-run
    python -m scripts.admin audit --json --after 2026-01-01 > audit.jsonl

The commands use the database and the blob store that the settings name. A secret is printed once, at its creation.
The service cannot show it again.
"""

import argparse
import sys

from sqlalchemy import make_url

from scripts.admin import access, audit_log, dead_jobs, embedding_spaces, search_index, unused_blobs
from shared.errors import BaseAppException, DatabaseConnectionError
from shared.settings import get_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for resource in (access, dead_jobs, embedding_spaces, search_index, unused_blobs, audit_log):
        resource.add_commands(commands)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except DatabaseConnectionError as error:
        print(f"error: {error} {_database_address()}", file=sys.stderr)
        raise SystemExit(1) from error
    except (BaseAppException, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _database_address() -> str:
    url = make_url(get_settings().database.url.get_secret_value()).set(username=None, password=None, query={})
    return f"AFTERIMAGE_DATABASE__URL names {url.render_as_string()}."


if __name__ == "__main__":
    main()
