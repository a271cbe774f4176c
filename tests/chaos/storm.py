"""A storm: a stack under load, one fault after the other, and the checks at the end."""

import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from shared.settings import ModelSettings
from tests.chaos import promises
from tests.chaos.faults import FAIL_OVER, FAULTS, KINDS
from tests.chaos.load import Load
from tests.chaos.mailbox import VARIABLE, Mailbox
from tests.chaos.promises import Broken
from tests.chaos.receiver import receiving
from tests.chaos.scene import OWNERS, SCOPES, Hit, Scene
from tests.chaos.servers import REPLACED, SERVERS
from tests.chaos.store import small_store
from tests.other_servers import chosen_state
from tests.stack import running_stack, wait_until

QUIET_S = 120.0
"""Seconds that all work may take to end after the last fault, beside leases and retry delays."""


@dataclass(frozen=True)
class Plan:
    """One storm. Its seed repeats the faults and requests, but not the timing of the processes."""

    seed: int
    jobs: int = 500
    """The least number of submitted jobs."""
    faults: int = len(KINDS)
    kinds: Sequence[str] = tuple(KINDS)
    lease_s: float = 30
    slack_s: float = 0
    """Added to every bound on recovery, because with short leases a process start takes longer than a lease."""
    starter_share: float = 0.03
    """The share of jobs for the starter model. 0: the model is not loaded."""
    generators: int = 2
    durable: bool = True
    servers: str = "local"
    """A name in `SERVERS`. With replicas, there is a fail-over in the middle of the storm."""
    webhook_timeout_s: float = 3
    watchdog_s: float = 60
    """Longer than a worker stays frozen, so that the watchdog does not end it. Its writes must be refused."""

    @property
    def visibility_timeout_s(self) -> int:
        return max(5, int(self.lease_s * 2))

    @property
    def models(self) -> Sequence[str]:
        return ("cheap", "starter") if self.starter_share else ("cheap",)

    def environment(self) -> dict[str, str]:
        cheap = {"kind": "fake", "cost_ms": 200, "max_batch_size": 4}
        starter = ModelSettings().generators["starter"].model_dump(mode="json", exclude_defaults=True)
        generators = {"cheap": cheap, "starter": starter}
        settings = {
            "ENVIRONMENT": "test",
            "SECURITY__REQUIRE_API_KEYS": "true",
            "LIMITS__WRITES_PER_MINUTE": 60,
            "QUEUE__MAX_QUEUED_PER_OWNER": 60,
            "MODEL__GENERATORS": orjson.dumps({name: generators[name] for name in self.models}).decode(),
            "MODEL__DEFAULT_GENERATOR": "cheap",
            "MODEL__THREADS": 1,
            "JOBS__LEASE_S": self.lease_s,
            "JOBS__HEARTBEAT_S": self.lease_s / 3,
            "JOBS__RECONCILE_S": min(5, self.lease_s / 4),
            "JOBS__TRANSIENT_RETRY_DELAY_S": min(5, self.lease_s / 4),
            "QUEUE__VISIBILITY_TIMEOUT_S": self.visibility_timeout_s,
            "WEBHOOKS__ALLOW_HTTP": "true",
            "WEBHOOKS__ALLOW_PRIVATE": "true",
            "WEBHOOKS__TIMEOUT_S": self.webhook_timeout_s,
            "WEBHOOKS__PER_HOST": 8,
            "WEBHOOKS__PER_OWNER": 8,
            "WATCHDOG__STEP_S": self.watchdog_s,
        }
        return {f"AFTERIMAGE_{name}": str(value) for name, value in settings.items()}

    def options(self) -> tuple[str, ...]:
        return "--worker-module", "tests.chaos.worker", "--api", "2", "--generate", str(self.generators)

    def sequence(self) -> list[str]:
        """All kinds in random order, again and again, and the fail-over. The seed decides the order."""
        order = random.Random(self.seed)
        possible = [kind for kind in self.kinds if kind not in REPLACED.get(self.servers, ())]
        rounds = -(-self.faults // len(possible))
        sequence = [kind for _ in range(rounds) for kind in order.sample(possible, len(possible))][: self.faults]
        if self.servers in REPLACED:
            sequence.insert(len(sequence) // 2, FAIL_OVER)
        return sequence


SHORT_KINDS = (
    "kill_before_commit",
    "kill_after_commit",
    "restart_postgres",
    "deliver_twice",
    "foreign_messages",
    "freeze_limits",
    "steal_lease",
    "freeze_lock_holder",
    "poison",
    "out_of_memory",
    "garbage",
    "full_store",
    "other_encoder",
    "flood",
    "hang_receivers",
    "drip_receivers",
)
"""`tests/e2e/test_faults.py` already kills a busy worker and empties the broker, so these leave out both."""


def short(seed: int, *, servers: str = "local") -> Plan:
    """The plan of a short storm with short leases."""
    return Plan(
        seed=seed,
        jobs=80,
        faults=len(SHORT_KINDS),
        kinds=SHORT_KINDS,
        lease_s=4,
        # `make chaos` measures recovery. Here a busy machine may need a minute to start a killed worker again.
        slack_s=120,
        starter_share=0,
        # Only what the primary has stored safely can be on its standby.
        durable=servers == "standby",
        servers=servers,
    )


@dataclass
class Outcome:
    """The results of a storm. `recovery_s`: by kind of fault, the seconds of each recovery."""

    plan: Plan
    jobs: int = 0
    uploads: int = 0
    deliveries: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """The requests that a limit refused, by error code."""
    faults: Counter[str] = field(default_factory=Counter)
    recovery_s: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    broken: list[Broken] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Recoveries beyond their bounds, faults that could not be injected, and promises broken between faults."""
    took_s: float = 0

    @property
    def kept(self) -> bool:
        return not self.broken and not self.failures

    def summary(self) -> dict[str, Any]:
        breaches = Counter(each.breach.value for each in self.broken)
        return {
            "seed": self.plan.seed,
            "servers": self.plan.servers,
            "jobs": self.jobs,
            "uploads": self.uploads,
            "webhooks": self.deliveries,
            "refused": dict(self.refused),
            "faults": sum(self.faults.values()),
            "kinds": len(self.faults),
            **{breach.value: breaches[breach.value] for breach in promises.Breach},
            "recovery_s": dict(sorted(self.recovery_s.items())),
            "failures": self.failures,
            "broken": [asdict(each) for each in self.broken],
            "lease_s": self.plan.lease_s,
            "took_s": round(self.took_s, 1),
        }


@contextmanager
def storm(plan: Plan, folder: Path, *, say: Callable[[str], None] = print) -> Iterator[tuple[Scene, Outcome]]:
    """Run the whole plan in `folder` and check the promises. Keep the stack running until the block ends.

    The logs of the stack stay in `folder`.
    """
    started = time.monotonic()

    def clock(line: str) -> None:
        say(f"{time.monotonic() - started:6.1f} s  {line}")

    mailbox = Mailbox(folder / "mailbox")
    mailbox.folder.mkdir(parents=True)
    environment = plan.environment() | {VARIABLE: str(mailbox.folder)}
    clock(f"seed {plan.seed}: starting the stack in {folder}")
    with ExitStack() as running:
        receiver = running.enter_context(receiving())
        store = running.enter_context(small_store(folder / "stack" / "blobs"))
        servers = SERVERS[plan.servers](folder / "servers", chosen_state(folder / "stack"))
        running.enter_context(servers.around())
        stack = running.enter_context(
            running_stack(
                folder / "stack",
                environment=environment,
                options=plan.options(),
                settings=servers.settings,
                durable=plan.durable,
            )
        )
        running.enter_context(servers.beside(stack))
        load = Load(
            [stack.api_url("api"), stack.api_url("api-2")],
            keys={name: stack.new_key(name, *SCOPES) for name in OWNERS},
            seed=plan.seed,
            receiver_url=receiver.url,
            starter_share=plan.starter_share,
        )
        scene = Scene(
            stack=stack,
            servers=servers,
            load=load,
            receiver=receiver,
            store=store,
            mailbox=mailbox,
            random=random.Random(plan.seed + 1),
            models=plan.models,
            lease_s=plan.lease_s,
            webhook_timeout_s=plan.webhook_timeout_s,
            watchdog_s=plan.watchdog_s,
        )
        outcome = Outcome(plan)
        try:
            load.flow(jobs_per_s=0.5, unfinished=lambda: len(scene.unfinished()))
            sequence = plan.sequence()
            for number, kind in enumerate(sequence, start=1):
                clock(f"{number:2}/{len(sequence)}  {kind} ...")
                clock(f"{number:2}/{len(sequence)}  {kind}: {_inject(kind, scene, outcome)}")
            load.jobs(max(0, plan.jobs - len(load.submissions)))
            outcome.failures += load.settle()
            clock(f"the storm is over: {len(load.submissions)} jobs were accepted; waiting for them to end")
            _wait_until_idle(scene, plan)
            scene.sweep()
            outcome.broken = promises.broken(scene)
            outcome.jobs, outcome.uploads = len(load.submissions), len(load.uploads)
            outcome.deliveries, outcome.refused = len(receiver.receipts), load.refused
            outcome.took_s = time.monotonic() - started
            yield scene, outcome
        finally:
            load.close()
            scene.engine.dispose()


def _inject(kind: str, scene: Scene, outcome: Outcome) -> str:
    """Inject one fault and wait for the recovery. Return a line for the console."""
    chosen = FAULTS[kind]
    limit_s = None if chosen.bound_s is None else chosen.bound_s(scene) + outcome.plan.slack_s
    outcome.faults[kind] += 1
    threading.Event().wait(scene.random.uniform(0, 2))
    try:
        hit = chosen.inject(scene)
        took_s = _recovery_s(hit, scene, timeout_s=max(limit_s or 0, scene.lease_s * 3) + QUIET_S)
    except AssertionError as error:
        outcome.failures.append(f"{kind}: {error}")
        return str(error)
    outcome.recovery_s[kind].append(round(took_s, 2))
    early = promises.broken_so_far(scene)
    if early:
        outcome.failures.append(f"{kind}: already broken: {early[0].what}")
    if limit_s is not None and took_s > limit_s:
        outcome.failures.append(f"{kind}: recovery took {took_s:.1f} s, allowed are {limit_s:.1f} s")
    return f"{len(hit.jobs)} jobs affected, recovered in {took_s:.1f} s"


def _recovery_s(hit: Hit, scene: Scene, *, timeout_s: float) -> float:
    """Seconds until the last affected job was claimed again or ended, from the fault or the return of a server."""
    wait_until(hit.also, timeout_s=timeout_s, what="the affected process to work again")
    also_s = time.time() - hit.since
    scene.wait_until_recovered(hit.jobs, timeout_s=timeout_s)
    recovered_at = scene.recovered_at(hit.jobs)
    assert recovered_at is not None
    return max(also_s, recovered_at - hit.since, 0)


def _wait_until_idle(scene: Scene, plan: Plan) -> None:
    """Wait until all work has ended. The checks report the work that has not ended in time."""
    patience_s = QUIET_S + plan.lease_s * 3
    for is_done, what in (
        (lambda: not scene.unfinished(), "every job to end"),
        (lambda: not scene.pending_images(), "every upload to be searchable"),
        (lambda: not scene.pending_deliveries(), "every webhook to be delivered"),
        (lambda: not scene.messages(), "the broker to be empty"),
    ):
        try:
            wait_until(is_done, timeout_s=patience_s, what=what)
        except AssertionError:
            patience_s = 1
