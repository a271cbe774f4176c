"""Images of the evaluation: a contact sheet, a sheet of searches, a chart."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from scripts.contact_sheet import Cell, sheet_of_rows
from scripts.evaluate.arms import Arm
from scripts.evaluate.evaluation import Evaluation
from scripts.evaluate.metrics import Floats
from scripts.evaluate.store import Store

RESULTS_PER_SEARCH = 5
COLOURS = {Arm.NONE: "#9aa0a6", Arm.RANDOM: "#e0a458", Arm.RETRIEVED: "#2f6f9f", Arm.ORACLE: "#7fb3a0"}
CHART_TITLES = {"judge_top5": "The judge knows the concept (top-5)", "clip_i": "CLIP-I: cosine with a real image"}


def contact_sheet(evaluation: Evaluation) -> Image.Image:
    """One row per prompt: its retrieved references, one image of each arm from the same seed, and a real image."""
    header = ["retrieved references", *[""] * (evaluation.k - 1), *Arm, "real image"]
    rows: list[tuple[str, list[Cell]]] = []
    for name, split in evaluation.splits.items():
        for row in range(len(split.shown[Arm.NONE])):
            case = split.cases[row]
            references: list[Cell] = [
                (evaluation.store.image(reference.scored).open(), f"{reference.weight:.2f}")
                for reference in case.references[Arm.RETRIEVED]
            ]
            empty: list[Cell] = [(None, "")] * (evaluation.k - len(references))
            generated: list[Cell] = [(Image.fromarray(split.shown[arm][row]), "") for arm in Arm]
            rows.append(
                (
                    f"{case.concept}\n({name.replace('_', '-')})",
                    [*references, *empty, *generated, (evaluation.targets.get(case.concept), "")],
                )
            )
    return sheet_of_rows(header, rows)


def search_sheet(store: Store, queries: Mapping[str, Floats], *, min_similarity: float) -> Image.Image:
    """One row per query: its five nearest images with similarity and concept, in brackets below `min_similarity`.

    queries: vector by text, L2-normalised, shape (dim,).
    """
    rows: list[tuple[str, list[Cell]]] = []
    for text, vector in queries.items():
        cells: list[Cell] = []
        for found in store.nearest(vector, k=RESULTS_PER_SEARCH):
            caption = f"{found.similarity:.2f} {store.image(found).concept}"
            if found.similarity < min_similarity:
                caption = f"({caption})"
            cells.append((store.image(found).open(), caption))
        rows.append((text, cells))
    return sheet_of_rows(["nearest", *[""] * (RESULTS_PER_SEARCH - 1)], rows)


def chart(summary: Mapping[str, Any], path: Path) -> None:
    """Draw a bar with its interval for each arm and split, one panel per deciding measure."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    splits = list(summary["conditions"]["concepts"])
    for axes, (measure, title) in zip(figure.subplots(1, len(CHART_TITLES)), CHART_TITLES.items(), strict=True):
        for number, arm in enumerate(Arm):
            means = np.array([summary[split][arm].get(measure, np.nan) for split in splits])
            ends = np.array([summary["intervals"][split][arm].get(measure, [np.nan] * 2) for split in splits])
            axes.bar(
                np.arange(len(splits)) + 0.2 * (number - 1.5),
                means,
                width=0.18,
                yerr=np.abs(ends.T - means),
                color=COLOURS[arm],
                capsize=3,
                label=arm.value,
            )
        axes.set_title(title)
        axes.set_ylim(min(0, axes.get_ylim()[0]), 1)
        axes.set_xticks(range(len(splits)), [f"{split.replace('_', '-')} concepts" for split in splits])
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(title="references", frameon=False)
    # Without this the file would contain the library's version, so equal figures would give different files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
