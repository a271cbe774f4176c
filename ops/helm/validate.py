"""Check resources against the schemas of Kubernetes, KEDA and the Prometheus operator; unknown fields are mistakes too.

    helm template afterimage ops/helm/afterimage | python -m ops.helm.validate

Needs the packages of `python -m ops.helm.tools`. Prints one line per mistake, and ends with 1 if there is one.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import yaml

from ops.helm.tools import PACKAGES

VERSIONS = ("1.29", "1.37")
"""The oldest Kubernetes that the chart accepts, and the newest with a schema."""
CUSTOM_KINDS = {
    "ScaledObject": "cloudcoil.models.keda.v1alpha1",
    "ServiceMonitor": "cloudcoil.models.prometheus_operator.v1",
    "PrometheusRule": "cloudcoil.models.prometheus_operator.v1",
}
"""Kinds that operators add to a cluster, and the module with a model of each."""


def find_mistakes(resource: dict[str, Any]) -> Iterator[str]:
    """One line per mistake in a resource."""
    name = f"{resource['kind']} {resource['metadata']['name']}"
    if resource["kind"] in CUSTOM_KINDS:
        model = getattr(import_module(CUSTOM_KINDS[resource["kind"]]), resource["kind"])
        try:
            known = model.model_validate(resource).model_dump(by_alias=True, exclude_unset=True, mode="json")
        except ValueError as error:
            yield f"{name}: {error}"
            return
        # The models ignore fields that they do not know, as a cluster does.
        if known != resource:
            yield f"{name}: has unknown fields"
        return
    schemas = import_module("kubernetes_validate")
    for version in VERSIONS:
        try:
            schemas.validate(resource, version, strict=True)
        except schemas.ValidationError as error:
            yield f"{name}: {'.'.join(map(str, error.path))}: {error.message} (Kubernetes {version})"
        except schemas.SchemaNotFoundError as error:
            yield f"{name}: {error.message}"


def main() -> int:
    sys.path.append(str(PACKAGES))
    resources = [resource for resource in yaml.safe_load_all(sys.stdin) if resource]
    mistakes = [mistake for resource in resources for mistake in find_mistakes(resource)]
    print(*mistakes, f"{len(resources)} resources, {len(mistakes)} mistakes", sep="\n")
    return 1 if mistakes else 0


if __name__ == "__main__":
    sys.exit(main())
