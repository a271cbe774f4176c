"""Drawn backgrounds of training scenes: a place, a time of day and a kind of weather, with words for each."""

import math
import random
from collections.abc import Callable

from PIL import Image, ImageDraw, ImageFilter

from starter.data.corpus import IMAGE_PX

Colour = tuple[int, int, int]
Painter = Callable[[ImageDraw.ImageDraw, random.Random], None]

SCALE = 2
"""Backgrounds are drawn at twice the size and reduced, which smooths their edges."""
SIDE = IMAGE_PX * SCALE

PLACES: dict[str, tuple[str, ...]] = {
    "white": ("",),
    "snow": ("in the snow", "in winter", "on a snowy day", "in a snowy landscape"),
    "grass": ("on the grass", "in a meadow", "in a field", "in the garden"),
    "beach": ("on the beach", "on the sand", "by the sea"),
    "water": ("under water", "in the sea", "in the ocean", "swimming in the water"),
    "mountains": ("in the mountains", "in front of the mountains", "over the mountains"),
    "city": ("in the city", "in a town", "in front of a city", "over a city"),
    "room": ("in a room", "on the floor", "at home"),
    "desert": ("in the desert",),
    "forest": ("in the forest", "in the woods"),
}
LANDSCAPES: dict[str, tuple[str, ...]] = {
    "snow": ("a winter landscape", "a snowy landscape", "snow", "winter"),
    "grass": ("a green meadow", "a field of grass", "a summer landscape"),
    "beach": ("a beach", "a sandy beach by the sea"),
    "water": ("the ocean", "the sea", "water"),
    "mountains": ("mountains", "a mountain landscape"),
    "city": ("a city", "a town", "a skyline", "houses of a city"),
    "desert": ("a desert", "a desert landscape"),
    "forest": ("a forest", "the woods", "trees"),
}
TIMES: dict[str, tuple[str, ...]] = {
    "day": ("",),
    "night": ("at night", "under the stars", "in the dark", "on a starry night"),
    "sunset": ("at sunset", "in the evening", "at dusk"),
}
WEATHERS: dict[str, tuple[str, ...]] = {
    "clear": ("",),
    "rain": ("in the rain", "on a rainy day"),
    "snowfall": ("while it snows", "with falling snow"),
}
SKIES: dict[str, tuple[Colour, Colour]] = {
    "day": ((120, 190, 245), (215, 238, 252)),
    "night": ((14, 20, 58), (44, 56, 110)),
    "sunset": ((240, 120, 90), (253, 215, 130)),
}
WALL_STRENGTH, GROUND_STRENGTH = 0.35, 0.6
"""Shares of a tint in the tones of an empty stage; the rest is white."""
GROUND_LINE = 0.66
"""The height of the horizon, as a share of the side."""


def draw_background(place: str, time: str, weather: str, rng: random.Random) -> Image.Image:
    """Return an RGB image of IMAGE_PX square. place, time, weather: keys of PLACES, TIMES and WEATHERS."""
    if place == "white":
        return Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
    top, bottom = ((20, 80, 170), (90, 190, 225)) if place == "water" else SKIES[time]
    canvas = _gradient(top, bottom)
    draw = ImageDraw.Draw(canvas)
    if time == "night" and place not in ("water", "room"):
        _dots(draw, rng, count=26, radius=(1, 3), colour=(255, 244, 200), lowest=0.6)
    PAINTERS[place](draw, rng)
    if time != "day":
        canvas = Image.blend(canvas, Image.new("RGB", canvas.size, SKIES[time][0]), 0.35 if time == "night" else 0.15)
        draw = ImageDraw.Draw(canvas)
    if weather == "rain":
        _rain(draw, rng)
    elif weather == "snowfall":
        _dots(draw, rng, count=60, radius=(2, 4), colour=(255, 255, 255), lowest=1.0)
    return canvas.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX).filter(ImageFilter.GaussianBlur(0.3))


def draw_stage(tint: Colour) -> Image.Image:
    """Return an RGB image of IMAGE_PX square: an empty ground below an empty wall, both in a soft tone of `tint`."""
    wall, ground = (
        tuple(round(255 - (255 - value) * strength) for value in tint) for strength in (WALL_STRENGTH, GROUND_STRENGTH)
    )
    canvas = Image.new("RGB", (IMAGE_PX, IMAGE_PX), wall)
    canvas.paste(ground, (0, round(IMAGE_PX * GROUND_LINE), IMAGE_PX, IMAGE_PX))
    return canvas


def _gradient(top: Colour, bottom: Colour) -> Image.Image:
    ramp = Image.linear_gradient("L").resize((SIDE, SIDE))
    return Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)


def _ground(colour: Colour, *, waves: float = 0.02) -> Painter:
    def paint(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
        phase = rng.random() * 7
        line = [(x, SIDE * (GROUND_LINE + waves * math.sin(x / SIDE * 6 + phase))) for x in range(0, SIDE + 8, 8)]
        draw.polygon([*line, (SIDE, SIDE), (0, SIDE)], fill=colour)

    return paint


def _mountains(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for centre in (rng.uniform(0, 0.35), rng.uniform(0.65, 1), rng.uniform(0.3, 0.7)):
        height, half = rng.uniform(0.3, 0.48), rng.uniform(0.26, 0.36)
        peak = (SIDE * centre, SIDE * (GROUND_LINE - height))
        draw.polygon(
            [peak, (SIDE * (centre + half), SIDE * 0.7), (SIDE * (centre - half), SIDE * 0.7)],
            fill=rng.choice([(104, 124, 150), (120, 138, 160), (92, 110, 136)]),
        )
        cap = 0.3
        draw.polygon(
            [
                peak,
                (SIDE * (centre + half * cap), peak[1] + SIDE * (height + 0.04) * cap),
                (SIDE * (centre - half * cap), peak[1] + SIDE * (height + 0.04) * cap),
            ],
            fill=(250, 252, 255),
        )
    _ground((118, 178, 100))(draw, rng)


def _city(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    left = 0
    while left < SIDE:
        width, height = rng.randint(30, 52), rng.uniform(0.25, 0.55)
        top = SIDE * (0.8 - height)
        colour = rng.choice([(110, 122, 146), (140, 120, 128), (92, 104, 132), (160, 150, 140)])
        draw.rectangle([left, top, left + width, SIDE], fill=colour)
        for x in range(left + 6, left + width - 8, 12):
            for y in range(int(top) + 8, int(SIDE * 0.8) - 8, 16):
                draw.rectangle([x, y, x + 6, y + 8], fill=(253, 226, 130) if rng.random() < 0.7 else (70, 80, 104))
        left += width + 2
    draw.rectangle([0, SIDE * 0.8, SIDE, SIDE], fill=(96, 100, 108))


def _beach(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    draw.rectangle([0, SIDE * 0.5, SIDE, SIDE], fill=(46, 150, 205))
    _ground((240, 214, 150))(draw, rng)


def _room(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    wall = rng.choice([(236, 224, 204), (206, 224, 222), (232, 212, 214), (214, 218, 236)])
    draw.rectangle([0, 0, SIDE, SIDE], fill=wall)
    draw.rectangle([0, SIDE * GROUND_LINE, SIDE, SIDE], fill=(170, 124, 84))


def _forest(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _ground((96, 150, 84))(draw, rng)
    for _ in range(9):
        x, base, height = rng.uniform(0, SIDE), SIDE * rng.uniform(0.6, 0.76), SIDE * rng.uniform(0.3, 0.5)
        draw.rectangle([x - 5, base - height * 0.3, x + 5, base], fill=(110, 78, 52))
        draw.polygon(
            [(x, base - height), (x + height * 0.28, base - height * 0.2), (x - height * 0.28, base - height * 0.2)],
            fill=rng.choice([(44, 110, 66), (58, 128, 74), (36, 94, 60)]),
        )


def _bubbles(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    _dots(draw, rng, count=14, radius=(3, 8), colour=(170, 222, 240), lowest=1.0)


def _dots(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    *,
    count: int,
    radius: tuple[int, int],
    colour: Colour,
    lowest: float,
) -> None:
    for _ in range(count):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE * lowest), rng.randint(*radius)
        draw.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _rain(draw: ImageDraw.ImageDraw, rng: random.Random) -> None:
    for _ in range(44):
        x, y = rng.uniform(0, SIDE), rng.uniform(-20, SIDE)
        draw.line([x, y, x - 7, y + 20], fill=(90, 150, 225), width=3)


PAINTERS: dict[str, Painter] = {
    "snow": _ground((246, 250, 255)),
    "grass": _ground((112, 182, 84)),
    "beach": _beach,
    "water": _bubbles,
    "mountains": _mountains,
    "city": _city,
    "room": _room,
    "desert": _ground((232, 196, 124), waves=0.05),
    "forest": _forest,
}
