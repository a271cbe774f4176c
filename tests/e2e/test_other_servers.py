"""The product behind PgBouncer, with a standby that is promoted, and with sentinels that promote a replica."""

import shutil
import threading
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.session import build_engine
from shared.db.tables import Job, JobEvent, Output
from shared.settings import DatabaseSettings
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.other_servers import PgBouncer, Sentinels, Standby, chosen_state, through
from tests.stack import RunningStack, running_stack, wait_until

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]

QUICK = {
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake", "cost_ms": 100}}',
    "AFTERIMAGE_JOBS__LEASE_S": "4",
    "AFTERIMAGE_JOBS__HEARTBEAT_S": "1",
    "AFTERIMAGE_JOBS__RECONCILE_S": "1",
    "AFTERIMAGE_JOBS__TRANSIENT_RETRY_DELAY_S": "1",
}
JOBS = 24
BULK = "".join(f'{{"prompt": "item {number}"}}\n' for number in range(20))


class Load:
    """Submits a job every 0.1 s, as long as the block runs. A refused submit is tried again with its key."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.submitted: list[str] = []
        self.refused = 0

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(60)

    def _run(self) -> None:
        number = 0
        while not self._end.wait(0.1):
            answer = self._api.http.post(
                "/rag/generate", json={"prompt": f"job {number}"}, headers={"Idempotency-Key": f"load-{number}"}
            )
            if answer.status_code == 202:
                self.submitted.append(answer.json()["id"])
                number += 1
            else:
                assert answer.status_code == 503, answer.text
                self.refused += 1

    def wait_for(self, more: int) -> None:
        goal = len(self.submitted) + more
        wait_until(lambda: len(self.submitted) >= goal, timeout_s=120, what=f"{more} more submits")


def test_jobs_searches_and_bulks_run_behind_pgbouncer_in_transaction_mode(tmp_path: Path) -> None:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    state = chosen_state(tmp_path / "var")
    bouncer = PgBouncer(tmp_path / "pgbouncer", state)
    options = through("AFTERIMAGE_DATABASE__URL", bouncer.url)
    with (
        bouncer.running() as first,
        ExitStack() as servers,
        running_stack(tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, options=options) as stack,
        Api(stack.url) as api,
    ):
        image = api.upload(disc("orange"))
        api.searchable(image["id"])
        found = api.http.post("/search", files={"image": disc("orange")}, data={"k": "1"}).json()
        assert found["results"][0]["image_id"] == image["id"]
        bulk = api.http.post("/bulks", content=BULK, headers={"Content-Type": "application/jsonl"}).json()
        with Load(api) as load:
            load.wait_for(JOBS // 2)
            first.send_signal(SIGKILL)
            first.wait()
            servers.enter_context(bouncer.running())
            load.wait_for(JOBS // 2)
        wait_until(
            lambda: api.http.get(f"/bulks/{bulk['id']}").json()["state"] == "completed",
            timeout_s=120,
            what="the bulk to end",
        )
        everything_ran_once(stack, api, load.submitted)


def test_nothing_is_lost_when_a_standby_is_promoted(tmp_path: Path) -> None:
    state = chosen_state(tmp_path / "var")
    standby = Standby(tmp_path / "standby", state)
    options = through("AFTERIMAGE_DATABASE__URL", standby.url)
    with (
        running_stack(tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, options=options, durable=True) as stack,
        Api(stack.url) as api,
        standby.running(),
    ):
        with Load(api) as load:
            load.wait_for(JOBS // 2)
            stack.control.freeze("postgres")
            stack.control.stop("postgres")
            standby.promote()
            load.wait_for(JOBS // 2)
        everything_ran_once(stack, api, load.submitted, port=standby.port)


def test_every_job_runs_once_when_sentinels_promote_a_replica_of_the_queue(tmp_path: Path) -> None:
    state = chosen_state(tmp_path / "var")
    sentinels = Sentinels(tmp_path / "sentinels", state)
    options = through("AFTERIMAGE_QUEUE__URL", sentinels.url)
    with (
        sentinels.running(),
        running_stack(tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, options=options) as stack,
        Api(stack.url) as api,
    ):
        sentinels.wait_until_ready()
        with Load(api) as load:
            load.wait_for(JOBS // 2)
            stack.control.stop("queue")
            wait_until(lambda: sentinels.primary_port() == sentinels.replica_port, timeout_s=60, what="the fail-over")
            load.wait_for(JOBS // 2)
        everything_ran_once(stack, api, load.submitted)
        assert api.http.get("/health").status_code == 200
        assert load.refused == 0, "jobs wait in Postgres while there is no broker"


def everything_ran_once(stack: RunningStack, api: Api, submitted: list[str], *, port: int | None = None) -> None:
    """Wait until the jobs have ended, and count their successes and outputs. port: of the Postgres to ask."""
    assert {api.ended(job_id, timeout_s=120)["state"] for job_id in list(submitted)} == {"succeeded"}
    url = stack.environment()["AFTERIMAGE_DATABASE__URL"]
    if port is not None:
        url = url.replace(f":{url.rpartition(':')[2].partition('/')[0]}/", f":{port}/")
    engine = build_engine(DatabaseSettings(url=SecretStr(url)))
    with Session(engine) as session:
        ended = select(func.count()).where(JobEvent.type == "succeeded", JobEvent.job_id.in_(submitted))
        assert session.scalar(ended) == len(submitted)
        assert session.scalar(select(func.count()).where(Output.job_id.in_(submitted))) == len(submitted)
        assert session.scalar(select(func.count()).select_from(Job).where(Job.state == "processing")) == 0
    engine.dispose()
