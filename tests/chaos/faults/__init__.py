"""The faults: each function injects one fault and returns which jobs it affected.

Each submits jobs and waits until the target process has claimed some, so that the fault affects something.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.faults.leases import freeze_lock_holder, freeze_worker_past_its_lease, steal_lease
from tests.chaos.faults.messages import deliver_twice, foreign_messages
from tests.chaos.faults.models import garbage, hang, out_of_memory, poison, second_clip
from tests.chaos.faults.outside import drip_receivers, flood, full_store, hang_receivers, other_encoder
from tests.chaos.faults.processes import (
    kill_after_commit,
    kill_api,
    kill_before_commit,
    kill_embed,
    kill_generate,
    kill_io,
    kill_mid_batch,
    kill_reconciler,
    power_cut,
    restart_generate,
)
from tests.chaos.faults.servers import (
    broker_away,
    fail_over,
    freeze_broker,
    freeze_limits,
    kill_postgres,
    postgres_away_longer_than_a_lease,
    read_only_broker,
    restart_postgres,
    wipe_broker,
)
from tests.chaos.scene import Hit, Scene


@dataclass(frozen=True)
class Kind:
    inject: Callable[[Scene], Hit]
    bound_s: Callable[[Scene], float] | None = None
    """Seconds that recovery may take. `None`: there is no bound."""


def _after_a_lease(scene: Scene) -> float:
    return scene.lease_s * 1.5


def _after_the_watchdog_and_a_lease(scene: Scene) -> float:
    return scene.watchdog_s + scene.lease_s * 1.5


def _soon(_scene: Scene) -> float:
    return 15.0


KINDS = {
    "kill_api": Kind(kill_api, _after_a_lease),
    "kill_embed": Kind(kill_embed, _after_a_lease),
    "kill_generate": Kind(kill_generate, _after_a_lease),
    "kill_io": Kind(kill_io, _after_a_lease),
    "kill_reconciler": Kind(kill_reconciler, _after_a_lease),
    "power_cut": Kind(power_cut),
    "kill_mid_batch": Kind(kill_mid_batch, _after_a_lease),
    "kill_before_commit": Kind(kill_before_commit, _after_a_lease),
    "kill_after_commit": Kind(kill_after_commit, _after_a_lease),
    "restart_generate": Kind(restart_generate, _soon),
    "wipe_broker": Kind(wipe_broker, _soon),
    "broker_away": Kind(broker_away, _soon),
    "freeze_broker": Kind(freeze_broker, _soon),
    "read_only_broker": Kind(read_only_broker, _soon),
    "freeze_limits": Kind(freeze_limits, _soon),
    "restart_postgres": Kind(restart_postgres),
    "kill_postgres": Kind(kill_postgres),
    "postgres_away": Kind(postgres_away_longer_than_a_lease),
    "deliver_twice": Kind(deliver_twice),
    "foreign_messages": Kind(foreign_messages, _soon),
    "steal_lease": Kind(steal_lease, _after_a_lease),
    "freeze_worker": Kind(freeze_worker_past_its_lease, _after_a_lease),
    "freeze_lock_holder": Kind(freeze_lock_holder, _soon),
    "poison": Kind(poison),
    "hang": Kind(hang, _after_the_watchdog_and_a_lease),
    "out_of_memory": Kind(out_of_memory),
    "garbage": Kind(garbage),
    "second_clip": Kind(second_clip),
    "full_store": Kind(full_store),
    "other_encoder": Kind(other_encoder),
    "flood": Kind(flood),
    "hang_receivers": Kind(hang_receivers),
    "drip_receivers": Kind(drip_receivers),
}
FAIL_OVER = "fail_over"
"""Only for a storm on servers that have a replica, and only once in it."""
FAULTS = KINDS | {FAIL_OVER: Kind(fail_over)}
