"""Relative links, anchors and file names in the Markdown documents point to something that exists."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "starter").glob("*.md")]
)
SOURCE_FOLDERS = (
    "afterimage_client|api_service|benchmarks|docs|migrations|ops|scripts|shared|starter|tests|worker_service"
)
NAMED_FILE = re.compile(rf"`((?:{SOURCE_FOLDERS})/[\w./-]*\.(?:py|md|toml|yml))`")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")


def without_code_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings: lower case, words joined by -, repeated ones numbered."""
    found = Counter[str]()
    result = set()
    for heading in re.findall(r"^#+ (.+)$", without_code_blocks(document.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        result.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return result


def broken_link(document: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    linked = (document.parent / path).resolve() if path else document
    if not linked.exists():
        return True
    return bool(anchor) and (linked.suffix != ".md" or anchor not in anchors(linked))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(document: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", without_code_blocks(document.read_text()))
    targets = [target for target in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")]
    assert [target for target in targets if broken_link(document, target)] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = NAMED_FILE.findall(document.read_text())
    assert [path for path in named if not (ROOT / path).exists() and not (document.parent / path).exists()] == []


def test_a_wrong_link_is_found() -> None:
    assert broken_link(ROOT / "README.md", "docs/absent.md")
    assert broken_link(ROOT / "README.md", "docs/api.md#absent")
    assert broken_link(ROOT / "README.md", "#absent")
    assert not broken_link(ROOT / "README.md", "docs/api.md#errors")
