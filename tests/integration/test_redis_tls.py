"""Redis behind TLS, with addresses like those of docker-compose.worker.yml: clients check the server's certificate."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from shared.cache import get_cache_manager
from shared.messaging import queue
from shared.messaging.redis import connect
from tests.conftest import process_settings
from tests.tls_proxy import tls_in_front_of


@pytest.fixture
def tls(redis_url: str, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of the queue behind TLS, without options, and the certificate."""
    parts = urlsplit(redis_url)
    assert parts.port is not None
    with tls_in_front_of(parts.port, tmp_path) as (port, certificate):
        yield f"rediss://:{parts.password}@127.0.0.1:{port}/0", certificate


def test_messages_and_cached_values_pass_through_tls(
    tls: tuple[str, Path], postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, certificate = tls
    address = f"{url}?ssl_ca_certs={certificate}"
    with process_settings(monkeypatch, postgres_url, address, address, tmp_path / "blobs"):
        with queue.celery_app().connection_for_write() as connection:
            messages = connection.SimpleQueue("tls")
            messages.put({"hello": 1})
            assert messages.get(timeout=5).payload == {"hello": 1}
            messages.close()
        assert queue.broker().ping()
        get_cache_manager().set("tls", 1, ttl=60)
        assert queue.broker().keys("*tls*"), "it is in Redis, not in the memory of this process"


def test_a_server_with_an_unknown_certificate_is_refused(tls: tuple[str, Path]) -> None:
    with pytest.raises(redis.ConnectionError, match="certificate"):
        connect(tls[0], timeout_s=5).ping()
