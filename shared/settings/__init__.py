"""Every setting of the product: its type, its bounds and its meaning.

Sources, strongest first: keyword arguments, the environment (`AFTERIMAGE_DATABASE__URL=...`), `.env.<environment>`,
`.env`, a folder of secrets, a TOML file, and the defaults here. `AFTERIMAGE_SECRETS_DIR` names the folder, in which the
file `afterimage_database__url` holds one value. `AFTERIMAGE_CONFIG_FILE` names the TOML file,
`afterimage.toml` by default. The defaults run offline on a laptop.
"""

from shared.settings.api import APISettings, LimitSettings, SecuritySettings
from shared.settings.engines import EngineSettings
from shared.settings.jobs import (
    BulkSettings,
    JobSettings,
    RetentionSettings,
    WatchdogSettings,
    WebhookSettings,
    WorkerSettings,
)
from shared.settings.models import (
    STARTER,
    ClipSettings,
    GeneratorDefaults,
    GeneratorSettings,
    IPAdapterSettings,
    LoraSettings,
    ModelSettings,
    QuantizationSettings,
)
from shared.settings.retrieval import PlannerSettings, RetrievalSettings
from shared.settings.root import (
    Environment,
    LoggingSettings,
    MetricsSettings,
    Settings,
    TraceSettings,
    get_settings,
    load_settings,
)
from shared.settings.safety import (
    SAFETY_CHECKER,
    ConceptSettings,
    ContentCredentialsSettings,
    OutputRule,
    PromptRule,
    SafetySettings,
)
from shared.settings.section import Advanced, AdvancedMarker, FormerName, Section, Value, logger
from shared.settings.servers import CacheSettings, DatabaseSettings, QueueSettings, StorageSettings

__all__ = [
    "SAFETY_CHECKER",
    "STARTER",
    "APISettings",
    "Advanced",
    "AdvancedMarker",
    "BulkSettings",
    "CacheSettings",
    "ClipSettings",
    "ConceptSettings",
    "ContentCredentialsSettings",
    "DatabaseSettings",
    "EngineSettings",
    "Environment",
    "FormerName",
    "GeneratorDefaults",
    "GeneratorSettings",
    "IPAdapterSettings",
    "JobSettings",
    "LimitSettings",
    "LoggingSettings",
    "LoraSettings",
    "MetricsSettings",
    "ModelSettings",
    "OutputRule",
    "PlannerSettings",
    "PromptRule",
    "QuantizationSettings",
    "QueueSettings",
    "RetentionSettings",
    "RetrievalSettings",
    "SafetySettings",
    "Section",
    "SecuritySettings",
    "Settings",
    "StorageSettings",
    "TraceSettings",
    "Value",
    "WatchdogSettings",
    "WebhookSettings",
    "WorkerSettings",
    "get_settings",
    "load_settings",
    "logger",
]
