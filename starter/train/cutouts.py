"""Cut the corpus drawings out of their white background, and recolour them."""

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]

WHITE = 246
"""A pixel of the background has at least this value in each channel."""

HUES: dict[str, int] = {
    "red": 0,
    "orange": 20,
    "yellow": 36,
    "green": 88,
    "blue": 152,
    "purple": 194,
    "pink": 236,
}
"""Hue of each colour name, in Pillow's HSV (0 to 255)."""


def cut_out(pixels: Pixels) -> Image.Image:
    """Return the drawing as RGBA of the same size.

    The background is the white area that reaches the border. White inside of the drawing stays. A pixel at the edge
    mixes the drawing with white: its alpha is estimated from its darkest neighbour.

    pixels: uint8 (S, S, 3), drawn on white.
    """
    darkness = 255 - pixels.min(axis=2).astype(np.int16)
    white = darkness <= 255 - WHITE
    background = np.zeros_like(white)
    background[[0, -1], :] = white[[0, -1], :]
    background[:, [0, -1]] = white[:, [0, -1]]
    while True:
        grown = _dilated(background) & white
        if (grown == background).all():
            break
        background = grown
    strongest = np.maximum.reduce(_shifted(darkness))
    edge = _dilated(background) & ~background
    share = np.where(edge, np.clip(darkness / np.maximum(strongest, 1), 0.05, 1), 1.0)
    share = np.where(background, 0.0, share)
    divisor = np.maximum(share, 0.05)[..., None]
    colour = np.clip(255 - (255 - pixels.astype(np.float32)) / divisor, 0, 255)
    rgba = np.dstack([colour, share * 255]).round().astype(np.uint8)
    return Image.fromarray(rgba, "RGBA")


def recoloured(drawing: Image.Image, colour: str) -> Image.Image:
    """Return the drawing with its saturated pixels in the hue of `colour`, a key of HUES."""
    hue, saturation, value = (
        np.asarray(band, dtype=np.int16) for band in drawing.convert("RGB").convert("HSV").split()
    )
    is_coloured = saturation > 60
    new_hue = np.where(is_coloured, HUES[colour], hue)
    new_value = np.where(is_coloured & (colour in ("yellow", "orange", "pink")), np.maximum(value, 190), value)
    new_saturation = np.where(is_coloured, np.minimum(saturation, 130) if colour == "pink" else saturation, saturation)
    bands = [Image.fromarray(band.astype(np.uint8), "L") for band in (new_hue, new_saturation, new_value)]
    result = Image.merge("HSV", bands).convert("RGB")
    result.putalpha(drawing.getchannel("A"))
    return result


def coloured_share(drawing: Image.Image) -> float:
    """Return the share of the drawn pixels that `recoloured` changes."""
    saturation = np.asarray(drawing.convert("RGB").convert("HSV").getchannel("S"))
    drawn = np.asarray(drawing.getchannel("A")) > 128
    return float((saturation[drawn] > 60).mean()) if drawn.any() else 0.0


def _shifted(values: npt.NDArray[np.int16]) -> list[npt.NDArray[np.int16]]:
    padded = np.pad(values, 1, mode="edge")
    height, width = values.shape
    return [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]


def _dilated(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    result = mask.copy()
    result[1:] |= mask[:-1]
    result[:-1] |= mask[1:]
    result[:, 1:] |= mask[:, :-1]
    result[:, :-1] |= mask[:, 1:]
    return result
