"""Draw one image for each of many prompts into a contact sheet, and ask a quiz about the images."""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.progress import track

from afterimage_client import Afterimage, JobState, JobView, RagGenerateRequest
from scripts.contact_sheet import Cell, decode_image, sheet_of_rows

ORDINARY_PROMPTS = Path(__file__).with_name("ordinary_prompts.txt")
KIND = "# kind:"
"""Start of a line that names the kind of the prompts below it."""
COLUMNS = 5
CELL_PX = 192
OPTIONS = 8
"""Prompts among which a viewer chooses."""


@dataclass(frozen=True)
class Drawn:
    """A prompt with its job, and the job's image; None if the job failed."""

    prompt: str
    kind: str
    job: JobView
    image: Image.Image | None


def read_prompts(file: Path) -> dict[str, str]:
    """Return the kind of each prompt in the file, in order. It has one prompt per line, and lines `# kind: NAME`.

    Raises:
        ValueError: the file has no prompt, or has one twice.
        OSError: the file cannot be read.
    """
    prompts: dict[str, str] = {}
    kind = ""
    for line in map(str.strip, file.read_text(encoding="utf-8").splitlines()):
        if line.startswith(KIND):
            kind = line.removeprefix(KIND).strip()
        elif line and not line.startswith("#"):
            if line in prompts:
                raise ValueError(f"{file} has this prompt twice: {line}")
            prompts[line] = kind
    if not prompts:
        raise ValueError(f"{file} has no prompt")
    return prompts


def draw(service: Afterimage, prompts: Mapping[str, str], *, seed: int, console: Console) -> list[Drawn]:
    """Generate one image for each prompt, all with the same seed. prompts: kinds by prompt."""
    # All are queued first, so that the worker draws them in batches.
    jobs = [service.jobs.submit(RagGenerateRequest(prompt=prompt, num_images=1, seed=seed)) for prompt in prompts]
    drawn = []
    waiting = track(zip(prompts.items(), jobs, strict=True), "drawing", total=len(jobs), console=console)
    for (prompt, kind), submitted in waiting:
        job = service.jobs.wait(submitted)
        succeeded = job.state is JobState.SUCCEEDED
        image = decode_image(service.outputs.content(job.outputs[0])) if succeeded else None
        drawn.append(Drawn(prompt, kind, job, image))
    return drawn


def write_sheet(drawn: Sequence[Drawn], out: Path, *, seed: int) -> list[Path]:
    """Write sheet.png, rows of images by kind, and sheet.json with the jobs and what they used."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, list[Cell]]] = []
    for kind, group in groupby(drawn, key=lambda each: each.kind):
        rows += _rows(kind, ((each.image, each.prompt) for each in group))
    sheet, record = out / "sheet.png", out / "sheet.json"
    sheet_of_rows([""] * COLUMNS, rows, cell_px=CELL_PX).save(sheet)
    _write_json(record, {"seed": seed, "images": [_record(each) for each in drawn]})
    return [sheet, record]


def write_quiz(drawn: Sequence[Drawn], out: Path, *, seed: int) -> list[Path]:
    """Write quiz.png, quiz.json and quiz_answers.json. A viewer needs the first two, and must not see the answers.

    The images have numbers instead of captions, in random order. For each, the viewer chooses its prompt from OPTIONS:
    the right one, and others drawn from all prompts. seed: of the order and the options.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    shown = [each for each in drawn if each.image is not None]
    rng.shuffle(shown)
    prompts = [each.prompt for each in drawn]
    questions, answers = [], []
    for number, each in enumerate(shown, start=1):
        others = [prompt for prompt in prompts if prompt != each.prompt]
        options = [each.prompt, *rng.sample(others, min(OPTIONS - 1, len(others)))]
        rng.shuffle(options)
        questions.append({"number": number, "options": options})
        answers.append({"number": number, "prompt": each.prompt, "kind": each.kind})
    cells = ((each.image, str(number)) for number, each in enumerate(shown, start=1))
    image, quiz, key = (out / name for name in ("quiz.png", "quiz.json", "quiz_answers.json"))
    sheet_of_rows([""] * COLUMNS, _rows("", cells), cell_px=CELL_PX).save(image)
    _write_json(quiz, {"question": f"Which prompt is drawn in each image of {image.name}?", "images": questions})
    _write_json(key, {"images": answers})
    return [image, quiz, key]


def _rows(label: str, cells: Iterable[Cell]) -> list[tuple[str, list[Cell]]]:
    """The cells in rows of COLUMNS, the first of which has the label."""
    cells = list(cells)
    starts = range(0, len(cells), COLUMNS)
    return [(label if start == 0 else "", cells[start : start + COLUMNS]) for start in starts]


def _record(drawn: Drawn) -> dict[str, Any]:
    resolution = drawn.job.resolution or {}
    return {
        "prompt": drawn.prompt,
        "kind": drawn.kind,
        "job": str(drawn.job.id),
        "state": drawn.job.state.value,
        "error": drawn.job.error and drawn.job.error.model_dump(mode="json"),
        **{name: resolution.get(name) for name in ("mode", "references", "concepts")},
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
