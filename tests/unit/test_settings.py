"""Settings: their defaults and sources, the report of mistakes, and former names."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from shared.errors import ConfigurationError
from shared.settings import (
    ConceptSettings,
    EngineSettings,
    Environment,
    GeneratorSettings,
    IPAdapterSettings,
    LoraSettings,
    OutputRule,
    PromptRule,
    QueueSettings,
    Section,
    Settings,
    WorkerSettings,
    get_settings,
    load_settings,
)
from shared.settings.section import warn_of_former

SECRET = "hunter2hunter2"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variable of the product is set, and the current directory is empty."""
    for name in list(os.environ):
        if name.upper().startswith("AFTERIMAGE_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def mistakes(**overrides: object) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**overrides)
    return caught.value.message.splitlines()


# --- defaults -----------------------------------------------------------------------------------------------------


def sections() -> list[type[BaseModel]]:
    return [section for section in Section.__subclasses__() if section.__module__.startswith("shared.settings.")]


def test_no_setting_is_required() -> None:
    settings = load_settings()
    assert settings.environment is Environment.LOCAL
    assert settings.model.offline
    assert settings.storage.url.startswith("file://")
    assert settings.model.default_generator in settings.model.generators


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_of_every_section_has_a_default(section: type[BaseModel]) -> None:
    # These describe one entry of a list that is empty by default, so they have no sensible default.
    required = {
        IPAdapterSettings: {"source"},
        LoraSettings: {"source"},
        EngineSettings: {"urls", "model"},
        ConceptSettings: {"name", "texts"},
        PromptRule: {"threshold"},
        OutputRule: {"threshold"},
    }.get(section, set())
    without = {name for name, field in section.model_fields.items() if field.is_required()}
    assert without == required


def test_every_section_is_part_of_the_settings() -> None:
    reached: set[type[BaseModel]] = set()

    def visit(model: type[BaseModel]) -> None:
        for field in model.model_fields.values():
            for found in _models_in(field.annotation):
                if found not in reached:
                    reached.add(found)
                    visit(found)

    visit(Settings)
    assert set(sections()) <= reached


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _models_in(part)


def test_the_defaults_point_at_this_machine_only() -> None:
    settings = load_settings()
    for url in (settings.database.url, settings.queue.url, settings.cache.url):
        assert "@127.0.0.1:" in url.get_secret_value() or "//127.0.0.1:" in url.get_secret_value()
    assert settings.api.host == "127.0.0.1"
    assert settings.metrics.host == "127.0.0.1"


def test_no_default_is_a_secret() -> None:
    for section in sections():
        for name, field in section.model_fields.items():
            if field.annotation in (str, SecretStr) and re.search("password|secret|token|key", name):
                assert field.default in (None, PydanticUndefined, ""), name


# --- sources ------------------------------------------------------------------------------------------------------


def test_variables_set_nested_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__POOL_SIZE", "3")
    monkeypatch.setenv("afterimage_logging__level", "DEBUG")
    monkeypatch.setenv("AFTERIMAGE_STORAGE__OPTIONS", '{"access_key_id": "x"}')
    settings = load_settings()
    assert settings.database.pool_size == 3
    assert settings.database.max_overflow == 8
    assert settings.logging.level == "DEBUG"
    assert settings.storage.options["access_key_id"].get_secret_value() == "x"


def test_a_generator_can_be_added_by_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFTERIMAGE_MODEL__GENERATORS", f'{{"mine": {{"source": "{tmp_path}"}}}}')
    monkeypatch.setenv("AFTERIMAGE_MODEL__DEFAULT_GENERATOR", "mine")
    assert load_settings().model.generators == {"mine": GeneratorSettings(source=str(tmp_path))}


def test_the_source_of_higher_priority_wins_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("afterimage.toml").write_text("[api]\nport = 1\nworkers = 1\nthreads = 1\nmax_waiters = 1\nmax_wait_s = 1\n")
    Path(".env").write_text(
        "AFTERIMAGE_API__WORKERS=2\nAFTERIMAGE_API__THREADS=2\nAFTERIMAGE_API__MAX_WAITERS=2\n"
        "AFTERIMAGE_API__MAX_WAIT_S=2\nPOSTGRES_PASSWORD=of-another-program\n"
    )
    Path(".env.test").write_text(
        "AFTERIMAGE_API__THREADS=3\nAFTERIMAGE_API__MAX_WAITERS=3\nAFTERIMAGE_API__MAX_WAIT_S=3\n"
    )
    monkeypatch.setenv("AFTERIMAGE_ENVIRONMENT", "test")
    monkeypatch.setenv("AFTERIMAGE_API__MAX_WAITERS", "4")
    monkeypatch.setenv("AFTERIMAGE_API__MAX_WAIT_S", "4")
    api = load_settings(api={"max_wait_s": 5}).api
    assert (api.port, api.workers, api.threads, api.max_waiters, api.max_wait_s) == (1, 2, 3, 4, 5)
    assert api.decoder_processes == 2


def test_a_config_file_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "somewhere.toml"
    file.write_text('environment = "test"\n[retrieval]\ndefault_k = 7\n')
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(file))
    settings = load_settings()
    assert (settings.environment, settings.retrieval.default_k) == (Environment.TEST, 7)


def test_secrets_are_read_from_files_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "afterimage_queue__url").write_text("redis://:from-a-file@queue/0\n")
    (tmp_path / "afterimage_cache__url").write_text("redis://:from-a-file@cache/0\n")
    (tmp_path / "afterimage_security__signing_keys").write_text('["a-key-of-at-least-24-letters"]\n')
    (tmp_path / "grafana_password").write_text("of another program\n")
    monkeypatch.setenv("AFTERIMAGE_CACHE__URL", "redis://:from-the-environment@cache/0")
    settings = load_settings()
    assert settings.queue.url.get_secret_value() == "redis://:from-a-file@queue/0"
    assert settings.cache.url.get_secret_value() == "redis://:from-the-environment@cache/0"
    assert settings.security.signing_keys[0].get_secret_value() == "a-key-of-at-least-24-letters"


def test_a_missing_folder_or_a_misspelt_name_of_a_secret_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(tmp_path / "not-there"))
    (mistake,) = mistakes()
    assert "not-there" in mistake
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(tmp_path))
    (tmp_path / "afterimage_databse__url").write_text("x")
    assert mistakes() == ["AFTERIMAGE_DATABSE__URL: there is no such setting"]


def test_a_process_reads_its_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("AFTERIMAGE_API__PORT", "1234")
    assert get_settings() is first
    assert load_settings().api.port == 1234


def test_settings_are_immutable() -> None:
    settings = load_settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.environment = Environment.TEST  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.api.port = 1  # type: ignore[misc]


# --- mistakes -----------------------------------------------------------------------------------------------------


def test_every_mistake_has_one_line_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__POOL_SIZE", "many")
    monkeypatch.setenv("AFTERIMAGE_API__PORT", "99999")
    monkeypatch.setenv("AFTERIMAGE_LOGGING__LEVEL", "LOUD")
    monkeypatch.setenv("AFTERIMAGE_QUEUE__URL", "amqp://localhost")
    lines = mistakes()
    assert [line.partition(":")[0] for line in sorted(lines)] == [
        "api.port",
        "database.pool_size",
        "logging.level",
        "queue.url",
    ]
    assert "queue.url: must start with redis://, rediss:// or unix:// (AFTERIMAGE_QUEUE__URL)" in lines


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AFTERIMAGE_DATABASE__URL", f"mysql://user:{SECRET}@host/db"),
        ("AFTERIMAGE_DATABASE__URL", f"postgresql+psycopg2://user:{SECRET}@host:port/db"),
        ("AFTERIMAGE_QUEUE__URL", f"redis://:{SECRET}@host:port/0"),
        ("AFTERIMAGE_QUEUE__URL", f"redis://:{SECRET}/of-it@host/0"),
        ("AFTERIMAGE_CACHE__URL", SECRET),
        ("AFTERIMAGE_DATABASE__PASSWORD", SECRET),
        ("AFTERIMAGE_STORAGE__OPTIONS", f'["{SECRET}"]'),
        ("AFTERIMAGE_STORAGE__OPTIONS", f'{{"secret_access_key": ["{SECRET}"]}}'),
        ("AFTERIMAGE_STORAGE__OPTIONS", f"{{not json {SECRET}"),
        ("AFTERIMAGE_STORAGE", f"not json {SECRET}"),
        ("AFTERIMAGE_DATABSE__URL", SECRET),
    ],
)
def test_a_wrong_secret_is_reported_without_its_value(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigurationError) as caught:
        load_settings()
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert len(caught.value.message.splitlines()) == 1


def test_secrets_are_not_shown_by_printing_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABASE__URL", f"postgresql+psycopg2://user:{SECRET}@host/db")
    monkeypatch.setenv("AFTERIMAGE_CACHE__URL", f"redis://:{SECRET}@host")
    settings = load_settings(storage={"options": {"secret_access_key": SECRET}})
    assert SECRET not in f"{settings!r}{settings}{settings.model_dump()}{settings.model_dump_json()}"


@pytest.mark.parametrize(
    "name",
    ["AFTERIMAGE_DATABSE__URL", "AFTERIMAGE_API__PROT", "AFTERIMAGE_API__PORT__X", "AFTERIMAGE_REQUIRE_API_KEYS"],
)
def test_a_misspelt_variable_is_a_mistake(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    (line,) = mistakes()
    section = name.split("__")[0].removeprefix("AFTERIMAGE_").lower()
    assert section in line.lower()


def test_a_misspelt_variable_in_a_dotenv_file_is_a_mistake() -> None:
    Path(".env").write_text("AFTERIMAGE_DATABSE__URL=x\n")
    assert mistakes() == ["AFTERIMAGE_DATABSE__URL: there is no such setting"]


def test_variables_of_tools_around_the_product_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("AFTERIMAGE_API_KEY", "what a client sends")
    assert load_settings().environment is Environment.LOCAL


def test_a_misspelt_name_in_the_config_file_is_a_mistake() -> None:
    Path("afterimage.toml").write_text('enviroment = "test"\n[api]\nport = 1\n[databse]\nurl = "x"\n')
    assert mistakes() == ["databse: there is no such setting", "enviroment: there is no such setting"]
    Path("afterimage.toml").write_text("[api]\nprot = 1\n")
    assert mistakes() == ["api.prot: there is no such setting (AFTERIMAGE_API__PROT)"]


def test_unknown_names_and_wrong_values_are_reported_together_with_their_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AFTERIMAGE_DATABSE__URL", "x")
    monkeypatch.setenv("AFTERIMAGE_API__PORT", "eighty")
    Path("afterimage.toml").write_text('[databse]\nurl = "x"\n[worker]\ngenerator = "unknown"\n')
    unknown_variable, unknown_section, wrong = mistakes()
    assert unknown_variable == "AFTERIMAGE_DATABSE__URL: there is no such setting"
    assert unknown_section == "databse: there is no such setting"
    assert wrong.startswith("api.port: ")
    assert wrong.endswith(" (AFTERIMAGE_API__PORT)")
    monkeypatch.delenv("AFTERIMAGE_API__PORT")
    assert mistakes()[2] == "worker.generator: 'unknown' is not one of model.generators (AFTERIMAGE_WORKER__GENERATOR)"
    monkeypatch.setenv("AFTERIMAGE_SAFETY__CONCEPTS", '[{"name": "Bad Name"}]')
    assert all(
        line.startswith("safety.concepts.0.") and "(AFTERIMAGE_SAFETY__CONCEPTS)" in line for line in mistakes()[2:]
    )


def test_a_broken_or_missing_config_file_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("afterimage.toml").write_text("[api\n")
    assert len(mistakes()) == 1
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(tmp_path / "not-there.toml"))
    assert mistakes() == [f"AFTERIMAGE_CONFIG_FILE: {tmp_path}/not-there.toml is not a file"]


FAKE = {"generators": {"fast": {"kind": "fake"}}, "default_generator": "fast"}


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ({"environment": "production"}, "security.require_api_keys"),
        ({"environment": "staging"}, "security.require_api_keys"),
        ({"api": {"host": "0.0.0.0"}}, "security.require_api_keys"),
        ({"environment": "local", "model": FAKE}, "the fake generator"),
        ({"environment": "production", "security": {"require_api_keys": True}, "model": FAKE}, "the fake generator"),
        ({"worker": {"generator": "unknown"}}, "worker.generator"),
        ({"model": {"default_generator": "unknown"}}, "default_generator"),
        ({"model": {"generators": {}}}, "generators"),
        ({"model": {"generators": {"Bad Name": {"kind": "fake"}}}}, "Bad Name"),
        ({"model": {"generators": {"a": {"source": "org/model"}}, "default_generator": "a"}}, "revision"),
        ({"model": {"generators": {"a": {}}, "default_generator": "a"}}, "source"),
        ({"model": {"generators": {"a": {"source": ".", "loras": {"My ink": {"source": "."}}}}}}, "My ink"),
        ({"jobs": {"lease_s": 10, "heartbeat_s": 6}}, "heartbeat_s"),
        ({"queue": {"socket_timeout_s": 60}}, "queue.socket_timeout_s"),
        ({"cache": {"socket_timeout_s": 60}}, "cache.socket_timeout_s"),
    ],
)
def test_an_unsafe_or_contradictory_combination_is_refused(overrides: dict[str, Any], place: str) -> None:
    assert any(place in line for line in mistakes(**overrides))


def test_several_unsafe_combinations_are_reported_at_once() -> None:
    lines = mistakes(environment="production", model=FAKE, worker={"generator": "unknown"})
    assert len(lines) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        {"environment": "production", "security": {"require_api_keys": True}, "api": {"host": "0.0.0.0"}},
        {"environment": "test", "model": FAKE},
        {"api": {"host": "::1"}},
        {"model": {"generators": {"a": {"source": "org/model", "revision": "abc"}}, "default_generator": "a"}},
    ],
)
def test_a_safe_combination_is_accepted(overrides: dict[str, Any]) -> None:
    load_settings(**overrides)


# --- former names -------------------------------------------------------------------------------------------------

FORMER_NAMES = [
    ("queue.window", "queue.published_jobs_per_lane", 3),
    ("queue.starving_s", "queue.starvation_timeout_s", 3.0),
    ("worker.spare_seats", "worker.lane_headroom", 3),
]


@pytest.fixture
def _no_warning_yet() -> None:
    warn_of_former.cache_clear()


def variable(name: str) -> str:
    return f"AFTERIMAGE_{name.upper().replace('.', '__')}"


def value_of(settings: Settings, name: str) -> object:
    section, field = name.split(".")
    return getattr(getattr(settings, section), field)


@pytest.mark.usefixtures("_no_warning_yet")
@pytest.mark.parametrize(("former", "current", "value"), FORMER_NAMES)
def test_a_former_name_is_read_from_every_source_and_one_line_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, former: str, current: str, value: float
) -> None:
    section, field = former.split(".")
    assert value_of(load_settings(**{section: {field: value}}), current) == value
    Path("afterimage.toml").write_text(f"[{section}]\n{field} = {value}\n")
    assert value_of(load_settings(), current) == value
    Path("afterimage.toml").unlink()
    Path(".env").write_text(f"{variable(former)}={value}\n")
    assert value_of(load_settings(), current) == value
    Path(".env").unlink()
    monkeypatch.setenv(variable(former), str(value))
    assert value_of(load_settings(), current) == value
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert f"{former} is now {current}" in line
    assert "\n" not in line


@pytest.mark.parametrize(("former", "current", "value"), FORMER_NAMES)
def test_the_sections_accept_former_names_as_keywords(former: str, current: str, value: float) -> None:
    section, field = former.split(".")
    models: dict[str, type[Section]] = {"queue": QueueSettings, "worker": WorkerSettings}
    assert getattr(models[section](**{field: value}), current.split(".")[1]) == value


@pytest.mark.parametrize(("former", "current", "value"), FORMER_NAMES)
def test_a_former_and_a_current_name_together_are_a_mistake_that_names_both(
    monkeypatch: pytest.MonkeyPatch, former: str, current: str, value: float
) -> None:
    monkeypatch.setenv(variable(former), str(value))
    section, field = current.split(".")
    Path("afterimage.toml").write_text(f"[{section}]\n{field} = {value}\n")
    (line,) = mistakes()
    assert former in line
    assert current in line


def test_a_current_name_alone_is_read_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _, current, value in FORMER_NAMES:
        monkeypatch.setenv(variable(current), str(value))
    settings = load_settings(environment="test", model=FAKE)
    assert all(value_of(settings, current) == value for _, current, value in FORMER_NAMES)
    assert caplog.records == []


@pytest.mark.usefixtures("_no_warning_yet")
def test_the_fake_generator_is_also_read_by_its_former_kind(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        settings = load_settings(
            environment="test", model={"generators": {"fast": {"kind": "cheap"}}, "default_generator": "fast"}
        )
        assert settings.model.generators["fast"].kind == "fake"
    (line,) = [record.getMessage() for record in caplog.records]
    assert 'kind = "fake"' in line


def test_the_defaults_of_settings_are_those_of_the_sections() -> None:
    """A partly given section takes the defaults of its own class, so `Settings` may define no other defaults."""
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, Section):
            assert field.default == type(field.default)(), name


# --- the content policy -------------------------------------------------------------------------------------------

RULE = {"threshold": 0.9, "action": "block"}
WEAPON = {"name": "weapon", "texts": ["a gun"], "prompt": RULE}


def test_there_is_no_content_policy_unless_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().safety.concepts == []
    monkeypatch.setenv("AFTERIMAGE_SAFETY__CONCEPTS", json.dumps([WEAPON]))
    (concept,) = load_settings().safety.concepts
    assert concept.prompt is not None
    assert (concept.name, concept.prompt.action, concept.output) == ("weapon", "block", None)


@pytest.mark.parametrize(
    ("concepts", "place"),
    [
        ([{**WEAPON, "name": "Weapons!"}], "concepts.0.name"),
        ([{**WEAPON, "texts": []}], "concepts.0.texts"),
        ([{**WEAPON, "texts": [" "]}], "concepts.0.texts.0"),
        ([{**WEAPON, "prompt": {"threshold": 1.1}}], "concepts.0.prompt.threshold"),
        ([{**WEAPON, "prompt": {"threshold": 0.5, "action": "blur"}}], "concepts.0.prompt.action"),
        ([{**WEAPON, "treshold": 1}], "concepts.0.treshold"),
        ([{**WEAPON, "prompt": None}], "prompt or output is required"),
        ([WEAPON, WEAPON], "a name twice: weapon"),
        ([{**WEAPON, "name": "safety_checker"}], "safety_checker"),
    ],
)
def test_an_invalid_content_policy_is_a_mistake(concepts: list[dict[str, Any]], place: str) -> None:
    (line,) = mistakes(safety={"concepts": concepts})
    assert line.startswith("safety")
    assert place in line


def test_weighed_references_have_the_scale_of_the_training_unless_the_settings_name_another() -> None:
    def scale(**settings: Any) -> float:
        return GeneratorSettings.model_validate({"source": "./klein", **settings}).defaults.ip_adapter_scale

    assert scale() == 0.5
    assert scale(weigh_references=True) == 1
    assert scale(weigh_references=True, defaults={"num_inference_steps": 4}) == 1
    assert scale(weigh_references=True, defaults={"ip_adapter_scale": 0.5}) == 0.5
