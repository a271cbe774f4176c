"""How a drawn image becomes one of the requested size, and where a reference lies in it. Nothing is stretched.

A model cannot draw every size. From the middle of the drawn image, the largest part with the requested ratio is kept,
and scaled to the requested size. The initial image of img2img lies whole in this part.
"""

import numpy as np
from PIL import Image

from worker_service.models.interface import ImageRequest

Size = tuple[int, int]
"""Width and height in pixels."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""
MAX_ASPECT = 32
"""Largest ratio of the sides of a picture that a model reads. Of a longer one, it reads only the middle."""


def visible_part(drawn: Size, requested: Size) -> Box:
    """The largest part in the middle of a drawn image that has the ratio of the requested size."""
    scale = max(requested[0] / drawn[0], requested[1] / drawn[1])
    width, height = requested[0] / scale, requested[1] / scale
    left, top = (drawn[0] - width) / 2, (drawn[1] - height) / 2
    return left, top, left + width, top + height


def to_requested_size(pixels: np.ndarray, requested: Size) -> np.ndarray:
    """The visible part of a drawn image, scaled to the requested size. uint8, shape (height, width, 3)."""
    if pixels.shape[1::-1] == requested:
        return pixels
    box = visible_part((pixels.shape[1], pixels.shape[0]), requested)
    return np.asarray(Image.fromarray(pixels).resize(requested, Image.Resampling.LANCZOS, box=box))


def to_requested_ratio(pixels: np.ndarray, requested: Size) -> np.ndarray:
    """The visible part of a drawn image, to the nearest pixel and not scaled. At least one pixel wide and high."""
    left, top, right, bottom = visible_part((pixels.shape[1], pixels.shape[0]), requested)
    rows = slice(int(top), max(int(top) + 1, round(bottom)))
    return pixels[rows, int(left) : max(int(left) + 1, round(right))]


def placed_reference(reference: Size, drawn: Size, requested: Size) -> tuple[int, int, int, int]:
    """The box of a reference in the drawn image: whole, in its own ratio, as large as fits in the visible part."""
    left, top, right, bottom = visible_part(drawn, requested)
    scale = min((right - left) / reference[0], (bottom - top) / reference[1])
    width, height = max(1, round(reference[0] * scale)), max(1, round(reference[1] * scale))
    x, y = round((drawn[0] - width) / 2), round((drawn[1] - height) / 2)
    return x, y, x + width, y + height


def initial_image(reference: Image.Image, drawn: Size, requested: Size) -> Image.Image:
    """An image of the drawn size with the reference in its place. The colours of its edges fill the space around it."""
    left, top, right, bottom = placed_reference(reference.size, drawn, requested)
    picture = np.asarray(reference.resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    return Image.fromarray(np.pad(picture, ((top, drawn[1] - bottom), (left, drawn[0] - right), (0, 0)), mode="edge"))


def middle_of_long(picture: Image.Image, *, longest: int = MAX_ASPECT) -> Image.Image:
    """The middle of a picture whose long side is more than `longest` times its short side; otherwise the picture.

    A model that scales both sides alike would give the short side less than a pixel. One that scales the short side to
    its own size, and then crops, would need gigabytes.
    """
    width, height = picture.size
    most = min(width, height) * longest
    if max(width, height) <= most:
        return picture
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return picture.crop((left, top, left + min(width, most), top + min(height, most)))


def crop_of(request: ImageRequest) -> list[float] | None:
    """The visible part of the request's drawn image, in its pixels; None when at least all but half a pixel is."""
    drawn = (request.width, request.height)
    left, top, right, bottom = visible_part(drawn, request.output_size or drawn)
    whole = drawn[0] - (right - left) < 0.5 and drawn[1] - (bottom - top) < 0.5
    return None if whole else [round(side, 2) for side in (left, top, right, bottom)]
