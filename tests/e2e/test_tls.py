"""The product with TLS to Postgres, to the queue and to the cache, with addresses as on a second machine.

PgBouncer ends the TLS for Postgres, as docs/scale.md advises. The programs of the local stack have no TLS themselves.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import event, text
from sqlalchemy.exc import OperationalError

from ops.local.layout import StackState
from ops.local.stack import LocalStack
from shared.db.session import build_engine
from shared.settings import DatabaseSettings
from tests.conftest import TEST_ENVIRONMENT
from tests.e2e.conftest import Api, disc
from tests.e2e.steady_load import QUICK, Load, everything_ran_once
from tests.other_servers import PgBouncer, chosen_state
from tests.stack import running_stack
from tests.tls_proxy import tls_in_front_of, write_certificate

pytestmark = [
    pytest.mark.extended,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed"),
]


def bouncer_with_tls(folder: Path, state: StackState) -> PgBouncer:
    folder.mkdir()
    return PgBouncer(folder / "pgbouncer", state, certificate=write_certificate(folder))


@contextmanager
def redis_with_tls(folder: Path, state: StackState) -> Iterator[dict[str, str]]:
    """The settings with the addresses of the queue and of the cache behind TLS."""
    settings = {}
    with ExitStack() as proxies:
        for name in ("queue", "cache"):
            (folder / name).mkdir(parents=True)
            port, certificate = proxies.enter_context(tls_in_front_of(state.port(name), folder / name))
            url = f"rediss://:{state.password(name)}@127.0.0.1:{port}/0?ssl_ca_certs={certificate}"
            settings[f"AFTERIMAGE_{name.upper()}__URL"] = url
        yield settings


def test_jobs_and_searches_run_with_tls_to_every_server(tmp_path: Path) -> None:
    state = chosen_state(tmp_path / "var")
    bouncer = bouncer_with_tls(tmp_path / "postgres", state)
    with (
        bouncer.running(),
        redis_with_tls(tmp_path / "redis", state) as redis_settings,
        running_stack(
            tmp_path / "var", environment=TEST_ENVIRONMENT | QUICK, settings=bouncer.settings | redis_settings
        ) as stack,
        Api(stack.url) as api,
    ):
        api.searchable(api.upload(disc("orchid"))["id"])
        found = api.http.post("/search", json={"query": "an orchid disc", "k": 1}).raise_for_status().json()
        assert len(found["results"]) == 1
        with Load(api) as load:
            load.wait_for(24)
        assert load.refused == 0
        everything_ran_once(stack, api, load.submitted)
        health = api.http.get("/health").raise_for_status().json()
        assert health["status"] == "ok", health


def test_a_connection_with_tls_is_used_again_and_wrong_certificates_are_refused(tmp_path: Path) -> None:
    state = chosen_state(tmp_path / "var")
    bouncer = bouncer_with_tls(tmp_path / "postgres", state)
    (tmp_path / "other").mkdir()
    other, _ = write_certificate(tmp_path / "other")
    url = bouncer.settings["AFTERIMAGE_DATABASE__URL"]
    of_another_issuer = f"{url.rpartition('=')[0]}={other}"
    stack = LocalStack(tmp_path / "var")
    stack.start(durable=False, servers_only=True, attached=True, on_message=lambda _: None)
    try:
        with bouncer.running():
            opened: list[object] = []
            engine = build_engine(DatabaseSettings(url=SecretStr(url)))
            event.listen(engine, "connect", lambda connection, _: opened.append(connection))
            for _ in range(3):
                with engine.connect() as connection:
                    assert connection.scalar(text("select 1")) == 1
            engine.dispose()
            assert len(opened) == 1
            for wrong, message in (
                (of_another_issuer, "certificate verify failed"),
                (url.replace("@127.0.0.1:", "@localhost:"), "does not match host name"),
            ):
                engine = build_engine(DatabaseSettings(url=SecretStr(wrong)))
                with pytest.raises(OperationalError, match=message):
                    engine.connect()
                engine.dispose()
    finally:
        stack.stop()
