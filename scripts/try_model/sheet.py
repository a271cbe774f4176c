"""Draws the sheet: one row of images per mode, beside the references that they are drawn from."""

from collections.abc import Callable

from PIL import Image

from scripts.contact_sheet import Cell, sheet_of_rows
from scripts.try_model.report import Check, Outcome
from scripts.try_model.trial import Trial
from shared.capabilities import default_references
from shared.contracts.generation import Mode
from shared.errors import BaseAppException
from worker_service.execution.steps import go_on
from worker_service.models.generate_batch import generate_batch
from worker_service.models.pipelines.probe import REFUSALS

SEEDS = 3
LARGEST_CELL_PX = 384


def draw_sheet(trial: Trial, *, on_mode: Callable[[Mode], None]) -> tuple[Image.Image, list[Check]]:
    """The sheet, and per mode whether the model draws in it: valid images, of finite numbers, none of them black.

    on_mode: called before the images of each mode are drawn.
    """
    columns = max((_references(trial, mode) for mode in trial.modes), default=0)
    rows: list[tuple[str, list[Cell]]] = []
    checks = []
    for mode in trial.modes:
        on_mode(mode)
        count = _references(trial, mode)
        used = trial.references[:count]
        references: list[Cell] = [(each.image, each.caption or "") for each in used]
        references += [(None, "")] * (columns - count)
        images, check = _draw(trial, mode, count)
        rows.append((mode.value.replace("+", " + "), [*references, *images]))
        checks.append(check)
    header = [*["references", *[""] * columns][:columns], *[f"seed {seed}" for seed in range(SEEDS)]]
    cell_px = min(LARGEST_CELL_PX, max(128, trial.width, trial.height))
    return sheet_of_rows(header, rows, cell_px=cell_px), checks


def _references(trial: Trial, mode: Mode) -> int:
    """How many references a request of this mode searches, as far as the model takes them."""
    if mode is Mode.NONE:
        return 0
    if mode.traits.uses_initial_image and not mode.traits.uses_image_prompt:
        return min(1, len(trial.references))
    return default_references(trial.capabilities, mode, default=len(trial.references))


def _draw(trial: Trial, mode: Mode, references: int) -> tuple[list[Cell], Check]:
    requests = [trial.request(mode, references=references, seed=seed) for seed in range(SEEDS)]
    images: list[Cell] = []
    try:
        for request in requests:  # one by one: the largest batch need not fit
            drawn = generate_batch(trial.model, [request], go_on)
            unsafe = "unsafe" if drawn[0].unsafe else ""
            images.append((Image.fromarray(drawn[0].pixels), unsafe))
    except (BaseAppException, *REFUSALS) as error:
        images += [(None, "")] * (SEEDS - len(images))
        outcome, detail = Outcome.FAIL, f"{type(error).__name__}: {error}"
    else:
        outcome, detail = Outcome.PASS, f"{SEEDS} images of finite {trial.capabilities.dtype} numbers"
    return images, Check(name="draws", mode=mode.value, outcome=outcome, detail=detail)
