"""Draw a chart of a stage's log with Pillow, so that training needs no plotting library."""

import json
from pathlib import Path

from PIL import Image, ImageDraw

from starter.train.loop import LOG

WIDTH, HEIGHT, MARGIN = 720, 360, 48
SMOOTHING = 0.9


def plot_losses(folder: Path) -> Path:
    """Write `loss.png` and return its path: the loss of every logged step in grey, its moving average in blue."""
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    points = sorted((line["step"], line["loss"]) for line in lines)
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((MARGIN, MARGIN // 2, WIDTH - MARGIN // 2, HEIGHT - MARGIN), outline="#999999")
    if points:
        ranked = sorted(loss for _, loss in points)
        low, high = ranked[0], ranked[int(0.98 * (len(ranked) - 1))]
        last = points[-1][0]
        place = [(_x(step, last), _y(loss, low, high)) for step, loss in points]
        draw.line(place, fill="#cccccc")
        draw.line(
            [(x, y) for (x, _), y in zip(place, _smooth([y for _, y in place]), strict=True)],
            fill="#1f77b4",
            width=2,
        )
        for value in (low, (low + high) / 2, high):
            draw.text((4, _y(value, low, high) - 6), f"{value:.3g}", fill="black")
        for step in (0, last // 2, last):
            draw.text((_x(step, last) - 12, HEIGHT - MARGIN + 6), str(step), fill="black")
    draw.text((WIDTH // 2 - 60, HEIGHT - 20), f"{folder.name}: loss by step", fill="black")
    path = folder / "loss.png"
    image.save(path)
    return path


def _x(step: int, last: int) -> float:
    return MARGIN + (WIDTH - 1.5 * MARGIN) * step / max(1, last)


def _y(loss: float, low: float, high: float) -> float:
    share = (min(loss, high) - low) / max(1e-9, high - low)
    return HEIGHT - MARGIN - (HEIGHT - 1.5 * MARGIN) * share


def _smooth(values: list[float]) -> list[float]:
    smooth, average = [], values[0]
    for value in values:
        average = SMOOTHING * average + (1 - SMOOTHING) * value
        smooth.append(average)
    return smooth
