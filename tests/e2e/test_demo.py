"""The command `demo` on a whole stack with the fake generator, which draws in an instant."""

import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops
from rich.console import Console

from afterimage_client import Afterimage
from ops.local.stack import REPOSITORY
from scripts.contact_sheet import GAP_PX, LABEL_PX, LINE_PX
from scripts.demo.__main__ import STARTER_CORPUS
from scripts.demo.sheet import (
    CELL_PX,
    COLUMNS,
    OPTIONS,
    ORDINARY_PROMPTS,
    draw,
    read_prompts,
    write_quiz,
    write_sheet,
)
from tests.stack import RunningStack, clean_environment

IMAGES = 8


@pytest.fixture
def corpus(stack: RunningStack, tmp_path: Path) -> Iterator[Path]:
    """The first images of the starter corpus. They are deleted from the shared stack afterwards."""
    few = tmp_path / "few.tar"
    with tarfile.open(STARTER_CORPUS) as whole, tarfile.open(few, "w") as part:
        for member in islice(whole, 2 * IMAGES):
            part.addfile(member, whole.extractfile(member))
    with Afterimage(stack.url) as service:
        before = {image.id for image in service.images.list()}
        yield few
        for image in list(service.images.list()):
            if image.id not in before:
                service.images.delete(image.id)


def demo(stack: RunningStack, corpus: Path, out: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(sys.executable, "-m", "scripts.demo", *options),
            *("--url", stack.url, "--corpus", str(corpus), "--out", str(out)),
        ],
        cwd=REPOSITORY,
        env=clean_environment() | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_one_prompt_shows_its_references_and_what_was_not_found(
    stack: RunningStack, corpus: Path, tmp_path: Path
) -> None:
    with Afterimage(stack.url) as service:
        done = demo(stack, corpus, tmp_path, "a grinning face and a screwdriver")
        assert done.returncode == 0, done.stderr
        caption = next(service.images.list()).caption
    assert caption is not None
    assert "nothing was found for “a screwdriver”" in done.stdout
    record = read(tmp_path / "provenance.json")
    found, missing = record["job"]["resolution"]["concepts"]
    assert (found["text"], found["found"], missing["found"]) == ("a grinning face", True, False)
    assert len(record["outputs"]) == 4
    with Image.open(tmp_path / "image.png") as images, Image.open(tmp_path / "references.png") as references:
        assert images.width == 4 * images.height
        assert references.height > references.width / 3, "a row for each concept"


def test_a_sheet_has_all_prompts_and_its_quiz_can_be_solved_with_the_key_alone(
    stack: RunningStack, tmp_path: Path
) -> None:
    prompts = read_prompts(ORDINARY_PROMPTS)
    assert list(prompts.values()).count("one thing") == 15
    assert len(prompts) == 30
    with Afterimage(stack.url) as service:
        drawn = draw(service, prompts, seed=3, console=Console(quiet=True))
    write_sheet(drawn, tmp_path, seed=3)
    write_quiz(drawn, tmp_path, seed=3)

    sheet = read(tmp_path / "sheet.json")
    assert [(each["prompt"], each["kind"]) for each in sheet["images"]] == list(prompts.items())
    assert {each["state"] for each in sheet["images"]} == {"succeeded"}
    questions, answers = read(tmp_path / "quiz.json")["images"], read(tmp_path / "quiz_answers.json")["images"]
    assert sorted(each["prompt"] for each in answers) == sorted(prompts)
    assert [each["prompt"] for each in answers] != list(prompts), "in another order than the file"
    for question, answer in zip(questions, answers, strict=True):
        assert question["number"] == answer["number"]
        assert answer["prompt"] in question["options"]
        assert len(set(question["options"])) == OPTIONS
        assert set(question["options"]) <= prompts.keys()
    places = {question["options"].index(answer["prompt"]) for question, answer in zip(questions, answers, strict=True)}
    assert len(places) > 3, "the place of the right option does not give it away"

    image_of = {each.prompt: each.image for each in drawn}
    with Image.open(tmp_path / "quiz.png") as quiz:
        number = next(each["number"] for each in answers if each["prompt"] == "a bridge at night") - 1
        left = LABEL_PX + number % COLUMNS * (CELL_PX + GAP_PX)
        top = LINE_PX + GAP_PX + number // COLUMNS * (CELL_PX + GAP_PX + LINE_PX)
        shown = quiz.crop((left, top, left + CELL_PX, top + CELL_PX))
    expected = image_of["a bridge at night"]
    assert expected is not None
    assert ImageChops.difference(shown, expected.resize(shown.size, Image.Resampling.LANCZOS)).getbbox() is None

    for seed, equal in ((3, True), (4, False)):
        other = tmp_path / str(seed)
        write_quiz(drawn, other, seed=seed)
        names = ("quiz.png", "quiz.json", "quiz_answers.json")
        assert all(((other / name).read_bytes() == (tmp_path / name).read_bytes()) is equal for name in names)


def test_a_file_of_prompts_of_ones_own(stack: RunningStack, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n# a remark\n# kind: other\na dog\n")
    done = demo(stack, corpus, tmp_path, "--sheet", str(file), "--quiz")
    assert done.returncode == 0, done.stderr
    images = read(tmp_path / "sheet.json")["images"]
    assert [(each["prompt"], each["kind"]) for each in images] == [("a cat", ""), ("a dog", "other")]
    assert {len(each["options"]) for each in read(tmp_path / "quiz.json")["images"]} == {2}


@pytest.mark.parametrize("text", ["", "# kind: one thing\n", "a cat\na cat\n"])
def test_a_file_without_prompts_or_with_one_twice_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"has no prompt|has this prompt twice: a cat"):
        read_prompts(file)
