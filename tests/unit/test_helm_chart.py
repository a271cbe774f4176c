"""The Helm chart: its three examples are valid for Kubernetes, and all that they name exists in the product.

Helm and the schemas come from packages (ops/helm/tools.lock). Where these cannot be installed, the tests that need them
are skipped. No cluster has run the chart.
"""

import json
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import jsonschema_rs
import pytest
import yaml

from api_service.app import create_app
from ops.helm import tools
from shared import metrics
from shared.settings import Environment, Settings, load_settings
from shared.settings.root import MetricsSettings
from tests.deployments import ROOT, VARIABLES_BESIDE_SETTINGS, assert_starts_a_module, setting_variables

CHART = ROOT / "ops" / "helm" / "afterimage"
EXAMPLES = sorted((ROOT / "ops" / "helm" / "examples").glob("*.yaml"))
NAMESPACE = "images"
CONTENTS = {
    "afterimage_database__url": "postgresql+psycopg2://a:b@db.example.com:5432/a",
    "afterimage_queue__url": "rediss://:a@queue.example.com:6379/0",
    "afterimage_cache__url": "rediss://:a@cache.example.com:6379/0",
    "afterimage_security__signing_keys": f'["{"k" * 48}"]',
    "afterimage_storage__options": '{"region": "eu-central-1"}',
    "afterimage_planner__api_key": "key",
    "flower_auth": "user:password",
}
"""A value for each file of a secret."""
SERVERS = {
    "afterimage_database__url": "database",
    "afterimage_queue__url": "queue",
    "afterimage_cache__url": "cache",
}
"""The server whose address is in a file, by its name in `networkPolicy.ports`."""

Resource = dict[str, Any]


@cache
def installed_helm() -> Path | tools.ToolsUnavailableError:
    """Helm, or why it cannot be installed: one attempt for all tests."""
    try:
        return tools.install()
    except tools.ToolsUnavailableError as error:
        return error


def helm() -> Path:
    found = installed_helm()
    if isinstance(found, tools.ToolsUnavailableError):
        pytest.skip(f"Helm cannot be installed: {found}")
    return found


def run_helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([helm(), *arguments], capture_output=True, text=True)


@cache
def rendered(example: Path | None, *sets: str) -> list[Resource]:
    """The resources of the chart for an example, or for the chart's own values."""
    files = ["-f", str(example)] if example else []
    options = [option for each in sets for option in ("--set-json", each)]
    done = run_helm("template", "afterimage", str(CHART), "--namespace", NAMESPACE, *files, *options)
    assert done.returncode == 0, done.stderr
    return [resource for resource in yaml.safe_load_all(done.stdout) if resource]


def of_kind(resources: list[Resource], kind: str) -> list[Resource]:
    return [resource for resource in resources if resource["kind"] == kind]


def pod_templates(resources: list[Resource]) -> Iterator[Resource]:
    for resource in resources:
        if resource["kind"] in ("Deployment", "Job"):
            yield resource["spec"]["template"]


def component_of(resource: Resource) -> str:
    return str(resource["metadata"]["labels"]["app.kubernetes.io/component"])


def secret_files(pod: Resource) -> dict[str, str]:
    """The mounted file of each (secret/key) of a pod, as file -> secret/key."""
    (volume,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == "secrets"]
    sources = [source["secret"] for source in volume["projected"]["sources"]]
    return {item["path"]: f"{source['name']}/{item['key']}" for source in sources for item in source["items"]}


def plain_environment(container: Resource) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


examples = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


# --- without Helm -------------------------------------------------------------------------------------------------


def _merged(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merged(base.get(key), value) for key, value in over.items()}
    return over


@examples
def test_the_schema_of_the_values_accepts_an_example(example: Path) -> None:
    values = _merged(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(example.read_text()))
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    jsonschema_rs.validator_for(schema).validate(values)


def test_the_chart_has_the_version_of_the_project() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (chart["version"], chart["appVersion"]) == (version, version)


def test_alerts_and_dashboard_are_those_of_compose() -> None:
    assert (CHART / "files/alerts.yml").samefile(ROOT / "ops/prometheus/alerts.yml")
    assert (CHART / "files/dashboard.json").samefile(ROOT / "ops/grafana/dashboards/afterimage.json")


# --- with Helm ----------------------------------------------------------------------------------------------------


@examples
def test_helm_finds_no_fault(example: Path) -> None:
    done = run_helm("lint", "--strict", str(CHART), "-f", str(example))
    assert done.returncode == 0, done.stdout


def _mistakes(resources: list[Resource]) -> str:
    """The output of `ops.helm.validate`."""
    command = [sys.executable, "-m", "ops.helm.validate"]
    text = yaml.safe_dump_all(resources)
    return subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT).stdout


@pytest.mark.extended
def test_all_resources_fit_the_schemas_and_a_wrong_field_does_not() -> None:
    helm()
    every = [resource for example in EXAMPLES for resource in rendered(example)]
    assert _mistakes(every).endswith(f"{len(every)} resources, 0 mistakes\n")
    wrong = json.loads(
        json.dumps([of_kind(every, kind)[0] for kind in ("Deployment", "ScaledObject", "NetworkPolicy")])
    )
    wrong[0]["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    wrong[1]["spec"]["minReplicas"] = 1
    wrong[2]["spec"]["policyTypes"] = "Egress"
    output = _mistakes(wrong)
    assert "Deployment afterimage-api: " in output
    assert "ScaledObject afterimage-embed: has unknown fields" in output
    assert "NetworkPolicy afterimage-api: " in output


@examples
def test_the_settings_accept_what_each_process_gets(
    example: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    resources = rendered(example)
    (config,) = [each for each in of_kind(resources, "ConfigMap") if each["metadata"]["name"] == "afterimage"]
    (tmp_path / "afterimage.toml").write_text(config["data"]["afterimage.toml"])
    known = set(setting_variables()) | VARIABLES_BESIDE_SETTINGS
    for number, pod in enumerate(pod_templates(resources)):
        (container,) = pod["spec"]["containers"]
        variables = plain_environment(container)
        assert {name for name in variables if name.startswith("AFTERIMAGE_")} <= known, component_of(pod)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert variables["AFTERIMAGE_SECRETS_DIR"] == mounts["secrets"]
        secrets = tmp_path / f"secrets-{number}"
        secrets.mkdir()
        for file in secret_files(pod):
            (secrets / file).write_text(CONTENTS[file])
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setenv("AFTERIMAGE_SECRETS_DIR", str(secrets))
            if "AFTERIMAGE_CONFIG_FILE" in variables:
                assert variables["AFTERIMAGE_CONFIG_FILE"] == f"{mounts['config']}/afterimage.toml"
                patch.setenv("AFTERIMAGE_CONFIG_FILE", str(tmp_path / "afterimage.toml"))
            settings = load_settings()
        assert settings.environment is Environment.PRODUCTION
        assert settings.security.require_api_keys
        assert bool(settings.security.signing_keys) == (component_of(pod) == "api")
        if component_of(pod) == "generate":
            assert container["command"][-1] in settings.model.generators


@examples
def test_each_process_starts_a_module_with_its_own_secrets(example: Path) -> None:
    assert 'Path("/run/secrets/flower_auth")' in (ROOT / "ops/flower/config.py").read_text()
    for pod in pod_templates(rendered(example)):
        (container,) = pod["spec"]["containers"]
        assert_starts_a_module(container["command"])
        files = secret_files(pod)
        assert ("flower_auth" in files) == (component_of(pod) == "flower")
        (folder,) = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "secrets"]
        assert (folder == "/run/secrets") == (component_of(pod) == "flower")
        # The token of a service account is mounted below /run/secrets, for which a read-only volume has no room.
        assert ("serviceAccountName" in pod["spec"]) == (component_of(pod) not in ("flower", "migrate"))
        if component_of(pod) in ("flower", "migrate"):
            assert set(files) <= {"afterimage_database__url", "afterimage_queue__url", "flower_auth"}


def _port_numbers(container: Resource) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in container.get("ports", [])}


@examples
def test_ports_are_those_on_which_the_processes_listen(example: Path) -> None:
    resources = rendered(example)
    ports = {}
    for pod in pod_templates(resources):
        (container,) = pod["spec"]["containers"]
        variables = plain_environment(container)
        listening = {
            "api": ("http", "AFTERIMAGE_API__PORT", "AFTERIMAGE_API__HOST"),
            "flower": ("http", "FLOWER_PORT", "FLOWER_ADDRESS"),
            "migrate": None,
        }.get(component_of(pod), ("metrics", "AFTERIMAGE_METRICS__PORT", "AFTERIMAGE_METRICS__HOST"))
        ports[component_of(pod)] = _port_numbers(container)
        if listening is not None:
            name, port, host = listening
            assert _port_numbers(container) == {name: int(variables[port])}
            assert variables[host] == "0.0.0.0"
    for service in of_kind(resources, "Service"):
        for port in service["spec"]["ports"] if "selector" in service["spec"] else ():
            assert port["targetPort"] in ports[component_of(service)]


def _probes(container: Resource) -> dict[str, Resource]:
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    return {kind: container[kind] for kind in kinds if kind in container}


@examples
def test_probes_ask_paths_that_the_processes_answer(example: Path) -> None:
    with create_app(Settings(api={"port": 0})).test_client() as api:
        api_paths = {"/api/v1/health/live": api.get("/api/v1/health/live").status_code}
    ready = [False]
    port = metrics.serve(MetricsSettings(port=free_port()), lambda: ready[0])
    worker = f"http://127.0.0.1:{port}"
    with pytest.raises(OSError, match="503"):
        urlopen(f"{worker}/ready")
    assert urlopen(f"{worker}/metrics").status == 200, "a worker that loads its model is alive"
    ready[0] = True
    for pod in pod_templates(rendered(example)):
        (container,) = pod["spec"]["containers"]
        probes = _probes(container)
        for kind, probe in probes.items():
            path = probe["httpGet"]["path"]
            assert probe["httpGet"]["port"] in _port_numbers(container)
            if component_of(pod) == "api":
                assert api_paths[path] == 200
            elif component_of(pod) != "flower":
                assert urlopen(f"{worker}{path}").status == 200
                assert (path == "/ready") == (kind != "livenessProbe")
        assert ("readinessProbe" in probes and "livenessProbe" in probes) == (component_of(pod) != "migrate")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@examples
def test_no_pod_has_privileges_or_unlimited_memory_or_a_secret_variable(example: Path) -> None:
    for pod in pod_templates(rendered(example)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001, "the user of the Dockerfile"
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]
        for name, value in plain_environment(container).items():
            assert not re.search(r"PASSWORD|SIGNING|AUTH|TOKEN|(DATABASE|QUEUE|CACHE)__URL$", name), name
            assert "password" not in value.lower()
    assert "--uid 10001" in (ROOT / "ops/docker/Dockerfile").read_text()


@examples
def test_workers_have_time_to_hand_their_jobs_back(example: Path) -> None:
    jobs = Settings.model_fields["jobs"].default
    for pod in pod_templates(rendered(example)):
        if component_of(pod) in ("embed", "generate", "io", "reconciler"):
            assert pod["spec"]["terminationGracePeriodSeconds"] >= jobs.shutdown_grace_s + 15


@examples
def test_a_pod_may_call_the_servers_whose_addresses_it_has_and_no_others(example: Path) -> None:
    resources = rendered(example)
    values = _merged(yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load(example.read_text()))
    ports = values["networkPolicy"]["ports"]
    policies = {
        policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]: policy["spec"]
        for policy in of_kind(resources, "NetworkPolicy")
    }
    for pod in pod_templates(resources):
        policy = policies[component_of(pod)]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        allowed = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
        servers = {SERVERS[file] for file in secret_files(pod) if file in SERVERS}
        servers |= set() if component_of(pod) in ("flower", "migrate") else {"web"}
        assert allowed == {53} | {port for server in servers for port in ports[server]}
        (container,) = pod["spec"]["containers"]
        open_ports = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
        assert open_ports <= set(_port_numbers(container))
        assert all(rule["from"] for rule in policy["ingress"])
    assert policies["flower"]["ingress"] == []


# --- monitoring and autoscaling -----------------------------------------------------------------------------------

(GPU_CLUSTER,) = [example for example in EXAMPLES if example.stem == "gpu-cluster"]


def test_prometheus_gets_the_alerts_of_compose_but_those_that_mean_nothing_here() -> None:
    (rule,) = of_kind(rendered(GPU_CLUSTER), "PrometheusRule")
    ours = yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())["groups"]
    for group in ours:
        group["rules"] = [each for each in group["rules"] if each["alert"] != "NoGenerateWorker"]
    assert rule["spec"]["groups"] == ours, "the model `klein` has no worker while no job waits"
    always = rendered(GPU_CLUSTER, 'generators=[{"name":"sdxl"}]')
    (rule,) = of_kind(always, "PrometheusRule")
    assert "NoGenerateWorker" in [each["alert"] for group in rule["spec"]["groups"] for each in group["rules"]]


def test_the_scraped_services_have_the_names_that_the_alerts_ask_for() -> None:
    resources = rendered(GPU_CLUSTER)
    (monitor,) = of_kind(resources, "ServiceMonitor")
    (condition,) = monitor["spec"]["selector"]["matchExpressions"]
    assert condition["key"] == monitor["spec"]["jobLabel"]
    watched = set(re.findall(r'up\{job="(\w+)"\}', (ROOT / "ops/prometheus/alerts.yml").read_text()))
    assert watched <= set(condition["values"])
    services = [each for each in of_kind(resources, "Service") if "selector" in each["spec"]]
    ports = {component_of(each): {port["name"] for port in each["spec"]["ports"]} for each in services}
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    assert all(ports[component] & scraped for component in condition["values"])


def test_the_dashboard_is_that_of_compose() -> None:
    (shown,) = [each for each in of_kind(rendered(GPU_CLUSTER), "ConfigMap") if "dashboard" in each["metadata"]["name"]]
    assert shown["data"]["afterimage.json"] == (ROOT / "ops/grafana/dashboards/afterimage.json").read_text()


def test_workers_are_scaled_by_the_queue_of_their_model() -> None:
    resources = rendered(GPU_CLUSTER)
    deployments = {each["metadata"]["name"]: each for each in of_kind(resources, "Deployment")}
    queues = {}
    for scaled in of_kind(resources, "ScaledObject"):
        deployment = deployments[scaled["spec"]["scaleTargetRef"]["name"]]
        assert "replicas" not in deployment["spec"], "an upgrade would undo the scaling"
        (trigger,) = scaled["spec"]["triggers"]
        found = re.fullmatch(r"max\((\w+)\{(.*)\}\)", trigger["metadata"]["query"])
        assert found
        metric = {"queue_depth": metrics.QUEUE_DEPTH, "embedding_space_missing": metrics.EMBEDDING_SPACE_MISSING}[
            found[1]
        ]
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found[2]))
        assert labels.pop("namespace") == NAMESPACE
        assert set(labels) <= set(metric._labelnames)
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        if labels:
            assert container["command"][-1] == labels["queue"]
            queues[labels["queue"]] = scaled["spec"]["minReplicaCount"]
        # A job that left the queue long ago may still run. It ends within its time limit.
        longest_s = Settings.model_fields["jobs"].default.timeout_s
        assert scaled["spec"]["cooldownPeriod"] > longest_s
        behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior["scaleDown"]["stabilizationWindowSeconds"] > longest_s
        assert scaled["spec"]["fallback"]["replicas"] >= 1
    assert queues == {"sdxl": 1, "klein": 0}


def test_a_gpu_worker_has_its_gpu_and_ends_before_its_successor() -> None:
    for deployment in of_kind(rendered(GPU_CLUSTER), "Deployment"):
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        on_gpu = component_of(deployment) in ("embed", "generate")
        assert container["resources"]["limits"].get("nvidia.com/gpu") == (1 if on_gpu else None)
        surge = deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        assert surge == (0 if on_gpu else 1)
        tolerated = [each["key"] for each in deployment["spec"]["template"]["spec"].get("tolerations", [])]
        assert tolerated == (["nvidia.com/gpu"] if on_gpu else [])


def test_metrics_are_not_served_to_the_outside() -> None:
    resources = rendered(GPU_CLUSTER)
    (ingress,) = of_kind(resources, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    (metrics_path,) = [path for path in rule["http"]["paths"] if path["path"] == "/metrics"]
    refused = metrics_path["backend"]["service"]["name"]
    (service,) = [each for each in of_kind(resources, "Service") if each["metadata"]["name"] == refused]
    assert metrics_path["pathType"] == "Exact"
    assert "selector" not in service["spec"]


def test_migrations_use_their_own_address_and_run_before_the_release() -> None:
    (external,) = [example for example in EXAMPLES if example.stem == "external-services"]
    (job,) = of_kind(rendered(external), "Job")
    assert secret_files(job["spec"]["template"]) == {"afterimage_database__url": "postgres-direct/url"}
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    names = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
    assert "configMap" not in str(names), "the hook runs before the ConfigMap exists"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ('genrators=[{"name":"starter"}]', "genrators"),
        ('generators=[{"name":"sdxl"}]', 'config.model.generators has no "sdxl"'),
        ('settings={"AFTERIMAGE_DATABASE__URL":"postgresql+psycopg2://a:b@c/d"}', "AFTERIMAGE_DATABASE__URL"),
        ('storage.url="file:///data"', "storage"),
        ('embed.autoscaling={"enabled":true}', "keda.prometheusUrl is needed"),
        ('ingress={"enabled":true,"host":"a.example.com"}', "ingress.tlsSecret is needed"),
        ("workerGraceSeconds=10", "workerGraceSeconds"),
    ],
)
def test_wrong_values_are_refused_with_their_name(wrong: str, named: str) -> None:
    done = run_helm("template", "afterimage", str(CHART), "--set-json", wrong)
    assert done.returncode != 0
    assert named in done.stderr
