"""The short storm behind PgBouncer, and with a replica that takes the place of the queue or of Postgres."""

import secrets
import shutil
from pathlib import Path

import pytest

from tests.chaos.servers import SERVERS
from tests.chaos.storm import short, storm

pytestmark = [pytest.mark.extended, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("servers", sorted(SERVERS.keys() - {"local"}))
def test_nothing_is_lost_doubled_or_stuck(servers: str, tmp_path: Path) -> None:
    if servers == "pgbouncer" and shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    plan = short(secrets.randbelow(10**6), servers=servers)
    with storm(plan, tmp_path / "run") as (_, outcome):
        assert outcome.broken == [], f"repeat it with seed {plan.seed}"
        assert outcome.failures == [], f"repeat it with seed {plan.seed}"
        assert set(outcome.recovery_s) == set(plan.sequence())
