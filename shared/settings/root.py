"""The whole configuration of one process, and how it is read from its sources."""

import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, SecretStr, ValidationError, model_validator
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

from shared.errors import ConfigurationError
from shared.settings.api import APISettings, LimitSettings, SecuritySettings
from shared.settings.jobs import (
    BulkSettings,
    JobSettings,
    RetentionSettings,
    WatchdogSettings,
    WebhookSettings,
    WorkerSettings,
)
from shared.settings.models import ModelSettings
from shared.settings.retrieval import PlannerSettings, RetrievalSettings
from shared.settings.safety import ContentCredentialsSettings, SafetySettings
from shared.settings.section import Advanced, Section
from shared.settings.servers import CacheSettings, DatabaseSettings, QueueSettings, StorageSettings
from shared.singleton import process_singleton

NOT_SECTIONS = ("environment", "config_file", "secrets_dir", "url", "stack", "api_key")
"""Names after the prefix `AFTERIMAGE_` that are not sections. A local stack sets `url` and `stack` for programs started
beside it. A client reads `url` and `api_key`."""

UNKNOWN_NAMES = "unknown names"
"""Key under which the sources pass the names that no setting has."""


class Environment(StrEnum):
    LOCAL = "local"
    TEST = "test"
    STAGING = "staging"
    PRODUCTION = "production"


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


class TraceSettings(Section):
    """Traces of requests and jobs, exported by OpenTelemetry's protocol OTLP over HTTP."""

    enabled: Advanced[bool] = Field(False, description="record traces and export them; needs the extra `traces`")
    endpoint: Advanced[str] = Field(
        "http://127.0.0.1:4318/v1/traces",
        pattern=r"^https?://[^@\s]+$",
        description="URL to which spans are sent; it must not contain a password",
    )
    headers: Advanced[dict[str, SecretStr]] = Field(
        default_factory=dict, description="headers of these requests, such as an API key of the collector"
    )
    sample_ratio: Advanced[float] = Field(
        1.0, ge=0, le=1, description="share of the requests, and of the jobs of bulks, whose traces are recorded"
    )
    timeout_s: Advanced[float] = Field(
        5.0, gt=0, le=60, description="longest time for one export; its spans are then dropped"
    )
    continue_requests: Advanced[bool] = Field(
        False,
        description="continue the trace that a request's header `traceparent` names; "
        "only behind a proxy that sets or removes the header, because it also decides whether the trace is recorded",
    )


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
    traces: TraceSettings = TraceSettings()
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
