"""docs/settings.md and the example configuration agree with the settings."""

import re
import tomllib
from collections import Counter
from pathlib import Path

from scripts.document_settings import PAGE, groups, page
from shared.settings import ModelSettings, Section, Settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def rows(part: str) -> list[tuple[str, str]]:
    """The title of the table and the name of each setting in one part of the page."""
    found, title = [], ""
    for line in part.splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif name := re.match(r"\| `(\S+)` \|", line):
            found.append((title, name[1]))
    return found


def parts() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The rows of the common settings, and those of the advanced ones."""
    _, common, advanced = re.split(r"^## (?:Common|Advanced)$", page(), flags=re.MULTILINE)
    return rows(common), rows(advanced)


def test_every_setting_is_in_exactly_one_of_the_two_parts() -> None:
    common, advanced = parts()
    every = [(title, name) for title, variables in groups() for name, _ in variables]
    assert Counter(common + advanced) == Counter(every)
    assert max(Counter(every).values()) == 1
    fields = [
        field
        for model in (Settings.model_fields, *(section.model_fields for section in Section.__subclasses__()))
        for field in model.values()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert len(every) == len(fields)


def test_the_common_part_stays_short() -> None:
    common, _ = parts()
    assert len(common) <= 60, "mark a setting as `Advanced` that no operator needs on day one"


def test_every_setting_has_a_description() -> None:
    assert [name for _, variables in groups() for name, field in variables if not field.description] == []


def test_the_page_names_former_names() -> None:
    assert re.search(
        r"`AFTERIMAGE_WORKER__LANE_HEADROOM` .*; formerly `AFTERIMAGE_WORKER__SPARE_SEATS` \|$", page(), re.M
    )


def test_the_example_generator_is_valid_when_it_is_uncommented() -> None:
    text = (ROOT / "ops" / "config" / "afterimage.toml").read_text()
    uncommented = re.sub(r"^# ?((?:\[.*|\w+ = .*)?)$", r"\1", text, flags=re.MULTILINE)
    models = ModelSettings.model_validate(tomllib.loads(uncommented)["model"])
    assert models.default_generator == "sdxl"
    assert models.generators["sdxl"].ip_adapter is not None
