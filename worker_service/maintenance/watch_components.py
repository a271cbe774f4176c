"""Whether the servers of the product do their work: gauges for alerts.

The reconciler updates them once per tick. Exporters of these servers would show more, and would be more containers.
"""

import shutil
from collections.abc import Callable

import redis
from sqlalchemy import text

from shared.db.session import session_scope
from shared.errors import DatabaseError, StorageError
from shared.messaging import queue
from shared.messaging.redis import connect
from shared.metrics import COMPONENT_UP, STORAGE_FREE_BYTES, STORAGE_SIZE_BYTES, set_gauge
from shared.settings import Settings
from shared.storage import get_blobs, local_folder


class ComponentWatch:
    def __init__(self, settings: Settings) -> None:
        cache = settings.cache
        self._cache = connect(cache.url.get_secret_value(), timeout_s=cache.socket_timeout_s)
        self._storage_url = settings.storage.url
        self._checks: dict[str, Callable[[], object]] = {
            "database": _query_database,
            "broker": lambda: queue.broker().ping(),
            "cache": self._cache.ping,
            "storage": self._check_storage,
        }

    def update(self) -> None:
        """Set every gauge. Each check waits no longer than its server's time limit in the settings."""
        for name, check in self._checks.items():
            try:
                check()
                up = True
            except (DatabaseError, StorageError, redis.RedisError):
                up = False
            set_gauge(COMPONENT_UP, up, {"component": name})

    def _check_storage(self) -> None:
        get_blobs().check()
        if self._storage_url.startswith("file://"):
            usage = shutil.disk_usage(local_folder(self._storage_url))
            set_gauge(STORAGE_FREE_BYTES, usage.free)
            set_gauge(STORAGE_SIZE_BYTES, usage.total)


def _query_database() -> None:
    with session_scope() as session:
        session.execute(text("select 1"))
