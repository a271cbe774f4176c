"""Frequent operations take no longer with 100,000 ended and 20,000 waiting jobs than with an almost empty table.

The test uses two databases on one server, one of them full. Every round does the same work in both, in turns, so that
other load of the machine slows both equally. The test compares the medians.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from psycopg2 import extensions
from pydantic import SecretStr
from sqlalchemy import Engine, delete, select, text
from sqlalchemy.orm import Session, sessionmaker

from api_service.services import views
from ops.local.stack import LocalStack
from shared.contracts.jobs import JobState
from shared.db import attempts, dispatch, jobs
from shared.db import session as session_module
from shared.db.session import bound_waits, build_engine
from shared.db.tables import Job
from shared.messaging import queue
from shared.settings import Settings
from tests import one_attempt
from tests.conftest import fresh_database
from tests.factories import make_job
from worker_service.maintenance.reconciler import Reconciler

ENDED, WAITING = 100_000, 20_000
ROUNDS, AT_LEAST, ENOUGH_S = 200, 40, 20.0
"""The test stops after `ENOUGH_S` seconds, but not before `AT_LEAST` rounds."""
SMALL = 4 * ROUNDS
"""Jobs that wait in the "empty" table: the rounds need something to work on."""
SLOWER, MORE_S = 1.3, 0.001

pytestmark = pytest.mark.extended  # filling the table and measuring take half a minute

FILL = """
insert into owners (id, name) select gen_random_uuid(), 'owner ' || n from generate_series(1, 20) n;
create temporary table people as select id, row_number() over () as place from owners where name like 'owner %';
insert into jobs (
    id, owner_id, kind, state, lane, model, images, parameters, timeout_s, attempt, worker, last_seq,
    created_at, started_at, finished_at
)
select gen_random_uuid(), people.id, template.kind, 'succeeded', n % 4, '{model}', 1, template.parameters, 60, 1,
    'worker ' || n % 8, 4, now() - n * interval '2 seconds', now() - n * interval '2 seconds' + interval '1 second',
    now() - n * interval '2 seconds' + interval '3 seconds'
from generate_series(1, {ended}) n join people on people.place = 1 + n % 20, jobs template
where template.id = '{template}';
insert into job_events (job_id, seq, type, at)
select id, 4, 'succeeded', finished_at from jobs where state = 'succeeded';
insert into jobs (
    id, owner_id, kind, state, lane, model, images, parameters, timeout_s, last_seq, created_at
)
select gen_random_uuid(), people.id, template.kind, 'queued', 1 + n % 3,
    case when n % 10 = 0 then 'other' else '{model}' end, 1, template.parameters, 60, 1,
    now() - interval '1 hour' + n * interval '0.1 seconds'
from generate_series(1, {waiting}) n join people on people.place = 1 + n % 20, jobs template
where template.id = '{template}';
drop table people;
"""


@dataclass
class Database:
    engine: Engine
    model: str
    """Each database has another model, so that the caches of a process do not mix the two databases."""
    sessions: sessionmaker[Session]
    reconciler: Reconciler
    took_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @contextmanager
    def timed(self, name: str) -> Iterator[Session]:
        """One transaction, its commit included."""
        started = time.perf_counter()
        with self.sessions.begin() as session:
            yield session
        self.took_s[name].append(time.perf_counter() - started)


@pytest.fixture
def databases(servers: LocalStack, settings: Settings, postgres_url: str) -> Iterator[tuple[Database, Database]]:
    with ExitStack() as stack:
        # An API that was created earlier in this process limits all database waits, and filling takes longer.
        stack.callback(extensions.set_wait_callback, extensions.get_wait_callback())
        bound_waits(120)
        full_url = stack.enter_context(fresh_database(servers))

        def filled(url: str, model: str, *, ended: int, waiting: int) -> Database:
            patient = {"url": SecretStr(url), "statement_timeout_s": 120}
            engine = build_engine(settings.database.model_copy(update=patient))
            stack.callback(engine.dispose)
            fill(engine, model, ended=ended, waiting=waiting)
            sessions = sessionmaker(engine, expire_on_commit=False)
            return Database(engine, model, sessions, Reconciler(settings.jobs))

        yield (
            filled(postgres_url, "cheap", ended=0, waiting=SMALL),
            filled(full_url, "cheaper", ended=ENDED, waiting=WAITING),
        )


def fill(engine: Engine, model: str, *, ended: int, waiting: int) -> None:
    with Session(engine) as session:
        template = make_job(session, model=model)
        session.commit()
        connection = session.connection(execution_options={"no_parameters": True})  # its percent signs are SQL
        connection.exec_driver_sql(FILL.format(ended=ended, waiting=waiting, model=model, template=template.id))
        session.execute(delete(Job).where(Job.id == template.id))
        session.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("vacuum analyze"))


def one_round(database: Database, settings: Settings, *, with_tick: bool) -> None:
    """Take one job from its dispatch to its end, and poll jobs in between."""
    with database.timed("dispatch") as session:
        window = settings.queue.published_jobs_per_lane
        published = dispatch.mark_next_published(session, database.model, window=window, starvation_timeout_s=60)
    queue.publish_jobs(database.model, published)
    with database.sessions() as session:
        queued = (
            select(Job.id, Job.owner_id)
            .where(Job.state == JobState.QUEUED, Job.model == database.model)
            .order_by(Job.lane.desc(), Job.created_at.desc())
            .limit(1)
        )
        last_id, last_owner = session.execute(queued.where(Job.published_at.is_(None))).one()
        next_id = session.scalars(queued.where(Job.published_at.is_not(None)).with_only_columns(Job.id)).one()
    with database.timed("claim") as session:
        taken = one_attempt.claim(session, next_id, worker="worker 1", lease_s=30)
    assert taken is not None
    claim, job = taken
    with database.timed("renew") as session:
        assert attempts.renew(session, [claim], lease_s=30)
    with database.timed("check of ownership") as session:
        assert attempts.still_owned(session, [claim])
    with database.timed("poll of a running job") as session:
        views.job(session, jobs.get(session, next_id, owner_id=job.owner_id))
    with database.timed("poll of the last queued job") as session:
        view = views.job(session, jobs.get(session, last_id, owner_id=last_owner))
    assert (view.queue_position or 0) > SMALL / 4
    with database.timed("finish") as session:
        assert one_attempt.finish(session, claim, [], timings={})
    with database.timed("poll of an ended job") as session:
        views.job(session, jobs.get(session, next_id, owner_id=job.owner_id))
    if with_tick:
        started = time.perf_counter()
        database.reconciler.tick()
        database.took_s["reconcile"].append(time.perf_counter() - started)


def test_a_full_table_does_not_slow_down_frequent_operations(
    databases: tuple[Database, Database], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends_at = time.monotonic() + ENOUGH_S
    for number in range(ROUNDS):
        if number >= AT_LEAST and time.monotonic() > ends_at:
            break
        for database in databases if number % 2 else databases[::-1]:
            # The reconciler opens its own sessions, which must be of this database.
            monkeypatch.setattr(session_module, "_factory", lambda it=database: it.sessions)
            one_round(database, settings, with_tick=number % 4 == 0)
    small, full = ({name: statistics.median(took) for name, took in each.took_s.items()} for each in databases)
    slower = {
        name: f"{small[name] * 1000:.2f} ms, with many jobs {full[name] * 1000:.2f} ms"
        for name in small
        if full[name] > max(small[name] * SLOWER, small[name] + MORE_S)
    }
    assert slower == {}
