"""docker-compose.worker.yml, the workers of another machine, agrees with docker-compose.yml and with the product."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.settings import Environment, Settings, load_settings
from tests.deployments import ROOT, VARIABLES_BESIDE_SETTINGS, assert_starts_a_module, setting_variables

FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.worker.yml").read_text())
MAIN: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
STORAGE_URL = "s3://bucket/prefix"
CONTENTS = {
    "afterimage_database__url": "postgresql+psycopg2://a:b@db.example.com:6432/a?sslmode=verify-full"
    "&sslrootcert=/run/secrets/ca.crt",
    "afterimage_queue__url": "rediss://:a@queue.example.com:6379/0?ssl_ca_certs=/run/secrets/ca.crt",
    "afterimage_cache__url": "rediss://:a@cache.example.com:6379/0?ssl_ca_certs=/run/secrets/ca.crt",
    "afterimage_storage__options": '{"region": "eu-central-1", "access_key_id": "a", "secret_access_key": "b"}',
    "ca.crt": "",
}
"""The secrets, with addresses like those in the comments of the file."""


@pytest.mark.parametrize("name", SERVICES)
def test_the_settings_accept_what_a_worker_gets(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service = SERVICES[name]
    assert set(service["secrets"]) == set(FILE["secrets"]) == set(CONTENTS)
    for secret in service["secrets"]:
        (tmp_path / secret).write_text(CONTENTS[secret])
    named = {variable for variable in service["environment"] if variable.startswith("AFTERIMAGE_")}
    assert named <= set(setting_variables()) | VARIABLES_BESIDE_SETTINGS
    for variable, value in service["environment"].items():
        monkeypatch.setenv(variable, STORAGE_URL if "STORAGE_URL" in value else value)
    monkeypatch.setenv("AFTERIMAGE_CONFIG_FILE", str(ROOT / "ops" / "config" / "afterimage.toml"))
    monkeypatch.setenv("AFTERIMAGE_SECRETS_DIR", str(tmp_path))
    settings = load_settings()
    assert settings.environment is Environment.PRODUCTION
    assert settings.database.url.get_secret_value() == CONTENTS["afterimage_database__url"]
    assert settings.queue.url.get_secret_value() == CONTENTS["afterimage_queue__url"]
    assert settings.storage.url == STORAGE_URL
    assert settings.storage.options["region"].get_secret_value() == "eu-central-1"


@pytest.mark.parametrize("name", SERVICES)
def test_a_worker_is_like_that_of_the_first_machine(name: str) -> None:
    here, there = SERVICES[name], MAIN["services"][name]
    assert_starts_a_module(here["command"])
    same = [
        *("image", "command", "profiles", "healthcheck", "stop_grace_period", "read_only", "cap_drop", "tmpfs"),
        *(
            "security_opt",
            "mem_limit",
            "cpus",
            "cpuset",
            "pids_limit",
            "logging",
            "restart",
            "init",
            "pull_policy",
            "env_file",
        ),
    ]
    assert {key: here[key] for key in same} == {key: there[key] for key in same}
    assert here.get("build") == there.get("build")
    assert here.get("deploy") == there.get("deploy")


def test_nothing_else_runs_there_and_only_the_metrics_are_published_on_loopback() -> None:
    assert set(SERVICES) == {"embed", "embed-gpu", "generate", "generate-gpu"}
    for service in SERVICES.values():
        (port,) = service["ports"]
        assert port.startswith("${METRICS_ADDRESS:-127.0.0.1}:")
        assert port.endswith(f":{service['environment']['AFTERIMAGE_METRICS__PORT']}")


def test_a_worker_has_time_to_hand_its_jobs_back() -> None:
    grace_s = Settings.model_fields["jobs"].default.shutdown_grace_s
    for service in SERVICES.values():
        assert int(service["stop_grace_period"].removesuffix("s")) >= grace_s + 15
