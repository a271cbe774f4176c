"""Every setting of the product, typed, bounded and documented in one place.

Values come, strongest first, from keyword arguments, the environment (`AFTERIMAGE_DATABASE__URL=...`),
`.env.<environment>`, `.env`, the TOML file named by `AFTERIMAGE_CONFIG_FILE` (default `afterimage.toml`), and the
defaults here, which run offline on a laptop.
"""

import os
import tomllib
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from shared.errors import ConfigurationError

NOT_SECTIONS = ("environment", "config_file", "url", "stack", "api_key")
"""What else may stand behind `AFTERIMAGE_`: `url` and `stack` are what a local stack tells the processes around it,
`url` and `api_key` are what a client reads."""

SAFETY_CHECKER = "safety_checker"
"""What decisions of the checker that a model brings are called."""

STARTER = Path(__file__).resolve().parent.parent / "starter"


class Environment(StrEnum):
    LOCAL = "local"
    TEST = "test"
    STAGING = "staging"
    PRODUCTION = "production"


class Section(BaseModel):
    """A group of settings; an unknown name in it is a mistake, not a comment."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# The parsers' own words may repeat a password.
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
        urlsplit(url.get_secret_value()).port  # noqa: B018 - parsed when asked for
    except ValueError:
        raise ValueError(UNREADABLE_URL) from None
    return url


DatabaseUrl = Annotated[SecretStr, AfterValidator(_psycopg2_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


class DatabaseSettings(Section):
    url: DatabaseUrl = Field(
        SecretStr("postgresql+psycopg2://postgres@127.0.0.1:5432/afterimage"), description="Postgres with pgvector"
    )
    pool_size: int = Field(8, ge=1, le=100, description="connections kept per process")
    max_overflow: int = Field(8, ge=0, le=100, description="connections above `pool_size`, closed when idle")
    pool_timeout_s: float = Field(2, gt=0, le=60, description="longest wait for a free connection")
    pool_recycle_s: int = Field(1800, ge=1, description="a connection older than this is replaced at checkout")
    connect_timeout_s: int = Field(2, ge=1, le=60, description="longest wait for a new connection")
    statement_timeout_s: float = Field(10, gt=0, le=3600, description="longest single statement")


class QueueSettings(Section):
    url: RedisUrl = Field(SecretStr("redis://127.0.0.1:6379/0"), description="the Celery broker")
    socket_timeout_s: float = Field(0.5, gt=0, le=5, description="longest wait of a publisher for the broker")
    visibility_timeout_s: int = Field(
        60, ge=5, description="an unacknowledged message is delivered again after this; fencing makes that harmless"
    )
    window: int = Field(16, ge=1, le=10_000, description="jobs published per queue and lane; the rest wait in SQL")
    starving_s: float = Field(
        60,
        gt=0,
        description="a lane with nothing in flight for this long gets one job ahead of all others; in a worker's line, "
        "so does one image; after it was held up for so long, nothing more passes a batch",
    )
    max_queued: int = Field(200_000, ge=1, description="queued jobs in all; beyond it a submit gets 503")
    max_queued_per_owner: int = Field(20_000, ge=1, description="queued jobs of one owner; beyond it a submit gets 429")


class JobSettings(Section):
    lease_s: float = Field(30, ge=2, le=600, description="a worker silent for this long loses its job")
    heartbeat_s: float = Field(10, gt=0, le=200, description="how often a worker renews its leases")
    reconcile_s: float = Field(5, gt=0, le=60, description="how often the reconciler compares jobs and broker")
    max_crashes: int = Field(3, ge=1, le=10, description="crashes during model work before a job is `dead`")
    max_transient_retries: int = Field(3, ge=0, le=20, description="returns to the queue after a passing fault")
    transient_retry_delay_s: float = Field(5, gt=0, le=3600, description="first wait; it doubles each time")
    timeout_s: float = Field(
        600,
        gt=0,
        le=86_400,
        description="longest run of one attempt, unless the job says less; what passes it does not count",
    )
    shutdown_grace_s: float = Field(20, ge=0, le=600, description="time to finish or hand back on SIGTERM")

    @model_validator(mode="after")
    def _a_lease_outlives_two_heartbeats(self) -> Self:
        if self.heartbeat_s * 2 > self.lease_s:
            raise ValueError("heartbeat_s must be at most half of lease_s")
        return self


class StorageSettings(Section):
    url: str = Field("file://var/blobs", description="file://folder, s3://bucket/prefix, gs://... or az://...")
    options: dict[str, SecretStr] = Field(
        default_factory=dict, description="object store options such as access_key_id, endpoint, region"
    )
    timeout_s: float = Field(30, gt=0, le=600, description="longest single request to the store")


class CacheSettings(Section):
    url: RedisUrl = Field(SecretStr("redis://127.0.0.1:6379/1"), description="may lose its data at any time")
    socket_timeout_s: float = Field(0.5, gt=0, le=5, description="longest wait for the cache before memory serves")
    memory_max_items: int = Field(2048, ge=1, description="size of the in-process fall-back")
    default_ttl_s: int = Field(3600, ge=1, description="how long an answer is kept where its place says nothing")
    embedding_ttl_s: int = Field(86_400, ge=1, description="how long the vector of a text is remembered")


class ClipSettings(Section):
    model: str = Field(
        f"local-dir:{STARTER / 'models' / 'clip'}",
        description="what open_clip loads: `local-dir:<folder>`, `hf-hub:<id>`, or a name such as ViT-B-32",
    )
    pretrained: str | None = Field(None, description="open_clip weights tag or file, for a plain model name")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is one",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the weights and the work")
    max_batch_size: int = Field(32, ge=1, le=1024, description="texts or images per call of the model")


class IPAdapterSettings(Section):
    source: str = Field(description="folder or hub id")
    revision: str | None = Field(None, description="commit of the hub repository")
    subfolder: str = Field("ip_adapter", description="folder inside the source that holds the weights")
    weight_name: str = Field("ip_adapter.safetensors", description="file of the weights")
    image_encoder_folder: str | None = Field(
        None, description="the adapter's own image encoder; none when the retrieval CLIP is that encoder"
    )
    conditions_on: Literal["embedding_space", "image"] = Field(
        "image",
        description="`embedding_space`: the retrieval CLIP is the adapter's encoder, so stored vectors condition "
        "directly; `image`: the stored images are encoded again by the adapter's encoder",
    )


class LoraSettings(Section):
    source: str = Field(description="folder or hub id")
    revision: str | None = Field(None, description="commit of the hub repository")
    weight_name: str | None = Field(None, description="file of the weights; none: the only one there is")


class GeneratorDefaults(Section):
    """What a request that says nothing gets."""

    width: int = Field(512, ge=16, le=4096, description="pixels")
    height: int = Field(512, ge=16, le=4096, description="pixels")
    num_inference_steps: int = Field(30, ge=1, le=200, description="denoising steps")
    guidance_scale: float = Field(7.5, ge=0, le=30, description="classifier-free guidance; at most 1 is none")
    scheduler: str | None = Field(None, description="a name of the scheduler allowlist; none keeps the model's own")
    ip_adapter_scale: float = Field(0.5, ge=0, le=2, description="weight of the references against the prompt")
    strength: float = Field(0.6, gt=0, le=1, description="img2img: how much of the reference is drawn anew")


class GeneratorSettings(Section):
    kind: Literal["diffusers", "cheap"] = Field(
        "diffusers", description="`cheap` draws tiny images in milliseconds; only the test environment accepts it"
    )
    source: str = Field("", description="folder or hub id of a diffusers pipeline")
    revision: str | None = Field(None, description="commit of the hub repository; required for a hub id")
    variant: str | None = Field(None, description="which files of the pipeline, such as fp16")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: bf16 on CUDA")
    ip_adapter: IPAdapterSettings | None = Field(None, description="conditions the model on images; none: it cannot")
    loras: dict[str, LoraSettings] = Field(default_factory=dict, description="by the name that requests use")
    defaults: GeneratorDefaults = GeneratorDefaults()
    any_size: bool = Field(True, description="the model draws sizes near its native one well, not only that one")
    max_batch_size: int = Field(4, ge=1, le=64, description="images per call of the model")
    max_references: int = Field(4, ge=1, le=16, description="references per image; fewer are padded to this number")
    safety_checker: Literal["off", "flag", "blur", "block"] = Field(
        "block",
        description="what becomes of an image that the model's own safety checker, if it brings one, objects to",
    )
    cost_ms: float = Field(5, ge=0, le=10_000, description="cheap generator only: time of one batch")

    @model_validator(mode="after")
    def _a_pipeline_is_named_and_pinned(self) -> Self:
        if self.kind == "cheap":
            return self
        if not self.source:
            raise ValueError("source is required")
        if not _is_folder(self.source) and self.revision is None:
            raise ValueError(f"{self.source!r} is not a folder, so it is a hub id, and a hub id needs a revision")
        return self


def _is_folder(source: str) -> bool:
    return Path(source).is_dir() or source.startswith((".", "/"))


def _starter_generator() -> dict[str, GeneratorSettings]:
    folder = str(STARTER / "models" / "generator")
    return {
        "starter": GeneratorSettings(
            source=folder,
            ip_adapter=IPAdapterSettings(source=folder, conditions_on="embedding_space"),
            defaults=GeneratorDefaults(
                width=64, height=64, num_inference_steps=16, guidance_scale=2.5, ip_adapter_scale=1.0
            ),
            any_size=False,
            max_batch_size=8,
        )
    }


class ModelSettings(Section):
    clip: ClipSettings = ClipSettings()
    generators: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], GeneratorSettings] = Field(
        default_factory=_starter_generator, min_length=1, description="the models that draw, by the name requests use"
    )
    default_generator: str = Field("starter", description="what a request that names no model gets")
    threads: int = Field(0, ge=0, le=256, description="CPU threads of a model process; 0 leaves it to torch")
    offline: bool = Field(True, description="never ask a model hub; set to false to let it download")

    @model_validator(mode="after")
    def _the_default_exists(self) -> Self:
        if self.default_generator not in self.generators:
            raise ValueError(
                f"default_generator {self.default_generator!r} is not one of generators: {sorted(self.generators)}"
            )
        return self


class RetrievalSettings(Section):
    default_k: int = Field(4, ge=1, le=16, description="references looked for when the request does not say")
    min_similarity: float = Field(
        0.42,
        ge=-1,
        le=1,
        description="cosine below which a reference is not used; fits the starter CLIP, other "
        "CLIPs need their own: about 0.22 for those of OpenAI and LAION",
    )
    duplicate_similarity: float = Field(0.95, ge=0, le=1, description="cosine above which two results are one")
    weight_temperature: float = Field(0.1, gt=0, le=10, description="softmax temperature from similarity to weight")
    ef_search: int = Field(100, ge=10, le=1000, description="candidates the index looks at; more finds better, slower")
    exact_below: int = Field(10_000, ge=0, description="scan exactly when the filter leaves fewer rows than this")
    text_timeout_s: float = Field(5, gt=0, le=60, description="longest wait of a search for its query's vector")


class APISettings(Section):
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on")
    workers: int = Field(1, ge=1, le=64, description="API processes")
    threads: int = Field(
        32, ge=1, le=512, description="requests one process works on at a time, those that only wait not counted"
    )
    max_body_bytes: int = Field(32 * 2**20, ge=1024, description="one whole request")
    body_timeout_s: float = Field(10, gt=0, le=600, description="head start of a body over `body_bytes_per_s`")
    body_bytes_per_s: int = Field(2048, ge=1, description="a request whose body comes more slowly gets 408")
    max_slow_bodies: int = Field(
        256, ge=1, le=10_000, description="requests whose bodies one process waits for at a time; others get 503"
    )
    max_upload_bytes: int = Field(16 * 2**20, ge=1024, description="one image of an upload")
    max_upload_pixels: int = Field(40_000_000, ge=4096, description="one image of an upload, decoded")
    max_upload_files: int = Field(32, ge=1, le=1000, description="files of one upload")
    decoder_processes: int = Field(1, ge=1, le=32, description="processes that decode uploads")
    decode_timeout_s: float = Field(20, gt=0, le=600, description="longest decoding of one image")
    database_timeout_s: float = Field(
        2.5, gt=0, le=60, description="longest wait for the database to say anything before a request gets 503"
    )
    max_wait_s: float = Field(30, ge=0, le=120, description="longest `Prefer: wait` or long-poll")
    max_stream_s: float = Field(600, ge=1, le=86_400, description="longest life of one event stream")
    max_waiters: int = Field(80, ge=0, le=1000, description="long-polls and streams one process holds at a time")
    max_waiters_per_owner: int = Field(60, ge=0, le=1000, description="of them, those of one owner")
    max_downloads: int = Field(64, ge=1, le=1000, description="files over 1 MiB that one process sends at a time")
    max_downloads_per_owner: int = Field(48, ge=1, le=1000, description="of them, those to one owner")


class LimitSettings(Section):
    """What one API key, or one owner, may ask for. Where keys are off there are no rate limits."""

    enabled: bool = Field(True, description="count the requests of each key; quotas hold either way")
    url: RedisUrl | None = Field(None, description="where requests are counted; none: on the cache's server")
    socket_timeout_s: float = Field(0.5, gt=0, le=5, description="longest wait for it before memory counts")
    reads_per_minute: int = Field(6000, ge=1, description="GET requests and searches of one key")
    writes_per_minute: int = Field(1200, ge=1, description="all other requests of one key")
    daily_images: int = Field(
        0, ge=0, description="images one owner may ask for per day (UTC), unless its own number says else; 0: no quota"
    )


class BulkSettings(Section):
    max_items: int = Field(100_000, ge=1, le=1_000_000, description="items of one bulk, invalid lines included")
    max_body_bytes: int = Field(512 * 2**20, ge=1024, description="one request that sends lines of a bulk")
    max_line_bytes: int = Field(64 * 1024, ge=1024, le=2**20, description="one line of a bulk")
    chunk_lines: int = Field(500, ge=1, le=10_000, description="lines stored at a time while a bulk is received")
    max_transfers: int = Field(
        8, ge=1, le=512, description="requests that send lines or download results, per API process at a time"
    )
    receive_timeout_s: float = Field(60, gt=0, le=3600, description="longest wait for a sender's next bytes")
    max_open: int = Field(100, ge=1, description="unfinished bulks of one owner")
    max_open_items: int = Field(500_000, ge=1, description="items of all unfinished bulks of one owner")
    abandoned_after_s: float = Field(86_400, gt=0, description="a bulk whose lines stop coming is given up after this")


class WebhookSettings(Section):
    timeout_s: float = Field(15, gt=0, le=60, description="longest wait for a receiver")
    allow_http: bool = Field(False, description="accept targets without TLS")
    allow_private: bool = Field(False, description="accept targets on private, loopback and link-local addresses")
    per_host: int = Field(2, ge=1, le=100, description="deliveries to one host at a time: a dead one slows nobody")
    secret_overlap_s: float = Field(86_400, ge=0, description="how long a rotated secret signs beside the new one")


class WorkerSettings(Section):
    concurrency: int = Field(16, ge=1, le=512, description="jobs one worker process walks through at a time")
    spare_seats: int = Field(
        4, ge=0, le=512, description="a generate worker takes so many more of a lane than of the next worse one"
    )
    bulk_pause_s: float = Field(
        0.05,
        ge=0,
        le=60,
        description="while better lanes are in use, a generate worker takes a bulk's jobs so far apart",
    )
    generator: str | None = Field(None, description="which generator this process serves; none: the default one")


class WatchdogSettings(Section):
    """After how long without progress a model call ends its process; leases then bring the jobs back."""

    load_s: float = Field(3600, gt=0, le=86_400, description="loading one model, downloads included")
    warm_up_s: float = Field(900, gt=0, le=86_400, description="the first call of a loaded model")
    embed_s: float = Field(300, gt=0, le=86_400, description="one batch of the embedding model")
    step_s: float = Field(300, gt=0, le=86_400, description="one denoising step of a batch; the first includes prompts")
    decode_s: float = Field(300, gt=0, le=86_400, description="from a batch's last step to its pictures")


class RetentionSettings(Section):
    """What is kept for how long. Days count from the end of a job; 0 keeps for ever."""

    jobs_days: float = Field(0, ge=0, le=36_500, description="ended jobs, with their outputs and events; 0: they stay")
    outputs_days: float = Field(0, ge=0, le=36_500, description="outputs alone, from their making; 0: they stay")
    events_days: float = Field(30, ge=0, le=36_500, description="the events of ended jobs; 0: they stay")
    deliveries_days: float = Field(30, ge=0, le=36_500, description="the log of webhook deliveries; 0: it stays")
    every_s: float = Field(3600, gt=0, le=604_800, description="how often the reconciler removes what is older")
    sweep_every_s: float = Field(
        21_600, ge=0, le=2_592_000, description="how often it removes blobs that nothing names; 0: only by hand"
    )
    blob_grace_s: float = Field(
        86_400, ge=0, description="younger blobs are left alone; never less than the longest job and two leases"
    )


class LoggingSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="the least that is logged")
    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console locally, JSON elsewhere")


class MetricsSettings(Section):
    host: str = Field("127.0.0.1", description="where a worker and the reconciler show their metrics")
    port: int = Field(0, ge=0, le=65_535, description="0: nowhere; the API shows its own at `/metrics`")


class SecuritySettings(Section):
    default_owner: str = Field("local", description="who acts when keys are off")
    require_api_keys: bool = Field(False, description="may be off only locally, bound to loopback")
    docs_enabled: bool = Field(True, description="serve Swagger UI")
    studio_enabled: bool = Field(True, description="serve Studio, the pages for people, at `/`")
    cors_origins: list[Annotated[str, Field(pattern=r"^(\*|https?://[A-Za-z0-9.-]+(:\d+)?)$")]] = Field(
        default_factory=list, description="whose pages may call the API from a browser: `https://studio.example`"
    )
    trusted_hosts: list[str] = Field(
        default_factory=lambda: ["localhost", "127.0.0.1", "::1"],
        description="where keys are off, the names that the service answers to",
    )


class PromptRule(Section):
    threshold: float = Field(ge=-1, le=1, description="cosine between two texts from which on the concept counts")
    action: Literal["flag", "block"] = Field("flag", description="`block`: the job fails before anything is drawn")


class OutputRule(Section):
    threshold: float = Field(
        ge=-1,
        le=1,
        description="cosine between image and text from which on the concept counts; lower than of two texts",
    )
    action: Literal["flag", "blur", "block"] = Field(
        "flag", description="`blur`: what is stored shows a few blots of colour; `block`: nothing is stored"
    )


ConceptText = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class ConceptSettings(Section):
    """Something that prompts or outputs are looked through for."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="how decisions, metrics and logs call it")
    texts: list[ConceptText] = Field(
        min_length=1, max_length=64, description="short descriptions of it, each embedded; the nearest counts"
    )
    unless: list[ConceptText] = Field(
        default_factory=list, max_length=64, description="what it is not: nearer to one of these it does not count"
    )
    prompt: PromptRule | None = Field(None, description="none: prompts are not looked through for it")
    output: OutputRule | None = Field(None, description="none: outputs are not looked through for it")

    @model_validator(mode="after")
    def _it_is_looked_for(self) -> Self:
        if self.prompt is None and self.output is None:
            raise ValueError("prompt or output is required")
        return self


class SafetySettings(Section):
    concepts: list[ConceptSettings] = Field(
        default_factory=list, max_length=64, description="what the content policy looks for; none: there is no policy"
    )

    @model_validator(mode="after")
    def _names_tell_concepts_apart(self) -> Self:
        names = [concept.name for concept in self.concepts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"concepts has a name twice: {', '.join(twice)}")
        if SAFETY_CHECKER in names:
            raise ValueError(f"concepts cannot have the name {SAFETY_CHECKER}: so the models' own checker is called")
        return self


class Settings(BaseSettings):
    """The whole configuration of one process."""

    model_config = SettingsConfigDict(
        env_prefix="AFTERIMAGE_",
        env_nested_delimiter="__",
        extra="ignore",
        frozen=True,
        nested_model_default_partial_update=True,
    )

    environment: Environment = Field(
        Environment.LOCAL, description="what may be left open: keys only locally, the cheap generator only in tests"
    )
    database: DatabaseSettings = DatabaseSettings()
    queue: QueueSettings = QueueSettings()
    jobs: JobSettings = JobSettings()
    storage: StorageSettings = StorageSettings()
    cache: CacheSettings = CacheSettings()
    model: ModelSettings = Field(default_factory=ModelSettings)
    retrieval: RetrievalSettings = RetrievalSettings()
    api: APISettings = APISettings()
    limits: LimitSettings = LimitSettings()
    bulks: BulkSettings = BulkSettings()
    webhooks: WebhookSettings = WebhookSettings()
    worker: WorkerSettings = WorkerSettings()
    watchdog: WatchdogSettings = WatchdogSettings()
    retention: RetentionSettings = RetentionSettings()
    logging: LoggingSettings = LoggingSettings()
    metrics: MetricsSettings = MetricsSettings()
    security: SecuritySettings = SecuritySettings()
    safety: SafetySettings = SafetySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get("AFTERIMAGE_CONFIG_FILE")
        if named and not Path(named).is_file():
            raise ConfigurationError(f"AFTERIMAGE_CONFIG_FILE: {named} is not a file")
        toml = TomlConfigSettingsSource(settings_cls, named or "afterimage.toml")
        unknown = [name for name in toml.toml_data if name not in settings_cls.model_fields]
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):
                unknown += [name.upper() for name in source.env_vars if not _is_known(name, settings_cls)]
        if unknown:
            raise ConfigurationError("\n".join(f"{name}: there is no such setting" for name in sorted(set(unknown))))
        return init_settings, env_settings, dotenv_settings, file_secret_settings, toml

    @model_validator(mode="after")
    def _the_combination_is_safe(self) -> Self:
        mistakes = []
        if self.environment is not Environment.TEST:
            cheap = sorted(name for name, model in self.model.generators.items() if model.kind == "cheap")
            if cheap:
                mistakes.append(f"model.generators {cheap}: the cheap generator is for the test environment only")
        keyless_allowed = self.environment in (Environment.LOCAL, Environment.TEST)
        if not self.security.require_api_keys and not (
            keyless_allowed and self.api.host in ("127.0.0.1", "::1", "localhost")
        ):
            mistakes.append("security.require_api_keys: may be false only locally, with api.host on loopback")
        if self.worker.generator is not None and self.worker.generator not in self.model.generators:
            mistakes.append(f"worker.generator: {self.worker.generator!r} is not one of model.generators")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self


def _is_known(variable: str, settings_cls: type[BaseSettings]) -> bool:
    """Whether an environment variable is none of ours, or one that something reads."""
    if not variable.startswith("afterimage_"):
        return True
    section, separator, _ = variable.removeprefix("afterimage_").partition("__")
    return section in (settings_cls.model_fields if separator else NOT_SECTIONS)


def load_settings(**overrides: object) -> Settings:
    """Read the settings afresh.

    Raises:
        ConfigurationError: one readable line per mistake, without the values of secrets.
    """
    environment = os.environ.get("AFTERIMAGE_ENVIRONMENT", Environment.LOCAL)
    try:
        return Settings(_env_file=(".env", f".env.{environment}"), **overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError("\n".join(_mistakes(error))) from None
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"settings: {error}") from None


def _mistakes(error: ValidationError) -> list[str]:
    lines = []
    for mistake in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in mistake["loc"]) or "settings"
        lines += [f"{place}: {line}" for line in mistake["msg"].removeprefix("Value error, ").splitlines()]
    return lines


@cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return load_settings()
