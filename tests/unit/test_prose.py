"""Docstrings, comments and documents are plain English: subject, verb, object, and words that a reader searches for.

`python tests/unit/test_prose.py PATH ...` lists the breaches in files or folders.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = (
    *("afterimage_client", "api_service", "worker_service", "shared", "migrations", "scripts", "ops", "starter"),
    *("tests", "benchmarks", "README.md", "SECURITY.md", "docs"),
)
TEXTS_ARE_DATA = ("tests", "starter")
"""Their strings are prompts, captions and inputs."""
MAX_SENTENCE_WORDS = 25
MIN_SPACES = 3
"""Shorter strings are names, keys and patterns, not texts."""

RULES = {
    "an image for the field's word (notify, dispatch, publish, append, delay, isolate)": (
        r"\b(door)?bells?\b|\brings?\b|\brung\b|\brang\b|\bringing\b|\btold\b|\btells?\b|\btelling\b|\bseats?\b"
        r"|\bsuspects?\b|\bheld up\b|\bholds? up\b|\bholding up\b|\bhung up\b|\bin line\b|\bgood news\b"
    ),
    "an unnamed person (a caller, a client, another process, no job)": (
        r"\bwhoever\b|\bnobody\b|\bsomebody\b|\bwhom\b|\bwhosoever\b"
    ),
    "a negated identity (write what it is, and `None` for Python's None)": (
        r"\b(is|are|was|were) none\b|\bso that none\b|(?<![Tt]here )\bis no (?!longer\b|more\b)[a-z]+"
    ),
    "a sentence whose subject is a clause (name the thing)": (
        r"(?:^|(?<=[.!?:] ))(?:What|Whatever|Those that|Those who|Who) (?![^.?]*\?)"
    ),
}


class Breach(NamedTuple):
    line: int
    rule: str
    text: str


def prose_of_python(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings (also those after an assignment) and comments, each with its first line."""
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value
    block: list[str] = []
    first = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|type:|!|---)", token.string):
            first = first or token.start[0]
            block.append(re.sub(r"\s+(noqa|type: ignore).*", "", token.string.lstrip("# ")))
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            if block:
                yield first, " ".join(block)
            block, first = [], 0


def texts_of_python(source: str) -> Iterator[tuple[int, str]]:
    """All other strings of several words: messages, descriptions, help."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or id(node) in docstrings:
            continue
        if node.value.count(" ") >= MIN_SPACES:
            yield node.lineno, node.value


def prose_of_markdown(text: str) -> Iterator[tuple[int, str]]:
    """Paragraphs, list items and table rows, without code."""
    text = re.sub(r"```.*?```", lambda match: "\n" * match.group().count("\n"), text, flags=re.DOTALL)
    line = 1
    for paragraph in re.split(r"(\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s))", text):
        if paragraph.strip():
            yield line, paragraph.strip(" \n-*")
        line += paragraph.count("\n")


def breaches(first: int, text: str, *, max_words: int | None = MAX_SENTENCE_WORDS) -> Iterator[Breach]:
    """max_words: of a sentence; None for any number."""
    plain = re.sub(r"`[^`\n]*`|\"[^\"\n]*\"|https?://\S+|\([^()]*://[^()]*\)", "CODE", text)
    for paragraph in re.split(r"\n\s*\n|\n\s*[-*] |\n(?=\s+[A-Z]\w*(?:, \w+)*: )", plain):
        flat = " ".join(paragraph.split())
        for rule, pattern in RULES.items():
            for match in re.finditer(pattern, flat, flags=re.IGNORECASE if "image" in rule or "person" in rule else 0):
                yield Breach(first, rule, flat[max(0, match.start() - 30) : match.end() + 40])
        for sentence in re.split(r"(?<=[.!?;]) |(?<=\|)", flat):
            words = re.findall(r"[\w'-]+", sentence)
            if max_words is not None and len(words) > max_words:
                yield Breach(first, f"a sentence of {len(words)} words", sentence[:90])


def breaches_in(file: Path) -> Iterator[Breach]:
    text = file.read_text()
    for first, part in prose_of_python(text) if file.suffix == ".py" else prose_of_markdown(text):
        yield from breaches(first, part)
    if file.suffix == ".py" and file.relative_to(ROOT).parts[0] not in TEXTS_ARE_DATA:
        for first, part in texts_of_python(text):
            yield from breaches(first, part, max_words=None)


def scan(places: Sequence[str]) -> Iterator[tuple[Path, Breach]]:
    """The breaches in files and in all Python and Markdown files of folders; paths are relative to the repository."""
    for place in places:
        path = ROOT / place
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.suffix in (".py", ".md"):
                yield from ((file, breach) for breach in breaches_in(file))


@pytest.mark.parametrize("place", PLACES)
def test_prose_is_plain(place: str) -> None:
    found = [f"{path.relative_to(ROOT)}:{breach.line}: {breach.rule}: {breach.text}" for path, breach in scan([place])]
    assert found == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("What a process has one of.", "subject"),
        ("Pull the bell, and the reconciler rings again.", "image"),
        ("Whoever holds the row is feeding another model of it.", "person"),
        ("The address is none, asked for by a person.", "identity"),
        (" ".join(["word"] * (MAX_SENTENCE_WORDS + 1)) + ".", "sentence of"),
    ],
)
def test_a_breach_is_found(text: str, rule: str) -> None:
    assert any(rule in breach.rule for breach in breaches(1, text))


def test_plain_prose_has_no_breach() -> None:
    source = '"""Publish the next jobs. Is it empty? Then `None` is returned."""\n# Cleared before the call.\nx = 1\n'
    assert [breach for line, text in prose_of_python(source) for breach in breaches(line, text)] == []


if __name__ == "__main__":
    for path, breach in scan(sys.argv[1:]):
        print(f"{path.relative_to(ROOT)}:{breach.line}: {breach.rule}: {breach.text}")
