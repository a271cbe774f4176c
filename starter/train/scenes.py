"""Training scenes: one to three things from the corpus on a background, with a caption and the references to draw from.

Things stand on a grid of 16 pixels, the size of one token of the generator. Where several things are drawn, each has
about half of the picture's side, like its reference. So most of drawing is copying tokens, which a small model learns.
"""

import random
from dataclasses import dataclass

from PIL import Image

from starter.data.corpus import IMAGE_PX, Sample
from starter.train.backgrounds import LANDSCAPES, PLACES, TIMES, WEATHERS, draw_background
from starter.train.cutouts import HUES, coloured_share, cut_out, paste, recoloured

FULL_SIDE = IMAGE_PX
HALF_SIDE = IMAGE_PX // 2
COLOURABLE_SHARE = 0.35
SAME_DRAWING = 0.6
"""Probability that the drawn image is one of its references. Otherwise it is another drawing of the same concept."""

HATS = frozenset({"crown", "woman's hat", "top hat", "graduation cap", "billed cap", "military helmet"})
WORN_WORDS = ("wearing", "with", "in")
HELD_WORDS = ("holding", "with", "carrying")
SIDE_WORDS = ("and", "and", "next to", "beside", "with", "near")
NUMBERS = {2: "two", 3: "three", 4: "four"}
UNCOUNTABLE = frozenset(
    {"bread", "butter", "salt", "bacon", "money", "grass", "broccoli", "garlic", "fire", "ice", "spaghetti"}
)
OPENINGS = ("{}",) * 6 + ("a picture of {}", "a drawing of {}", "an image of {}", "an icon of {}")

Box = tuple[int, int, int]
"""Left, top and side of a square in pixels."""


@dataclass(frozen=True)
class Reference:
    """A corpus image that conditions the scene. image: its index. side: the pixels at which the generator reads it."""

    image: int
    side: int


@dataclass(frozen=True)
class Scene:
    """One training example. picture: RGB, IMAGE_PX square. references: in the order in which the caption names them."""

    caption: str
    picture: Image.Image
    references: tuple[Reference, ...]


@dataclass(frozen=True)
class Thing:
    """A concept with the index of the image to draw, and the words for it."""

    image: int
    references: tuple[int, ...]
    noun: str
    colour: str = ""

    def singular(self) -> str:
        words = f"{self.colour} {self.noun}".strip()
        if self.noun in UNCOUNTABLE or (self.noun.endswith("s") and not self.noun.endswith("ss")):
            return words
        return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"

    def counted(self, number: int) -> str:
        return f"{NUMBERS[number]} {self.colour} {plural(self.noun)}".replace("  ", " ")


class SceneMaker:
    """Makes random scenes from the corpus images that are not held out, or from `concepts` alone."""

    def __init__(self, samples: list[Sample], *, held_out: bool = False) -> None:
        self.samples = samples
        self.images_of: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            if sample.is_held_out == held_out:
                self.images_of.setdefault(sample.concept, []).append(index)
        self.concepts = list(self.images_of)
        self.hats = [concept for concept in self.concepts if concept in HATS]
        self.held = [concept for concept in self.concepts if self._group(concept) in ("objects", "food", "activities")]
        self._drawings: dict[int, Image.Image] = {}

    def scene(self, rng: random.Random, *, references: int, side: int) -> Scene:
        """Return a scene with exactly `references` references of `side` pixels.

        With FULL_SIDE it shows one thing or a landscape. With HALF_SIDE it shows as many things as there are references
        for, or one thing several times.
        """
        place, time, weather = self._surroundings(rng)
        if references == 0:
            if rng.random() < 0.7:
                if place == "white" or place not in LANDSCAPES:
                    place = rng.choice(list(LANDSCAPES))
                text = _with_surroundings(rng.choice(LANDSCAPES[place]), "white", time, weather, rng)
                return self._finished(text, draw_background(place, time, weather, rng), (), rng)
            thing = self._thing(rng, references=0)
            picture = draw_background(place, time, weather, rng)
            self._place(picture, thing, (0, 0, FULL_SIDE))
            return self._finished(_with_surroundings(thing.singular(), place, time, weather, rng), picture, (), rng)
        picture = draw_background(place, time, weather, rng)
        if side == FULL_SIDE:
            thing = self._thing(rng, references=references)
            self._place(picture, thing, _single_box(place, rng))
            text, things = thing.singular(), [thing]
        else:
            text, things = self._group_of_things(picture, references, rng)
        used = tuple(Reference(image, side) for thing in things for image in thing.references)
        return self._finished(_with_surroundings(text, place, time, weather, rng), picture, used, rng)

    def _group_of_things(self, picture: Image.Image, references: int, rng: random.Random) -> tuple[str, list[Thing]]:
        kind = rng.random()
        if references == 1 or kind < 0.12:
            thing = self._thing(rng, references=references)
            number = rng.choice((2, 2, 3, 3, 4))
            for box in _boxes(number, rng):
                self._place(picture, thing, box)
            return thing.counted(number), [thing]
        if references >= 3 and kind < 0.45:
            shares = _shares(references, 3)
            things = [self._thing(rng, references=share) for share in shares]
            for thing, box in zip(things, _boxes(3, rng), strict=True):
                self._place(picture, thing, box)
            names = [thing.singular() for thing in things]
            return f"{names[0]}, {names[1]} and {names[2]}", things
        first, second = (self._thing(rng, references=share) for share in _shares(references, 2))
        return self._pair(picture, first, second, rng)

    def _pair(self, picture: Image.Image, first: Thing, second: Thing, rng: random.Random) -> tuple[str, list[Thing]]:
        relation = rng.choices(("side", "worn", "held", "over", "under", "on"), (50, 10, 20, 6, 7, 7))[0]
        if relation == "worn":
            second = self._thing(rng, references=len(second.references), among=self.hats)
            boxes, word = ((16, 32, 96), (32, 0, 64)), rng.choice(WORN_WORDS)
        elif relation == "held":
            second = self._thing(rng, references=len(second.references), among=self.held)
            boxes, word = ((0, 16, 96), (64, 64, 64)), rng.choice(HELD_WORDS)
        elif relation == "over":
            boxes, word = ((32, 0, 64), (32, 64, 64)), rng.choice(("over", "above"))
        elif relation == "under":
            boxes, word = ((32, 64, 64), (32, 0, 64)), rng.choice(("under", "below"))
        elif relation == "on":
            boxes, word = ((32, 0, 64), (16, 48, 80)), rng.choice(("on", "on top of", "sitting on"))
        else:
            top = rng.choice((32, 32, 48, 64))
            boxes, word = ((0, top, 64), (64, top, 64)), rng.choice(SIDE_WORDS)
        self._place(picture, first, boxes[0])
        self._place(picture, second, boxes[1])
        return f"{first.singular()} {word} {second.singular()}", [first, second]

    def _thing(self, rng: random.Random, *, references: int, among: list[str] | None = None) -> Thing:
        concept = rng.choice(among or self.concepts)
        images = self.images_of[concept]
        drawn = rng.choice(images)
        others = [image for image in images if image != drawn] or [drawn]
        rng.shuffle(others)
        chosen = ([drawn] if rng.random() < SAME_DRAWING else []) + others
        used = tuple((chosen * references)[:references])
        colour = ""
        if rng.random() < 0.25 and coloured_share(self._drawing(drawn)) > COLOURABLE_SHARE:
            colour = rng.choice(list(HUES))
        return Thing(image=drawn, references=used, noun=self._noun(concept, rng), colour=colour)

    def _noun(self, concept: str, rng: random.Random) -> str:
        sample = self.samples[self.images_of[concept][0]]
        if sample.tags and rng.random() < 0.2:
            return rng.choice(sample.tags)
        plain = concept.removesuffix(" face") if sample.attributes["group"] == "nature" else concept
        return plain if plain[:2].isupper() else plain[0].lower() + plain[1:]

    def _place(self, picture: Image.Image, thing: Thing, box: Box) -> None:
        drawing = self._drawing(thing.image)
        if thing.colour:
            drawing = recoloured(drawing, thing.colour)
        left, top, side = box
        paste(picture, drawing, left=left, top=top, side=side)

    def _drawing(self, image: int) -> Image.Image:
        if image not in self._drawings:
            self._drawings[image] = cut_out(self.samples[image].pixels(IMAGE_PX))
        return self._drawings[image]

    def _group(self, concept: str) -> str:
        return self.samples[self.images_of[concept][0]].attributes["group"]

    @staticmethod
    def _surroundings(rng: random.Random) -> tuple[str, str, str]:
        if rng.random() < 0.5:
            return "white", "day", "clear"
        place = rng.choice([name for name in PLACES if name != "white"])
        outside = place not in ("water", "room")
        time = rng.choices(list(TIMES), (6, 3, 1))[0] if outside else "day"
        weather = rng.choices(list(WEATHERS), (8, 1, 1))[0] if outside else "clear"
        return place, time, weather

    @staticmethod
    def _finished(text: str, picture: Image.Image, used: tuple[Reference, ...], rng: random.Random) -> Scene:
        return Scene(caption=rng.choice(OPENINGS).format(text), picture=picture, references=used)


def plural(noun: str) -> str:
    """Return the plural by the regular rules of English, which suffice for training captions."""
    if noun.endswith("s") and not noun.endswith(("ss", "us")):
        return noun
    if noun.endswith(("ss", "us", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return {"mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "tooth": "teeth", "foot": "feet"}.get(
        noun, noun.removesuffix("man") + "men" if noun.endswith("man") else noun + "s"
    )


def _with_surroundings(text: str, place: str, time: str, weather: str, rng: random.Random) -> str:
    phrases = (rng.choice(PLACES[place]), rng.choice(TIMES[time]), rng.choice(WEATHERS[weather]))
    return " ".join([text, *(phrase for phrase in phrases if phrase)])


def _single_box(place: str, rng: random.Random) -> Box:
    if place == "white":
        side = rng.choice((128, 128, 128, 112))
        return (FULL_SIDE - side) // 2, (FULL_SIDE - side) // 2, side
    side = rng.choice((112, 96, 96))
    return (FULL_SIDE - side) // 2, FULL_SIDE - side - (0 if side == 112 else 16), side


def _boxes(number: int, rng: random.Random) -> list[Box]:
    """Return `number` squares of half the side: a row of two at one of three heights, a triangle, or a grid."""
    half = HALF_SIDE
    if number == 2:
        top = rng.choice((32, 48, 64))
        return [(0, top, half), (half, top, half)]
    lower = [(0, half, half), (half, half, half)]
    return [(half // 2, 0, half), *lower] if number == 3 else [(0, 0, half), (half, 0, half), *lower]


def _shares(total: int, parts: int) -> list[int]:
    """Split `total` references over `parts` things, the first ones getting more."""
    return [total // parts + (part < total % parts) for part in range(parts)]
