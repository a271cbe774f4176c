"""Where settings come from, and how a wrong one is told."""

import json
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
    Environment,
    GeneratorSettings,
    IPAdapterSettings,
    LoraSettings,
    OutputRule,
    PromptRule,
    Section,
    Settings,
    get_settings,
    load_settings,
)

SECRET = "hunter2hunter2"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variables of ours, and an empty current directory."""
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
    return [section for section in Section.__subclasses__() if section.__module__ == "shared.settings"]


def test_nothing_has_to_be_set() -> None:
    settings = load_settings()
    assert settings.environment is Environment.LOCAL
    assert settings.model.offline
    assert settings.storage.url.startswith("file://")
    assert settings.model.default_generator in settings.model.generators


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_field_of_every_section_has_a_default(section: type[BaseModel]) -> None:
    # These describe one entry of a list that is empty by default: what they name cannot be guessed.
    required = {
        IPAdapterSettings: {"source"},
        LoraSettings: {"source"},
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


def test_no_default_is_a_secret_that_ships() -> None:
    for section in sections():
        for name, field in section.model_fields.items():
            if field.annotation in (str, SecretStr) and re.search("password|secret|token|key", name):
                assert field.default in (None, PydanticUndefined, ""), name


# --- sources ------------------------------------------------------------------------------------------------------


def test_variables_reach_nested_fields(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_stronger_source_wins_field_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert api.decoder_processes == 1


def test_a_config_file_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "somewhere.toml"
    file.write_text('environment = "test"\n[retrieval]\ndefault_k = 7\n')
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(file))
    settings = load_settings()
    assert (settings.environment, settings.retrieval.default_k) == (Environment.TEST, 7)


def test_a_process_reads_its_settings_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = get_settings()
    monkeypatch.setenv("AFTERIMAGE_API__PORT", "1234")
    assert get_settings() is first
    assert load_settings().api.port == 1234


def test_settings_do_not_change() -> None:
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
    assert "queue.url: must start with redis://, rediss:// or unix://" in lines


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
def test_a_wrong_secret_is_told_without_its_value(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
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


def test_variables_of_tools_around_the_product_are_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("AFTERIMAGE_API_KEY", "what a client sends")
    assert load_settings().environment is Environment.LOCAL


def test_a_misspelt_name_in_the_config_file_is_a_mistake() -> None:
    Path("afterimage.toml").write_text('enviroment = "test"\n[api]\nport = 1\n[databse]\nurl = "x"\n')
    assert mistakes() == ["databse: there is no such setting", "enviroment: there is no such setting"]
    Path("afterimage.toml").write_text("[api]\nprot = 1\n")
    assert mistakes() == ["api.prot: Extra inputs are not permitted"]


def test_a_broken_or_missing_config_file_is_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Path("afterimage.toml").write_text("[api\n")
    assert len(mistakes()) == 1
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(tmp_path / "not-there.toml"))
    assert mistakes() == [f"AFTERIMAGE_CONFIG_FILE: {tmp_path}/not-there.toml is not a file"]


CHEAP = {"generators": {"cheap": {"kind": "cheap"}}, "default_generator": "cheap"}


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ({"environment": "production"}, "security.require_api_keys"),
        ({"environment": "staging"}, "security.require_api_keys"),
        ({"api": {"host": "0.0.0.0"}}, "security.require_api_keys"),
        ({"environment": "local", "model": CHEAP}, "cheap"),
        ({"environment": "production", "security": {"require_api_keys": True}, "model": CHEAP}, "cheap"),
        ({"worker": {"generator": "nobody"}}, "worker.generator"),
        ({"model": {"default_generator": "nobody"}}, "default_generator"),
        ({"model": {"generators": {}}}, "generators"),
        ({"model": {"generators": {"Bad Name": {"kind": "cheap"}}}}, "Bad Name"),
        ({"model": {"generators": {"a": {"source": "org/model"}}, "default_generator": "a"}}, "revision"),
        ({"model": {"generators": {"a": {}}, "default_generator": "a"}}, "source"),
        ({"jobs": {"lease_s": 10, "heartbeat_s": 6}}, "heartbeat_s"),
        ({"queue": {"socket_timeout_s": 60}}, "queue.socket_timeout_s"),
        ({"cache": {"socket_timeout_s": 60}}, "cache.socket_timeout_s"),
    ],
)
def test_an_unsafe_or_senseless_combination_is_refused(overrides: dict[str, Any], place: str) -> None:
    assert any(place in line for line in mistakes(**overrides))


def test_several_unsafe_combinations_are_told_at_once() -> None:
    lines = mistakes(environment="production", model=CHEAP, worker={"generator": "nobody"})
    assert len(lines) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        {"environment": "production", "security": {"require_api_keys": True}, "api": {"host": "0.0.0.0"}},
        {"environment": "test", "model": CHEAP},
        {"api": {"host": "::1"}},
        {"model": {"generators": {"a": {"source": "org/model", "revision": "abc"}}, "default_generator": "a"}},
    ],
)
def test_a_safe_combination_is_accepted(overrides: dict[str, Any]) -> None:
    load_settings(**overrides)


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
def test_a_policy_that_would_not_hold_stops_the_start(concepts: list[dict[str, Any]], place: str) -> None:
    (line,) = mistakes(safety={"concepts": concepts})
    assert line.startswith("safety")
    assert place in line
