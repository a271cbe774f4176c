"""Contact sheets: rows of labelled images on white."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL_PX = 112
GAP_PX = 8
LABEL_PX = 170
LINE_PX = 20
FONT_SIZE = 13

Cell = tuple[Image.Image | None, str]
"""An image, or None for an empty cell, and the line below it."""


def decode_image(data: bytes) -> Image.Image:
    """Return the image of a file, as RGB."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def sheet_of_rows(
    header: Sequence[str], rows: Sequence[tuple[str, Sequence[Cell]]], *, cell_px: int = CELL_PX
) -> Image.Image:
    """Draw one row per label, with its cells below the titles of `header`.

    cell_px: pixels per side of a cell. An image is scaled to it, and keeps its ratio.
    """
    font, small = ImageFont.load_default(FONT_SIZE + 2), ImageFont.load_default(FONT_SIZE - 2)
    width, height = cell_px + GAP_PX, cell_px + GAP_PX + LINE_PX
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
                draw.rectangle((left, top, left + cell_px, top + cell_px), outline="#dddddd")
                continue
            sheet.paste(_fit_to_cell(image, cell_px), (left, top))
            draw.text((left, top + cell_px + 2), _truncate(caption, small, cell_px), fill="#444444", font=small)
    return sheet


def _fit_to_cell(image: Image.Image, cell_px: int) -> Image.Image:
    canvas = Image.new("RGB", (cell_px, cell_px), "white")
    scale = cell_px / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS), ((cell_px - size[0]) // 2, (cell_px - size[1]) // 2))
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


def _truncate(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    while text and font.getlength(text) > width_px:
        text = text[:-1]
    return text
