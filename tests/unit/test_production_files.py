"""docker-compose.yml, the Dockerfile, Prometheus and Grafana agree with the code that they start and watch."""

import ast
import importlib.util
import json
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel

from shared import metrics
from shared.settings import Environment, Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
SECRETS = {
    "POSTGRES_PASSWORD",
    "QUEUE_PASSWORD",
    "CACHE_PASSWORD",
    "FLOWER_PASSWORD",
    "GRAFANA_PASSWORD",
    "SIGNING_KEY",
}
VARIABLES_BESIDE_SETTINGS = {"AFTERIMAGE_CONFIG_FILE"}

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


def _setting_variables(model: type[BaseModel] = Settings, prefix: str = "AFTERIMAGE_") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}".upper()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _setting_variables(field.annotation, f"{prefix}{name}__".upper())


def _interpolated(value: str) -> str:
    """The value as compose interpolates it, with every secret filled in."""
    return VARIABLE.sub(
        lambda found: "a-secret-of-many-letters" if found["kind"] == "?" else found["rest"] or "", value
    )


def _environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: _interpolated(value) for name, value in service.get("environment", {}).items()}


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_a_service_is_a_setting(name: str) -> None:
    named = {variable for variable in _environment(SERVICES[name]) if variable.startswith("AFTERIMAGE_")}
    assert named <= set(_setting_variables()) | VARIABLES_BESIDE_SETTINGS


@pytest.mark.parametrize("name", OURS)
def test_the_settings_accept_what_compose_gives_a_service(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in _environment(OURS[name]).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(ROOT / "ops" / "config" / "afterimage.toml"))
    settings = load_settings()
    assert settings.environment is Environment.PRODUCTION
    assert settings.security.require_api_keys
    assert settings.queue.url != settings.cache.url


@pytest.mark.parametrize("name", OURS)
def test_the_module_that_a_service_starts_exists(name: str) -> None:
    command = OURS[name]["command"]
    assert command[:2] == ["python", "-m"]
    module = command[2]
    assert importlib.util.find_spec(module) is not None
    if module not in ("celery", "alembic"):
        spec = importlib.util.find_spec(f"{module}.__main__") if "." not in module else importlib.util.find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        assert '__name__ == "__main__"' in Path(spec.origin).read_text()
    if module == "celery":
        assert importlib.util.find_spec(command[command.index("-A") + 1]) is not None


def test_every_long_running_service_restarts_and_has_a_health_check() -> None:
    one_shot = {"migrate"}
    for name, service in SERVICES.items():
        assert service["restart"] == ("no" if name in one_shot else "unless-stopped"), name
        assert ("healthcheck" in service) == (name not in one_shot), name


def test_every_service_that_uses_the_database_waits_for_the_migrations() -> None:
    for name in OURS.keys() - {"migrate", "flower"}:
        assert OURS[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, name


def test_our_containers_have_no_privileges() -> None:
    for name, service in OURS.items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
    assert re.search(r"^USER (?!root)\w+$", (ROOT / "ops/docker/Dockerfile").read_text(), re.MULTILINE)


def test_only_the_api_and_grafana_publish_a_port_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "grafana"}
    for ports in published.values():
        assert all(_interpolated(port).startswith("127.0.0.1:") for port in ports)


def test_the_queue_keeps_its_messages_and_the_cache_evicts_old_keys() -> None:
    queue, cache = (" ".join(SERVICES[name]["command"]) for name in ("queue", "cache"))
    assert "--appendonly yes" in queue
    assert "noeviction" in queue
    assert "allkeys-lru" in cache
    assert SERVICES["queue"]["volumes"]


def test_the_example_environment_names_every_secret_and_leaves_it_empty() -> None:
    example = dict(re.findall(r"^#?(\w+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    used = {found["name"] for found in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text())}
    required = {
        found["name"] for found in VARIABLE.finditer((ROOT / "docker-compose.yml").read_text()) if found["kind"] == "?"
    }
    assert required == SECRETS
    assert {example[name] for name in SECRETS} == {""}
    assert set(example) <= used | {"COMPOSE_PROFILES"}


def test_every_worker_kind_runs_on_cpus_and_on_gpus() -> None:
    for kind in ("embed", "generate"):
        on_cpu, on_gpu = SERVICES[kind], SERVICES[f"{kind}-gpu"]
        assert (on_cpu["profiles"], on_gpu["profiles"]) == (["cpu"], ["gpu"])
        assert on_cpu["command"] == on_gpu["command"]
        (device,) = on_gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


# --- images -------------------------------------------------------------------------------------------------------


def _pins(lock: Path) -> set[str]:
    return set(re.findall(r"^([\w.-]+==[^\s;]+)", lock.read_text(), re.MULTILINE))


NOT_INSTALLED = ("torchao", "bitsandbytes", "c2pa")
"""Extras that the repository's own set-up leaves out. The first two slow each import of diffusers down, and print
warnings. The last one is large."""


def test_the_lock_pins_a_version_that_fits_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].items()
    named = project["dependencies"] + [one for name, extra in extras if name not in NOT_INSTALLED for one in extra]
    pinned = {Requirement(pin).name: Requirement(pin).specifier for pin in _pins(ROOT / "requirements.lock")}
    for requirement in map(Requirement, named):
        if requirement.name == project["name"]:
            continue  # an extra that contains another one
        pins = pinned.get(canonicalize_name(requirement.name), ())
        fitting = [pin for pin in pins if requirement.specifier.contains(pin.version)]
        assert fitting, f"{requirement}: run `make lock`"


@pytest.mark.parametrize("kind", sorted({service["build"]["args"]["KIND"] for service in OURS.values()}))
def test_an_image_installs_a_subset_of_the_tested_versions(kind: str) -> None:
    pins = _pins(ROOT / "ops" / "docker" / f"{kind}.lock")
    assert pins
    assert pins <= _pins(ROOT / "requirements.lock")


@pytest.mark.parametrize("kind", ["api", "flower"])
def test_only_the_worker_image_contains_torch(kind: str) -> None:
    names = {pin.split("==")[0] for pin in _pins(ROOT / "ops" / "docker" / f"{kind}.lock")}
    assert not names & {"torch", "torchvision", "diffusers", "transformers", "open-clip-torch"}


_OURS_AS_PACKAGES = {
    *("afterimage_client", "api_service", "worker_service", "shared"),
    *("migrations", "scripts", "ops", "starter"),
}
RUN_BY = {
    "api": [
        *("api_service", "shared", "migrations", "scripts/admin"),
        *("worker_service/__main__.py", "worker_service/maintenance"),
        *(f"worker_service/workers/{name}.py" for name in ("process", "io", "revoke", "lane_transport", "consumer")),
    ],
    "worker": ["worker_service", "shared", "scripts/try_model", "scripts/contact_sheet.py"],
    "flower": ["ops/flower"],
}


def _imported(source: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("kind", RUN_BY)
def test_an_image_contains_every_package_that_its_code_imports(kind: str) -> None:
    paths = [ROOT / name for name in RUN_BY[kind]]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    providers = packages_distributions()
    needed = {name for file in files for name in _imported(file) if name in providers} - _OURS_AS_PACKAGES
    installed = {pin.split("==")[0] for pin in _pins(ROOT / "ops" / "docker" / f"{kind}.lock")}
    missing = {name for name in needed if not installed & {canonicalize_name(provider) for provider in providers[name]}}
    assert missing == set()


def test_no_lock_names_a_registry_or_a_folder() -> None:
    for lock in (ROOT / "requirements.lock", *(ROOT / "ops" / "docker").glob("*.lock")):
        assert not re.search(r"://|--index|--find-links|--extra-index| @ ", lock.read_text()), lock


def test_every_path_that_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "ops/docker/Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).replace("${KIND}", "api").split():
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignored, source


# --- Prometheus and Grafana ---------------------------------------------------------------------------------------

PROMQL_WORDS = {"sum", "rate", "increase", "absent", "histogram_quantile", "topk", "by", "max", "and", "for", "or"}
PROMQL_WORDS |= {"min", "min_over_time", "delta"}


def _metric_names() -> set[str]:
    names = {"up"}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            (described,) = metric.describe()
            suffixes = {Counter: ["_total"], Gauge: [""], Histogram: ["_bucket", "_sum", "_count"]}[type(metric)]
            names |= {described.name + suffix for suffix in suffixes}
    return names


def _names_in(expression: str) -> set[str]:
    without_labels = re.sub(r"\{[^}]*\}|\bby \([^)]*\)|\[[^]]*\]", " ", expression)
    return set(re.findall(r"\b[a-z]\w+", without_labels)) - PROMQL_WORDS


def _alerts() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("alert", _alerts(), ids=lambda alert: str(alert["alert"]))
def test_an_alert_watches_metrics_that_exist_and_says_what_to_do(alert: dict[str, Any]) -> None:
    assert _names_in(alert["expr"])
    assert _names_in(alert["expr"]) <= _metric_names()
    assert alert["annotations"]["action"]


def test_the_dashboard_shows_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "ops/grafana/dashboards/afterimage.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(expressions) > 20
    for expression in expressions:
        assert _names_in(expression) <= _metric_names(), expression


def test_prometheus_scrapes_every_service_on_its_port() -> None:
    jobs = yaml.safe_load((ROOT / "ops/prometheus/prometheus.yml").read_text())["scrape_configs"]
    scraped = {name: source["port"] for job in jobs for source in job["dns_sd_configs"] for name in source["names"]}
    exposed = {}
    for name, service in OURS.items():
        environment = _environment(service)
        if port := environment.get("AFTERIMAGE_METRICS__PORT") or environment.get("AFTERIMAGE_API__PORT"):
            exposed[name] = int(port)
    assert scraped == exposed
