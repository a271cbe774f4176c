"""Every setting of the product: its type, its bounds and its meaning.

Sources, strongest first: keyword arguments, the environment (`AFTERIMAGE_DATABASE__URL=...`), `.env.<environment>`,
`.env`, a folder of secrets, a TOML file, and the defaults in this file. `AFTERIMAGE_SECRETS_DIR` names the folder, in
which the file `afterimage_database__url` holds one value. `AFTERIMAGE_CONFIG_FILE` names the TOML file,
`afterimage.toml` by default. The defaults run offline on a laptop.
"""

import logging
import os
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NestedSecretsSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from shared.errors import ConfigurationError, ModelNotFoundError
from shared.singleton import process_singleton

logger = logging.getLogger(__name__)

NOT_SECTIONS = ("environment", "config_file", "secrets_dir", "url", "stack", "api_key")
"""Names after the prefix `AFTERIMAGE_` that are not sections. A local stack sets `url` and `stack` for programs started
beside it. A client reads `url` and `api_key`."""

UNKNOWN_NAMES = "unknown names"
"""Key under which the sources pass the names that no setting has."""

SAFETY_CHECKER = "safety_checker"
"""Concept name in the decisions of the safety checker that a model brings."""

STARTER = Path(__file__).resolve().parent.parent / "starter"

Value = TypeVar("Value")


class AdvancedMarker:
    """Marks a field that no operator needs on day one. docs/settings.md lists these apart from the common ones."""


ADVANCED = AdvancedMarker()
Advanced = Annotated[Value, ADVANCED]


@dataclass(frozen=True)
class FormerName:
    """The name of a setting in the previous release. This release still reads it and logs a warning."""

    section: str
    name: str


class Environment(StrEnum):
    LOCAL = "local"
    TEST = "test"
    STAGING = "staging"
    PRODUCTION = "production"


class Section(BaseModel):
    """A group of settings. An unknown name in it is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _former_names_are_read(cls, values: Any) -> Any:
        """Move values from former names to the current ones; a value under both names is an error."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            for former in (marker for marker in field.metadata if isinstance(marker, FormerName)):
                if former.name in values:
                    old, new = f"{former.section}.{former.name}", f"{former.section}.{name}"
                    if name in values:
                        raise ValueError(f"{old} is the former name of {new}: set only {new}")
                    values[name] = values.pop(former.name)
                    _warn_of_former(old, new)
        return values


@cache
def _warn_of_former(former: str, current: str) -> None:
    """Log once per process. The line must be complete without fields, because logging is not configured yet."""
    logger.warning("setting_renamed: %s is now %s; the next release does not read the old name", former, current)


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


DatabaseUrl = Annotated[SecretStr, AfterValidator(_psycopg2_url)]
RedisUrl = Annotated[SecretStr, AfterValidator(_redis_url)]


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
    url: RedisUrl = Field(SecretStr("redis://127.0.0.1:6379/0"), description="Redis that serves as the Celery broker")
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


class JobSettings(Section):
    lease_s: Advanced[float] = Field(
        30, ge=2, le=600, description="a worker that does not renew its leases for this long loses its jobs"
    )
    heartbeat_s: Advanced[float] = Field(
        10, gt=0, le=200, description="how often a worker renews its leases; at most half of `lease_s`"
    )
    reconcile_s: Advanced[float] = Field(
        5, gt=0, le=60, description="how often the reconciler compares the jobs in Postgres with the broker"
    )
    unserved_after_s: Advanced[float] = Field(
        900,
        ge=0,
        le=86_400,
        description="queued jobs of a model that is not one of `model.generators` fail when no worker has served it "
        "for this long; 0: they wait without limit",
    )
    max_crashes: Advanced[int] = Field(
        3,
        ge=1,
        le=10,
        description="worker crashes during the model work of a job or image, after which it is `dead` or `failed`",
    )
    max_transient_retries: int = Field(
        3, ge=0, le=20, description="returns of a job to the queue after temporary errors"
    )
    transient_retry_delay_s: Advanced[float] = Field(
        5, gt=0, le=3600, description="delay before a job's first retry after a temporary error; it doubles each time"
    )
    timeout_s: float = Field(
        600,
        gt=0,
        le=86_400,
        description="longest run of one attempt; a job may ask for less; "
        "delays by jobs of higher-priority lanes do not count",
    )
    shutdown_grace_s: float = Field(
        20, ge=0, le=600, description="time to finish running jobs after SIGTERM; then they go back to the queue"
    )

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


class ClipSettings(Section):
    model: str = Field(
        f"local-dir:{STARTER / 'models' / 'clip'}",
        description="model that open_clip loads: `local-dir:<folder>`, `hf-hub:<id>`, or a name such as ViT-B-32",
    )
    pretrained: str | None = Field(
        None, description="open_clip weights tag or file, for a model given by a name such as ViT-B-32"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is a GPU, else the CPU",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of the weights and the computation"
    )
    max_batch_size: int = Field(32, ge=1, le=1024, description="texts or images per call of the model")


class IPAdapterSettings(Section):
    source: Advanced[str] = Field(description="folder or hub id")
    revision: Advanced[str | None] = Field(None, description="commit of the hub repository")
    subfolder: Advanced[str] = Field("ip_adapter", description="folder inside the source that holds the weights")
    weight_name: Advanced[str] = Field("ip_adapter.safetensors", description="file of the weights")
    image_encoder_folder: Advanced[str | None] = Field(
        None, description="folder of the adapter's own image encoder; unset if the retrieval CLIP is that encoder"
    )
    conditions_on: Advanced[Literal["embedding_space", "image"]] = Field(
        "image",
        description="`embedding_space`: the stored vectors condition directly, because the retrieval CLIP is the "
        "adapter's encoder; `image`: the adapter's encoder encodes the stored images again",
    )


class LoraSettings(Section):
    source: Advanced[str] = Field(description="folder or hub id")
    revision: Advanced[str | None] = Field(None, description="commit of the hub repository")
    weight_name: Advanced[str | None] = Field(
        None, description="file of the weights; may be unset if the source has only one"
    )


class QuantizationSettings(Section):
    backend: Advanced[Literal["torchao", "bitsandbytes"]] = Field(
        "torchao",
        description="library that stores the weights in fewer bits; each is an extra of this package; bitsandbytes "
        "needs a GPU",
    )
    type: Advanced[Literal["int8", "float8", "nf4", "fp4"]] = Field(
        "int8", description="type of the weights: int8 or float8 with torchao; int8, nf4 or fp4 with bitsandbytes"
    )
    components: Advanced[list[str]] = Field(
        default_factory=list,
        description="parts of the pipeline, such as transformer and text_encoder; empty: only the denoiser",
    )

    @model_validator(mode="after")
    def _the_backend_has_the_type(self) -> Self:
        types = {"torchao": ("int8", "float8"), "bitsandbytes": ("int8", "nf4", "fp4")}[self.backend]
        if self.type not in types:
            raise ValueError(f"{self.backend} has the types {', '.join(types)}, not {self.type}")
        return self


class GeneratorDefaults(Section):
    """Values for the fields that a request leaves out. `GET /models` shows the values of a loaded model."""

    width: Advanced[int | None] = Field(None, ge=16, le=4096, description="pixels; unset: the model's native width")
    height: Advanced[int | None] = Field(None, ge=16, le=4096, description="pixels; unset: the model's native height")
    num_inference_steps: Advanced[int | None] = Field(
        None, ge=1, le=200, description="denoising steps; unset: the default of the model's pipeline"
    )
    guidance_scale: Advanced[float | None] = Field(
        None,
        ge=0,
        le=30,
        description="guidance as the model's pipeline defines it, true or distilled; 1 or less turns it off in most "
        "models, 0 in all; unset: the default of the pipeline",
    )
    scheduler: Advanced[str | None] = Field(
        None, description="a name of the scheduler allowlist; unset: the model's own scheduler"
    )
    ip_adapter_scale: Advanced[float] = Field(
        0.5,
        ge=0,
        le=2,
        description="weight of the references against the prompt; unset: 1 with `weigh_references`, else 0.5",
    )
    strength: Advanced[float] = Field(
        0.6,
        ge=0.01,
        le=1,
        description="img2img: share of the noise schedule that runs; more of it keeps less of the reference",
    )


def _current_kind(kind: Any) -> Any:
    """`fake` for its former name `cheap`."""
    if kind == "cheap":
        _warn_of_former('kind = "cheap"', 'kind = "fake"')
        return "fake"
    return kind


class GeneratorSettings(Section):
    kind: Annotated[Literal["diffusers", "fake"], ADVANCED, BeforeValidator(_current_kind)] = Field(
        "diffusers", description="`fake` draws coloured blocks without a model; only the test environment accepts it"
    )
    source: str = Field("", description="folder or hub id of a diffusers pipeline")
    revision: str | None = Field(None, description="commit of the hub repository; required for a hub id")
    variant: Advanced[str | None] = Field(None, description="variant of the pipeline's files, such as fp16")
    single_file: Advanced[str | None] = Field(
        None,
        description="safetensors file with the weights of all parts or of the denoiser alone, or GGUF file with those "
        "of the denoiser; `source` gives the configuration, the tokenizers and the other parts",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$",
        description="cpu, cuda, cuda:N or mps; auto: CUDA if there is a GPU, else the CPU",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on CUDA, float32 elsewhere"
    )
    offload: Advanced[Literal["none", "model", "group"]] = Field(
        "none",
        description="weights that wait in the memory of the CPU until they are used: `model`, whole models, such as "
        "the text encoder; `group`, layers, which needs the least memory of the GPU; images do not change",
    )
    quantization: Advanced[QuantizationSettings | None] = Field(
        None, description="weights in fewer bits, which need less memory and change the images a little"
    )
    attention: Advanced[
        Literal["native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math"]
        | Literal["flex", "flash", "_flash_3", "sage", "xformers"]
        | None
    ] = Field(
        None,
        description="attention backend of the denoiser, by its name in diffusers; flash, _flash_3, sage and xformers "
        "need their library; unset: as diffusers chooses",
    )
    compile: Advanced[Literal["none", "regional"]] = Field(
        "none",
        description="`regional`: torch compiles the repeated blocks of the denoiser, at the first call of each shape",
    )
    ip_adapter: IPAdapterSettings | None = Field(
        None, description="IP-Adapter that conditions the model on images; unset: no image prompts"
    )
    loras: Advanced[dict[str, LoraSettings]] = Field(default_factory=dict, description="by the name that requests use")
    defaults: GeneratorDefaults = GeneratorDefaults()
    any_size: Advanced[bool] = Field(
        True, description="the model draws sizes near its native one well; false: only the native size"
    )
    native_side: Advanced[int | None] = Field(
        None,
        ge=16,
        le=4096,
        description="pixels per side for which the model was trained; unset: as its pipeline says, which for FLUX.2 is "
        "always 1024",
    )
    max_sequence_length: Advanced[int | None] = Field(
        None,
        ge=1,
        le=4096,
        description="tokens of a prompt that the model reads, where the pipeline takes this number; unset: as the "
        "pipeline says",
    )
    text_encoder_out_layers: Advanced[list[int] | None] = Field(
        None,
        min_length=1,
        description="hidden states of the text encoder that condition the model, where the pipeline takes them; unset: "
        "as the pipeline says",
    )
    max_batch_size: int = Field(4, ge=1, le=64, description="images per call of the model")
    max_references: Advanced[int] = Field(4, ge=1, le=16, description="references per image")
    reference_side: Advanced[int | None] = Field(
        None,
        ge=16,
        le=2048,
        description="mode `reference`: pixels per side of a reference, where the pipeline takes a size; unset: 512, or "
        "what the pipeline chooses",
    )
    reference_side_of_several: Advanced[int | None] = Field(
        None,
        ge=16,
        le=2048,
        description="mode `reference`: pixels per side of a reference in images whose references stand for several "
        "things (`a dog and a car`, `two dogs`); unset: `reference_side`",
    )
    weigh_references: Advanced[bool] = Field(
        False,
        description="mode `reference`: the references' weights and `ip_adapter_scale` act on the attention, where the "
        "model can; this needs an attention that takes a mask, which is slower; false: weights decide only the order",
    )
    safety_checker: Literal["off", "flag", "blur", "block"] = Field(
        "block",
        description="action on an image that the model's own safety checker rejects; no effect without a checker",
    )
    cost_ms: Advanced[float] = Field(5, ge=0, le=10_000, description="fake generator only: time of one batch")

    @property
    def text_arguments(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, by name, that decide how it reads a prompt; only those that are set."""
        return self.model_dump(include={"max_sequence_length", "text_encoder_out_layers"}, exclude_none=True)

    @model_validator(mode="after")
    def _weighed_references_have_the_scale_of_the_training(self) -> Self:
        if self.weigh_references and "ip_adapter_scale" not in self.defaults.model_fields_set:
            # The model is frozen for its readers, not yet for its validators.
            self.__dict__["defaults"] = self.defaults.model_copy(update={"ip_adapter_scale": 1.0})
        return self

    @model_validator(mode="after")
    def _a_pipeline_is_named_and_pinned(self) -> Self:
        if self.kind == "fake":
            return self
        if not self.source:
            raise ValueError("source is required")
        if self.source.endswith(MODEL_FILES):
            raise ValueError("source is a file: name it in single_file, and in source the pipeline it belongs to")
        if not _is_folder(self.source) and self.revision is None:
            raise ValueError(f"{self.source!r} is not a folder, so it is a hub id, and a hub id needs a revision")
        return self

    @model_validator(mode="after")
    def _compiled_blocks_take_no_scales(self) -> Self:
        if self.compile != "none" and (self.ip_adapter is not None or self.loras):
            raise ValueError("compile is not for an ip_adapter or loras: with each scale the blocks are compiled again")
        return self

    @field_validator("single_file")
    @classmethod
    def _the_file_holds_no_code(cls, file: str | None) -> str | None:
        if file is not None and not file.endswith((".safetensors", ".gguf")):
            raise ValueError(f"{file!r} is neither a safetensors nor a GGUF file; other files may contain code")
        return file


MODEL_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def _is_folder(source: str) -> bool:
    return Path(source).is_dir() or source.startswith((".", "/"))


def _starter_generator() -> dict[str, GeneratorSettings]:
    return {
        "starter": GeneratorSettings(
            source=str(STARTER / "models" / "generator"),
            native_side=128,
            any_size=False,
            max_batch_size=8,
            max_sequence_length=24,
            text_encoder_out_layers=[3],
            reference_side=128,
            reference_side_of_several=64,
            defaults=GeneratorDefaults(width=128, height=128, num_inference_steps=14, guidance_scale=1.0),
        )
    }


class ModelSettings(Section):
    clip: ClipSettings = ClipSettings()
    generators: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")], GeneratorSettings] = Field(
        default_factory=_starter_generator, min_length=1, description="image models by the name that requests use"
    )
    default_generator: str = Field("starter", description="model of a request that names no model")
    threads: int = Field(0, ge=0, le=256, description="CPU threads of a model process; 0: torch decides")
    offline: bool = Field(True, description="load models from this machine only; false: download from a model hub")

    @model_validator(mode="after")
    def _the_default_exists(self) -> Self:
        if self.default_generator not in self.generators:
            raise ValueError(
                f"default_generator {self.default_generator!r} is not one of generators: {sorted(self.generators)}"
            )
        return self

    def generator(self, name: str) -> GeneratorSettings:
        """The settings of one generator.

        Raises:
            ModelNotFoundError: no generator has this name.
        """
        if name not in self.generators:
            raise ModelNotFoundError(model=name, models=sorted(self.generators))
        return self.generators[name]


class RetrievalSettings(Section):
    default_k: int = Field(4, ge=1, le=16, description="number of references of a request that does not set it")
    min_similarity: Advanced[float | None] = Field(
        None,
        ge=-1,
        le=1,
        description="lowest cosine of a reference that is used; empty: the thresholds that `scripts.calibrate` "
        "measured for the CLIP, or 0.42 without them",
    )
    duplicate_similarity: Advanced[float] = Field(
        0.95,
        ge=0,
        le=1,
        description="lowest cosine at which two references count as duplicates; "
        "0.05 less if their perceptual hashes are nearly equal",
    )
    weight_temperature: Advanced[float] = Field(
        0.1, gt=0, le=10, description="temperature of the softmax that turns similarities into weights"
    )
    ef_search: Advanced[int | None] = Field(
        None,
        ge=10,
        le=1000,
        description="candidates that the vector index examines; more give better results and take longer; unset: as "
        "`python -m scripts.admin tune-search` measured; before that 100, and searches among fewer than 100,000 images "
        "are exact",
    )
    exact_below: Advanced[int] = Field(
        10_000, ge=0, description="the search is exact when the filter leaves fewer images than this"
    )
    text_timeout_s: Advanced[float] = Field(
        5, gt=0, le=60, description="longest wait of a search for the vector of its query"
    )
    plan_expires_s: Advanced[int] = Field(
        3600, ge=1, le=2_592_000, description="how long a request may use a plan of references"
    )
    text_language: Advanced[str] = Field(
        "english",
        pattern=r"^[a-z_][a-z0-9_]{0,62}$",
        description="text search configuration of Postgres that finds the words of captions and tags; the first "
        "upgrade applies it, and later changes need `python -m scripts.admin set-text-language`",
    )


def _http_url(url: str | None) -> str | None:
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - reading the port parses it
    except ValueError:
        raise ValueError(UNREADABLE_URL) from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must start with http:// or https:// and name a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password; a key belongs into planner.api_key")
    return url


class PlannerSettings(Section):
    """An optional chat model that splits prompts into concepts."""

    url: Annotated[str | None, AfterValidator(_http_url), ADVANCED] = Field(
        None,
        description="OpenAI-compatible endpoint that splits prompts into concepts, such as "
        "`http://127.0.0.1:11434/v1`; it gets the prompts; unset: rules split them",
    )
    model: Advanced[str] = Field("", description="name of the chat model at this endpoint; required with `url`")
    api_key: Advanced[SecretStr | None] = Field(None, description="key for this endpoint; unset: none is sent")
    timeout_s: Advanced[float] = Field(
        3, gt=0, le=30, description="longest wait for an answer; then rules split the prompt"
    )
    pause_s: Advanced[float] = Field(
        30, ge=0, le=3600, description="after a failure, rules split all prompts for this long"
    )

    @model_validator(mode="after")
    def _a_model_is_named(self) -> Self:
        if self.url is not None and not self.model:
            raise ValueError("model is required with url")
        return self


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


class BulkSettings(Section):
    max_items: int = Field(100_000, ge=1, le=1_000_000, description="items of one bulk, invalid lines included")
    max_body_bytes: Advanced[int] = Field(
        512 * 2**20, ge=1024, description="size of one request that sends lines of a bulk"
    )
    max_line_bytes: Advanced[int] = Field(64 * 1024, ge=1024, le=2**20, description="size of one line of a bulk")
    chunk_lines: Advanced[int] = Field(
        500, ge=1, le=10_000, description="lines stored in one transaction while a bulk is received"
    )
    max_transfers: Advanced[int] = Field(
        8, ge=1, le=512, description="requests of one API process at a time that send lines or download results"
    )
    receive_timeout_s: Advanced[float] = Field(
        60, gt=0, le=3600, description="longest wait for the next bytes of a sender"
    )
    max_open: Advanced[int] = Field(100, ge=1, description="unfinished bulks of one owner")
    max_open_items: int = Field(500_000, ge=1, description="items of all unfinished bulks of one owner")
    abandoned_after_s: Advanced[float] = Field(
        86_400, gt=0, description="a bulk in state `receiving` that receives no lines for this long is abandoned"
    )


class WebhookSettings(Section):
    timeout_s: Advanced[float] = Field(
        15, gt=0, le=60, description="longest time of one try, from the look-up of the host to the answer's status"
    )
    allow_http: bool = Field(False, description="accept targets without TLS")
    allow_private: bool = Field(False, description="accept targets on private, loopback and link-local addresses")
    per_host: Advanced[int] = Field(
        2, ge=1, le=100, description="deliveries to one host at a time, so that a dead host does not delay the others"
    )
    per_owner: Advanced[int] = Field(
        4,
        ge=1,
        le=100,
        description="deliveries of one owner at a time, so that many slow hosts of one do not delay the other owners",
    )
    secret_overlap_s: Advanced[float] = Field(
        86_400, ge=0, description="how long the old secret still signs after a rotation"
    )


class WorkerSettings(Section):
    concurrency: int = Field(
        16,
        ge=1,
        le=512,
        description="jobs that one worker process handles at a time; "
        "a generate worker takes `lane_headroom` more for each higher-priority lane",
    )
    lane_headroom: Annotated[int, ADVANCED, FormerName("worker", "spare_seats")] = Field(
        4,
        ge=0,
        le=512,
        description="additional jobs that a generate worker takes of a lane, "
        "compared with the next lower-priority lane",
    )
    bulk_pause_s: Advanced[float] = Field(
        0.05,
        ge=0,
        le=60,
        description="pause of a generate worker between two jobs of the bulk lane "
        "while higher-priority lanes are in use",
    )
    generator: str | None = Field(
        None, description="generator that a generate worker serves; unset: the default generator"
    )


class WatchdogSettings(Section):
    """Longest time without progress of a model call. After it the process ends, and expired leases requeue its jobs."""

    load_s: Advanced[float] = Field(3600, gt=0, le=86_400, description="loading one model, downloads included")
    warm_up_s: Advanced[float] = Field(900, gt=0, le=86_400, description="the first call of a loaded model")
    embed_s: Advanced[float] = Field(300, gt=0, le=86_400, description="one batch of the embedding model")
    step_s: Advanced[float] = Field(
        300, gt=0, le=86_400, description="one denoising step of a batch; the first includes encoding the prompts"
    )
    decode_s: Advanced[float] = Field(
        300, gt=0, le=86_400, description="from the last step of a batch to its decoded images"
    )


class RetentionSettings(Section):
    """How long data is kept. Each field says from when its days count, and the meaning of 0."""

    jobs_days: float = Field(
        0,
        ge=0,
        le=36_500,
        description="jobs with their outputs and events, and bulks, counted from their end; 0: kept forever",
    )
    outputs_days: float = Field(
        0, ge=0, le=36_500, description="outputs, counted from their creation; 0: kept with their job"
    )
    events_days: float = Field(
        30,
        ge=0,
        le=36_500,
        description="events of jobs, with their webhook deliveries, counted from the job's end; 0: kept with their job",
    )
    deliveries_days: float = Field(
        30,
        ge=0,
        le=36_500,
        description="settled webhook deliveries, counted from their creation; 0: kept until their event is deleted",
    )
    every_s: Advanced[float] = Field(
        3600, gt=0, le=604_800, description="how often the reconciler deletes data that is too old"
    )
    sweep_every_s: Advanced[float] = Field(
        21_600,
        ge=0,
        le=2_592_000,
        description="how often the reconciler deletes unused blobs; 0: only `python -m scripts.admin sweep` does",
    )
    blob_grace_s: Advanced[float] = Field(
        86_400,
        ge=0,
        description="age below which an unused blob is kept; raised to the longest possible duration of a job",
    )


class LoggingSettings(Section):
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level that is logged")
    format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console in the local and test environments, JSON elsewhere"
    )


class MetricsSettings(Section):
    host: str = Field("127.0.0.1", description="address on which a worker or the reconciler serves its metrics")
    port: int = Field(
        0, ge=0, le=65_535, description="port for these metrics; 0: off; the API serves its own at `/metrics`"
    )


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


class PromptRule(Section):
    threshold: Advanced[float] = Field(
        ge=-1, le=1, description="lowest cosine between two texts at which the concept is recognised"
    )
    action: Advanced[Literal["flag", "block"]] = Field("flag", description="`block`: the job fails before drawing")


class OutputRule(Section):
    threshold: Advanced[float] = Field(
        ge=-1,
        le=1,
        description="lowest cosine between image and text at which the concept is recognised; "
        "such cosines are lower than those between two texts",
    )
    action: Advanced[Literal["flag", "blur", "block"]] = Field(
        "flag",
        description="`blur`: the stored image shows a few areas of colour; `block`: the image is not stored",
    )


ConceptText = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]


class ConceptSettings(Section):
    """A concept that the content policy looks for in prompts or outputs."""

    name: Advanced[str] = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$", description="name of the concept in decisions, metrics and logs"
    )
    texts: Advanced[list[ConceptText]] = Field(
        min_length=1,
        max_length=64,
        description="short descriptions of the concept; each is embedded, and the nearest one counts",
    )
    unless: Advanced[list[ConceptText]] = Field(
        default_factory=list,
        max_length=64,
        description="descriptions of harmless things; a prompt or image part nearer to one of these does not count",
    )
    prompt: Advanced[PromptRule | None] = Field(None, description="rule for prompts; unset: prompts are not checked")
    output: Advanced[OutputRule | None] = Field(None, description="rule for outputs; unset: outputs are not checked")

    @model_validator(mode="after")
    def _a_rule_is_given(self) -> Self:
        if self.prompt is None and self.output is None:
            raise ValueError("prompt or output is required")
        return self


class SafetySettings(Section):
    concepts: Advanced[list[ConceptSettings]] = Field(
        default_factory=list,
        max_length=64,
        description="concepts that the content policy looks for; empty: only the models' own safety checkers judge",
    )

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [concept.name for concept in self.concepts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"concepts has a name twice: {', '.join(twice)}")
        if SAFETY_CHECKER in names:
            raise ValueError(f"concepts cannot have the name {SAFETY_CHECKER}: it means the models' own checker")
        return self


class ContentCredentialsSettings(Section):
    """Signed manifests inside the outputs, by the standard C2PA (https://c2pa.org)."""

    enabled: Advanced[bool] = Field(
        False, description="sign every output; needs the extra `c2pa`; a job whose output cannot be signed fails"
    )
    certificate_chain: Advanced[Path | None] = Field(
        None, description="PEM file: the certificate of the signer, then those of its issuers"
    )
    private_key: Advanced[Path | None] = Field(None, description="PEM file (PKCS #8) with the key of this certificate")
    algorithm: Advanced[Literal["es256", "es384", "es512", "ps256", "ps384", "ps512", "ed25519"]] = Field(
        "es256", description="algorithm that fits the key"
    )
    timestamp_url: Advanced[str | None] = Field(
        None,
        pattern=r"^https?://",
        description="RFC 3161 service that dates signatures, so that they outlive the certificate; unset: no network",
    )
    include_prompt: Advanced[bool] = Field(
        True,
        description="false: no file names the prompt, neither in its manifest nor in its own record; "
        "the database keeps it",
    )

    @model_validator(mode="after")
    def _a_signer_has_its_files(self) -> Self:
        if self.enabled and (self.certificate_chain is None or self.private_key is None):
            raise ValueError("certificate_chain and private_key are required with enabled")
        return self


class Settings(BaseSettings):
    """The whole configuration of one process."""

    model_config = SettingsConfigDict(
        env_prefix="AFTERIMAGE_",
        env_nested_delimiter="__",
        extra="ignore",
        frozen=True,
    )

    environment: Environment = Field(
        Environment.LOCAL,
        description="staging and production require API keys; only test accepts the fake generator",
    )
    database: DatabaseSettings = DatabaseSettings()
    queue: QueueSettings = QueueSettings()
    jobs: JobSettings = JobSettings()
    storage: StorageSettings = StorageSettings()
    cache: CacheSettings = CacheSettings()
    model: ModelSettings = Field(default_factory=ModelSettings)
    retrieval: RetrievalSettings = RetrievalSettings()
    planner: PlannerSettings = PlannerSettings()
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
    content_credentials: ContentCredentialsSettings = ContentCredentialsSettings()

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
        secrets = NestedSecretsSettingsSource(
            file_secret_settings,
            secrets_dir=os.environ.get("AFTERIMAGE_SECRETS_DIR"),
            secrets_dir_missing="error",
        )
        unknown = {name for name in toml.toml_data if name not in settings_cls.model_fields}
        for source in (env_settings, dotenv_settings, secrets):
            if isinstance(source, EnvSettingsSource):
                unknown |= {name.upper() for name in source.env_vars if not _is_known(name, settings_cls)}
        # `_names_are_known` reports them, together with the wrong values.
        names = InitSettingsSource(settings_cls, {UNKNOWN_NAMES: sorted(unknown)})
        return names, init_settings, env_settings, dotenv_settings, secrets, toml

    @model_validator(mode="after")
    def _the_combination_is_safe(self) -> Self:
        mistakes = []
        if self.environment is not Environment.TEST:
            fakes = sorted(name for name, model in self.model.generators.items() if model.kind == "fake")
            if fakes:
                mistakes.append(f"model.generators {fakes}: the fake generator is for the test environment only")
        keyless_allowed = self.environment in (Environment.LOCAL, Environment.TEST)
        if not self.security.require_api_keys and not (
            keyless_allowed and self.api.host in ("127.0.0.1", "::1", "localhost")
        ):
            mistakes.append(
                "security.require_api_keys: may be false only in the environments local and test, "
                "with api.host on loopback"
            )
        if self.worker.generator is not None and self.worker.generator not in self.model.generators:
            mistakes.append(f"worker.generator: {self.worker.generator!r} is not one of model.generators")
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _names_are_known(cls, values: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        # Defined last, so that it also gets the mistakes that the validators above find.
        unknown = [f"{name}: there is no such setting" for name in values.pop(UNKNOWN_NAMES, [])]
        if not unknown:
            return validate(values)
        wrong = []
        try:
            validate(values)
        except ValidationError as error:
            wrong = _mistakes(error)
        raise ConfigurationError("\n".join(unknown + wrong))


def _is_known(variable: str, settings_cls: type[BaseSettings]) -> bool:
    """Whether an environment variable belongs to another program, or is one that this product reads."""
    if not variable.startswith("afterimage_"):
        return True
    section, separator, _ = variable.removeprefix("afterimage_").partition("__")
    return section in (settings_cls.model_fields if separator else NOT_SECTIONS)


def load_settings(**overrides: object) -> Settings:
    """Read the settings from all sources. `overrides`: sections or top-level settings by name.

    Raises:
        ConfigurationError: a value or a name is wrong. One line per mistake, without the values of secrets.
    """
    environment = os.environ.get("AFTERIMAGE_ENVIRONMENT", Environment.LOCAL)
    try:
        return Settings(_env_file=(".env", f".env.{environment}"), **overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConfigurationError("\n".join(_mistakes(error))) from None
    except (SettingsError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"settings: {error}") from None


def _mistakes(error: ValidationError) -> list[str]:
    """Return one line per mistake: the setting, the mistake, and the variable that sets it."""
    lines = []
    for mistake in error.errors(include_url=False, include_input=False):
        unknown = mistake["type"] == "extra_forbidden"
        message = "there is no such setting" if unknown else mistake["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in mistake["loc"])
        for line in message.splitlines():
            # The lines about a combination of settings begin with the place themselves.
            shown = f"{place}: {line}" if place else line
            lines.append(f"{shown} ({_variable(shown.partition(':')[0])})")
    return lines


def _variable(place: str) -> str:
    """Return the environment variable of a setting. A list, and the values of a mapping, are one variable."""
    names = place.partition(" ")[0].split(".")
    within = next((index for index, name in enumerate(names) if not name.isidentifier()), len(names))
    return "AFTERIMAGE_" + "__".join(names[:within]).upper()


@process_singleton
def get_settings() -> Settings:
    """Return the settings of this process, which are read once."""
    return load_settings()
