"""The product behind PgBouncer, with a standby that is promoted, and with sentinels that promote a replica."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.e2e.steady_load import QUICK, Load, everything_ran_once
from tests.other_servers import PgBouncer, Sentinels, Standby, chosen_state
from tests.stack import running_stack, wait_until

pytestmark = [pytest.mark.extended, pytest.mark.timeout(600)]

JOBS = 24
BULK = "".join(f'{{"prompt": "item {number}"}}\n' for number in range(20))


def test_jobs_searches_and_bulks_run_behind_pgbouncer_in_transaction_mode(tmp_path: Path) -> None:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    state = chosen_state(tmp_path / "var")
    bouncer = PgBouncer(tmp_path / "pgbouncer", state)
    with (
        bouncer.running() as first,
        ExitStack() as servers,
        running_stack(tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, settings=bouncer.settings) as stack,
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
    with (
        running_stack(
            tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, settings=standby.settings, durable=True
        ) as stack,
        Api(stack.url) as api,
        standby.running(),
    ):
        with Load(api) as load:
            load.wait_for(JOBS // 2)
            standby.fail_over(stack)
            load.wait_for(JOBS // 2)
        everything_ran_once(stack, api, load.submitted)


def test_every_job_runs_once_when_sentinels_promote_a_replica_of_the_queue(tmp_path: Path) -> None:
    state = chosen_state(tmp_path / "var")
    sentinels = Sentinels(tmp_path / "sentinels", state)
    with (
        sentinels.running(),
        running_stack(tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, settings=sentinels.settings) as stack,
        Api(stack.url) as api,
    ):
        with Load(api) as load:
            load.wait_for(JOBS // 2)
            sentinels.fail_over(stack)
            load.wait_for(JOBS // 2)
        everything_ran_once(stack, api, load.submitted)
        assert api.http.get("/health").status_code == 200
        assert load.refused == 0, "jobs wait in Postgres while there is no broker"
