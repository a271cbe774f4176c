"""The health probes: which components they check, and which details they show to which caller."""

import time
from collections.abc import Iterator

import pytest
from sqlalchemy.orm import Session

from api_service.services import health
from ops.local.stack import LocalStack
from shared.db import workers
from tests.integration.conftest import API, Client, a_key
from tests.stack import wait_until

READY = f"{API}/health/ready"
STRICT_READY = f"{READY}?strict=true"


@pytest.fixture(autouse=True)
def connections_of_this_test() -> Iterator[None]:
    yield
    health._connection.cache_clear()


def report_ready(session: Session, *, without: str | None = None) -> None:
    for kind, model in (("embed", None), ("io", None), ("generate", "cheap")):
        if kind != without:
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
    report_ready(session, without=absent)
    answer = client.get(STRICT_READY)
    assert (answer.status_code, answer.json["status"]) == (503, "down")
    assert answer.json["components"]["workers"]["detail"] == f"no worker is ready for {queue}"
    assert int(answer.headers["Retry-After"]) > 0
    report_ready(session)
    assert client.get(STRICT_READY).json["status"] == "ok"


def test_a_worker_that_is_loading_its_model_is_not_ready(client: Client, session: Session) -> None:
    report_ready(session, without="generate")
    workers.heartbeat(session, "slow", kind="generate", model="cheap", state="loading")
    session.commit()
    assert client.get(STRICT_READY).status_code == 503


def test_only_an_operator_sees_why_a_component_is_down(keyed_client: Client, session: Session) -> None:
    for headers in ({}, {"Authorization": "Bearer aft_wrong"}, a_key(session, "generate")):
        components = keyed_client.get(f"{API}/health", headers=headers).json["components"]
        assert components["workers"] == {"status": "degraded", "detail": None, "latency_ms": None}
    operator = a_key(session, "admin", owner="operators")
    components = keyed_client.get(f"{API}/health", headers=operator).json["components"]
    assert "embed" in components["workers"]["detail"]
    assert components["database"]["latency_ms"] > 0


def test_no_probe_and_no_document_waits_for_a_frozen_database_because_of_a_key(
    keyed_client: Client, session: Session, servers: LocalStack
) -> None:
    cookie = {"Cookie": "afterimage_key=aft_wrong"}
    for headers in ({}, a_key(session, "admin"), {"Authorization": "Bearer aft_wrong"}, cookie):
        # A session that starts while the server is being frozen would go on.
        wait_until(lambda: keyed_client.get(READY).status_code == 200, timeout_s=20, what="the database to answer")
        servers.control.freeze("postgres")
        try:
            for path in ("/health/live", f"{API}/health/live", "/metrics", f"{API}/openapi.json", "/docs/swagger/",
                         "/static/studio.css"):  # fmt: skip
                started = time.monotonic()
                keyed_client.get(path, headers=headers).close()
                assert time.monotonic() - started < 1, path
            for path in (READY, STRICT_READY, f"{API}/health"):
                started = time.monotonic()
                answer = keyed_client.get(path, headers=headers)
                assert time.monotonic() - started < health.CHECK_TIMEOUT_S + 0.4, path
                assert answer.json["components"]["database"]["status"] == "down", (path, headers, answer.json)
        finally:
            servers.control.thaw("postgres")
