"""A process that is frozen inside a transaction keeps its locks for a few seconds only. On a real database."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from ops.local.stack import REPOSITORY
from shared import blob_sweeper
from shared.contracts.common import ImageFormat
from shared.db import blobs, collections, owners, queue_limits, spaces, webhooks, withdrawals
from shared.db.dispatch import mark_next_published
from shared.db.session import IDLE_LIMIT_S, session_scope
from shared.errors import DatabaseConnectionError
from shared.settings import Settings
from shared.storage import get_blobs, image_key
from tests.factories import make_job
from tests.integration.conftest import API, Client
from worker_service.maintenance.reconciler import LOCK

OWNER = uuid4()
LOCKS: dict[str, str] = {
    "dispatch": "feed:cheap",
    "embedding spaces": "embedding_spaces",
    "webhooks": "webhook_deliveries",
    "queue limit": "queued",
    "bulks of an owner": f"bulks:{OWNER}",
    "reconciler": LOCK,
}
HOLDER = """
import sys, time
from sqlalchemy import text
from shared.db.session import session_scope
with session_scope() as session:
    for statement in sys.argv[1:]:
        session.execute(text(statement))
    print("holds", flush=True)
    time.sleep(600)
"""
"""A process that holds locks and does nothing more. For the server it is the same as a frozen one."""


@contextmanager
def holding(*statements: str) -> Iterator[None]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, *statements], cwd=REPOSITORY, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"holds\n"
        yield
    finally:
        holder.kill()
        holder.communicate()


def advisory(key: str) -> str:
    return f"select pg_advisory_xact_lock(hashtextextended('{key}', 0))"


def goes_on(act: Callable[[Session], object]) -> float:
    """Seconds until `act` succeeds, with retries as the services do them."""
    started = time.monotonic()
    while True:
        try:
            with session_scope() as session:
                act(session)
            return time.monotonic() - started
        except DatabaseConnectionError:
            assert time.monotonic() - started < 4 * IDLE_LIMIT_S


def test_every_advisory_lock_of_a_frozen_process_is_released(settings: Settings, session: Session) -> None:
    make_job(session)
    owner_id = owners.ensure(session, "team")
    session.commit()
    locks = LOCKS | {"collections": f"collections:{owner_id}", "withdrawals": withdrawals.LOCK}
    acts: dict[str, Callable[[Session], object]] = {
        "dispatch": lambda s: mark_next_published(s, "cheap", window=4, starvation_timeout_s=60),
        "embedding spaces": lambda s: spaces.ensure(s, digest="a" * 12, model="a", dim=4),
        "webhooks": lambda s: webhooks.claim_due(s, lease_s=1, per_host=1, per_owner=1),
        "queue limit": lambda s: queue_limits.refuse_when_full(s, OWNER, settings.queue),
        "collections": lambda s: collections.ensure(s, "mine", owner_id=owner_id),
        "withdrawals": withdrawals.lock,
        "remembered outputs": withdrawals.delay_withdrawals,
    }
    with holding(*map(advisory, locks.values()), "select id from jobs for update"):
        waits: dict[str, float] = {}

        def measure(name: str) -> None:
            waits[name] = goes_on(acts[name])

        threads = [threading.Thread(target=measure, args=(name,)) for name in acts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert waits.keys() == acts.keys()
    assert max(waits.values()) < IDLE_LIMIT_S + 3, waits


def test_every_advisory_lock_of_the_code_is_known_here() -> None:
    sources = [path for folder in ("shared", "api_service", "worker_service", "migrations")
               for path in (REPOSITORY / folder).rglob("*.py")]  # fmt: skip
    using = {str(path.relative_to(REPOSITORY)) for path in sources if "pg_advisory" in path.read_text()}
    using |= {str(path.relative_to(REPOSITORY)) for path in sources if "pg_try_advisory" in path.read_text()}
    assert using == {
        "migrations/env.py",
        "shared/db/blobs.py",
        "shared/db/bulks.py",
        "shared/db/collections.py",
        "shared/db/dispatch.py",
        "shared/db/queue_limits.py",
        "shared/db/spaces.py",
        "shared/db/webhooks.py",
        "shared/db/withdrawals.py",
        "worker_service/maintenance/reconciler.py",
    }


@pytest.mark.parametrize("statement_after", [True, False])
def test_a_transaction_that_the_server_ended_is_a_temporary_error(settings: Settings, statement_after: bool) -> None:
    def freeze() -> None:
        with session_scope() as session:
            session.execute(text("set local idle_in_transaction_session_timeout = 100"))
            threading.Event().wait(0.5)
            if statement_after:
                session.execute(text("select 1"))

    with pytest.raises(DatabaseConnectionError):
        freeze()
    with session_scope() as session:
        assert session.scalar(text("select 1")) == 1, "the next transaction gets another connection"


def test_a_submit_beside_a_frozen_dispatcher_is_accepted(client: Client, settings: Settings) -> None:
    with holding(advisory("feed:cheap")):
        answer = client.post(f"{API}/generate", json={"prompt": "a cat"})
    assert answer.status_code == 202


def test_a_sweeper_that_was_frozen_deletes_nothing_after_its_locks_are_gone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = image_key("ab" * 32, ImageFormat.PNG, b"bytes")
    get_blobs().put(key, b"bytes", media_type="image/png")
    listed = blobs.list_unneeded

    def frozen_then_listed(session: Session, keys: list[str]) -> list[str]:
        found = listed(session, keys)
        monkeypatch.setattr(blob_sweeper, "DELETE_LIMIT_S", 0)  # the time has passed
        return found

    monkeypatch.setattr("shared.db.blobs.list_unneeded", frozen_then_listed)
    (info,) = get_blobs().list("images")
    swept = blob_sweeper.SweepResult()
    blob_sweeper._delete(get_blobs(), [info], swept)
    assert (swept.blobs, get_blobs().get(key)) == (0, b"bytes")
