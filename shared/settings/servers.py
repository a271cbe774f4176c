"""Settings of the servers behind the product: Postgres, Redis, and the storage of files."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from shared.messaging.sentinels import SentinelAddress
from shared.settings.section import ADVANCED, Advanced, FormerName, Section

# A parser's own message may repeat a password.
UNREADABLE_URL = "cannot be read as a URL: is the port a number, and is every / and @ of a password percent-encoded?"


def _psycopg2_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith("postgresql+psycopg2://"):
        raise ValueError("must start with postgresql+psycopg2://")
    try:
        make_url(url.get_secret_value())
    except (ValueError, ArgumentError):
        raise ValueError(UNREADABLE_URL) from None
    return url


def _redis_url(url: SecretStr) -> SecretStr:
    if not url.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must start with redis://, rediss:// or unix://")
    try:
        urlsplit(url.get_secret_value()).port  # noqa: B018 - reading the port parses it
    except ValueError:
        raise ValueError(UNREADABLE_URL) from None
    return url


def _queue_url(url: SecretStr) -> SecretStr:
    try:
        address = SentinelAddress.parse(url.get_secret_value())
    except ValueError:
        raise ValueError("must look like redis+sentinel://host:port,host:port/service") from None
    return _redis_url(url) if address is None else url


def http_url(url: str) -> str:
    """Check the URL of another service. Its key has a setting of its own, because logs may name the URL.

    Raises:
        ValueError: it is not an http or https URL with a host, or it holds a user or a password.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading the port parses it
    except ValueError:
        raise ValueError(UNREADABLE_URL) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password; a key belongs into api_key")
    return url


DatabaseUrl = Annotated[SecretStr, AfterValidator(_psycopg2_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]
QueueUrl = Annotated[SecretStr, AfterValidator(_queue_url)]


class DatabaseSettings(Section):
    url: DatabaseUrl = Field(
        SecretStr("postgresql+psycopg2://postgres@127.0.0.1:5432/afterimage"), description="Postgres with pgvector"
    )
    pool_size: int = Field(8, ge=1, le=100, description="connections kept open per process")
    max_overflow: int = Field(8, ge=0, le=100, description="connections above `pool_size`, closed when idle")
    pool_timeout_s: Advanced[float] = Field(2, gt=0, le=60, description="longest wait for a free connection")
    pool_recycle_s: Advanced[int] = Field(1800, ge=1, description="age at which a connection is replaced before use")
    connect_timeout_s: Advanced[int] = Field(2, ge=1, le=60, description="longest wait for a new connection")
    statement_timeout_s: Advanced[float] = Field(10, gt=0, le=3600, description="longest run of one statement")


class QueueSettings(Section):
    url: QueueUrl = Field(
        SecretStr("redis://127.0.0.1:6379/0"),
        description="Redis that serves as the Celery broker; with replicas: "
        "`redis+sentinel://:password@host:26379,host:26379/service`",
    )
    socket_timeout_s: Advanced[float] = Field(0.5, gt=0, le=5, description="longest wait of a publisher for the broker")
    visibility_timeout_s: Advanced[int] = Field(
        60,
        ge=5,
        description="an unacknowledged message is delivered again after this; a job's lease and attempt number make a "
        "second delivery harmless",
    )
    published_jobs_per_lane: Annotated[int, ADVANCED, FormerName("queue", "window")] = Field(
        16,
        ge=1,
        le=10_000,
        description="unclaimed jobs of a model that the broker holds for a lane and the higher-priority lanes "
        "together; the other jobs wait in Postgres",
    )
    starvation_timeout_s: Annotated[float, ADVANCED, FormerName("queue", "starving_s")] = Field(
        60,
        gt=0,
        description="if a job has waited this long and its lane has nothing in flight, it is published first; "
        "an image that has waited this long in a worker is drawn next, at most once in this time; "
        "a batch that was delayed this long in total is not interrupted again",
    )
    max_queued: int = Field(200_000, ge=1, description="queued jobs of all owners; further submits get 503")
    max_queued_per_owner: int = Field(20_000, ge=1, description="queued jobs of one owner; further submits get 429")


class StorageSettings(Section):
    url: str = Field("file://var/blobs", description="file://folder, s3://bucket/prefix, gs://... or az://...")
    options: dict[str, SecretStr] = Field(
        default_factory=dict, description="object store options such as access_key_id, endpoint, region"
    )
    timeout_s: Advanced[float] = Field(30, gt=0, le=600, description="longest single request to the store")


class CacheSettings(Section):
    url: RedisUrl = Field(
        SecretStr("redis://127.0.0.1:6379/1"), description="Redis for the cache; its data may be lost at any time"
    )
    socket_timeout_s: Advanced[float] = Field(
        0.5, gt=0, le=5, description="longest wait for Redis; after it the process uses its memory as cache"
    )
    memory_max_items: Advanced[int] = Field(2048, ge=1, description="entries held in memory while Redis is away")
    default_ttl_s: Advanced[int] = Field(3600, ge=1, description="lifetime of an entry that is stored without one")
    embedding_ttl_s: Advanced[int] = Field(86_400, ge=1, description="lifetime of the cached vector of a text")
