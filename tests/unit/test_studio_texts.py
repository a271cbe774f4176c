"""Studio's catalogue has all texts of its code and templates, and its scripts have no texts of their own."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

STUDIO = Path(__file__).parents[2] / "api_service" / "studio"
NAMES = {"ArrowLeft", "ArrowRight", "Enter", "Escape", "Files", "Retry-After"}
"""Names of keys, of a data type and of a header."""
TEXT_PROPERTIES = r"(?:textContent|innerText|title|alt|ariaLabel|placeholder)"


def texts_of_code() -> Iterator[str]:
    for file in STUDIO.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("_", "mark"):
                yield from (str(each.value) for each in node.args if isinstance(each, ast.Constant))


def texts_of_templates() -> Iterator[str]:
    environment = Environment(loader=FileSystemLoader(STUDIO / "templates"), extensions=["jinja2.ext.i18n"])
    environment.newstyle_gettext = True  # type: ignore[attr-defined] # the extension adds it
    for file in STUDIO.glob("templates/studio/*.html"):
        for _, _, found in environment.extract_translations(file.read_text()):  # type: ignore[attr-defined] # also
            yield from [found] if isinstance(found, str) else (each for each in found if isinstance(each, str))


def test_the_catalogue_has_exactly_the_texts_of_studio() -> None:
    catalogue = (STUDIO / "locale" / "studio.pot").read_text()
    entries = re.findall(r'^msgid(?:_plural)? ((?:".*"\n)+)', catalogue, flags=re.MULTILINE)
    kept = {"".join(json.loads(line) for line in entry.splitlines()) for entry in entries}
    assert kept == {*texts_of_code(), *texts_of_templates()}, "`make texts` writes the catalogue"


def test_scripts_show_only_texts_of_the_catalogue() -> None:
    listed = (STUDIO / "templates" / "studio" / "script_texts.html").read_text()
    names = set(re.findall(r'^  "(\w+)":', listed, flags=re.MULTILINE))
    used = {"theme_auto", "theme_dark", "theme_light"}  # studio.js puts these names together
    for file in STUDIO.glob("static/*.js"):
        script = re.sub(r'(?m)(^|\s)//.*$|className(?: = [^;]*;|: "[^"]*")', "", file.read_text())
        used |= {*re.findall(r'\btext\("(\w+)"', script), *(name for name in names if f'"{name}"' in script)}
        own = re.findall(rf'\b{TEXT_PROPERTIES}\b\s*[:=]\s*["`]([^"`]+)["`](?! in )', script)
        literals = re.findall(r'"((?:[^"\\\n]|\\.)*)"|`((?:[^`\\]|\\.)*)`', script)
        own += [plain + other for plain, other in literals if is_sentence(plain + other) and plain not in NAMES]
        assert own == [], file.name
    assert used == names


def is_sentence(literal: str) -> bool:
    """Whether a string reads like a text: a capital word, or words without the signs of a selector or of HTML."""
    words = re.sub(r"\$\{[^}]*\}", "0", literal)
    if re.search(r"[\[\].#:<>=*/]|--", words.rstrip(".")):
        return False
    return bool(re.match(r"[A-Z][a-z]+", words) or re.search(r"[a-z]{2,} [a-z]{2,}", words))
