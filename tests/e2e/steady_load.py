"""Jobs at a steady rate, and the check that each of them ran once."""

import threading

from pydantic import SecretStr
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.db.session import build_engine
from shared.db.tables import Job, JobEvent, Output
from shared.settings import DatabaseSettings
from tests.e2e.conftest import Api
from tests.stack import RunningStack, wait_until

QUICK = {
    "AFTERIMAGE_MODEL__GENERATORS": '{"cheap": {"kind": "fake", "cost_ms": 100}}',
    "AFTERIMAGE_JOBS__LEASE_S": "4",
    "AFTERIMAGE_JOBS__HEARTBEAT_S": "1",
    "AFTERIMAGE_JOBS__RECONCILE_S": "1",
    "AFTERIMAGE_JOBS__TRANSIENT_RETRY_DELAY_S": "1",
}
"""Settings with short jobs and short leases."""


class Load:
    """Submits a job every `every_s`, as long as the block runs. A refused submit is tried again with its key."""

    def __init__(self, api: Api, *, every_s: float = 0.1) -> None:
        self._api = api
        self._every_s = every_s
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
        while not self._end.wait(self._every_s):
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


def everything_ran_once(stack: RunningStack, api: Api, submitted: list[str]) -> None:
    """Wait until the jobs have ended, and count their successes and outputs."""
    assert {api.ended(job_id, timeout_s=120)["state"] for job_id in list(submitted)} == {"succeeded"}
    engine = build_engine(DatabaseSettings(url=SecretStr(stack.environment()["AFTERIMAGE_DATABASE__URL"])))
    with Session(engine) as session:
        ended = select(func.count()).where(JobEvent.type == "succeeded", JobEvent.job_id.in_(submitted))
        assert session.scalar(ended) == len(submitted)
        assert session.scalar(select(func.count()).where(Output.job_id.in_(submitted))) == len(submitted)
        assert session.scalar(select(func.count()).select_from(Job).where(Job.state == "processing")) == 0
    engine.dispose()
