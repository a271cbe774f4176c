"""The address of a Redis with replicas: its sentinels know which server is the primary."""

from dataclasses import dataclass
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit

SCHEMES = ("redis+sentinel", "rediss+sentinel")
DEFAULT_PORT = 26379


@dataclass(frozen=True)
class SentinelAddress:
    """The parts of `redis+sentinel://user:password@host:port,host:port/service/db?sentinel_password=...`."""

    hosts: tuple[tuple[str, int], ...]
    """Host and port of each sentinel."""
    service: str
    """The name under which the sentinels know the primary and its replicas."""
    database: int
    username: str | None
    password: str | None
    sentinel_password: str | None
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Self | None:
        """The parts of the URL; None for a URL of another kind.

        Raises:
            ValueError: a host or the service is missing, or a port or the database is not a number.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            return None
        login, _, hosts = parts.netloc.rpartition("@")
        username, _, password = login.partition(":")
        service, _, database = parts.path.strip("/").partition("/")
        if not service or not all(host.partition(":")[0] for host in hosts.split(",")):
            raise ValueError("a host or the service is missing")
        return cls(
            hosts=tuple(
                (name, int(port) if port else DEFAULT_PORT)
                for name, _, port in (host.partition(":") for host in hosts.split(","))
            ),
            service=service,
            database=int(database or 0),
            username=unquote(username) or None,
            password=unquote(password) or None,
            sentinel_password=parse_qs(parts.query).get("sentinel_password", [None])[0],
            tls=parts.scheme == "rediss+sentinel",
        )
