"""Images of the evaluation: a contact sheet, a sheet of searches, a chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from scripts.evaluate.arms import Arm
from scripts.evaluate.evaluation import Evaluation
from scripts.evaluate.metrics import Floats
from scripts.evaluate.store import Store

CELL_PX = 112
GAP_PX = 8
LABEL_PX = 170
LINE_PX = 20
FONT_SIZE = 13
RESULTS_PER_SEARCH = 5
COLOURS = {Arm.NONE: "#9aa0a6", Arm.RANDOM: "#e0a458", Arm.RETRIEVED: "#2f6f9f", Arm.ORACLE: "#7fb3a0"}
CHART_TITLES = {"judge_top5": "The judge knows the concept (top-5)", "clip_i": "CLIP-I: cosine with a real image"}

Cell = tuple[Image.Image | None, str]
"""An image, or None for an empty cell, and the line below it."""


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
    return _sheet(header, rows)


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
    return _sheet(["nearest", *[""] * (RESULTS_PER_SEARCH - 1)], rows)


def _sheet(header: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    font, small = ImageFont.load_default(FONT_SIZE + 2), ImageFont.load_default(FONT_SIZE - 2)
    width, height = CELL_PX + GAP_PX, CELL_PX + GAP_PX + LINE_PX
    sheet = Image.new("RGB", (LABEL_PX + len(header) * width + GAP_PX, LINE_PX + GAP_PX + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(header):
        draw.text((LABEL_PX + column * width, GAP_PX // 2), title, fill="black", font=font)
    for row, (label, cells) in enumerate(rows):
        top = LINE_PX + GAP_PX + row * height
        draw.multiline_text((GAP_PX, top), _wrap(label, font), fill="black", font=font)
        for column, (image, caption) in enumerate(cells):
            left = LABEL_PX + column * width
            if image is None:
                draw.rectangle((left, top, left + CELL_PX, top + CELL_PX), outline="#dddddd")
                continue
            sheet.paste(_fit_to_cell(image), (left, top))
            draw.text((left, top + CELL_PX + 2), _truncate(caption, small), fill="#444444", font=small)
    return sheet


def _fit_to_cell(image: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (CELL_PX, CELL_PX), "white")
    scale = CELL_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((CELL_PX - size[0]) // 2, (CELL_PX - size[1]) // 2))
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Break lines between words so that they end before the images."""
    lines = []
    for line in text.splitlines():
        lines.append("")
        for word in line.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= LABEL_PX - 2 * GAP_PX:
                lines[-1] = longer
            else:
                lines.append(word)
    return "\n".join(lines)


def _truncate(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > CELL_PX:
        text = text[:-1]
    return text


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
