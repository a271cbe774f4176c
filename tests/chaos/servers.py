"""The servers under a storm: those of the local stack, or others in front of them and beside them."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from ops.local.layout import StackState
from tests.other_servers import PgBouncer, Sentinels, Standby
from tests.stack import RunningStack

CONNECTIONS = 24
"""Of PgBouncer to Postgres. The fault `freeze_lock_holder` holds about 13 transactions, and the others need some."""


@dataclass(frozen=True)
class Servers:
    settings: Mapping[str, str] = field(default_factory=dict)
    """The addresses at which the product reaches the servers."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Runs the servers that start before the stack."""
    beside: Callable[[RunningStack], AbstractContextManager[object]] = nullcontext
    """Runs the servers that start after the stack."""
    fail_over: Callable[[RunningStack], None] | None = None
    """Stops a server of the stack for good and lets another one take its place."""


def _pgbouncer(folder: Path, state: StackState) -> Servers:
    bouncer = PgBouncer(folder, state, connections=CONNECTIONS)
    return Servers(bouncer.settings, around=bouncer.running, beside=bouncer.documented_role)


def _sentinels(folder: Path, state: StackState) -> Servers:
    sentinels = Sentinels(folder, state)
    return Servers(sentinels.settings, around=sentinels.running, fail_over=sentinels.fail_over)


def _standby(folder: Path, state: StackState) -> Servers:
    standby = Standby(folder, state)
    return Servers(standby.settings, beside=lambda _: standby.running(), fail_over=standby.fail_over)


SERVERS: Mapping[str, Callable[[Path, StackState], Servers]] = {
    "local": lambda _folder, _state: Servers(),
    "pgbouncer": _pgbouncer,
    "sentinels": _sentinels,
    "standby": _standby,
}

REPLACED: Mapping[str, frozenset[str]] = {
    "sentinels": frozenset({"wipe_broker", "freeze_broker", "broker_away", "read_only_broker", "power_cut"}),
    "standby": frozenset({"restart_postgres", "kill_postgres", "postgres_away", "power_cut"}),
}
"""For servers with a fail-over: the faults that would start the former server beside its successor."""
