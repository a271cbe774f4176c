"""The probes: what they wait for, and whom they tell what."""

from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from api_service.services import health
from shared.db import workers
from tests.integration.conftest import API, Client, a_key

READY = f"{API}/health/ready"
STRICTLY = f"{READY}?strict=true"


@pytest.fixture(autouse=True)
def connections_of_this_test() -> Iterator[None]:
    yield
    health._connection.cache_clear()


def ready(session: Session, *, besides: str | None = None) -> None:
    for kind, model in (("embed", None), ("io", None), ("generate", "cheap")):
        if kind != besides:
            workers.heartbeat(session, kind, kind=kind, model=model, state="ready")
    session.commit()


def test_readiness_needs_what_accepting_a_job_needs(client: Client) -> None:
    answer = client.get(READY)
    assert (answer.status_code, answer.json["status"]) == (200, "degraded")
    assert answer.json["components"]["database"]["status"] == "ok"
    assert answer.json["components"]["workers"]["status"] == "degraded"


@pytest.mark.parametrize(("absent", "queue"), [("embed", "embed"), ("io", "io"), ("generate", "generate.cheap")])
def test_strict_readiness_needs_a_worker_for_every_queue(
    client: Client, session: Session, absent: str, queue: str
) -> None:
    ready(session, besides=absent)
    answer = client.get(STRICTLY)
    assert (answer.status_code, answer.json["status"]) == (503, "down")
    assert answer.json["components"]["workers"]["detail"] == f"no worker is ready for {queue}"
    assert int(answer.headers["Retry-After"]) > 0
    ready(session)
    assert client.get(STRICTLY).json["status"] == "ok"


def test_a_worker_that_loads_its_model_is_not_ready(client: Client, session: Session) -> None:
    ready(session, besides="generate")
    workers.heartbeat(session, "slow", kind="generate", model="cheap", state="loading")
    session.commit()
    assert client.get(STRICTLY).status_code == 503


def test_only_an_operator_is_told_why_a_part_is_away(guarded: Client, session: Session) -> None:
    for asker in ({}, {"Authorization": "Bearer aft_wrong"}, a_key(session, "generate")):
        told = guarded.get(f"{API}/health", headers=asker).json["components"]
        assert told["workers"] == {"status": "degraded", "detail": None, "latency_ms": None}
    told = guarded.get(f"{API}/health", headers=a_key(session, "admin", owner="operators")).json["components"]
    assert "embed" in told["workers"]["detail"]
    assert told["database"]["latency_ms"] > 0
