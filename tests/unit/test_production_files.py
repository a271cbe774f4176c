"""docker-compose.yml, the Dockerfile, Prometheus and Grafana agree with the code that they start and watch."""

import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from prometheus_client import Counter, Gauge, Histogram

from shared import metrics
from shared.settings import Environment, Settings, load_settings
from tests.deployments import VARIABLES_BESIDE_SETTINGS, assert_starts_a_module, setting_variables

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "_IMAGE:-afterimage-" in service["image"]}
ON_DEMAND = {"migrate", "tools"}
"""Services that end by themselves."""

VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<rest>[^}]*))?\}")


def _interpolated(value: str) -> str:
    """The value as compose interpolates it, without a .env."""
    return VARIABLE.sub(lambda found: found["rest"] or "", value)


def _environment(service: dict[str, Any]) -> dict[str, str]:
    return {name: _interpolated(value) for name, value in service.get("environment", {}).items()}


@pytest.mark.parametrize("name", SERVICES)
def test_every_variable_of_a_service_is_a_setting(name: str) -> None:
    named = {variable for variable in _environment(SERVICES[name]) if variable.startswith("AFTERIMAGE_")}
    assert named <= set(setting_variables()) | VARIABLES_BESIDE_SETTINGS


def _prepare(folder: Path, compose: str = "2.24.0", engine: str = "25.0.0") -> "subprocess.CompletedProcess[str]":
    """Run `ops/prepare.sh` in a copy of this repository, with a stand-in for the versions that docker prints."""
    (folder / "ops").mkdir(exist_ok=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("ops/prepare.sh", ".env.example"):
        shutil.copy(ROOT / name, folder / name)
    docker = folder / "bin" / "docker"
    docker.write_text(f'#!/bin/sh\ncase "$1" in compose) echo {compose};; *) echo {engine};; esac\n')
    docker.chmod(0o755)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    script = folder / "ops" / "prepare.sh"
    return subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, umask=0o077)


def _secrets(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text().strip() for file in (folder / "ops" / "secrets").iterdir()}


@pytest.mark.parametrize("name", OURS)
def test_the_settings_accept_what_compose_gives_a_service(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _prepare(tmp_path).returncode == 0
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    for secret in OURS[name]["secrets"]:
        shutil.copy(tmp_path / COMPOSE["secrets"][secret]["file"], mounted / secret)
    for variable, value in _environment(OURS[name]).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(ROOT / "ops" / "config" / "afterimage.toml"))
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(mounted))
    settings = load_settings()
    assert settings.environment is Environment.PRODUCTION
    assert settings.security.require_api_keys
    assert settings.queue.url != settings.cache.url
    assert bool(settings.security.signing_keys) == (name == "api")


def test_the_prepared_secrets_belong_together_and_stay(tmp_path: Path) -> None:
    assert _prepare(tmp_path).returncode == 0
    made = _secrets(tmp_path)
    assert set(made) == set(COMPOSE["secrets"])
    assert made["postgres_password"] in made["afterimage_database__url"]
    for server in ("queue", "cache"):
        directive, password = made[f"{server}.conf"].split()
        assert directive == "requirepass"
        assert made[f"afterimage_{server}__url"] == f"redis://:{password}@{server}:6379/0"
    assert _prepare(tmp_path).returncode == 0
    assert _secrets(tmp_path) == made


def test_the_prepared_secrets_are_readable_in_containers_and_hidden_on_the_host(tmp_path: Path) -> None:
    _prepare(tmp_path)
    folder = tmp_path / "ops" / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o444}


def test_passwords_of_an_older_env_file_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=of-the-last-release\nFLOWER_PASSWORD=shown\n")
    _prepare(tmp_path)
    made = _secrets(tmp_path)
    assert made["postgres_password"] == "of-the-last-release"
    assert made["flower_auth"] == "afterimage:shown"
    assert len(made["grafana_password"]) == 48


def test_a_secret_whose_files_are_removed_is_made_anew(tmp_path: Path) -> None:
    _prepare(tmp_path)
    before = _secrets(tmp_path)
    for name in ("postgres_password", "afterimage_database__url"):
        (tmp_path / "ops" / "secrets" / name).unlink()
    _prepare(tmp_path)
    after = _secrets(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"postgres_password", "afterimage_database__url"}
    assert after["postgres_password"] in after["afterimage_database__url"]


def test_the_docs_say_how_to_rotate_every_secret() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    section = page.partition("### Rotate secrets\n")[2].partition("\n### ")[0]
    assert {name for name in COMPOSE["secrets"] if f"`{name}`" not in section} == set()


def test_the_docs_list_every_container() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    table = page.partition("| container | how many | notes |\n")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines() for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}
    assert listed == set(SERVICES)


def test_the_changelog_has_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(("version", "accepted"), [("2.23.3", False), ("v2.40.3-3", True), ("5.0.1", True)])
def test_an_old_compose_is_refused(version: str, accepted: bool, tmp_path: Path) -> None:
    done = _prepare(tmp_path, version)
    assert (done.returncode == 0) == accepted
    assert ("Compose " + version + " is too old: 2.24 or newer is needed" in done.stderr) == (not accepted)


@pytest.mark.parametrize(("version", "accepted"), [("20.10.24+dfsg1", False), ("25.0.0", True), ("28.5.2", True)])
def test_an_engine_that_lacks_start_interval_is_refused(version: str, accepted: bool, tmp_path: Path) -> None:
    done = _prepare(tmp_path, engine=version)
    assert (done.returncode == 0) == accepted
    assert ("Engine " + version + " is too old: 25.0 or newer is needed" in done.stderr) == (not accepted)


@pytest.mark.parametrize("name", OURS)
def test_the_module_that_a_service_starts_exists(name: str) -> None:
    assert_starts_a_module(OURS[name]["command"])


def test_every_long_running_service_restarts_and_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] == ("no" if name in ON_DEMAND else "unless-stopped"), name
        assert ("test" in service.get("healthcheck", {})) == (name not in ON_DEMAND), name


def test_a_worker_is_healthy_only_when_it_is_ready() -> None:
    for name, service in OURS.items():
        if service["command"][2] == "worker_service":
            assert service["healthcheck"]["test"] == ["CMD", "python", "-m", "ops.probe", "http://127.0.0.1:9100/ready"]
            assert name in ("io", "reconciler") or service["healthcheck"]["start_period"] == "10m"


def test_every_service_that_uses_the_database_waits_for_the_migrations() -> None:
    for name in OURS.keys() - {"migrate", "flower"}:
        assert OURS[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, name


def test_no_container_has_privileges_or_unlimited_resources() -> None:
    for name, service in SERVICES.items():
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"]), name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert "cpus" in service, name
        assert service["pids_limit"], name
        assert service["logging"]["options"]["max-size"], name
        assert any(each.startswith("/tmp:size=") for each in service["tmpfs"]), name
    # The program of the proxy's image has this capability, and starts only where it is allowed.
    assert {name: service["cap_add"] for name, service in SERVICES.items() if "cap_add" in service} == {
        "proxy": ["NET_BIND_SERVICE"]
    }
    assert re.search(r"^USER (?!root)\w+$", (ROOT / "ops/docker/Dockerfile").read_text(), re.MULTILINE)
    assert {SERVICES[name]["user"] for name in ("queue", "cache")} == {"redis"}
    assert SERVICES["postgres"]["user"] == "postgres"


def test_no_variable_of_a_container_is_a_secret() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            is_file = variable.endswith(("_FILE", "_DIR"))
            assert is_file or not re.search(r"PASSWORD|SECRET|SIGNING|AUTH|TOKEN|__URL$", variable), (name, variable)
            assert "password" not in value.lower() or is_file, (name, variable)


def test_a_service_reaches_only_the_servers_whose_secrets_it_has() -> None:
    networks = {
        "afterimage_database__url": "database",
        "afterimage_queue__url": "queue",
        "afterimage_cache__url": "cache",
    }
    for name, service in OURS.items():
        needed = {networks[secret] for secret in service["secrets"] if secret in networks}
        assert set(service["networks"]) & set(networks.values()) == needed, name
    assert (OURS["flower"]["networks"], SERVICES["proxy"]["networks"]) == (["queue"], ["edge"])
    internal = {name for name, options in COMPOSE["networks"].items() if options}
    assert internal == {"database", "queue", "cache", "metrics"}


def test_only_the_proxy_and_grafana_publish_ports_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"proxy", "grafana"}
    for ports in published.values():
        assert all(_interpolated(port).startswith("127.0.0.1:") for port in ports)


def test_the_proxy_accepts_the_largest_body_of_the_service_and_asks_every_api() -> None:
    caddyfile = (ROOT / "ops" / "proxy" / "Caddyfile").read_text()
    (size,) = re.findall(r"max_size (\d+)MiB", caddyfile)
    assert int(size) * 2**20 == Settings.model_fields["bulks"].default.max_body_bytes
    assert re.search(r"dynamic a \{\s+name api\s+port 8000", caddyfile)
    assert "respond /metrics 404" in caddyfile
    (minutes,) = re.findall(r"response_header_timeout (\d+)m", caddyfile)
    assert int(minutes) * 60 > Settings.model_fields["api"].default.max_stream_s


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_image_is_built_once_and_has_the_version_of_the_project(profile: str) -> None:
    active = [service for service in OURS.values() if profile in service.get("profiles", [profile])]
    built = [service["image"] for service in active if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in active})
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for service in OURS.values():
        assert _interpolated(service["image"]).endswith(f":{version}")
        assert "build" not in service or service["build"]["args"]["VERSION"] == version


def test_the_queue_keeps_its_messages_and_the_cache_evicts_old_keys() -> None:
    queue, cache = (" ".join(SERVICES[name]["command"]) for name in ("queue", "cache"))
    assert "--appendonly yes" in queue
    assert "noeviction" in queue
    assert "allkeys-lru" in cache
    assert SERVICES["queue"]["volumes"]


def test_the_example_environment_names_every_variable_with_its_default() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    names = ("docker-compose.yml", "docker-compose.worker.yml", "ops/config/two-gpus.yml")
    files = [ROOT / name for name in names]
    used = {found["name"]: found["rest"] for file in files for found in VARIABLE.finditer(file.read_text())}
    assert set(example) == {*used, "COMPOSE_PROFILES"}
    free = {name for name in example if name.startswith("ALERT_")} | {"COMPOSE_PROFILES", "REVISION", "STORAGE_URL"}
    free |= {"TORCH_INDEX"}
    assert {name: example[name] for name in example.keys() - free} == {name: used[name] for name in used.keys() - free}


def test_every_worker_kind_runs_on_cpus_and_on_gpus() -> None:
    for kind in ("embed", "generate"):
        on_cpu, on_gpu = SERVICES[kind], SERVICES[f"{kind}-gpu"]
        assert (on_cpu["profiles"], on_gpu["profiles"]) == (["cpu"], ["gpu"])
        assert on_cpu["command"] == on_gpu["command"]
        (device,) = on_gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert _interpolated(device["device_ids"][0]) == "0"
        assert "count" not in device


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


KINDS = sorted({service["build"]["args"]["KIND"] for service in OURS.values() if "build" in service})


@pytest.mark.parametrize("kind", KINDS)
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
    "worker": [
        *("worker_service", "shared", "scripts/contact_sheet.py", "scripts/export", "scripts/admin"),
        *(
            "scripts/try_model",
            "scripts/try_policy.py",
            "scripts/calibrate",
            "scripts/index_images",
            "scripts/bulk_generate",
            "ops/backup",
            "ops/postgres_programs.py",
        ),
    ],
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
        assert not any(source.startswith(each) for each in ignored), source
        assert f"!{source.split('/')[0]}" in ignored, source


# --- Prometheus and Grafana ---------------------------------------------------------------------------------------

PROMQL_WORDS = {"sum", "rate", "increase", "absent", "histogram_quantile", "topk", "by", "max", "and", "for", "or"}
PROMQL_WORDS |= {"min", "min_over_time", "delta", "vector"}


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
        port = environment.get("AFTERIMAGE_METRICS__PORT") or environment.get("AFTERIMAGE_API__PORT")
        if port and name not in ON_DEMAND:
            exposed[name] = int(port)
    assert scraped == exposed


# --- Alertmanager -------------------------------------------------------------------------------------------------

MAIL = {"ALERT_EMAIL_TO": "a@example.com", "ALERT_SMTP": "mail.example.com:587", "ALERT_SMTP_USER": "a"}
HOOK = {"ALERT_WEBHOOK_URL": "https://example.com/hook?a=1&b=2"}


@pytest.mark.parametrize(
    ("variables", "sent_by"),
    [
        ({}, set()),
        (MAIL, {"email_configs"}),
        (HOOK, {"webhook_configs"}),
        (MAIL | HOOK, {"email_configs", "webhook_configs"}),
    ],
)
def test_alerts_are_sent_as_the_environment_says(variables: dict[str, str], sent_by: set[str], tmp_path: Path) -> None:
    program = tmp_path / "alertmanager"
    program.write_text('#!/bin/sh\ncat "${1#--config.file=}"\n')
    program.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "ALERTMANAGER": str(program), **variables}
    script = str(ROOT / "ops" / "alertmanager" / "start.sh")
    written = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True).stdout
    (receiver,) = yaml.safe_load(written)["receivers"]
    assert set(receiver) - {"name"} == sent_by
    if "email_configs" in sent_by:
        (mail,) = receiver["email_configs"]
        assert (mail["to"], mail["smarthost"], mail["require_tls"]) == ("a@example.com", "mail.example.com:587", True)
        assert mail["auth_password_file"] == "/run/secrets/alert_smtp_password"
    if "webhook_configs" in sent_by:
        assert receiver["webhook_configs"][0]["url"] == variables["ALERT_WEBHOOK_URL"]
