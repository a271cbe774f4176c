"""The tables of metrics, alerts, ports and limits in the documents agree with the code and with the compose file."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.document_metrics import PAGE, page
from shared.settings import Section, Settings

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
NOT_SETTINGS = {"queue.conf", "cache.conf", "model.weights_digest_kind"}
"""Two secrets, and a field of an output's record."""
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_the_page_of_metrics_and_alerts_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def rows(head: str) -> list[list[str]]:
    """The cells of a table of docs/operations.md."""
    table = OPERATIONS.partition(f"\n| {head} |\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def ports(service: dict[str, Any]) -> set[int]:
    """Ports of a service that other containers or clients reach, as the compose file names them."""
    published = [port.rpartition(":")[2] for port in service.get("ports", ())]
    own = [value for name, value in service.get("environment", {}).items() if name.endswith(("S__PORT", "I__PORT"))]
    checked = re.findall(r"http://127\.0\.0\.1:(\d+)/", str(service.get("healthcheck", "")))
    return {int(port) for port in (published or [*own, *service.get("expose", ()), *checked])}


def test_the_docs_list_the_ports_of_every_container() -> None:
    addresses = re.findall(r"@(\w+):(\d+)/", (ROOT / "ops" / "prepare.sh").read_text())
    used = {name: ports(service) for name, service in SERVICES.items()} | {
        name: {int(port)} for name, port in addresses
    }
    listed = {
        name: {int(port) for port in re.findall(r"\d+", cells[1])}
        for cells in rows("container | port | who connects")
        for name in re.findall(r"`([\w-]+)`", cells[0])
    }
    assert listed == {name: numbers for name, numbers in used.items() if numbers and name not in ("migrate", "tools")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_setting_that_a_document_names_exists(document: Path) -> None:
    sections = {
        name: field.annotation.model_fields
        for name, field in Settings.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }
    named = re.findall(rf"`({'|'.join(sections)})\.(\w+)(?:\.\w+)*(?: ?=[^`]*)?`", document.read_text())
    wrong = {f"{section}.{name}" for section, name in named if name not in sections[section]}
    assert wrong - NOT_SETTINGS == set()


def test_every_limit_names_its_settings() -> None:
    limits = rows("limit | settings")
    assert len(limits) >= 4
    assert all(re.search(r"`\w+\.\w+", settings) for _, settings in limits)
