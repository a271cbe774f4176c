"""`scripts.try_policy` lists the similarities and actions of a content policy."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from scripts import try_policy
from shared.settings import get_settings
from tests.small_pipelines import save_clip

CONCEPT = {
    "name": "thing",
    "texts": ["a thing"],
    "prompt": {"threshold": 0.9999, "action": "block"},
    "output": {"threshold": -1, "action": "blur"},
}


@pytest.fixture(autouse=True)
def _small_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    save_clip(tmp_path / "clip")
    monkeypatch.setenv("AFTERIMAGE_MODEL__CLIP__MODEL", f"local-dir:{tmp_path / 'clip'}")
    monkeypatch.setenv("COLUMNS", "120")
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["try_policy", *arguments])
    try_policy.main()


def test_prompts_and_pictures_are_listed_nearest_first_with_their_action(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AFTERIMAGE_SAFETY__CONCEPTS", json.dumps([CONCEPT]))
    (tmp_path / "prompts.txt").write_text("an [odd] one\n\na thing\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "pictures" / "red.png")
    run(monkeypatch, "--prompts", str(tmp_path / "prompts.txt"), "--images", str(tmp_path / "pictures"))
    printed = capsys.readouterr().out
    of_prompts, of_images = printed.split("thing, output: blur from -1")
    assert of_prompts.index("a thing") < of_prompts.index("an [odd] one")
    assert [line.split("│")[2].strip() for line in of_prompts.splitlines() if "a thing " in line] == ["block"]
    assert [line.split("│")[2].strip() for line in of_prompts.splitlines() if "[odd]" in line] == [""]
    assert [line.split("│")[2].strip() for line in of_images.splitlines() if "red.png" in line] == ["blur"]


def test_without_a_policy_the_script_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--prompts", "none.txt")
    assert ended.value.code == 2
    assert "safety.concepts is empty" in capsys.readouterr().err
