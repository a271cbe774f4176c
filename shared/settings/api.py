"""Settings of the API: its address, its limits, and who may call it."""

from typing import Annotated

from pydantic import Field, SecretStr

from shared.settings.section import Advanced, Section
from shared.settings.servers import RedisUrl


class APISettings(Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on")
    path_prefix: Advanced[str] = Field(
        "",
        pattern=r"^(/[A-Za-z0-9._~-]+)*$",
        description="path under which a proxy publishes the service, such as `/afterimage`; empty: the root",
    )
    workers: int = Field(1, ge=1, le=64, description="API processes")
    threads: int = Field(
        32, ge=1, le=512, description="requests that one process works on at a time; waiting requests do not count"
    )
    max_body_bytes: Advanced[int] = Field(32 * 2**20, ge=1024, description="size of one request body")
    body_timeout_s: Advanced[float] = Field(
        10, gt=0, le=600, description="time for a request body, added to its size divided by `body_bytes_per_s`"
    )
    body_bytes_per_s: Advanced[int] = Field(
        2048, ge=1, description="lowest speed of a request body; a slower one gets 408"
    )
    max_slow_bodies: Advanced[int] = Field(
        256,
        ge=1,
        le=10_000,
        description="slow request bodies that one process waits for at a time; further ones get 503",
    )
    max_upload_bytes: int = Field(16 * 2**20, ge=1024, description="size of one uploaded image")
    max_upload_pixels: Advanced[int] = Field(40_000_000, ge=4096, description="pixels of one uploaded image")
    max_upload_files: int = Field(32, ge=1, le=1000, description="files of one upload")
    decoder_processes: Advanced[int] = Field(
        2,
        ge=1,
        le=32,
        description="processes that decode the uploads of one API process; of several, one owner never occupies all",
    )
    decode_timeout_s: Advanced[float] = Field(20, gt=0, le=600, description="longest decoding of one image")
    database_timeout_s: Advanced[float] = Field(
        2.5, gt=0, le=60, description="longest silence of the database before a request gets 503"
    )
    max_wait_s: Advanced[float] = Field(30, ge=0, le=120, description="longest `Prefer: wait` or long-poll")
    max_stream_s: Advanced[float] = Field(600, ge=1, le=86_400, description="longest event stream")
    max_waiters: Advanced[int] = Field(
        80, ge=0, le=1000, description="long-polls and event streams that one process serves at a time"
    )
    max_waiters_per_owner: Advanced[int] = Field(
        60, ge=0, le=1000, description="long-polls and event streams of one owner at a time, per process"
    )
    max_downloads: Advanced[int] = Field(
        64, ge=1, le=1000, description="files over 1 MiB that one process sends at a time"
    )
    max_downloads_per_owner: Advanced[int] = Field(
        48, ge=1, le=1000, description="files over 1 MiB to one owner at a time, per process"
    )


class LimitSettings(Section):
    """Limits of one API key or one owner. Without API keys there are no rate limits."""

    enabled: bool = Field(True, description="count the requests of each key; quotas apply in any case")
    url: Advanced[RedisUrl | None] = Field(
        None, description="Redis that holds the request counts; unset: the Redis of the cache"
    )
    socket_timeout_s: Advanced[float] = Field(
        0.5, gt=0, le=5, description="longest wait for this Redis; after it the process counts in its memory"
    )
    reads_per_minute: int = Field(6000, ge=1, description="GET requests and searches of one key")
    writes_per_minute: int = Field(1200, ge=1, description="all other requests of one key")
    daily_images: int = Field(
        0,
        ge=0,
        description="images that one owner may request per day (UTC); an owner's own quota replaces it; 0: no quota",
    )
    collections: Advanced[int] = Field(1000, ge=1, le=100_000, description="collections that one owner may have")


class SecuritySettings(Section):
    default_owner: Advanced[str] = Field("local", description="owner of every request when API keys are off")
    require_api_keys: bool = Field(
        False, description="false is accepted only in the local and test environments, bound to loopback"
    )
    docs_enabled: bool = Field(True, description="serve Swagger UI")
    studio_enabled: bool = Field(True, description="serve Studio, the web pages, at `/`")
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.-]+(:\d+)?)$")]] = Field(
        default_factory=list,
        description="origins whose pages may call the API from a browser, such as `https://studio.example`",
    )
    trusted_hosts: list[str] = Field(
        default_factory=lambda: ["localhost", "127.0.0.1", "::1"],
        description="host names that the service answers to when API keys are off",
    )
    signing_keys: Advanced[list[Annotated[SecretStr, Field(min_length=24)]]] = Field(
        default_factory=list,
        max_length=8,
        description="secrets that sign plans of references, newest first; the first one signs and each is accepted; "
        "the same for all API processes; a local stack makes its own; empty: searches return no plan",
    )
