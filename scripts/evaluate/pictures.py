"""The evaluation to look at: a contact sheet, a sheet of searches, a chart."""

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
CAPTION = 13
NEAREST = 5
COLOURS = {Arm.NONE: "#9aa0a6", Arm.RANDOM: "#e0a458", Arm.RETRIEVED: "#2f6f9f", Arm.ORACLE: "#7fb3a0"}
CHARTED = {"judge_top5": "The judge knows the concept (top-5)", "clip_i": "CLIP-I: cosine with a real image"}

Cell = tuple[Image.Image | None, str]
"""A picture, none for an empty place, and the line below it."""


def contact_sheet(evaluation: Evaluation) -> Image.Image:
    """Rows: prompts. Columns: what was retrieved for it, one image of each arm, all from one seed, and a real one."""
    header = ["retrieved references", *[""] * (evaluation.k - 1), *Arm, "real image"]
    rows: list[tuple[str, list[Cell]]] = []
    for name, split in evaluation.splits.items():
        for place in range(len(split.shown[Arm.NONE])):
            case = split.cases[place]
            references: list[Cell] = [
                (evaluation.store.picture(reference.found).open(), f"{reference.weight:.2f}")
                for reference in case.references[Arm.RETRIEVED]
            ]
            empty: list[Cell] = [(None, "")] * (evaluation.k - len(references))
            drawn: list[Cell] = [(Image.fromarray(split.shown[arm][place]), "") for arm in Arm]
            rows.append(
                (
                    f"{case.concept}\n({name.replace('_', '-')})",
                    [*references, *empty, *drawn, (evaluation.targets.get(case.concept), "")],
                )
            )
    return _sheet(header, rows)


def search_sheet(store: Store, queries: Mapping[str, Floats], *, min_similarity: float) -> Image.Image:
    """The five nearest images to each query, with their similarity and concept; those below the gate in brackets.

    queries: vector by text, L2-normalised, shape (dim,).
    """
    rows: list[tuple[str, list[Cell]]] = []
    for text, vector in queries.items():
        cells: list[Cell] = []
        for found in store.nearest(vector, k=NEAREST):
            said = f"{found.similarity:.2f} {store.picture(found).concept}"
            cells.append((store.picture(found).open(), said if found.similarity >= min_similarity else f"({said})"))
        rows.append((text, cells))
    return _sheet(["nearest", *[""] * (NEAREST - 1)], rows)


def _sheet(header: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]]) -> Image.Image:
    font, small = ImageFont.load_default(CAPTION + 2), ImageFont.load_default(CAPTION - 2)
    width, height = CELL_PX + GAP_PX, CELL_PX + GAP_PX + LINE_PX
    sheet = Image.new("RGB", (LABEL_PX + len(header) * width + GAP_PX, LINE_PX + GAP_PX + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(header):
        draw.text((LABEL_PX + column * width, GAP_PX // 2), title, fill="black", font=font)
    for row, (label, cells) in enumerate(rows):
        top = LINE_PX + GAP_PX + row * height
        draw.multiline_text((GAP_PX, top), _wrapped(label, font), fill="black", font=font)
        for column, (picture, caption) in enumerate(cells):
            left = LABEL_PX + column * width
            if picture is None:
                draw.rectangle((left, top, left + CELL_PX, top + CELL_PX), outline="#dddddd")
                continue
            sheet.paste(_fitted(picture), (left, top))
            draw.text((left, top + CELL_PX + 2), _cut(caption, small), fill="#444444", font=small)
    return sheet


def _fitted(picture: Image.Image) -> Image.Image:
    canvas = Image.new("RGB", (CELL_PX, CELL_PX), "white")
    scale = CELL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), ((CELL_PX - size[0]) // 2, (CELL_PX - size[1]) // 2))
    return canvas


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Broken between words where a line would run into the pictures."""
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


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > CELL_PX:
        text = text[:-1]
    return text


def chart(summary: Mapping[str, Any], path: Path) -> None:
    """Bars of each arm with their intervals, a panel for each deciding measure."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    splits = list(summary["conditions"]["concepts"])
    for axes, (measure, title) in zip(figure.subplots(1, len(CHARTED)), CHARTED.items(), strict=True):
        for place, arm in enumerate(Arm):
            means = np.array([summary[split][arm].get(measure, np.nan) for split in splits])
            ends = np.array([summary["intervals"][split][arm].get(measure, [np.nan] * 2) for split in splits])
            axes.bar(
                np.arange(len(splits)) + 0.2 * (place - 1.5),
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
    # Without these the file would name the library's version, and equal figures would not be equal files.
    figure.savefig(path, dpi=120, metadata={"Software": None})
