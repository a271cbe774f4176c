"""docs/settings.md and the example configuration agree with the settings."""

import re
import tomllib
from pathlib import Path

from scripts.document_settings import PAGE, page
from shared.settings import ModelSettings

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_settings_is_current() -> None:
    assert PAGE.read_text() == page(), "run `make docs`"


def test_every_setting_says_what_it_means() -> None:
    assert re.findall(r"^\| (`\S+`) .*\| None \|$", page(), re.MULTILINE) == []


def test_the_example_generator_is_valid_when_it_is_uncommented() -> None:
    text = (ROOT / "ops" / "config" / "afterimage.toml").read_text()
    uncommented = re.sub(r"^# ?((?:\[.*|\w+ = .*)?)$", r"\1", text, flags=re.MULTILINE)
    models = ModelSettings.model_validate(tomllib.loads(uncommented)["model"])
    assert models.default_generator == "sdxl"
    assert models.generators["sdxl"].ip_adapter is not None
